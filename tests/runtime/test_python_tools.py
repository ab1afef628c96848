"""Step "sandbox" and "execute": Python tools through real forks of a real zygote."""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import dedent
from typing import Literal

import pytest

from safeconduct import Runtime
from safeconduct.call import Json, Limits, Outcome, Profile, Tier
from safeconduct.errors import (
    Denied,
    LimitExceeded,
    SandboxFailed,
    SandboxUnavailable,
    ToolFailed,
)
from safeconduct.runtime.sandbox import cgroup, python_link
from safeconduct.runtime.sandbox.native import NativeSandbox
from safeconduct.runtime.sandbox.python import PythonEngine
from safeconduct.runtime.sandbox.shield import Shield
from safeconduct.runtime.tools.function import describe


@dataclass(frozen=True)
class Snippets:
    """The short way to run a snippet in one profile."""

    engine: PythonEngine
    profile: Profile
    workspace: Path
    tier: Tier

    def run(
        self,
        code: str,
        value: Json = None,
        *,
        limits: Limits | None = None,
        shield: Shield | None = None,
    ) -> Outcome:
        """Run a snippet in the workspace."""
        profile = replace(self.profile, limits=limits) if limits else self.profile
        return self.engine.run(
            "call",
            source=dedent(code),
            value=value,
            profile=profile,
            workspace=str(self.workspace),
            shield=shield or Shield(),
        )

    def result(self, code: str, value: Json = None) -> Json:
        """Return the result of a snippet."""
        found = self.run(code, value).value
        assert isinstance(found, Mapping)
        return found["result"]


@pytest.fixture
def python(
    sandbox: NativeSandbox, workspace: Path, cgroups: cgroup.Cgroups | None
) -> Iterator[Snippets]:
    engine = PythonEngine(sandbox, cgroups)
    folder = str(workspace)
    limits = Limits(wall_ms=20_000)
    profile = Profile(
        name="test", read=(folder,), write=(folder,), imports=("json", "random"), limits=limits
    )
    snippets = Snippets(engine, profile, workspace, sandbox.tier)
    try:
        snippets.run("0")
    except (SandboxUnavailable, ToolFailed) as error:
        engine.close()
        if sandbox.tier is Tier.FULL or os.geteuid() != 0:
            raise
        # Root gives the program another user's view, which may not reach root's own Python.
        pytest.skip(f"tier {sandbox.tier}: {error.message}")
    yield snippets
    engine.close()


def test_a_snippet_gives_its_last_expression(python: Snippets) -> None:
    assert python.result("import math\nmath.floor(2.5) + input['n']", {"n": 1}) == 3


def test_the_variable_result_goes_first(python: Snippets) -> None:
    assert python.result("result = [1, {'a': None}]\n'something else'") == [1, {"a": None}]


def test_output_is_captured_and_bounded(python: Snippets) -> None:
    outcome = python.run("import os, sys\nprint('out')\nprint('err', file=sys.stderr)")
    assert (outcome.stdout, outcome.stderr, outcome.truncated) == (b"out\n", b"err\n", False)
    limits = Limits(wall_ms=20_000, output_bytes=1000)
    outcome = python.run("import os\nprint('out')\nos.write(1, bytes(3000))", limits=limits)
    assert outcome.stdout == b"out\n" + bytes(996)
    assert outcome.truncated


def test_the_outcome_says_how_it_was_confined(python: Snippets) -> None:
    confinement = python.run("1").confinement
    assert confinement.tier is python.tier
    layer = "python-fork" if python.tier is Tier.FULL else "python-process"
    assert confinement.layers[-1] == layer
    assert python.run("1").usage.peak_memory_bytes


def test_each_call_has_fresh_state(python: Snippets) -> None:
    change = """
        import builtins, json, os, sys
        builtins.left = json.left = sys.left = 1
        open("/tmp/left", "w").close() if os.path.isdir("/tmp") else None
        os.environ["LEFT"] = "1"
    """
    look = """
        import builtins, json, os, sys
        [hasattr(builtins, "left"), hasattr(json, "left"), hasattr(sys, "left"),
         os.path.exists("/tmp/left"), "LEFT" in os.environ]
    """
    if python.tier is Tier.LANDLOCK:
        change, look = (text.replace("/tmp", "/nowhere") for text in (change, look))
    python.run(change)
    assert python.result(look) == [False] * 5


