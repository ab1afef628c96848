"""The words of the product as types: a Call, the Decision about it, where it runs, what came of it.

Every step of the path of one Call (docs/architecture.md) speaks in these values. They are frozen,
hold plain data only, and import nothing of ours, so any of them may cross a process boundary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import TypeAlias

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"


class Effect(StrEnum):
    """What a Decision says. Deny beats ask beats allow."""

    ALLOW = "allow"
    ASK = "ask"
    DENY = "deny"


class Enforcement(StrEnum):
    """How strong a verdict is.

    ``object``: we execute the tool ourselves on the descriptor or document that was judged.
    ``sandbox``: the tool opens things itself; the sandbox around it is the boundary.
    ``advisory``: judged only.
    """

    OBJECT = "object"
    SANDBOX = "sandbox"
    ADVISORY = "advisory"


class Engine(StrEnum):
    """What executes a Call inside a profile."""

    NATIVE = "native"
    WASM = "wasm"


class WorkspaceMode(StrEnum):
    """How a call's writes reach the workspace.

    ``direct``: at once. ``overlay``: not before somebody commits them; ``session-overlay``: the
    same, but later calls of the session see them (docs/workspace.md).
    """

    # INVARIANT: from the widest to the narrowest; where two apply, the later one counts.
    DIRECT = "direct"
    SESSION = "session-overlay"
    OVERLAY = "overlay"

    @property
    def overlaid(self) -> bool:
        """Tell whether writes go to an overlay."""
        return self is not WorkspaceMode.DIRECT


class Tier(StrEnum):
    """The set of layers that actually enforces a native sandbox on this machine.

    ``full``: user, mount, pid, net, ipc, uts and cgroup namespaces, Landlock, seccomp, tree-kill.
    ``landlock``: Landlock and seccomp alone, where namespaces are refused; no network at all.
    """

    FULL = "full"
    LANDLOCK = "landlock"


class Held(StrEnum):
    """How one limit holds.

    ``tree``: the kernel (or the sandbox's own clock) holds the whole process tree to it.
    ``process``: the kernel holds each process to it. ``polled``: the supervisor looks at intervals
    and ends the call, so it may be exceeded for that long. ``none``: nothing holds it.
    """

    TREE = "tree"
    PROCESS = "process"
    POLLED = "polled"
    NONE = "none"


class Durability(StrEnum):
    """When an Entry counts as written.

    ``volatile``: handed to the kernel, survives a killed process. ``batch``: on disk within some
    milliseconds. ``sync``: on disk (fdatasync) before the call goes on.
    """

    VOLATILE = "volatile"
    BATCH = "batch"
    SYNC = "sync"


class EntryKind(StrEnum):
    """The closed set of Entry kinds (docs/trace-format.md)."""

    LOG_OPEN = "log.open"
    SESSION_OPEN = "session.open"
    POLICY_LOAD = "policy.load"
    CALL_INTENT = "call.intent"
    CALL_DECISION = "call.decision"
    CALL_OUTCOME = "call.outcome"
    APPROVAL = "approval"
    KEY_ROTATE = "key.rotate"
    REDACTION = "redaction"
    HEARTBEAT = "heartbeat"
    LOG_RECOVERED = "log.recovered"
    SESSION_CLOSE = "session.close"


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One tool invocation, exactly as an adapter received it. Nothing in it is trusted."""

    id: str
    tool: str
    arguments: Mapping[str, Json]
    session: str
    caller: str = "local"
    origin: str = "sdk"
    parent: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """The one spelling of a Call that is judged, recorded and, for our own tools, executed.

    ``arguments`` are closed by the tool's signature, defaults filled: a path argument is the
    absolute path of the object it resolved to, a URL argument its WHATWG serialisation.

    ``unfit`` names the arguments of a tool that is not ours which are not what the rules take
    them for, each with the code and the sentence that say why; they stay as they were given. No
    grant that judges one covers it, and every restriction that does binds.
    """

    tool: str
    arguments: Mapping[str, Json]
    workspace: str
    unfit: Mapping[str, tuple[str, str]] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Upper bounds of one Call. ``None`` means there is no such bound.

    ``memory_bytes`` includes swap. ``disk_bytes`` and ``inodes`` bound the private scratch folder
    and what the call adds to its writable folders, ``depth`` how deep folders nest there;
    ``file_bytes`` bounds any one written file, and where it is None ``disk_bytes`` does.
    ``idle_ms`` is how long a call may neither print nor compute.
    """

    wall_ms: int = 30_000
    cpu_ms: int | None = None
    memory_bytes: int = 512 << 20
    pids: int = 64
    files: int = 1024
    disk_bytes: int = 256 << 20
    inodes: int = 8192
    depth: int = 256
    file_bytes: int | None = None
    output_bytes: int = 1 << 20
    idle_ms: int | None = None
    fuel: int | None = None


# What a policy, a call's `resources` and Outcome.limit call each field of Limits.
LIMIT_FIELDS: Mapping[str, str] = MappingProxyType(
    {
        "wall": "wall_ms",
        "cpu": "cpu_ms",
        "memory": "memory_bytes",
        "pids": "pids",
        "files": "files",
        "disk": "disk_bytes",
        "inodes": "inodes",
        "depth": "depth",
        "file": "file_bytes",
        "output": "output_bytes",
        "idle": "idle_ms",
        "fuel": "fuel",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """The named settings of a sandbox: it sees only what is listed, whatever the tool is.

    ``read`` and ``write`` are absolute folders or files, each granted with all it holds.
    ``hide`` are glob patterns over absolute paths that stay absent although they lie inside.
    Everything in ``write`` is readable too. There is no network (``net: none``).
    ``imports`` are modules that Python tools find loaded. ``syscalls`` are the system calls it adds
    to those that every sandbox has (``safeconduct.syscalls``).
    """

    name: str
    engine: Engine = Engine.NATIVE
    workspace: WorkspaceMode = WorkspaceMode.DIRECT
    read: tuple[str, ...] = ()
    write: tuple[str, ...] = ()
    hide: tuple[str, ...] = ()
    imports: tuple[str, ...] = ()
    syscalls: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a decision may depend on besides the Document: who calls, how often, and when.

    ``calls`` and ``denied`` count this session so far; ``now_ms`` is the wall clock (Unix, UTC).
    """

    role: str | None = None
    caller: str = "local"
    origin: str = "sdk"
    calls: int = 0
    denied: int = 0
    now_ms: int = 0


class Unit(StrEnum):
    """What a budget counts. Money is counted in millionths."""

    CALLS = "calls"
    BYTES = "bytes"
    MONEY = "money"
    TOKENS = "tokens"


class Per(StrEnum):
    """What a budget is for: each call, the session, a UTC day, or a sliding window (a rate)."""

    CALL = "call"
    SESSION = "session"
    DAY = "day"
    WINDOW = "window"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """An obligation: at most ``most`` of ``unit``, counted under ``id``.

    ``reserve`` is taken before the Call runs, and put right when what it used is known.
    ``window_ms`` is set where ``per`` is ``window``.
    """

    id: str
    unit: Unit
    most: int
    per: Per
    reserve: int
    window_ms: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The judgement of one Document by one policy version.

    ``rules`` are the ids of the rules that decided, ``reason`` one sentence for the agent and
    ``advice`` the smallest change that would allow it, which only the operator is shown: a text,
    or in ``advises`` what writes it for those who read it.
    ``obligations`` must be met before the Call runs. ``durability`` is how durable its intent is
    then, and an ``irreversible`` one is signed too. ``observed`` tells that it runs whatever
    ``effect`` says, because the operator only observes.
    """

    effect: Effect
    policy: str
    code: str
    reason: str
    rules: tuple[str, ...] = ()
    # Of two equal Decisions one may not have written it yet.
    advises: str | Callable[[], str] = field(default="", compare=False, repr=False)
    profile: Profile | None = None
    enforcement: Enforcement = Enforcement.SANDBOX
    obligations: tuple[Bound, ...] = ()
    durability: Durability = Durability.SYNC
    irreversible: bool = False
    observed: bool = False

    @property
    def advice(self) -> str:
        """Say what change would allow it, or where it was decided; empty where nobody knows."""
        return self.advises if isinstance(self.advises, str) else self.advises()


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What the process tree of a Call used. ``None`` where this machine does not account for it.

    ``throttled_ms`` is how long a cpu quota kept it waiting, ``oom_kills`` how many of its
    processes the kernel ended for memory, ``peak_pids`` the most processes and threads at one
    time. ``read_bytes`` and ``written_bytes`` went to and from block devices, not caches.
    """

    wall_ms: int = 0
    cpu_ms: int | None = None
    throttled_ms: int | None = None
    peak_memory_bytes: int | None = None
    oom_kills: int | None = None
    peak_pids: int | None = None
    refused_forks: int | None = None
    read_bytes: int | None = None
    written_bytes: int | None = None
    fuel: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Confinement:
    """What actually enforced a Call: the tier, its layers and how each limit held."""

    tier: Tier | None
    layers: tuple[str, ...] = ()
    held: Mapping[str, Held] = field(default_factory=dict[str, Held])


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """A system call that the kernel filter refused, how often, and what would allow it."""

    syscall: str
    count: int
    remedy: str


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptChanges:
    """What a Call changed in an overlay: a set that is kept until somebody decides about it.

    ``id`` names the set, ``workspace`` is the absolute folder it belongs to. The counts are of
    files, folders and links; ``modified`` are also changed modes. ``refused`` are never copied
    out, ``conflicts`` stand against the commit of the set. ``later`` counts what takes effect
    outside of every sandbox, and ``flagged`` names the first of these, relative to the workspace:
    hostile text. ``digest`` is the SHA-256 of the whole list of changes. (docs/workspace.md)
    """

    id: str
    workspace: str
    created: int = 0
    modified: int = 0
    deleted: int = 0
    refused: int = 0
    conflicts: int = 0
    later: int = 0
    flagged: tuple[str, ...] = ()
    digest: str = ""

    @property
    def count(self) -> int:
        """How many entries differ, the refused ones among them."""
        return self.created + self.modified + self.deleted


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a Call that ran: its result, exit and use.

    ``value`` is the result of a tool we execute ourselves. ``stdout`` and ``stderr`` are raw
    bytes of a program, cut at ``output_bytes`` (then ``truncated``). ``limit`` names the bound
    that ended the Call, if one did. ``refused`` is what seccomp refused, where it was asked for.
    ``changes`` are the sets that it left in overlays, one for each workspace.
    """

    call: str
    value: Json = None
    exit_code: int | None = None
    signal: int | None = None
    stdout: bytes = b""
    stderr: bytes = b""
    truncated: bool = False
    limit: str | None = None
    refused: tuple[Refused, ...] = ()
    changes: tuple[KeptChanges, ...] = ()
    usage: Usage = field(default_factory=Usage)
    confinement: Confinement = field(default_factory=lambda: Confinement(tier=None))

    @property
    def ok(self) -> bool:
        """Tell whether the Call ended by itself and reported success."""
        return self.limit is None and self.signal is None and self.exit_code in (None, 0)
