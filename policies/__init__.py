"""Judge Calls: load a policy, bring a Call to one Document, decide it. No tool runs here."""

from __future__ import annotations

from .arguments import decode_arguments
from .bounds import describe_bound
from .canonical import Canonical, canonicalize
from .capability import NarrowedPolicy, both, narrow_profiles
from .checks.cases import beside
from .checks.check import Finding, Level, check_file, check_policy
from .checks.testing import require_passing
from .decision import NO_FACTS, decide
from .delegation import Capability, Revocations, attenuate
from .discover import Found, Origin, Resolution, discover_policy, resolve_policy
from .explain import Considered, Explanation, explain
from .globs import hidden_by
from .load import (
    PolicyFile,
    compile_elsewhere,
    load_policy,
    parse_policy,
    read_policy_file,
)
from .observing import as_observed
from .paths import Resolved
from .preset import PRESETS, read_preset
from .protected import PROTECTED, is_protected
from .rules import Judged, Policy, Role, Rule, Server
from .schema import policy_schema
from .signatures import BUILT_IN, Argument, Kind, Signature
from .spelling import unspelled
from .trust import TrustStore, state_folder

__all__ = [
    "BUILT_IN",
    "NO_FACTS",
    "PRESETS",
    "PROTECTED",
    "Argument",
    "Canonical",
    "Capability",
    "Considered",
    "Explanation",
    "Finding",
    "Found",
    "Judged",
    "Kind",
    "Level",
    "NarrowedPolicy",
    "Origin",
    "Policy",
    "PolicyFile",
    "Resolution",
    "Resolved",
    "Revocations",
    "Role",
    "Rule",
    "Server",
    "Signature",
    "TrustStore",
    "as_observed",
    "attenuate",
    "beside",
    "both",
    "canonicalize",
    "check_file",
    "check_policy",
    "compile_elsewhere",
    "decide",
    "decode_arguments",
    "describe_bound",
    "discover_policy",
    "explain",
    "hidden_by",
    "is_protected",
    "load_policy",
    "narrow_profiles",
    "parse_policy",
    "policy_schema",
    "read_policy_file",
    "read_preset",
    "require_passing",
    "resolve_policy",
    "state_folder",
    "unspelled",
]
