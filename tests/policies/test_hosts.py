"""Hosts and mail addresses: one spelling each, and nothing else gets through."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safeconduct.call import Json
from safeconduct.policies.hosts import (
    canonical_email,
    canonical_host,
    compile_email,
    compile_host,
)
from safeconduct.policies.match_text import email_matcher, host_matcher
from safeconduct.policies.signatures import Kind, merge_kinds
from safeconduct.policies.urls import UrlRefused, canonical_url, compile_url, split_url


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("example.org", "example.org"),
        ("API.Example.ORG", "api.example.org"),
        ("localhost", "localhost"),
        ("xn--bcher-kva.example", "xn--bcher-kva.example"),
        ("bücher.example", "xn--bcher-kva.example"),
        ("BÜCHER.example", "xn--bcher-kva.example"),
        ("bu\N{COMBINING DIAERESIS}cher.example", "xn--bcher-kva.example"),
        ("a\N{FULLWIDTH FULL STOP}example", "a.example"),
        ("a\N{IDEOGRAPHIC FULL STOP}example", "a.example"),
        ("\N{FULLWIDTH LATIN SMALL LETTER A}.example", "a.example"),
        ("\N{CYRILLIC SMALL LETTER A}pple.example", "xn--pple-43d.example"),
        ("strasse.example", "strasse.example"),
        ("straße.example", "xn--strae-oqa.example"),
        ("exa\N{SOFT HYPHEN}mple.org", "example.org"),
        ("exa\N{ZERO WIDTH SPACE}mple.org", "example.org"),
        ("_dmarc.example.org", "_dmarc.example.org"),
        ("10.0.0.1", "10.0.0.1"),
        ("0x7f.1", "127.0.0.1"),
        ("127.1", "127.0.0.1"),
        ("017700000001", "127.0.0.1"),
        ("2130706433", "127.0.0.1"),
        ("0x7f000001", "127.0.0.1"),
        ("\N{CIRCLED DIGIT ONE}27.0.0.1", "127.0.0.1"),
        ("\N{FULLWIDTH DIGIT ONE}27.0.0.1", "127.0.0.1"),
        ("::1", "[::1]"),
        ("[::1]", "[::1]"),
        ("0:0:0:0:0:0:0:1", "[::1]"),
        ("[2001:DB8:0:0::A]", "[2001:db8::a]"),
        ("[::127.0.0.1]", "[::7f00:1]"),
    ],
)
def test_one_spelling_of_a_host(text: str, expected: str) -> None:
    assert canonical_host(text) == expected
    assert canonical_host(expected) == expected


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", ".", "..", "a..b", ".a", "a.", "a\N{IDEOGRAPHIC FULL STOP}", "a.b."),
        *("a b", " a", "a ", "a\n", "a\r\nb", "a\t", "a\0", "\0", "a\x7f", "a\N{NO-BREAK SPACE}b"),
        *("a:80", "a:443", "a:", ":80", "[::1]:443", "[::1", "::1]", "[[::1]]", "1::2::3"),
        *("user@a", "user:pw@a", "a@", "a/b", "a/", "/", "//a", "https://a", "a\\b", "a?b", "a#b"),
        *("a%2eb", "%61", "a%00", "fe80::1%eth0", "[fe80::1%25eth0]", "a,b", "a;b", "a|b", "a<b"),
        *("*.a", "**", "a^b", "a`b", '"a"', "'a'", "(a)b", "a(b)", "[]", "[a]", "{a}"),
        *("256.1.1.1", "1.2.3.4.5", "1.2.3.256", "0x100000000", "1.2.3.4.", "08.1.1.1", "a.1"),
        *("::ffff:127.0.0.1", "[::ffff:7f00:1]", "0:0:0:0:0:ffff:10.0.0.1"),
        *("\N{FULLWIDTH FULL STOP}a", "a\N{FULLWIDTH COLON}80", "a\N{FULLWIDTH SOLIDUS}b"),
        *(
            "a\N{FULLWIDTH COMMERCIAL AT}b",
            "a\N{FULLWIDTH NUMBER SIGN}b",
            "a\N{FULLWIDTH PERCENT SIGN}b",
        ),
        *("\N{CARE OF}.example", "\ud800.example", "a" * 64 + "." + "b" * 200),
        *(("a" * 62 + ".") * 5 + "a", "x" * 2000),
    ],
)
def test_no_host(text: str) -> None:
    with pytest.raises(UrlRefused) as error:
        canonical_host(text)
    assert error.value.code.partition(".")[0] in ("host", "url")


@given(
    st.one_of(
        st.text(max_size=30), st.text("aB.:-_[]@/%*0x\N{FULLWIDTH DIGIT ONE}ß。 \n", max_size=20)
    )
)
def test_a_host_is_the_host_of_its_url_or_refused(text: str) -> None:
    try:
        host = canonical_host(text)
    except UrlRefused:
        return
    assert host == canonical_host(host)
    url = split_url(canonical_url(f"https://{host}/"))
    assert url is not None
    assert url.host == host
    assert not set(host) & set("/?#@%\\ \t\r\n\0*")


@pytest.mark.parametrize(
    ("pattern", "covered", "refused"),
    [
        ("a.example", ["a.example"], ["b.a.example", "a.example.evil.test", "xa.example"]),
        ("A.Example", ["a.example"], []),
        (
            "*.example",
            ["a.example"],
            ["example", "a.b.example", "example.evil.test", "evilexample"],
        ),
        ("**.example", ["a.example", "a.b.example"], ["example", "aexample", "a.example.test"]),
        ("api.*.example", ["api.eu.example"], ["api.example", "api.a.b.example"]),
        ("bücher.example", ["xn--bcher-kva.example"], ["bucher.example"]),
        ("*.bücher.example", ["a.xn--bcher-kva.example"], []),
        ("**", ["a.example"], ["localhost", "intranet", "127.0.0.1", "[::1]", "a.local", "a.lan"]),
        ("*.internal", ["a.internal"], ["metadata.google.internal", "10.0.0.1"]),
        ("127.0.0.1", ["127.0.0.1"], ["127.0.0.2"]),
        ("0x7f.1", ["127.0.0.1"], []),
        ("::1", ["[::1]"], ["[::2]"]),
        ("localhost", ["localhost"], ["a.localhost"]),
        ("**.localhost", [], ["a.localhost", "localhost"]),
    ],
)
def test_host_patterns(pattern: str, covered: list[str], refused: list[str]) -> None:
    matcher = host_matcher([pattern])
    assert [host for host in covered if not matcher.matches(host)] == []
    assert [host for host in refused if matcher.matches(host)] == []


@pytest.mark.parametrize(
    "pattern",
    [
        *("", "*a.example", "a*.example", "a.**.example", "*.**", "a.example.", "a..b", "***"),
        *("https://a.example", "a.example/x", "*.example:443", "a:80", "u@*.example", "*.exa mple"),
        *("*.a?b", "*.a#b", "*.a%2eb", "*.a,b", "*\\.a", "[*]", "*.[::1]", "a.example*", "{a,b}.x"),
        *("::ffff:1.2.3.4", "256.1.1.1", "\N{ZERO WIDTH SPACE}"),
    ],
)
def test_no_host_pattern(pattern: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        compile_host(pattern)


LABELS = st.lists(st.sampled_from(["a", "b", "localhost", "local", "1"]), min_size=1, max_size=4)


@given(
    st.lists(st.sampled_from(["a", "b", "*", "local"]), min_size=1, max_size=4),
    st.booleans(),
    LABELS.map(".".join),
)
def test_hosts_and_urls_agree(labels: list[str], several: bool, text: str) -> None:
    pattern = ".".join(["**", *labels] if several else labels)
    try:
        host = canonical_host(text)
    except UrlRefused:
        return
    url = split_url(f"https://{host}/")
    assert url is not None
    expected = compile_url(f"https://{pattern}/").matches(url)
    assert host_matcher([pattern]).matches(host) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ann@corp.example", "ann@corp.example"),
        ("Ann@Corp.EXAMPLE", "ann@corp.example"),
        ("ann+news@corp.example", "ann+news@corp.example"),
        ("o'brien_x=1&y~z-w@corp.example", "o'brien_x=1&y~z-w@corp.example"),
        ("a.b.c@corp.example", "a.b.c@corp.example"),
        ("1@corp.example", "1@corp.example"),
        ("a@bücher.example", "a@xn--bcher-kva.example"),
        ("a@c\N{CYRILLIC SMALL LETTER O}rp.example", None),
        ("a@corp\N{FULLWIDTH FULL STOP}example", "a@corp.example"),
        ("x" * 64 + "@corp.example", "x" * 64 + "@corp.example"),
    ],
)
def test_one_spelling_of_an_address(text: str, expected: str | None) -> None:
    found = canonical_email(text)
    assert found == expected or (expected is None and found.startswith("a@xn--"))
    assert canonical_email(found) == found
    assert found.isascii()


@pytest.mark.parametrize(
    "text",
    [
        # None, several, empty parts.
        *("", "@", "a", "a@", "@corp.example", "a@@corp.example", "a@b@corp.example", "@a@b.c"),
        # Lists and groups, which mail programs split.
        *("a@b.c,d@e.f", "a@b.c;d@e.f", "a@b.c d@e.f", "a,b@c.d", "a;b@c.d", "g:a@b.c;", "a@b.c,"),
        # Display names, angle brackets, comments, quoted local parts.
        *("Ann <a@b.c>", "<a@b.c>", "a@b.c>", "a(x)@b.c", "a@(x)b.c", "a@b.c(x)", "(x)a@b.c"),
        *('"a"@b.c', '"a@evil.test"@b.c', '"a b"@b.c', 'a"b"@c.d', r"a\@b.c", r"a\,b@c.d"),
        # Routes: percent hack, bang path, source route.
        *("a%evil.test@b.c", "evil.test!a@b.c", "@evil.test:a@b.c", "a:b@c.d", "b.c!a"),
        # Control characters: header and command injection.
        *("a@b.c\n", "a@b.c\r\nBcc: x@evil.test", "a\n@b.c", "a@b.c\0", "a\0@b.c", "a\t@b.c"),
        *("a@b.c\nx@evil.test", " a@b.c", "a@b.c ", "a @b.c", "a@ b.c", "a@b.c\x0b", "a@b.c\x85"),
        # What a mailer may take for a program, a file or an option.
        *("|id@b.c", "/etc/passwd@b.c", "-oQ/tmp@b.c", "--@b.c", "`id`@b.c", "$(id)@b.c", "a*@b.c"),
        *("{a}@b.c", "a^b@c.d", "a#b@c.d", "a?b@c.d", "a!b@c.d", ":include:x@b.c", "~/x@b.c"),
        # Dots.
        *(".a@b.c", "a.@b.c", "a..b@c.d", "a@b.c.", "a@.b.c", "a@b..c", "a@b"),
        # Not ASCII before the @: homoglyphs and look-alikes.
        *("\N{CYRILLIC SMALL LETTER A}nn@b.c", "\N{KELVIN SIGN}@b.c", "é@b.c"),
        *("\N{FULLWIDTH LATIN SMALL LETTER A}@b.c", "a\N{FULLWIDTH COMMERCIAL AT}b.c"),
        *(
            "a\N{SMALL COMMERCIAL AT}b.c",
            "a\N{ZERO WIDTH SPACE}@b.c",
            "\N{RIGHT-TO-LEFT OVERRIDE}a@b.c",
        ),
        # Domains that are none.
        *("a@[127.0.0.1]", "a@127.0.0.1", "a@[IPv6:::1]", "a@[::1]", "a@::1", "a@2130706433"),
        *("a@localhost", "a@b.c:25", "a@b.c/x", "a@b.c?x", "a@b.c#x", "a@b%2ec", "a@b_c", "a@*.c"),
        *("a@b.c\\", "mailto:a@b.c", "a@b.c?subject=x", "a@\ud800.c"),
        # Too long.
        *("x" * 65 + "@b.c", "a@" + ("b" * 60 + ".") * 4 + "b" * 9, "a" * 5000 + "@b.c"),
    ],
)
def test_no_address(text: str) -> None:
    with pytest.raises(UrlRefused) as error:
        canonical_email(text)
    assert error.value.code.partition(".")[0] == "email"


@given(
    st.one_of(
        st.text(max_size=30), st.text("aB.@,;<>()\"'%!+- \n[]:\N{FULLWIDTH DIGIT ONE}", max_size=20)
    )
)
def test_an_address_is_one_or_refused(text: str) -> None:
    try:
        address = canonical_email(text)
    except UrlRefused:
        return
    assert address == canonical_email(address)
    assert address.count("@") == 1
    assert address.isascii()
    assert not set(address) & set(' \t\r\n\0,;<>()"\\%!:[]/|`*')
    assert "." in address.partition("@")[2]


@pytest.mark.parametrize(
    ("pattern", "covered", "refused"),
    [
        ("*@corp.example", ["a@corp.example"], ["a@b.corp.example", "a@corp.example.evil.test"]),
        ("*@*.corp.example", ["a@b.corp.example"], ["a@corp.example", "a@b.c.corp.example"]),
        ("*@**.corp.example", ["a@b.c.corp.example"], ["a@corp.example", "a@evilcorp.example"]),
        ("Boss@Corp.example", ["boss@corp.example"], ["bossy@corp.example", "x.boss@corp.example"]),
        ("bounce+*@l.example", ["bounce+a=b@l.example", "bounce+@l.example"], ["bounce@l.example"]),
        ("*-ops@l.example", ["eu-ops@l.example"], ["ops@l.example", "eu-opsx@l.example"]),
        ("a*a@l.example", ["aa@l.example", "axa@l.example"], ["a@l.example"]),
        ("*@bücher.example", ["a@xn--bcher-kva.example"], ["a@bucher.example"]),
        ("*@**", ["a@b.example"], ["a@b.localhost", "a@x.local"]),
    ],
)
def test_email_patterns(pattern: str, covered: list[str], refused: list[str]) -> None:
    matcher = email_matcher([pattern])
    assert [mail for mail in covered if not matcher.matches(mail)] == []
    assert [mail for mail in refused if matcher.matches(mail)] == []


@pytest.mark.parametrize(
    "pattern",
    [
        *("", "*", "@", "corp.example", "@corp.example", "*@", "a@b", "*@localhost", "*@127.0.0.1"),
        *("*@[::1]", "**@corp.example", "*a*@corp.example", "a..*@corp.example", ".*@corp.example"),
        *("-*@corp.example", "a%*@corp.example", "a b@corp.example", "a@b@corp.example"),
        *("é@corp.example", "*@corp.example.", "*@*corp.example", "*@corp.example:25", "<a@b.c>"),
        *("*@corp.example,*@other.example", "a!*@corp.example", '"a"@corp.example'),
    ],
)
def test_no_email_pattern(pattern: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        compile_email(pattern)


@pytest.mark.parametrize("value", [None, True, 3, ["a@b.c"], {"a": "b"}, "no address"])
def test_other_values_never_match(value: Json) -> None:
    assert not email_matcher([]).matches(value)
    assert not email_matcher(["*@**"]).matches(value)
    if not isinstance(value, str):
        assert not host_matcher([]).matches(value)


def test_any_is_every_valid_one() -> None:
    assert host_matcher([]).matches("127.0.0.1")
    assert host_matcher([]).describe() == "any host"
    assert email_matcher([]).matches("a@b.example")
    assert email_matcher([]).describe() == "any mail address"
    assert host_matcher(["a.example", "b.example"]).describe() == "a host in a.example, b.example"


def test_an_argument_is_one_kind_of_thing() -> None:
    assert merge_kinds(Kind.HOST, Kind.HOST) is Kind.HOST
    for other in (Kind.TEXT, Kind.SCALAR, Kind.EMAIL, Kind.URL, Kind.JSON):
        assert merge_kinds(Kind.HOST, other) is None
    assert merge_kinds(Kind.EMAIL, Kind.SCALAR) is None
