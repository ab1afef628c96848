"""Policy step 3c: the written forms of a matcher become the matcher. Empty ones are refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeAlias, cast

from safeconduct.errors import PolicyError

from .globs import Glob, compile_glob
from .lattice.inclusion import Effort, bounded
from .lattice.matchers import subsumes
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
    parse_integer,
    path_matcher,
    spell,
    with_numbers,
)
from .match_json import Shape, ShapeError, compile_shape
from .match_text import Excluding, Regex, compile_regex, email_matcher, host_matcher
from .match_url import UrlMatcher
from .model_matchers import ElementSpec, MatcherSpec, PatternsSpec
from .signatures import BUILT_IN, Kind
from .syntax import Data, Items, Scalar, Source
from .urls import UrlPattern, compile_url
from .wildcards import compile_tool_pattern, is_ours, is_wildcard

Loc: TypeAlias = tuple[int | str, ...]

# LIMIT: steps of all regular expressions of a file: 0.4 s and 20 MB.
MAX_REGEX_STEPS = 1 << 20
# LIMIT: steps of all comparisons of a matcher with its `not`; beyond, none is refused as empty.
MAX_EFFORT = 300_000
# The matcher forms that fit an argument of ours, by its kind; `any` fits all of them.
_FITTING: Mapping[Kind, frozenset[str]] = MappingProxyType(
    {
        Kind.PATH: frozenset({"path"}),
        Kind.NEW_PATH: frozenset({"path"}),
        Kind.URL: frozenset({"url"}),
        Kind.ARGV: frozenset({"argv"}),
        Kind.TEXT: frozenset({"in", "text", "regex"}),
        Kind.INTEGERS: frozenset({"in", "range"}),
        Kind.JSON: frozenset({"json"}),
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
        self._regex_steps = 0
        self._effort = Effort(MAX_EFFORT)

    def compile(
        self, spec: MatcherSpec, kind: Kind | None, loc: Loc, *, restricts: bool
    ) -> Matcher:
        """Compile the matcher at ``loc``, (…, tool, index, effect, argument).

        ``restricts``: in a doubt it matches, as a deny must, and not as a grant must.
        """
        form = spec.form()
        if form == "any":
            return AnyValue()
        tool, name, place = loc[-4], loc[-1], loc
        if form == "items":
            self._refuse_ambiguous(str(tool), str(name), loc)
            form = _BARE_LIST.get(kind, "in") if kind else "in"
        else:
            place = (*loc, form)
        if kind is not None and form not in _FITTING[kind]:
            fitting = " or ".join((*sorted(_FITTING[kind]), "any"))
            message = f"{tool}: {name!r} is a {kind}, which {form} cannot judge"
            raise self._error(place, message, f"use {fitting}")
        matcher = self._make(form, spec, place, restricts=restricts)
        if spec.not_ is None:
            return matcher
        exclude = self._exclusion(form, spec.not_, (*loc, "not"), restricts)
        with bounded(self._effort):
            nothing_left = subsumes(exclude, matcher)
        if nothing_left:
            hint = "narrow what stands after not, or remove the rule"
            raise self._error((*loc, "not"), "not takes away all of it, so it never matches", hint)
        return Excluding(matcher, exclude)

    def _refuse_ambiguous(self, tool: str, name: str, loc: Loc) -> None:
        """Refuse a bare list that would mean one thing for our tools and another for others."""
        if not is_wildcard(tool) or is_ours(tool):
            return
        for ours in compile_tool_pattern(tool).ours:
            argument = BUILT_IN[ours].arguments.get(name)
            if argument is not None and argument.kind in _BARE_LIST:
                form = _BARE_LIST[argument.kind]
                message = f"a bare list is a {form} for {ours}, and plain texts for other tools"
                hint = f"write {name}: {{{form}: [..]}} or {name}: {{in: [..]}}"
                raise self._error(loc, message, hint)

    def _make(self, form: str, spec: MatcherSpec, loc: Loc, *, restricts: bool) -> Matcher:
        makers: dict[str, Callable[[], Matcher]] = {
            "path": lambda: self._path(self._words(spec.path, spec, loc), loc),
            "url": lambda: self._url(self._words(spec.url, spec, loc), loc),
            "argv": lambda: self._argv(spec, loc, restricts),
            "in": lambda: _literals(self._words(spec.in_, spec, loc), restricts),
            "range": lambda: self._range(spec.range or [], loc, restricts),
            "text": lambda: TextLength(spec.text.max if spec.text else 0),
            "regex": lambda: self._regex([spec.regex or ""], loc, restricts),
            "host": lambda: self._named(host_matcher, spec.host, loc),
            "email": lambda: self._named(email_matcher, spec.email, loc),
            "json": lambda: self._shape(spec.json_, loc, restricts),
        }
        return makers[form]()

    def _exclusion(self, form: str, words: list[str], loc: Loc, restricts: bool) -> Matcher:
        """Compile what stands after `not`, in the opposite sense of what it takes away from."""
        makers: dict[str, Callable[[], Matcher]] = {
            "path": lambda: self._path(words, loc),
            "url": lambda: self._url(words, loc),
            "in": lambda: _literals(words, not restricts),
            "range": lambda: self._range(words, loc, not restricts),
            "regex": lambda: self._regex(words, loc, not restricts),
            "host": lambda: self._patterns(host_matcher, words, loc),
            "email": lambda: self._patterns(email_matcher, words, loc),
        }
        if form not in makers:
            message = f"not does not stand beside {form}"
            hint = f"it stands beside {', '.join(sorted(makers))}"
            raise self._error(loc, message, hint)
        return makers[form]()

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

    def _path(self, words: list[str], loc: Loc) -> PathMatcher:
        globs = [
            compile_pattern(self._source, (*loc, index), word, self._workspace)
            for index, word in enumerate(words)
        ]
        return path_matcher(globs)

    def _url(self, words: list[str], loc: Loc) -> UrlMatcher:
        compiled: list[UrlPattern] = []
        for index, pattern in enumerate(words):
            try:
                compiled.append(compile_url(pattern))
            except ValueError as error:
                hint = 'write for example "https://api.example.org/v1/**"'
                message = f"the URL pattern {pattern!r} {error}"
                raise self._error((*loc, index), message, hint) from error
        return UrlMatcher(tuple(compiled))

    def _named(
        self, make: Callable[[list[str]], Matcher], spec: PatternsSpec | None, loc: Loc
    ) -> Matcher:
        """Compile `host` or `email`: patterns, or `any` for every valid one."""
        if spec is None or spec.any is not None:
            return make([])
        if not spec.patterns:
            hint = "list what is meant, or write any for every valid one"
            raise self._error(loc, "an empty list never matches", hint)
        return self._patterns(make, spec.patterns, loc)

    def _patterns(
        self, make: Callable[[list[str]], Matcher], patterns: list[str], loc: Loc
    ) -> Matcher:
        for index, pattern in enumerate(patterns):
            try:
                make([pattern])
            except ValueError as error:
                hint = "see the matchers in docs/policy-language.md"
                message = f"the pattern {pattern!r} {error}"
                raise self._error((*loc, index), message, hint) from error
        return make(patterns)

    def _regex(self, patterns: list[str], loc: Loc, restricts: bool) -> Regex:
        try:
            found = compile_regex(patterns, restricts=restricts)
        except ValueError as error:
            hint = "write it in the syntax of RE2, without lookaround and back references"
            raise self._error(loc, f"the regular expression {error}", hint) from error
        self._regex_steps += found.effort
        if self._regex_steps > MAX_REGEX_STEPS:
            message = f"the regular expressions become more than {MAX_REGEX_STEPS} steps"
            raise self._error(loc, message, "use fewer of them, and smaller repetitions")
        return found

    def _shape(self, data: object, loc: Loc, restricts: bool) -> Shape:
        try:
            return compile_shape(cast("Data", data), restricts=restricts)
        except ShapeError as error:
            hint = "write for example json: {type: object, properties: {id: {type: integer}}}"
            raise self._error((*loc, *error.path), f"json: {error}", hint) from error

    def _range(self, ends: list[str], loc: Loc, restricts: bool) -> NumberRange:
        low, high = (parse_integer(end) for end in ends) if len(ends) == 2 else (None, None)
        if low is None or high is None:
            raise self._error(loc, "range takes two whole numbers", "write range: [1, 10]")
        if low > high:
            raise self._error(loc, "this range is empty", f"write range: [{high}, {low}]")
        return NumberRange(low, high, restricts)

    def _argv(self, spec: MatcherSpec, loc: Loc, restricts: bool) -> Argv:
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
            elements.append(self._element(element, place, restricts))
        wild = [_is_word(self._source.node((*loc, at)), "any") for at in range(len(specs))]
        shown = tuple(
            "any" if free else _show(spec) for spec, free in zip(specs, wild, strict=True)
        )
        # One object where all are literal, which nearly all are.
        same = shown == tuple(elements)
        return Argv(shown if same else tuple(elements), rest, shown, spelling)

    def _element(self, spec: ElementSpec, loc: Loc, restricts: bool) -> str | Callable[[str], bool]:
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
            return SpelledPath(self._path(spec.path, loc), self._workspace).matches
        if spec.in_ is not None:
            if not spec.in_:
                raise self._error(loc, "an empty list never matches", "list the words")
            return frozenset(spec.in_).__contains__
        if spec.range is not None:
            return SpelledNumber(self._range(spec.range, loc, restricts)).matches
        if spec.regex is not None:
            return self._regex([spec.regex], loc, restricts).matches
        return TextLength(spec.text.max if spec.text else 0).matches


def _literals(words: list[str], restricts: bool) -> Literals:
    texts = frozenset(words)
    return Literals(with_numbers(texts) if restricts else texts)


def _is_word(node: object, word: str) -> bool:
    return isinstance(node, Scalar) and not node.quoted and node.text == word


def _show(spec: ElementSpec) -> str:
    """Write an element with all its values, as in the policy; a quoted `any` keeps its quotes."""
    if spec.literal is not None:
        return spell(spec.literal)
    if spec.text is not None:
        return f"{{text: {{max: {spec.text.max}B}}}}"
    if spec.regex is not None:
        return f"{{regex: {spell(spec.regex)}}}"
    form = next(iter(spec.model_fields_set)).rstrip("_")
    values = spec.path or spec.in_ or spec.range or []
    return f"{{{form}: [{', '.join(spell(value) for value in values)}]}}"
