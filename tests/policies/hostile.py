"""Hostile payloads by the classes of the corpora: what is like them, made from seeds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from random import Random

MIB = 1 << 20


def json_payloads() -> Iterator[bytes]:
    """JSON that parsers choke on or disagree about."""
    for count in (33, 1000, 20_000, 500_000):
        yield b"[" * count
        yield b"[" * count + b"]" * count
        yield b'{"a":' * count + b"1" + b"}" * count
        yield b'{"a":[' * count
    for count in (17, 21, 400, 4301, 100_000, MIB):
        yield b'{"n":' + b"9" * count + b"}"
        yield b'{"n":-' + b"9" * count + b"}"
        yield b'{"n":0.' + b"1" * count + b"}"
        yield b'{"n":1e' + b"9" * count + b"}"
        yield b'{"n":1' + b"0" * count + b".5}"
    yield b"{" + b",".join(b'"%d":0' % at for at in range(90_000)) + b"}"
    yield b"{" + b",".join(b'"%d":0' % (at * ((1 << 61) - 1)) for at in range(30_000)) + b"}"
    yield b"{" + b",".join(b'"a":0' for _ in range(100_000)) + b"}"
    yield b'{"a":[' + b"0," * 500_000 + b"0]}"
    yield b'{"a":[' + b"{}," * 300_000 + b"0]}"
    yield b'{"a":"' + b"x" * MIB
    yield b'{"a":"' + b"\\u0000" * 150_000 + b'"}'
    yield b'{"a":"' + b"\\" * MIB
    yield b'{"a":"' + b'\\"' * 500_000
    yield b'{"a":"' + b"\\ud83d" * 100_000 + b'"}'
    yield b" " * MIB + b"{}"
    yield b"{" + b" " * 1_000_000 + b"}"
    yield b"{}" + b"\n" * 1_000_000
    for text in ('{"a":1}', '{"path":"\u00e9"}'):
        for encoding in ("utf-16", "utf-16-be", "utf-32", "utf-7", "utf-8-sig", "latin-1"):
            yield text.encode(encoding)
    for middle in (b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\x00", b"\x1b[2J"):
        yield b'{"a":"' + middle + b'"}'
    yield b'{"__proto__":{"admin":true},"__class__":"x","constructor":{"prototype":{}}}'
    yield from (b"", b"null", b"nan", b"-", b'"', b"{", b"}{", b"{}{}", b"[{}]", b"\x00")


_PATHS = [
    *(
        "..",
        "../x",
        "/..",
        "ws/../x",
        "ws/..",
        "ws/x/../../y",
        "..\\x",
        "ws\\..\\x",
        "/",
        "//",
        ".",
    ),
    *("%2e%2e/x", "..%2fx", "%252e%252e/x", "..%c0%afx", "\uff0e\uff0e/x", "\u2025/x", "ws\u2215x"),
    *("/proc/self/root/etc/passwd", "/proc/self/environ", "/proc/1/root", "/dev/fd/0", "/dev/zero"),
    *(
        "file:///etc/passwd",
        "~root/.ssh",
        "~",
        "$HOME/x",
        "${HOME}",
        "$(id)",
        "`id`",
        "|id",
        "; id",
    ),
    *("C:\\x", "C:/x", "\\\\h\\s", "//h/s", "\\\\?\\C:\\x", "NUL", "CON", "aux.txt", "x::$DATA"),
    *(
        "ws/.git/hooks/x",
        "ws/.mcp.json",
        "ws/.GIT/config",
        ".git/config",
        ".safeconduct/policy.yaml",
    ),
    *("-", "--output=/etc/passwd", "-rf", "@/etc/passwd", "", " ", "\t", "\n", "\x00", "x\x00.txt"),
    *("ws/link/passwd", "ws/up/x", "ws/loop", "ws/loop/x", "ws/fifo", "ws/gone", "ws/abs/passwd"),
    *("a" * 256, "a" * 5000, "a/" * 3000, "/" * 5000, "./" * 3000, "\u00e9" * 3000, "\x1b[31mx"),
    *(
        "ws/caf\u00e9",
        "ws/cafe\u0301",
        "ws/x\u202e",
        "ws/\ufeffx",
        "WS/x",
        "ws /x",
        "ws./x",
        "ws/x.",
    ),
    *(
        "\ud800",
        "ws/\udcff",
        "ws/\U0010ffff",
        "ws/*",
        "ws/[a]",
        "ws/{a,b}",
        "ws/?",
        "**",
        "$WS/ws/x",
    ),
]
_URLS = [
    *("http://127.0.0.1/", "http://0x7f.1/", "http://017700000001/", "http://2130706433/"),
    *("http://[::]/", "http://[::1]/", "http://[::ffff:127.0.0.1]/", "http://[fe80::1%25lo]/"),
    *(
        "http://127.0.0.1.:80",
        "http://127.1",
        "http://0/",
        "http://localhost",
        "http://LOCALHOST./",
    ),
    *(
        "http://169.254.169.254/",
        "http://[64:ff9b::a9fe:a9fe]/",
        "http://metadata.google.internal/",
    ),
    *("http://allowed.example@evil.test/", "http://evil.test@allowed.example/", "http://a:b@c/"),
    *(
        "http://allowed.example.evil.test/",
        "http://allowed.example%2eevil.test/",
        "http://evil.test#@",
    ),
    *(
        "http://allowed.example:80\\@evil.test/",
        "http:\\\\evil.test",
        "http:/evil.test",
        "//evil.test",
    ),
    *("http://allowed.example\\.evil.test/", "http://allowed.example\tevil.test/", "http://a b/"),
    *("http://allowed.example\r\nHost: evil/", "http://a\x00b/", "http://allowed.example\u3002/"),
    *(
        "http://\u2460\u2461\u2466.0.0.1/",
        "http://evil.c\u2100.example/",
        "http://all\u043ewed.example/",
    ),
    *(
        "http://xn--80ak6aa92e.com/",
        "http://xn--/",
        "http://xn--a" + "9" * 200 + "/",
        "http://\u00df.de/",
    ),
    *(
        "file:///etc/passwd",
        "ftp://h/",
        "gopher://h/",
        "javascript:alert(1)",
        "data:,x",
        "jar:http:x!/",
    ),
    *(
        "http://",
        "http:///",
        "http://?",
        "http://#",
        "http://:80/",
        "http://[",
        "http://[::1",
        "http://]",
    ),
    *(
        "http://h:0/",
        "http://h:99999/",
        "http://h:-1/",
        "http://h:80:80/",
        "http://h:\u0661/",
        "HTTP://H",
    ),
    *(
        "http://allowed.example/%2e%2e/",
        "http://allowed.example/..;/",
        "http://allowed.example/%00",
    ),
    *(
        "http://" + "a" * 9000,
        "http://" + "a." * 4000 + "b/",
        "http://h/" + "../" * 2700,
        "x" * MIB,
    ),
    *(
        "http://" + "\u0301" * 8000 + "/",
        "http://" + "\u4e00" * 8000 + "/",
        "http://h/" + "%25" * 2700,
    ),
    *("http://allowed.example/" + "a" * 8000, "http://allowed.example/?" + "a=b&" * 2000, "", " "),
]
_NAMES = [
    *(
        "read_file",
        "read_file ",
        " read_file",
        "read_file\n",
        "read_file\x00",
        "Read_File",
        "READ_FILE",
    ),
    *(
        "read_file\u200b",
        "\u202eelif_daer",
        "read\u2010file",
        "r\u0435ad_file",
        "\uff52ead_file",
        "read-file",
    ),
    *(
        "tools/call",
        "read_file\nPERMIT shell",
        "read_file;id",
        "read_file,shell",
        "*",
        "**",
        "re*",
        "any",
    ),
    *(
        "__class__",
        "__proto__",
        "constructor",
        "tools",
        "",
        ".",
        "..",
        "a..b",
        "read_file.",
        "a" * 100_000,
    ),
    *(
        "read_file/../shell",
        "../read_file",
        "shell.run",
        "fs.read",
        "mcp__x__read_file",
        "\x1b[2J",
        "\ud800",
    ),
]


def frames(key: str, values: list[str]) -> Iterator[bytes]:
    """Put each value into an argument of a call, as an MCP client sends it."""
    for value in values:
        yield call_frame("read_file", {key: value})
    yield call_frame("read_file", {key: values[:1000]})


def call_frame(name: object, arguments: object) -> bytes:
    """Write one request."""
    params = {"name": name, "arguments": arguments}
    request = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params}
    return json.dumps(request).encode()


def name_payloads() -> Iterator[bytes]:
    """Names of tools that are nearly one that is granted, or none at all."""
    for name in (*_NAMES, 5, None, True, ["read_file"], {"name": "read_file"}):
        yield call_frame(name, {})


def heavy_policies() -> Iterator[bytes]:
    """Yield small files that were much work to load."""
    # Long names that differ at their end alone, whose arguments clash if they meet.
    kinds = ('{path: ["/a/**"]}', '{url: ["https://h.example/**"]}')
    names = [f'"{"a*" * 55}{at:03d}": {{allow: {{x: {kinds[at % 2]}}}}}' for at in range(128)]
    yield f"version: 1\ntools: {{{', '.join(names)}}}\n".encode()
    # Expressions that become next to nothing, once they are compiled.
    classes = r"\pL\PL" * 120
    for expression in (f"(?i)[{classes}]", "(a{0,1000}){0}" * 60, "((" + r"\pL" * 300 + "){9}){0}"):
        listed = f"{{allow: {{x: {{regex: '{expression}'}}}}}}, " * 900
        yield f"version: 1\ntools: {{t: [{listed}]}}\n".encode()


def policy_payloads() -> Iterator[bytes]:
    """Policy files that cost much or mean something else than they seem to."""
    yield b"".join(b"%%TAG !%x! a\n" % at for at in range(60_000)) + b"---\nversion: 1\n"
    yield b"version: 1\n...\n" + b"".join(b"%%TAG !%x! a\n" % at for at in range(60_000))
    for unit in (
        b"[",
        b"{",
        b"- ",
        b"? ",
        b"a: ",
        b"&a ",
        b"!a ",
        b"*a ",
        b"'",
        b'"',
        b"\t",
        b"| ",
        b"\n",
    ):
        yield unit * (MIB // len(unit))
        yield b"version: 1\ntools: " + unit * 100_000
    for entry in (b"1,", b"[],", b"{},", b"'',", b"a: 1,"):
        opening, closing = (b"{", b"}") if b":" in entry else (b"[", b"]")
        for head in (b"tools: {t: ", b"profiles: {p: {read: ", b"tools: {t: {allow: {a: "):
            body = opening + entry * (900_000 // len(entry)) + closing
            yield b"version: 1\n" + head + body + b"}" * head.count(b"{")
    yield b"version: 1\n" + b"".join(b"k%d: 1\n" % at for at in range(80_000))
    yield b"version: 1\ntools: {" + b",".join(b"t%d: 1" % at for at in range(80_000)) + b"}"
    rows = [b"a0: &a0 [x]"] + [
        b"a%d: &a%d [*a%d,*a%d]" % (n, n, n - 1, n - 1) for n in range(1, 60)
    ]
    yield b"\n".join(rows)
    yield b"&a [*a]"
    yield from heavy_policies()
    yield b"version: 1\nversion: 1\n"
    for value in (
        b"1.10",
        b"0x1",
        b"!!int 1",
        b"~",
        b"yes",
        b"1_0",
        b"01",
        b"1e0",
        b".inf",
        b"[1]",
    ):
        yield b"version: " + value + b"\n"
    yield from (
        "version: 1\n".encode("utf-16"),
        b"version: \xff",
        b"\xef\xbb\xbfversion: 1",
        b"\x00",
    )
    for pattern in (
        "/**/../**",
        "/srv/[a-",
        "{a,b}" * 40,
        "/" + "**/" * 200 + "a",
        "/" + "*a" * 2000,
    ):
        yield f'version: 1\ntools: {{t: {{allow: {{x: {{path: ["{pattern}"]}}}}}}}}\n'.encode()
    for pattern in _EXPRESSIONS:
        yield json.dumps({"pattern": pattern, "subject": "a" * 100_000 + "!"}).encode()
    rules = ",".join(f'{{allow: {{x: {{regex: "[^a]{{900}}{at}"}}}}}}' for at in range(20_000))
    yield f"version: 1\ntools: {{t: [{rules}]}}\n".encode()[: MIB - 1]
    for when in ("not " * 250 + "call.a", "(" * 500, "len(" * 200, "call" + ".a" * 400, "9" * 1000):
        yield f"version: 1\ntools: {{t: {{allow: any, when: '{when}'}}}}\n".encode()


_EXPRESSIONS = [
    *(
        "^(a|aa)+$",
        "(.*a){25}$",
        "^(([a-z])+.)+[A-Z]([a-z])+$",
        "(?=(a+))a*b\\1",
        "a{1,1000}{1,1000}",
    ),
    *(
        "(a+)+$",
        "(a*)*b",
        "((a?){50}){50}",
        "(x+x+)+y",
        "(.+)+\\1",
        "([a-z]*)*!",
        "(a|a?)+$",
        "a**",
    ),
    *(
        "(" * 400 + ")" * 400,
        "[" * 500,
        "\\pL{500}",
        "(?i)\\pL{200}",
        ".{1000}.{1000}",
        "(?<=a)b",
        "(?>a)",
    ),
    *(
        "(a{0,100}){0,100}",
        "x*" * 400,
        "(?:" * 300,
        "\\C*",
        "\\Q" + "a" * 900,
        "a|" * 500,
        "\\x{10ffff}+",
    ),
]


def mutated(data: bytes, random: Random) -> bytes:
    """Return a payload with something cut, doubled, flipped or put into it."""
    at = random.randrange(len(data) + 1)
    end = min(len(data), at + random.randrange(1, 40))
    put = random.choice(
        [b"\x00", b"\xff", b'"', b"\\", b"{", b"]", b"..", b"%2e", b"\xe2\x80\x8b", b"\n"]
    )
    choices = [data[:at] + data[end:], data[:end] + data[at:], data[:at] + put + data[at:]]
    choices += [data[:at] + bytes([random.randrange(256)]) + data[at + 1 :], data[:at], data + data]
    return random.choice(choices)


def everything() -> Iterator[tuple[str, bytes]]:
    """Return every made payload with its class."""
    yield from (("json", data) for data in json_payloads())
    yield from (("path", data) for data in frames("path", _PATHS))
    yield from (("url", data) for data in frames("url", _URLS))
    yield from (("name", data) for data in name_payloads())
    yield from (("policy", data) for data in policy_payloads())