def test_random_numbers_differ_between_forks(python: Snippets) -> None:
    drawn = [python.result("import random; random.random()") for _ in range(4)]
    assert len(set(map(str, drawn))) == 4


def test_the_workspace_is_the_working_folder(python: Snippets) -> None:
    python.run("open('made', 'w').write('here')")
    assert (python.workspace / "made").read_text() == "here"
    assert python.result("import os; os.getcwd()") == str(python.workspace)


def test_an_exception_names_type_message_and_line(python: Snippets) -> None:
    with pytest.raises(ToolFailed, match=r"KeyError: 'x' \(line 2\)") as caught:
        python.run("a = {}\na['x']")
    assert caught.value.code == "python.raised"
    with pytest.raises(ToolFailed, match=r"SyntaxError: .* \(line 1\)"):
        python.run("1 +")


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("object()", "not JSON"),
        ("float('nan')", "not JSON"),
        ("2**60", "integer"),
        ("{1: 2, '1': 3}", "same key twice"),
        ("'\\ud800'", "unreadable|Unicode"),
        ("a = []\nfor _ in range(40): a = [a]\na", "deep"),
        ("list(range(20000))", "parts"),
        ("a = []\na.append(a)\na", "not JSON"),
    ],
)
def test_a_result_that_is_no_bounded_json_is_refused(
    python: Snippets, code: str, reason: str
) -> None:
    with pytest.raises(ToolFailed, match=reason) as caught:
        python.run(code)
    assert caught.value.code == "python.result"


def test_a_result_that_is_too_large_meets_the_output_limit(python: Snippets) -> None:
    assert python.run("'x' * 3_000_000").limit == "output"


def test_limits_end_the_call_and_are_named(
    python: Snippets, cgroups: cgroup.Cgroups | None
) -> None:
    assert python.run("while True: pass", limits=Limits(wall_ms=700)).limit == "wall"
    hungry = Limits(wall_ms=20_000, memory_bytes=96 << 20)
    if cgroups:
        assert python.run("b = bytearray(400 << 20)", limits=hungry).limit == "memory"
    else:
        with pytest.raises(ToolFailed, match="MemoryError"):
            python.run("b = bytearray(400 << 20)", limits=hungry)
    busy = Limits(wall_ms=20_000, cpu_ms=1000)
    assert python.run("while True: pass", limits=busy).limit == "cpu"


def test_what_a_snippet_prints_before_its_limit_is_kept(python: Snippets) -> None:
    outcome = python.run("print('begun')\nwhile True: pass", limits=Limits(wall_ms=700))
    assert outcome.stdout == b"begun\n"


def test_a_process_that_ends_without_an_answer_is_a_failure(python: Snippets) -> None:
    with pytest.raises(ToolFailed, match="exit code 3") as caught:
        python.run("import os; os._exit(3)")
    assert caught.value.code == "python.died"


