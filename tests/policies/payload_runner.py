"""Judge hostile payloads one by one, each in a child with little memory; a line of JSON for each.

Reads lines {"class", "name", "hex"}; argv 1 is a workspace. Whatever is not a typed refusal of
ours or an exact answer is reported as `wrong`. Started by test_payloads.py.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

from safeconduct.call import Call, Document, Effect, Json
from safeconduct.errors import Denied, Error, PolicyError, ProtocolError
from safeconduct.policies import Policy, canonicalize, decide, decode_arguments, parse_policy
from safeconduct.runtime.adapters import jsonrpc

MEMORY_BYTES = 256 << 20
# LIMIT: seconds until a child that says nothing is ended.
PATIENCE = 20.0
Say = Callable[[str], None]

NARROW = """
version: 1
tools:
  fs.read: {allow: {path: ["$WS/ws/**"]}}
  fs.list: {allow: {path: ["$WS/ws/**"]}}
  fs.write: {allow: {path: ["$WS/ws/**"]}}
  files.read: {allow: {path: {path: ["$WS/ws/**"]}}}
  http.get: {allow: {url: ["https://allowed.example/**", "http://allowed.example/**"]}}
  web.get: {allow: {url: {url: ["https://allowed.example/**", "http://allowed.example/**"]}}}
  read_file: {allow: any}
"""
WORLD = """
version: 1
tools:
  http.get: {allow: {url: ["https://**/**", "http://**/**"]}}
"""


def load(text: str) -> Policy:
    return parse_policy(text.encode(), name="policy.yaml", workspace=Path(sys.argv[1]))


def judge(policy: Policy, tool: str, arguments: Mapping[str, Json]) -> Document | None:
    """Return what would be executed, or None where it is refused."""
    call = Call(id="1", tool=tool, arguments=arguments, session="s")
    try:
        with canonicalize(policy, call) as canonical:
            decision = decide(policy, canonical.document)
    except Denied:
        return None
    if decision.code == "policy.error":
        raise AssertionError(f"could not be judged: {decision.advice}")
    return canonical.document if decision.effect is Effect.ALLOW else None


def texts(value: object) -> Iterator[str]:
    """Return every text in a value; payloads name their argument as they like."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in cast("Mapping[str, object]", value).values():
            yield from texts(item)
    elif isinstance(value, list):
        for item in cast("list[object]", value):
            yield from texts(item)


def frame(data: bytes, say: Say) -> Mapping[str, Any]:
    """Return the params of an MCP frame, or nothing where it is refused."""
    try:
        params = jsonrpc.parse(data).params
        say("a frame")
        return params
    except ProtocolError as refused:
        say(refused.code)
        return {}


def judge_json(data: bytes, say: Say) -> None:
    try:
        value = decode_arguments(data)
        if value != json.loads(data):
            say("wrong: another value than it says")
        judge(load(NARROW), "read_file", value)
        say("exact")
    except ProtocolError as refused:
        say(refused.code)
    arguments = frame(data, say).get("arguments", {})
    if isinstance(arguments, dict):
        judge(load(NARROW), "read_file", cast("dict[str, Json]", arguments))


def judge_path(data: bytes, say: Say) -> None:
    policy, inside = load(NARROW), f"{sys.argv[1]}/ws"
    for text in texts(frame(data, say).get("arguments", {})):
        for tool in ("fs.read", "fs.list", "fs.write", "files.read"):
            arguments = {"path": text} | ({"content": "x"} if tool == "fs.write" else {})
            found = judge(policy, tool, arguments)
            path = str(found.arguments["path"]) if found else ""
            if found and path != inside and not path.startswith(inside + "/"):
                say(f"wrong: {tool} was allowed {path!r}")
            say(f"{tool} {'allowed' if found else 'refused'}")


def judge_url(data: bytes, say: Say) -> None:
    narrow, world = load(NARROW), load(WORLD)
    for text in texts(frame(data, say).get("arguments", {})):
        for tool in ("http.get", "web.get"):
            found = judge(narrow, tool, {"url": text})
            if found and urlsplit(str(found.arguments["url"])).hostname != "allowed.example":
                say(f"wrong: {tool} was allowed {found.arguments['url']!r}")
            say(f"{tool} {'allowed' if found else 'refused'}")
        found = judge(world, "http.get", {"url": text})
        host = str(urlsplit(str(found.arguments["url"])).hostname) if found else "h.example"
        if "." not in host or ":" in host or host.rpartition(".")[2].isdigit():
            say(f"wrong: a wildcard covered {host!r}")


def judge_name(data: bytes, say: Say) -> None:
    params = frame(data, say)
    name = params.get("name", "")
    found = judge(load(NARROW), cast("str", name), {})
    if found and name != "read_file":
        say(f"wrong: {name!r} was allowed")
    say("allowed" if found else "refused")


def judge_policy(data: bytes, say: Say) -> None:
    sources = [(data, "loaded")]
    if data.startswith(b"{"):
        sources += [(text.encode(), "an expression in linear time") for text in _around(data)]
    for source, answer in sources:
        try:
            parse_policy(source, name="policy.yaml", workspace=Path(sys.argv[1]))
            say(answer)
        except PolicyError as refused:
            say(refused.code)
            if not refused.hint:
                say("wrong: no hint")


def _around(data: bytes) -> Iterator[str]:
    """Write the policies that hold a hostile expression; judge its subject by those that load."""
    try:
        found: object = json.loads(data)
    except (ValueError, RecursionError):
        return
    case = cast("dict[str, object]", found) if isinstance(found, dict) else {}
    pattern = case.get("pattern")
    if not isinstance(pattern, str):
        return
    for effect in ("allow", "deny"):
        text = f"version: 1\ntools: {{t: {{{effect}: {{x: {{regex: {json.dumps(pattern)}}}}}}}}}\n"
        yield text
        try:
            policy = load(text)
        except PolicyError:
            continue
        judge(policy, "t", {"x": str(case.get("subject", ""))})


CLASSES: Mapping[str, Callable[[bytes, Say], None]] = {
    "json": judge_json,
    "path": judge_path,
    "url": judge_url,
    "name": judge_name,
    "policy": judge_policy,
}


def child(payload: Mapping[str, str], write_fd: int) -> None:
    """Judge one payload under the memory limit; never returns."""
    said: list[str] = []
    data = bytes.fromhex(payload["hex"])
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    started = time.process_time()
    try:
        CLASSES[payload["class"]](data, said.append)
    except Error as error:
        said.append(f"wrong: {type(error).__name__} {error.code} where it was not expected")
    except BaseException as error:
        said.append(f"wrong: {type(error).__name__}: {error}"[:300])
    seconds = time.process_time() - started
    answer = {"name": payload["name"], "seconds": seconds, "said": sorted(set(said))[:20]}
    with os.fdopen(write_fd, "w") as stream:
        stream.write(json.dumps(answer))
    os._exit(0)


def main() -> None:
    """Fork for each line; what a payload does to its child is over with the child."""
    for line in sys.stdin:
        payload = cast("dict[str, str]", json.loads(line))
        read_fd, write_fd = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read_fd)
            child(payload, write_fd)
        os.close(write_fd)
        ready, _, _ = select.select([read_fd], [], [], PATIENCE)
        if not ready:
            os.kill(pid, signal.SIGKILL)
        with os.fdopen(read_fd) as stream:
            text = stream.read()
        _, status = os.waitpid(pid, 0)
        failed = {"name": payload["name"], "seconds": 0, "said": [f"wrong: ended with {status}"]}
        print(text or json.dumps(failed), flush=True)


if __name__ == "__main__":
    main()
