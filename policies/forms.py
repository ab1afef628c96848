"""Policy step 3b: the written forms of a matcher become the matcher. Empty ones are refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeAlias

from safeconduct.errors import PolicyError

from .globs import Glob, compile_glob
from .match import (
    AnyValue,
    Argv,
    Literals,
    Matcher,
    NumberRange,
    PathMatcher,
    SpelledNumber,
    SpelledPath,
    TextLength,
    UrlMatcher,
    parse_integer,
    path_matcher,
    spell,
)
from .model import ElementSpec, MatcherSpec
from .signatures import Kind
from .syntax import Items, Scalar, Source
from .urls import UrlPattern, compile_url

Loc: TypeAlias = tuple[int | str, ...]

# The matcher forms that fit an argument of ours, by its kind; `any` fits all of them.
_FITTING: Mapping[Kind, frozenset[str]] = MappingProxyType(
    {
        Kind.PATH: frozenset({"path"}),
        Kind.NEW_PATH: frozenset({"path"}),
        Kind.URL: frozenset({"url"}),
        Kind.ARGV: frozenset({"argv"}),
        Kind.TEXT: frozenset({"in", "text"}),
        Kind.INTEGERS: frozenset({"in", "range"}),
        Kind.JSON: frozenset[str](),
        Kind.RESOURCES: frozenset(),
    }
)
_BARE_LIST: Mapping[Kind, str] = MappingProxyType(
    {Kind.PATH: "path", Kind.NEW_PATH: "path", Kind.URL: "url", Kind.ARGV: "argv"}
)


def compile_pattern(source: Source, loc: Loc, pattern: str, workspace: str) -> Glob:
    """Compile the path pattern at ``loc``."""
    try:
        return compile_glob(pattern, workspace=workspace)
    except ValueError as error:
        hint = 'write for example "$WS/src/**", "/usr/share/**" or "**/.env"'
        message = f"the pattern {pattern!r} {error}"
        raise source.error(source.node(loc).position, message, hint=hint) from error


class Forms:
    """Compile the matchers of one file."""

    def __init__(self, source: Source, workspace: str) -> None:
        self._source = source
        self._workspace = workspace

    def compile(self, spec: MatcherSpec, kind: Kind | None, loc: Loc) -> Matcher:
        form = spec.form()
        if form == "any":
            return AnyValue()
        if form == "items":
            form = _BARE_LIST.get(kind, "in") if kind else "in"
        else:
            loc = (*loc, form)
        if kind is not None and form not in _FITTING[kind]:
            fitting = " or ".join((*sorted(_FITTING[kind]), "any"))
            message = f"{loc[1]}: {loc[4]!r} is a {kind}, which {form} cannot judge"
            raise self._error(loc, message, f"use {fitting}")
        makers: dict[str, Callable[[MatcherSpec, Loc], Matcher]] = {
            "path": self._path,
            "url": self._url,
            "argv": self._argv,
            "in": self._literals,
            "range": lambda spec, loc: self._range(spec.range or [], loc),
            "text": self._text,
        }
        return makers[form](spec, loc)

    def _error(self, loc: Loc, message: str, hint: str) -> PolicyError:
        return self._source.error(self._source.node(loc).position, message, hint=hint)

    def _words(self, listed: list[str] | None, spec: MatcherSpec, loc: Loc) -> list[str]:
        """Return the texts of `form: [..]` or of a bare list; an empty list never matches."""
        if listed is not None:
            words = listed
        else:
            words = [self._word(item, (*loc, at)) for at, item in enumerate(spec.items or [])]
        if not words:
            hint = "list what is meant, or remove the rule: what is not granted is denied"
            raise self._error(loc, "an empty list never matches", hint)
        return words

    def _word(self, element: ElementSpec, loc: Loc) -> str:
        if element.literal is None:
            raise self._error(loc, "expected a text", "only an argv takes matchers in its list")
        return element.literal

    def _path(self, spec: MatcherSpec, loc: Loc) -> PathMatcher:
        return self._paths(self._words(spec.path, spec, loc), loc)

    def _paths(self, words: list[str], loc: Loc) -> PathMatcher:
        globs = [
            compile_pattern(self._source, (*loc, index), word, self._workspace)
            for index, word in enumerate(words)
        ]
        return path_matcher(globs)

    def _url(self, spec: MatcherSpec, loc: Loc) -> UrlMatcher:
        compiled: list[UrlPattern] = []
        for index, pattern in enumerate(self._words(spec.url, spec, loc)):
            try:
                compiled.append(compile_url(pattern))
            except ValueError as error:
                hint = 'write for example "https://api.example.org/v1/**"'
                message = f"the URL pattern {pattern!r} {error}"
                raise self._error((*loc, index), message, hint) from error
        return UrlMatcher(tuple(compiled))

    def _literals(self, spec: MatcherSpec, loc: Loc) -> Literals:
        return Literals(frozenset(self._words(spec.in_, spec, loc)))

    def _range(self, ends: list[str], loc: Loc) -> NumberRange:
        low, high = (parse_integer(end) for end in ends)
        if low is None or high is None:
            raise self._error(loc, "range takes two whole numbers", "write range: [1, 10]")
        if low > high:
            raise self._error(loc, "this range is empty", f"write range: [{high}, {low}]")
        return NumberRange(low, high)

    def _text(self, spec: MatcherSpec, loc: Loc) -> TextLength:
        return TextLength(spec.text.max if spec.text else 0)

    def _argv(self, spec: MatcherSpec, loc: Loc) -> Argv:
        specs = (spec.argv if spec.argv is not None else spec.items) or []
        if not specs:
            raise self._error(loc, "an empty list never matches", "name the program")
        node = self._source.node(loc)
        rest = isinstance(node, Items) and _is_word(node.items[-1], "...")
        if rest:
            specs = specs[:-1]
        elements: list[str | Callable[[str], bool]] = []
        spelling = False
        for index, element in enumerate(specs):
            place = (*loc, index)
            if _is_word(self._source.node(place), "..."):
                raise self._error(place, "... can only come last", "use any for one element")
            spelling = spelling or element.path is not None
            elements.append(self._element(element, place))
        wild = [_is_word(self._source.node((*loc, at)), "any") for at in range(len(specs))]
        shown = tuple(
            "any" if free else _show(spec) for spec, free in zip(specs, wild, strict=True)
        )
        return Argv(tuple(elements), rest, shown, spelling)

    def _element(self, spec: ElementSpec, loc: Loc) -> str | Callable[[str], bool]:
        if spec.literal is not None:
            # A quoted "any" is the word itself.
            wild = _is_word(self._source.node(loc), "any")
            return AnyValue().matches if wild else spec.literal
        written = spec.model_fields_set
        if len(written) != 1:
            raise self._error(loc, "expected exactly one matcher", "write {in: [a, b]} or any")
        (form,) = written
        loc = (*loc, form.rstrip("_"))
        if spec.path is not None:
            if not spec.path:
                raise self._error(loc, "an empty list never matches", "list the folders")
            return SpelledPath(self._paths(spec.path, loc), self._workspace).matches
        if spec.in_ is not None:
            if not spec.in_:
                raise self._error(loc, "an empty list never matches", "list the words")
            return frozenset(spec.in_).__contains__
        if spec.range is not None:
            return SpelledNumber(self._range(spec.range, loc)).matches
        return TextLength(spec.text.max if spec.text else 0).matches


def _is_word(node: object, word: str) -> bool:
    return isinstance(node, Scalar) and not node.quoted and node.text == word


def _show(spec: ElementSpec) -> str:
    """Write an element with all its values, as in the policy; a quoted `any` keeps its quotes."""
    if spec.literal is not None:
        return spell(spec.literal)
    if spec.text is not None:
        return f"{{text: {{max: {spec.text.max}B}}}}"
    form = next(iter(spec.model_fields_set)).rstrip("_")
    values = spec.path or spec.in_ or spec.range or []
    return f"{{{form}: [{', '.join(spell(value) for value in values)}]}}"
