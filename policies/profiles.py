"""Policy step 3a: the profiles of a file become Profile values with absolute paths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from safeconduct.call import LIMIT_FIELDS, Engine, Limits, Profile
from safeconduct.syscalls import ADDABLE, NEVER, why_never

from .forms import Loc, compile_pattern
from .language import did_you_mean
from .model import LimitsSpec, ProfileSpec
from .syntax import Source

# LIMIT: `like` chains are walked, so they have an end.
MAX_LIKE = 16


def compile_profiles(
    specs: Mapping[str, ProfileSpec],
    source: Source,
    workspace: str,
    inherited: Mapping[str, Profile],
) -> dict[str, Profile]:
    """Compile every profile; PolicyError where one copies nothing, or nothing can enforce it.

    ``inherited`` are those of the policy that this one extends; `like` may name them, also the
    namesake of a profile.
    """
    return {**inherited, **_Profiles(specs, source, workspace, inherited).compile()}


@dataclass(frozen=True, slots=True)
class _Profiles:
    """Compile the profiles of a file."""

    specs: Mapping[str, ProfileSpec]
    source: Source
    workspace: str
    inherited: Mapping[str, Profile]

    def compile(self) -> dict[str, Profile]:
        return {name: self._compile(name) for name in self.specs}

    def _compile(self, name: str) -> Profile:
        lineage, first = self._lineage(name)
        profile = replace(first, name=name)
        for ancestor in reversed(lineage):
            profile = self._apply(profile, ancestor)
        if profile.engine is Engine.NATIVE and profile.limits.fuel is not None:
            position = self.source.node(("profiles", name, "limits", "fuel")).position
            message = f"profile {name!r} sets fuel, which bounds only the wasm engine"
            hint = "use cpu and wall, or engine: wasm"
            raise self.source.error(position, message, hint=hint)
        if profile.engine is not Engine.NATIVE and profile.workspace.overlaid:
            position = self.source.node(("profiles", name)).position
            message = f"profile {name!r} asks for an overlay, which a wasm module does not write to"
            hint = "write workspace: direct, or engine: native"
            raise self.source.error(position, message, hint=hint)
        if profile.engine is not Engine.NATIVE and profile.syscalls:
            position = self.source.node(("profiles", name, "syscalls")).position
            message = f"profile {name!r} adds syscalls, which a wasm module cannot make"
            hint = "write syscalls: [], or engine: native"
            raise self.source.error(position, message, hint=hint)
        return profile

    def _lineage(self, name: str) -> tuple[list[str], Profile]:
        """Return the profiles that one copies, itself first, and the one that the last copies."""
        lineage = [name]
        while (like := self.specs[lineage[-1]].like) is not None:
            position = self.source.node(("profiles", lineage[-1], "like")).position
            own = like in self.specs and like != lineage[-1]
            if not own and like in self.inherited:
                return lineage, self.inherited[like]
            if like not in self.specs:
                hint = did_you_mean(like, {**self.inherited, **self.specs})
                raise self.source.error(position, f"there is no profile {like!r}", hint=hint)
            if like in lineage or len(lineage) >= MAX_LIKE:
                hint = f"profiles copy one another along at most {MAX_LIKE} steps, in no circle"
                raise self.source.error(position, "like never ends", hint=hint)
            lineage.append(like)
        return lineage, Profile(name=name)

    def _apply(self, profile: Profile, name: str) -> Profile:
        spec, loc = self.specs[name], ("profiles", name)
        read = self._folders(spec.read, (*loc, "read"))
        write = self._folders(spec.write, (*loc, "write"))
        hide = self._hidden(spec.hide, (*loc, "hide"))
        return replace(
            profile,
            engine=spec.engine or profile.engine,
            workspace=spec.workspace or profile.workspace,
            read=profile.read if read is None else read,
            write=profile.write if write is None else write,
            # What a copied profile hides stays hidden: `like` never uncovers a secret.
            hide=profile.hide + tuple(item for item in hide if item not in profile.hide),
            imports=profile.imports if spec.imports is None else tuple(dict.fromkeys(spec.imports)),
            syscalls=profile.syscalls if spec.syscalls is None else self._added(spec.syscalls, loc),
            limits=_limits(profile.limits, spec.limits),
        )

    def _folders(self, patterns: list[str] | None, loc: Loc) -> tuple[str, ...] | None:
        if patterns is None:
            return None
        folders: list[str] = []
        for index, pattern in enumerate(patterns):
            place = (*loc, index)
            glob = compile_pattern(self.source, place, pattern, self.workspace)
            path = glob.folder or glob.literal
            if path is None:
                message = f"the sandbox cannot show {pattern!r}: it mounts folders and files"
                hint = 'write "folder/**" or one exact path here, and take away with hide'
                raise self.source.error(self.source.node(place).position, message, hint=hint)
            folders.append(path)
        return tuple(dict.fromkeys(folders))

    def _added(self, names: list[str], loc: Loc) -> tuple[str, ...]:
        for index, name in enumerate(names):
            if reason := why_never(name):
                raise self.source.error(
                    self.source.node((*loc, "syscalls", index)).position,
                    f"the system call {name!r} cannot be added to a sandbox: {reason}",
                    hint="remove it" if name in NEVER else did_you_mean(name, ADDABLE),
                    code="policy.syscall",
                )
        return tuple(sorted(set(names)))

    def _hidden(self, patterns: list[str] | None, loc: Loc) -> tuple[str, ...]:
        globs = [
            compile_pattern(self.source, (*loc, index), pattern, self.workspace)
            for index, pattern in enumerate(patterns or [])
        ]
        return tuple(dict.fromkeys("/" + "/".join(glob.components) for glob in globs))


def _limits(limits: Limits, spec: LimitsSpec | None) -> Limits:
    if spec is None:
        return limits
    named: dict[str, int | None] = {
        field: getattr(spec, name) for name, field in LIMIT_FIELDS.items()
    }
    return replace(limits, **{name: value for name, value in named.items() if value is not None})
