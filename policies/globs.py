"""Policy matching: path patterns. `*` and `?` stay inside one component, `**` crosses `/`.

`**` stands for zero or more whole components, so `/srv/allowed/**` covers `/srv/allowed`
(a folder may list itself) and never `/srv/allowed-evil`. There are no character classes,
braces or escapes: a pattern that looks like one is refused, because an author who believes
in them would get a deny that never matches.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from .work import CHARACTER_STEPS, COMPONENT_STEPS, WILDCARD_STEPS

MAX_PATTERN_BYTES = 4096
MAX_COMPONENTS = 128
_SPECIAL = frozenset("*?")
_REFUSED = frozenset("[]{}\\")


@dataclass(frozen=True, slots=True)
class Glob:
    """One compiled pattern over `/`-separated components, without the leading `/`."""

    pattern: str
    components: tuple[str, ...]

    @property
    def literal(self) -> str | None:
        """The one path this matches, if the pattern holds no wildcard."""
        plain = not any(_is_wild(component) for component in self.components)
        return "/" + "/".join(self.components) if plain else None

    @property
    def folder(self) -> str | None:
        """The folder this covers whole, if the pattern is `folder/**`."""
        *parents, last = self.components
        if last != "**" or any(_is_wild(component) for component in parents):
            return None
        return "/" + "/".join(parents)

    @property
    def anchor(self) -> str:
        """The longest folder that holds everything this can match."""
        plain: list[str] = []
        for component in self.components:
            if _is_wild(component):
                break
            plain.append(component)
        return "/" + "/".join(plain)

    def matches(self, components: list[str]) -> bool:
        """Tell whether all components match. Time is bounded by pattern times path length.

        The greedy walk of `*` over characters, lifted to components: only the last `**` can
        ever need to take one more, so there is no exponential backtracking.
        """
        pattern, at, star, resume = self.components, 0, -1, 0
        position = 0
        while position < len(components):
            if at < len(pattern) and pattern[at] == "**":
                star, resume, at = at, position, at + 1
            elif at < len(pattern) and _matches_one(pattern[at], components[position]):
                at, position = at + 1, position + 1
            elif star >= 0:
                resume += 1
                at, position = star + 1, resume
            else:
                return False
        return all(rest == "**" for rest in pattern[at:])


def walk_steps(globs: Iterable[Glob]) -> tuple[int, int]:
    """Bound the steps of walking over patterns: for each component of a path, each character.

    A walk takes up each pair of components at most once, and where one holds a wildcard beside
    other characters each pair of their characters.
    """
    parts = [part for glob in globs for part in glob.components]
    inner = [len(part) for part in parts if _is_wild(part) and part not in ("*", "**")]
    by_component = len(parts) * COMPONENT_STEPS + len(inner) * WILDCARD_STEPS
    return shared_steps(by_component, sum(inner) * CHARACTER_STEPS)


@lru_cache(maxsize=1024)
def shared_steps(by_component: int, by_character: int) -> tuple[int, int]:
    """Return both; patterns by the thousand take the same few, and share them in memory."""
    return by_component, by_character


def compile_glob(pattern: str, *, workspace: str) -> Glob:
    """Compile an absolute pattern; `$WS` is the workspace and a leading `**/` means anywhere.

    Raise ValueError saying what is wrong. `~` is refused: a policy must mean the same for
    everybody whose machine holds the same bytes.
    """
    text = pattern
    if text == "$WS" or text.startswith("$WS/"):
        tail = text[4:]
        components = _split(workspace[1:]) + (compile_components(tail) if tail else ())
        if text.endswith("/"):
            raise ValueError("ends with /; write folder/** for a folder and all it holds")
    elif text.startswith("/") or text.startswith("**/"):
        components = compile_components(text.removeprefix("/"))
    elif text.startswith("~"):
        raise ValueError("begins with ~; write the absolute path")
    else:
        raise ValueError("must begin with $WS/, / or **/")
    if len(components) > MAX_COMPONENTS:
        raise ValueError(f"has more than {MAX_COMPONENTS} components")
    return Glob(pattern, components)


@dataclass(frozen=True, slots=True)
class _Hiding:
    """The patterns of a ``hide``: one expression for those that name a component, and globs.

    ``tails`` are the texts one of which is in each path that the expression finds.
    """

    named: re.Pattern[str] | None
    tails: tuple[str, ...]
    globs: tuple[Glob, ...]

    def hides(self, path: str) -> bool:
        if self.named is not None:
            # To look for a plain text takes a tenth of the expression.
            for tail in self.tails:
                if tail in path and self.named.search(path):
                    return True
        if not self.globs:
            return False
        components = path[1:].split("/")
        return any(glob.matches(components) for glob in self.globs)


@lru_cache(maxsize=256)
def _hiding(patterns: tuple[str, ...]) -> _Hiding:
    named: list[str] = []
    tails: list[str] = []
    globs: list[Glob] = []
    for pattern in patterns:
        folder, _, last = pattern.removeprefix("/").rpartition("/")
        tail = last.removeprefix("*")
        if folder == "**" and tail and not _is_wild(tail):
            # Time is linear in the path: one `*` at most, and each component is tried once.
            named.append(("[^/]*" if tail != last else "") + re.escape(tail))
            tails.append(tail)
        else:
            # What holds a hidden folder's name holds its contents: `**` stands for them, or
            # nothing.
            globs.append(Glob(pattern, (*pattern.removeprefix("/").split("/"), "**")))
    expression = re.compile(f"/(?:{'|'.join(named)})(?:/|\\Z)") if named else None
    return _Hiding(expression, tuple(tails), tuple(globs))


@lru_cache(maxsize=256)
def hides_folder(patterns: tuple[str, ...], folder: str) -> bool:
    """Answer `hidden_by` for a workspace, which nearly every Call of a program names."""
    return hidden_by(patterns, folder)


def hidden_by(patterns: tuple[str, ...], path: str) -> bool:
    """Tell whether a profile's ``hide`` takes away an absolute path, or a folder above it."""
    if not patterns:
        return False
    return _hiding(patterns).hides(path)