def test_calls_run_side_by_side(python: Snippets) -> None:
    found: list[Json] = []

    def double(number: int) -> None:
        found.append(python.result("input * 2", number))

    threads = [threading.Thread(target=double, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(map(str, found)) == sorted(str(number * 2) for number in range(12))


def test_what_cannot_be_imported_is_said(python: Snippets) -> None:
    missing = replace(python.profile, imports=("no_such_module_of_ours",))
    with pytest.raises(SandboxUnavailable, match="no_such_module_of_ours") as caught:
        replace(python, profile=missing).run("1")
    assert caught.value.missing == "python-imports"


def test_packages_are_imported_from_where_safeconduct_is_installed(python: Snippets) -> None:
    packages = replace(python.profile, imports=("msgspec",))
    found = replace(python, profile=packages).result("import sys; 'msgspec' in sys.modules")
    assert found is True


def test_a_new_picture_needs_a_new_zygote(python: Snippets) -> None:
    if python.tier is Tier.LANDLOCK:
        pytest.skip("tier landlock has no zygotes")
    secret = python.workspace / "secret"
    secret.write_text("old")
    hidden = Shield(hidden=(str(secret),))
    read = "open('secret').read()"
    assert python.run(read).value == {"result": "old"}
    with pytest.raises(ToolFailed, match="PermissionError"):
        python.run(read, shield=hidden)
    # Replaced by another file of that name: the old mount does not cover it.
    secret.unlink()
    secret.write_text("new")
    with pytest.raises(ToolFailed, match="PermissionError"):
        python.run(read, shield=hidden)


def test_a_zygote_is_replaced_after_a_crash_and_after_many_forks(
    python: Snippets, monkeypatch: pytest.MonkeyPatch
) -> None:
    if python.tier is Tier.LANDLOCK:
        pytest.skip("tier landlock has no zygotes")
    # The address of a builtin is the same in all forks of one zygote, and of no two.
    address = "id(len)"
    first = python.result(address)
    assert python.result(address) == first
    with pytest.raises(ToolFailed, match="signal 11"):
        python.run("import ctypes; ctypes.string_at(0)")
    second = python.result(address)
    assert second != first
    monkeypatch.setattr(python_link, "FORKS_PER_ZYGOTE", 4)
    assert len({str(python.result(address)) for _ in range(16)}) > 1


def test_nothing_is_left_after_closing(
    sandbox: NativeSandbox, workspace: Path, cgroups: cgroup.Cgroups | None
) -> None:
    if sandbox.tier is Tier.LANDLOCK:
        pytest.skip("tier landlock has no zygotes")
    before = len(os.listdir("/proc/self/fd"))
    engine = PythonEngine(sandbox, cgroups)
    profile = Profile(name="test", read=(str(workspace),), limits=Limits(wall_ms=20_000))
    snippets = Snippets(engine, profile, workspace, sandbox.tier)
    for number in range(20):
        assert snippets.result("input", number) == number
    engine.close()
    if cgroups:
        cgroups.sweep(1000)
    assert len(os.listdir("/proc/self/fd")) <= before + 1
    assert list(_workers()) == []


def _workers() -> Iterator[int]:
    """Yield the processes below us that run the worker, outer ones first."""
    waiting = [str(os.getpid())]
    while waiting:
        pid = waiting.pop(0)
        try:
            if "python_worker.py" in Path(f"/proc/{pid}/cmdline").read_text():
                yield int(pid)
            for thread in os.listdir(f"/proc/{pid}/task"):
                waiting += Path(f"/proc/{pid}/task/{thread}/children").read_text().split()
        except OSError:
            continue


def test_the_death_of_a_zygote_fails_its_calls_and_no_more(python: Snippets) -> None:
    if python.tier is Tier.LANDLOCK:
        pytest.skip("tier landlock has no zygotes")
    failures: list[SandboxFailed] = []

    def wait() -> None:
        try:
            python.run("open('waiting', 'w').close()\nwhile True: pass")
        except SandboxFailed as error:
            failures.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    deadline = time.monotonic() + 20
    while not (python.workspace / "waiting").exists() and time.monotonic() < deadline:
        os.sched_yield()
    outer, zygote = list(_workers())[:2]
    os.kill(zygote, signal.SIGKILL)
    thread.join(20)
    assert len(failures) == 1
    assert python.result("'next'") == "next"
    assert not Path(f"/proc/{outer}").exists()


def test_a_call_whose_sink_fails_is_ended(python: Snippets) -> None:
    def sink(_: str, __: bytes) -> None:
        raise RuntimeError("a sink of ours")

    with pytest.raises(RuntimeError, match="a sink"):
        python.engine.run(
            "call",
            source="import time\nprint('x')\ntime.sleep(1)\nopen('left', 'w').close()",
            value=None,
            profile=python.profile,
            workspace=str(python.workspace),
            shield=Shield(),
            sink=sink,
        )
    python.run("import time; time.sleep(1.2)")
    assert not (python.workspace / "left").exists()


def test_many_calls_leave_nothing_behind(python: Snippets) -> None:
    if python.tier is Tier.LANDLOCK:
        pytest.skip("tier landlock has no zygotes")

    def held() -> tuple[int, int]:
        zygote = list(_workers())[1]
        return len(os.listdir("/proc/self/fd")), len(os.listdir(f"/proc/{zygote}/fd"))

    python.run("0")
    python.engine.settle()
    before = held()
    for number in range(300):
        assert python.result("input", number) == number
    python.engine.settle()
    # A cgroup that is still being removed may hold a few.
    assert held()[0] <= before[0] + 40
    # The zygote puts away what belonged to an ended fork after it has told of the end; and the fork
    # that was asked for last (two descriptors) may have been there before, or not yet.
    until = time.monotonic() + 10
    while held()[1] > before[1] + 2 and time.monotonic() < until:
        time.sleep(0.01)
    assert held()[1] <= before[1] + 2


POLICY = """\
version: 1
profiles:
  base: {read: ["$WS/**"], imports: [json, math], limits: {wall: 20s}}
  other: {like: base}
tools:
  python.run: {allow: {}}
  total: {allow: {first: {range: [0, 9]}, rest: any}, profile: base}
  text.shorten: {allow: any}
"""


@pytest.fixture
def runtime(workspace: Path, tmp_path: Path) -> Iterator[Runtime]:
    policy = tmp_path / "policy.yaml"
    policy.write_text(POLICY)
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path / "state")}
    with Runtime.from_policy(policy, workspace=workspace, environment=environment) as found:
        yield found


