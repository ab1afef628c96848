"""Policy step 3: what a matcher demands of an argument, as keys, and how a value finds them.

INVARIANT: a value that a matcher matches finds one of the matcher's keys. Finding one that it does
not match costs time only. A value that is not of the matcher's kind finds all of them, as every
restriction that judges it binds (binding.py).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Final, TypeAlias, cast

from safeconduct.call import Json

from .globs import Glob
from .match import Argv, Literals, Matcher, PathMatcher, scalar_text
from .match_text import Excluding
from .match_url import UrlMatcher
from .signatures import MAX_LIST
from .urls import UrlPattern, decoded

# LIMIT: keys of one rule; one that lists more is always a candidate.
MAX_KEYS: Final = 64
_PORTS: Final = {"http": ":80", "https": ":443"}
_SCHEME: Final = len("https:")

# The place of a rule, or those of several.
Hit: TypeAlias = "int | tuple[int, ...]"
Table: TypeAlias = "dict[Hashable, Hit]"
# The length of the shortest key that is a beginning, and of the longest key.
Span: TypeAlias = "tuple[int, int]"
# How the value of an argument is looked up in a table.
Lookup: TypeAlias = "Callable[[Json, Table, Span], Sequence[Hit]]"


def keys_of(matcher: Matcher) -> Iterator[tuple[Lookup, frozenset[Hashable]]]:
    """Name every way to find a matcher: how to look a value up, and the keys."""
    # What `not` takes away only narrows, so the keys of the matcher beside it hold.
    while type(matcher) is Excluding:
        matcher = matcher.base
    # Exactly these types: another one may match what it calls doubtful.
    if type(matcher) is Literals:
        yield _look_up_text, frozenset(matcher.texts)
    elif type(matcher) is Argv:
        yield from _argv_keys(matcher)
    elif type(matcher) is PathMatcher:
        yield from _path_keys(matcher)
    elif type(matcher) is UrlMatcher:
        yield from _url_keys(matcher)


def _everything(table: Table) -> Sequence[Hit]:
    return tuple(table.values())


def _are_texts(values: Sequence[Json]) -> bool:
    return len(values) <= MAX_LIST and all(isinstance(item, str) for item in values)


def _each(value: Json) -> Sequence[Json]:
    """Return the elements of a list: a rule that matches the list matches some of them."""
    return cast("Sequence[Json]", value) if isinstance(value, list | tuple) else (value,)


# Texts


def _look_up_text(value: Json, table: Table, span: Span) -> Sequence[Hit]:
    if type(value) is str:
        hit = table.get(value)
        return () if hit is None else (hit,)
    texts = [scalar_text(item) for item in _each(value)]
    if None in texts or len(texts) > MAX_LIST:
        return _everything(table)
    return [table[text] for text in texts if text is not None and text in table]


# Lists of words: by the first word, or the first two


def _argv_keys(argv: Argv) -> Iterator[tuple[Lookup, frozenset[Hashable]]]:
    first, second = (*(_words(element) for element in argv.elements[:2]), None, None)[:2]
    if first is None:
        return
    yield _look_up_word, frozenset(first)
    if second is not None and len(first) * len(second) <= MAX_KEYS:
        pairs = ((one, two) for one in first for two in second)
        # Two literal words are their own key: the same object, which saves a fifth of the index.
        literal = len(argv.elements) == 2 and argv.shown is argv.elements
        yield _look_up_words, frozenset([argv.elements] if literal else pairs)


def _words(element: object) -> frozenset[str] | None:
    """Return the only words that an element of an argv takes; None where it may take others."""
    if isinstance(element, str):
        return frozenset((element,))
    listed = getattr(element, "__self__", None)
    return cast("frozenset[str]", listed) if type(listed) is frozenset else None


def _look_up_word(value: Json, table: Table, span: Span) -> Sequence[Hit]:
    words = _each(value)
    if type(value) is str or not words or type(words[0]) is not str:
        return _everything(table)
    hit = table.get(words[0])
    return () if hit is None else (hit,)


def _look_up_words(value: Json, table: Table, span: Span) -> Sequence[Hit]:
    # Not by `isinstance` of a union, which takes as long as all the rest.
    if not isinstance(value, (list, tuple)):
        return _everything(table)
    words: Sequence[Json] = value
    if len(words) < 2:
        return ()
    try:
        hit = table.get((words[0], words[1]))
    except TypeError:
        # A list or an object is no word, and finds no rule about words.
        return ()
    return () if hit is None else (hit,)


# Paths: by the folder that holds all a pattern can match, or by the last component


def _path_keys(paths: PathMatcher) -> Iterator[tuple[Lookup, frozenset[Hashable]]]:
    # A folder and what holds a glob end with `/`, a path does not. The root holds everything.
    anchors = {f"{glob.anchor.rstrip('/')}/" for glob in paths.globs}
    keys = {*paths.exact, *paths.folders, *anchors}
    if "/" not in keys:
        yield _look_up_folder, frozenset(keys)
    names = [_last(glob) for glob in paths.globs]
    if not paths.folders and None not in names:
        yield _look_up_name, frozenset([*names, *(path.rpartition("/")[2] for path in paths.exact)])


def _last(glob: Glob) -> str | None:
    last = glob.components[-1]
    return None if "*" in last or "?" in last else last


def _look_up_folder(value: Json, table: Table, span: Span) -> Sequence[Hit]:
    found: list[Hit] = []
    if type(value) is str:
        paths: Sequence[str] = (value,)
    else:
        listed = _each(value)
        if not _are_texts(listed):
            return _everything(table)
        paths = cast("Sequence[str]", listed)
    for path in paths:
        hit = table.get(path)
        if hit is not None:
            found.append(hit)
        _look_up_starts(f"{path}/", table, span, found)
    return found


def _look_up_starts(text: str, table: Table, span: Span, found: list[Hit]) -> None:
    """Look up every beginning of a text that ends with `/`."""
    # LIMIT: a path has up to 8,192 folders; those longer than every key are never looked up.
    shortest, longest = span
    end = text.find("/", shortest - 1 if shortest else 0) + 1
    while 0 < end <= longest:
        hit = table.get(text[:end])
        if hit is not None:
            found.append(hit)
        end = text.find("/", end) + 1


def _look_up_name(value: Json, table: Table, span: Span) -> Sequence[Hit]:
    if type(value) is str:
        hit = table.get(value.rpartition("/")[2])
        return () if hit is None else (hit,)
    paths = _each(value)
    if not _are_texts(paths):
        return _everything(table)
    names = (path.rpartition("/")[2] for path in cast("Sequence[str]", paths))
    return [table[name] for name in names if name in table]


# URLs: by their beginning, or by host and leading path, or by the end of a host with a wildcard.
# INVARIANT: keys and values are decoded alike, as what a pattern compares is (`split_url`).


def _url_keys(urls: UrlMatcher) -> Iterator[tuple[Lookup, frozenset[Hashable]]]:
    starts = [pattern.start for pattern in urls.patterns]
    if None not in starts:
        yield _look_up_start, frozenset(starts)
    else:
        yield _look_up_url, frozenset(_url_key(pattern) for pattern in urls.patterns)


def _look_up_start(value: Json, table: Table, span: Span) -> Sequence[Hit]:
    found: list[Hit] = []
    if type(value) is str and "%" not in value and value.find(":", _SCHEME) < 0:
        # What nearly every one is: the same as below, in place.
        shortest, longest = span
        stop = value.find("?")
        if stop < 0:
            stop = len(value)
        end = value.find("/", shortest - 1 if shortest else 0) + 1
        while 0 < end <= longest and end <= stop:
            hit = table.get(value[:end])
            if hit is not None:
                found.append(hit)
            end = value.find("/", end) + 1
        if stop < longest:
            hit = table.get(f"{value[:stop]}/")
            if hit is not None:
                found.append(hit)
        return found
    urls = _each(value)
    if not _are_texts(urls):
        return _everything(table)
    for url in cast("Sequence[str]", urls):
        _look_up_starts(_start_of(url), table, span, found)
    return found


def _start_of(url: str) -> str:
    """Return what of a canonical URL a beginning may be, as the patterns write it."""
    text = f"{decoded(url.partition('?')[0])}/"
    return text if text.find(":", _SCHEME) < 0 else _without_port(text)


def _without_port(url: str) -> str:
    """Leave out the port that the scheme has anyway; no canonical URL spells it out."""
    scheme, mark, rest = url.partition("://")
    authority, slash, path = rest.partition("/")
    return scheme + mark + authority.removesuffix(_PORTS.get(scheme, "")) + slash + path


def _url_key(pattern: UrlPattern) -> str:
    wild = [at for at, label in enumerate(pattern.labels) if "*" in label]
    if wild:
        return "." + ".".join(pattern.labels[wild[-1] + 1 :])
    plain: list[str] = []
    for component in pattern.path.components:
        if "*" in component or "?" in component:
            break
        plain.append(component)
    return "/".join([pattern.labels[0], *plain])


def _look_up_url(value: Json, table: Table, span: Span) -> Sequence[Hit]:
    found: list[Hit] = []
    urls = _each(value)
    if not _are_texts(urls):
        return _everything(table)
    for url in cast("Sequence[str]", urls):
        _look_up_one_url(url, table, span[1], found)
    return found


def _look_up_one_url(url: str, table: Table, longest: int, found: list[Hit]) -> None:
    """Look up every key that a pattern over this canonical URL may be filed under."""
    authority, _, tail = url.partition("://")[2].partition("/")
    host = (
        authority.partition(":")[0] if "[" not in authority else authority.partition("]")[0] + "]"
    )
    whole = f"{host}/{decoded(tail.partition('?')[0])}"
    # The host, its folders, the whole path. LIMIT: a path has up to 8,192 folders; those longer
    # than every key are never looked up.
    end = len(host)
    while 0 <= end <= longest:
        hit = table.get(whole[:end])
        if hit is not None:
            found.append(hit)
        end = whole.find("/", end + 1)
    keys = [whole] if end < 0 else []
    dot = host.find(".")
    while dot >= 0:
        keys.append(host[dot:])
        dot = host.find(".", dot + 1)
    keys.append(".")
    for key in keys:
        hit = table.get(key)
        if hit is not None:
            found.append(hit)