def compile_components(text: str) -> tuple[str, ...]:
    """Compile `a/*/**` into components; raise ValueError for what the language does not have."""
    if not text:
        raise ValueError("is empty; write /** for everything")
    if len(text.encode("utf-8", "surrogatepass")) > MAX_PATTERN_BYTES:
        raise ValueError(f"is longer than {MAX_PATTERN_BYTES} bytes")
    if any(character < " " or character == "\x7f" for character in text):
        raise ValueError("holds a control character")
    found = sorted(_REFUSED.intersection(text))
    if found:
        raise ValueError(f"holds {found[0]!r}; only *, ** and ? are special, use ? in its place")
    components = _split(text)
    for component in components:
        if component == "":
            raise ValueError("has an empty component; write folder/** for a whole folder")
        if component in (".", ".."):
            raise ValueError(f"has the component {component!r}; write the path it leads to")
        if "**" in component and component != "**":
            raise ValueError("has ** beside other characters; ** must stand alone between /")
    # `**/**` means the same as `**` and would only cost time.
    return tuple(
        component
        for index, component in enumerate(components)
        if component != "**" or index == 0 or components[index - 1] != "**"
    )


def _split(text: str) -> tuple[str, ...]:
    return tuple(text.split("/")) if text else ()


def _is_wild(component: str) -> bool:
    return not _SPECIAL.isdisjoint(component)


def _matches_one(pattern: str, component: str) -> bool:
    if pattern == component or pattern == "*":
        # An empty component only exists in URLs; `*` stands for a name, so it needs one.
        return pattern == component or component != ""
    if not _is_wild(pattern):
        return False
    at, position, star, resume = 0, 0, -1, 0
    while position < len(component):
        if at < len(pattern) and pattern[at] == "*":
            star, resume, at = at, position, at + 1
        elif at < len(pattern) and pattern[at] in ("?", component[position]):
            at, position = at + 1, position + 1
        elif star >= 0:
            resume += 1
            at, position = star + 1, resume
        else:
            return False
    return all(rest == "*" for rest in pattern[at:])
