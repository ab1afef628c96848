"""Step "verify": which logs and witnesses a verifier trusts (C2SP tlog-policy), and is it enough.

A policy is a file of the verifier's own: logs, witnesses, groups of them and the quorum that a
checkpoint must have. Everything in it is parsed strictly, as a slip in a trust file must not widen
trust. A witness that belongs to the log's operator never makes a checkpoint a witnessed one.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from safeconduct.attestation.checkpoint import Checkpoint
from safeconduct.attestation.cosignature import CosignerKey
from safeconduct.attestation.note import Note, VerifierKey
from safeconduct.errors import TraceInvalid

from .trust_file import NONE, Group, TrustedLog, TrustedWitness, parse_lines

# LIMIT: how far ahead of the verifier's clock a cosignature may be (tlog-cosignature lets
# verifiers reject times in the future); clocks of honest machines differ by less.
_AHEAD_S = 300
_OWN = " (the operator's own, which does not count)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cosigned:
    """One witness's true cosignature on a checkpoint.

    ``time`` is in POSIX seconds, by the witness's clock. ``operator`` tells that the witness
    belongs to the log's operator: it then proves nothing that the log's own signature does not.
    """

    witness: str
    key: CosignerKey
    time: int
    operator: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a policy says about one checkpoint.

    ``log`` is the key that signed it, None when no trusted one did. ``quorum_met`` is the quorum
    of the file as it stands; ``independent`` is the quorum without the operator's witnesses, and
    not ``none``; ``asked`` tells that the quorum is not ``none``. ``ahead`` names witnesses whose
    time lies in the future; they do not count.
    """

    head: Checkpoint
    log: VerifierKey | None
    cosigned: tuple[Cosigned, ...]
    ahead: tuple[str, ...]
    quorum: str
    quorum_met: bool
    independent: bool
    asked: bool = True

    @property
    def satisfied(self) -> bool:
        """Tell whether the checkpoint is valid under the policy (tlog-policy, "What is")."""
        return self.log is not None and self.quorum_met

    @property
    def witnessed(self) -> bool:
        """Tell whether it is witnessed by others than the operator: level L3."""
        return self.log is not None and self.independent

    @property
    def enough(self) -> bool:
        """Tell whether the witnesses that the policy asks for are there, the operator's aside."""
        return self.independent or (self.quorum_met and not self.asked)

    @property
    def newest(self) -> int:
        """Return the time of the newest cosignature that is not the operator's own, or -1."""
        return max((one.time for one in self.cosigned if not one.operator), default=-1)

    def lacking(self) -> str:
        """Say in words what the policy asks for and what is there instead."""
        had = ", ".join(f"{one.witness}{_OWN * one.operator}" for one in self.cosigned) or "nobody"
        return f"your policy asks for {self.quorum}; cosigned by {had}{self.said_ahead()}"

    def said_ahead(self) -> str:
        """Name the witnesses whose time lies in the future, as the end of a sentence."""
        if not self.ahead:
            return ""
        return f"; not counted, as dated in the future: {', '.join(self.ahead)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustPolicy:
    """A parsed tlog-policy. Names are the file's octets as UTF-8, others as lone surrogates."""

    logs: tuple[TrustedLog, ...]
    witnesses: tuple[TrustedWitness, ...]
    groups: tuple[Group, ...]
    quorum: str

    @classmethod
    def parse(cls, data: bytes) -> TrustPolicy:
        """Parse a policy file strictly. Raise TraceInvalid ``trust.invalid`` naming the line."""
        logs, witnesses, groups, quorum = parse_lines(data)
        return cls(logs=logs, witnesses=witnesses, groups=groups, quorum=quorum)

    @property
    def unsupported(self) -> tuple[str, ...]:
        """Name the witnesses whose kind of key cannot be checked here: they never count."""
        return tuple(one.name for one in self.witnesses if one.key is None)

    def evaluate(
        self,
        note: Note,
        *,
        keys: Sequence[VerifierKey] = (),
        operators: Collection[str] = (),
        now: int | None = None,
    ) -> Verdict:
        """Judge a checkpoint note: which trusted log signed it and who cosigned it.

        ``keys`` are log keys trusted besides the listed ones, whatever the origin: a key brought
        by other means, or one that a listed key was rotated to. ``operators`` names witnesses of
        the file that belong to the operator. ``now`` (POSIX seconds) refuses later times. Raise
        TraceInvalid ``checkpoint.invalid``, or ``checkpoint.signature`` and
        ``cosignature.invalid`` where a line claims a trusted key and is false: such a note must
        be refused whole (signed-note, "Signatures").
        """
        head = Checkpoint.parse(note.text)
        log = self._signer(note, head.origin, keys)
        cosigned, ahead = self._cosigned(note, head.origin, keys, operators, now)
        everybody = {one.witness for one in cosigned}
        others = {one.witness for one in cosigned if not one.operator}
        return Verdict(
            head=head,
            log=log,
            cosigned=cosigned,
            ahead=ahead,
            quorum=self.describe(),
            quorum_met=self.reached(everybody),
            independent=self.quorum != NONE and self.reached(others),
            asked=self.quorum != NONE,
        )

    def reached(self, names: Collection[str]) -> bool:
        """Tell whether cosignatures of these witnesses are a quorum."""
        if self.quorum == NONE:
            return True
        present = {one.name for one in self.witnesses if one.name in names}
        # INVARIANT: a group names only what stands before it, so one pass settles every group.
        for group in self.groups:
            if sum(member in present for member in group.members) >= group.threshold:
                present.add(group.name)
        return self.quorum in present

    def describe(self) -> str:
        """Say the quorum as a person would, for a report: ``2 of (w1, w2, w3)``."""
        said = {one.name: one.name for one in self.witnesses} | {NONE: "no witness"}
        for group in self.groups:
            members = ", ".join(said[member] for member in group.members)
            said[group.name] = f"{group.threshold} of ({members})"
        return said[self.quorum]

    def log_keys(self, origin: str) -> list[VerifierKey]:
        """Return the listed log keys that speak for an origin."""
        listed = [one.key for one in self.logs if one.key and speaks_for(one.key.name, origin)]
        return [key.of_log(origin) for key in listed]

    def _signer(self, note: Note, origin: str, keys: Sequence[VerifierKey]) -> VerifierKey | None:
        found: VerifierKey | None = None
        # A key holder may have handed its log over thousands of times: few of them are named here.
        named = {one.id for one in note.signatures}
        for key in [*self.log_keys(origin), *(key.of_log(origin) for key in keys)]:
            for line in note.signatures if key.id in named else ():
                if not key.made(line):
                    continue
                if not key.verifies(line, note.text):
                    raise TraceInvalid(
                        f"the signature of {key.name} on the checkpoint is false",
                        code="checkpoint.signature",
                    )
                found = found or key
        return found

    def _cosigned(
        self,
        note: Note,
        origin: str,
        keys: Sequence[VerifierKey],
        operators: Collection[str],
        now: int | None,
    ) -> tuple[tuple[Cosigned, ...], tuple[str, ...]]:
        log_keys = [*(one.key for one in self.logs if one.key), *keys]
        found: dict[str, Cosigned] = {}
        ahead: list[str] = []
        for witness in self.witnesses:
            key = witness.key
            for line in note.signatures:
                if key is None or not key.made(line):
                    continue
                cosignature = key.verified(line, note.text)
                if cosignature is None:
                    raise TraceInvalid(
                        f"the cosignature of {key.name} on the checkpoint is false",
                        code="cosignature.invalid",
                    )
                if now is not None and cosignature.time > now + _AHEAD_S:
                    ahead.append(witness.name)
                    continue
                known = found.get(witness.name)
                own = known.operator if known else witness.name in operators
                found[witness.name] = Cosigned(
                    witness=witness.name,
                    key=key,
                    time=cosignature.time,
                    operator=own or (known is None and of_operator(key, origin, log_keys)),
                )
        return tuple(found.values()), tuple(ahead)