def total(first: int, more: list[float] | None = None, *, sign: Literal[1, -1] = 1) -> float:
    """Add numbers up."""
    return sign * math.fsum([first, *(more or [])])


def test_a_function_runs_confined_and_is_judged(runtime: Runtime) -> None:
    assert runtime.tool()(total) is total
    assert runtime.call("total", first=1, more=[2, 0.5], sign=-1).value == -3.5
    assert runtime.call("total", first=2).value == 2.0
    with pytest.raises(Denied) as caught:
        runtime.call("total", first=10)
    assert caught.value.code == "policy.no_rule"


@pytest.mark.parametrize(
    "arguments", [{}, {"first": "1"}, {"first": 1, "more": ["x"]}, {"first": 1, "unknown": 1}]
)
def test_arguments_are_closed_by_the_type_hints(
    runtime: Runtime, arguments: dict[str, Json]
) -> None:
    runtime.tool()(total)
    with pytest.raises(Denied) as caught:
        runtime.call("total", **arguments)
    assert caught.value.code == "call.bad_argument"


def test_python_run_through_the_whole_path(runtime: Runtime) -> None:
    outcome = runtime.call("python.run", code="print('seen'); sum(input)", input=[1, 2])
    assert (outcome.value, outcome.stdout) == ({"result": 3}, b"seen\n")
    with pytest.raises(LimitExceeded) as caught:
        runtime.call("python.run", code="'x' * 3_000_000")
    assert caught.value.limit == "output"


def test_a_function_that_nobody_grants_is_denied(runtime: Runtime) -> None:
    runtime.tool(name="unknown.tool")(total)
    with pytest.raises(Denied):
        runtime.call("unknown.tool", first=1)


def test_a_function_runs_in_the_profile_it_asks_for_or_not_at_all(runtime: Runtime) -> None:
    runtime.tool(profile="other")(total)
    with pytest.raises(Denied) as caught:
        runtime.call("total", first=1)
    assert caught.value.code == "python.profile"


def shorten(text: str, width: int = 10) -> str:
    import textwrap

    return textwrap.shorten(text, width=width, placeholder="") + sys.platform[:0]


def test_imports_inside_and_outside_the_function_work(runtime: Runtime) -> None:
    runtime.tool(name="text.shorten")(shorten)
    assert runtime.call("text.shorten", text="hello wide world").value == "hello wide"


LIVE = {"state": 1}


def uses_live_state() -> int:
    return LIVE["state"]


def takes_anything(*values: int) -> int:
    return len(values)


def takes_a_path(value: Path) -> str:
    return str(value)


def no_hints(value: int) -> int:
    return value


del no_hints.__annotations__["value"]


async def waits() -> int:
    return 1


def _closure() -> Callable[[], int]:
    kept = [1]

    def inner() -> int:
        return kept[0]

    return inner


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (uses_live_state, "LIVE of its own module"),
        (_closure(), "closure over kept"),
        (takes_anything, "any number"),
        (takes_a_path, "not JSON"),
        (no_hints, "not JSON"),
        (waits, "no plain function"),
        (lambda: 1, "no plain function"),
        (len, "no plain function"),
    ],
)
def test_what_cannot_cross_is_refused(function: Callable[..., object], reason: str) -> None:
    with pytest.raises(ToolFailed, match=reason) as caught:
        describe(function, "some.tool", None)
    assert caught.value.code == "python.function"


@pytest.mark.parametrize("name", ["python.run", "fs.read", "a b", "", "x" * 200])
def test_names_that_are_not_free_are_refused(name: str) -> None:
    with pytest.raises(ToolFailed):
        describe(total, name, None)
