"""Step 3 of the path of one Call: whether a profile hides what a rule would grant. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from safeconduct.call import Document, Json, Profile

from .binding import Rule
from .globs import hidden_by, hides_folder
from .signatures import Kind, Signature

# Bound once: looking a member of an enumeration up takes as long as a comparison.
_PATH: Final = Kind.PATH


def hides(profile: Profile, rule: Rule, document: Document, signature: Signature) -> bool:
    """Tell whether a profile hides a path that the Call names.

    Of a tool that is not ours a path is what the rule itself takes for one: the word of another
    rule about it must not matter.
    """
    if not profile.hide:
        return False
    names: Iterable[str] = signature.paths
    if not signature.closed:
        matchers = rule.matchers or {}
        names = [name for name in matchers if matchers[name].kind is _PATH]
    arguments, workspace = document.arguments, document.workspace
    for name in names:
        value = arguments.get(name)
        if value == workspace:
            if hides_folder(profile.hide, workspace):
                return True
        elif is_hidden(profile, value):
            return True
    return False


def is_hidden(profile: Profile, value: Json) -> bool:
    """Tell whether a profile hides a path, or some of a list."""
    if isinstance(value, str):
        return hidden_by(profile.hide, value)
    return isinstance(value, list | tuple) and any(is_hidden(profile, item) for item in value)