def speaks_for(name: str, origin: str) -> bool:
    """Tell whether a log key's name corresponds to an origin: the same, or a path above it.

    A key of ours signs several logs, each with an origin below the key's name
    (docs/trace-format.md §6); tlog-policy asks that name and origin correspond.
    """
    return origin == name or origin.startswith(f"{name}/")


def keys_for(
    origin: str, keys: Sequence[VerifierKey], listed: Sequence[VerifierKey] = ()
) -> list[VerifierKey]:
    """Return those of the brought keys that count for a log.

    One of several must have a name that speaks for the origin: the key of one operator is no
    word on the log of another. A key that is brought alone is meant for the log at hand.
    """
    if len({key.public for key in [*keys, *listed]}) == 1:
        return list(keys)
    return [key for key in keys if speaks_for(key.name, origin)]


def moment(time: int) -> str:
    """Spell POSIX seconds for a report, in UTC, whatever number a witness wrote."""
    try:
        return f"{datetime.fromtimestamp(time, UTC):%Y-%m-%d %H:%M:%S} UTC"
    except (OverflowError, OSError, ValueError):
        return f"second {time} of POSIX time"


def of_operator(key: CosignerKey, origin: str, logs: Sequence[VerifierKey]) -> bool:
    """Tell whether a witness is recognisably the log operator's own.

    It is when it uses a log's own key pair, or when its name is the origin, the path above the
    origin, or the name of a log key that speaks for the origin, or lies below one of these.
    Whoever runs a witness under the account that holds the log's key must give it such a name
    (``safeconduct witness`` insists). An origin of ours is the operator's name and a random part.
    """
    if any(key.public == log.public for log in logs):
        return True
    names = {origin, origin.rpartition("/")[0] or origin}
    names |= {log.name for log in logs if speaks_for(log.name, origin)}
    return any(speaks_for(name, key.name) for name in names)
