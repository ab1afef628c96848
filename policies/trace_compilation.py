"""Policy step 3e: `trace` of a file becomes its terms."""

from __future__ import annotations

from safeconduct.call import Durability

from .language import did_you_mean
from .model_trace import TraceSpec
from .signatures import BUILT_IN, PROGRAMS
from .syntax import Source
from .trace_terms import DEFAULT_TERMS, TraceTerms, Witnesses
from .wildcards import ToolPattern, compile_tool_pattern


def compile_trace(spec: TraceSpec | None, source: Source) -> TraceTerms:
    """Compile the terms; PolicyError where they bind nothing or cannot be meant."""
    if spec is None:
        return DEFAULT_TERMS
    position = source.key(("trace",))
    if not spec.model_fields_set:
        hint = "write for example trace: {durability: sync}, or remove it"
        raise source.error(position, "this trace asks for nothing", hint=hint)
    if spec.batch is not None and spec.durability is not Durability.BATCH:
        where = source.key(("trace", "batch"))
        hint = "write durability: batch beside it, or remove it"
        raise source.error(where, "batch is for durability: batch", hint=hint)
    kept = spec.durability
    witness = spec.witness
    return TraceTerms(
        local=DEFAULT_TERMS.local if kept is None else kept,
        other=DEFAULT_TERMS.other if kept is None else kept,
        batch_ms=spec.batch,
        irreversible=tuple(
            _pattern(name, source, at) for at, name in enumerate(spec.irreversible or ())
        ),
        quota_bytes=spec.quota,
        retain_days=spec.retain,
        witness=Witnesses(policy=witness.policy, require=witness.require) if witness else None,
        position=position,
    )


def _pattern(name: str, source: Source, at: int) -> ToolPattern:
    """Compile one name; refuse those that no Call has, whose mark would never count."""
    position = source.node(("trace", "irreversible", at)).position
    try:
        pattern = compile_tool_pattern(name)
    except ValueError as error:
        hint = "name one tool, or all of one server: files.*"
        raise source.error(position, f"{name!r} {error}", hint=hint) from error
    if pattern.only_ours and not pattern.ours:
        hint = did_you_mean(name, BUILT_IN)
        raise source.error(position, f"there is no tool {name!r} among ours", hint=hint)
    if name.partition(".")[0] in PROGRAMS and "*" not in name:
        # Only where it is needed: the tables are large.
        from .agents.tables import why_never_called

        why = why_never_called(name)
        if why:
            hint = "docs/tool-names.md lists what the tools of other programs are judged as"
            raise source.error(position, why, hint=hint)
    return pattern
