"""Step "sandbox": run Python code and functions in forks of a confined, warmed interpreter.

One zygote for each profile; a fork takes one call and is destroyed. Where the kernel refuses what
a fork needs (tier landlock, no nested user namespaces) each call gets a sandbox and an interpreter
of its own: slower, and the Outcome's layers say ``python-process`` instead of ``python-fork``.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TypeAlias

import msgspec

from safeconduct.call import Confinement, Json, Outcome, Profile, Tier
from safeconduct.errors import SandboxFailed, SandboxUnavailable, ToolFailed

from . import bounds, cgroup, python_call, share
from .native import NativeSandbox
from .python_link import Hand, Zygote
from .python_place import Place
from .python_single import start_single
from .python_talk import Heard, Sink, Talk
from .shield import Shield

# LIMIT: zygotes alive at once, besides those that finish their last calls.
_ZYGOTES_MAX = 4
# LIMIT: calls at once; more wait their turn.
_CALLS_MAX = 64
# LIMIT: ended forks whose descriptors and cgroups are not yet given back.
_BACKLOG_MAX = 64
# Forks that wait for a call, in each zygote.
WAITING = 1
# Profile, workspace, and whether refused calls are counted.
_Key: TypeAlias = tuple[Profile, str, bool]


class PythonEngine:
    """Runs Python calls, each in a fresh process. Safe to use from threads."""

    def __init__(
        self, native: NativeSandbox, groups: cgroup.Cgroups | None, *, waiting: int = WAITING
    ) -> None:
        """Start nothing yet. ``waiting`` forks are kept ready in each zygote."""
        self._native = native
        self._waiting = waiting
        self._groups = groups
        self._lock = threading.Lock()
        self._backlog = threading.BoundedSemaphore(_BACKLOG_MAX)
        self._turns = threading.BoundedSemaphore(_CALLS_MAX)
        self._zygotes: OrderedDict[_Key, _Warm] = OrderedDict()
        self._behind: ThreadPoolExecutor | None = None
        self._closed = False
        self.why_no_forks = "" if native.tier is Tier.FULL else "There are no namespaces here."

    def run(
        self,
        call: str,
        *,
        source: str,
        value: Json,
        function: str = "",
        profile: Profile,
        workspace: str,
        shield: Shield,
        sink: Sink | None = None,
        explain: bool = False,
    ) -> Outcome:
        """Run ``source`` with ``input`` bound to ``value``, or its ``function`` on ``value``.

        The Outcome's value is ``{"result": …}`` for code and what the function returned otherwise;
        its ``limit`` is set where a limit ended the call. ``explain`` counts what seccomp refuses,
        in a zygote of its own. Raises ToolFailed (python.raised, .result, .died, .too_large),
        SandboxUnavailable and SandboxFailed.
        """
        place = Place(profile=profile, workspace=workspace, shield=shield, explain=explain)
        frame = _frame(source, value, function)
        with self._turns:
            warm = self._warm(place)
            if warm is None:
                return self._alone(call, frame, place, sink)
            try:
                return self._forked(call, frame, warm, sink)
            except SandboxUnavailable as error:
                # It is told before anything of the call was sent.
                if error.missing != "python-forks":
                    raise
                self.why_no_forks = error.message
            finally:
                self._leave(warm)
            return self._alone(call, frame, place, sink)

    def prepare(self, profile: Profile, *, workspace: str, shield: Shield) -> None:
        """Start the zygote of a profile ahead of its first call, and have a fork wait."""
        place = Place(profile=profile, workspace=workspace, shield=shield)
        warm = self._warm(place)
        if warm is not None:
            self._leave(warm)

    def settle(self) -> None:
        """Wait until what goes on after a call (refilling, ending) is done."""
        with self._lock:
            behind = self._behind
        if behind:
            behind.submit(lambda: None).result()

    def close(self) -> None:
        """End all zygotes with their forks. Calls that still run fail."""
        with self._lock:
            self._closed = True
            ended = list(self._zygotes.values())
            self._zygotes.clear()
            behind, self._behind = self._behind, None
        if behind:
            behind.shutdown(wait=True)
        for warm in ended:
            warm.end()

    def _forked(self, call: str, frame: bytes, warm: _Warm, sink: Sink | None) -> Outcome:
        limits = warm.place.profile.limits
        hand = warm.take()
        try:
            heard = self._talk(hand, frame, warm, sink)
            return heard.outcome(call, limits, hand.charge(), warm.confinement)
        finally:
            self._discard(hand)

    def _talk(self, hand: Hand, frame: bytes, warm: _Warm, sink: Sink | None) -> Heard:
        try:
            heard = Talk(hand, warm.place.profile, sink).hold(frame)
        except BaseException:
            warm.spent = True
            with suppress(SandboxFailed, SandboxUnavailable):
                # Whatever went wrong on our side (a sink, an interrupt), its processes end first.
                hand.fate.stop()
                hand.fate.receive()
            hand.close()
            raise
        # What crashed may have learned, or broken, something about memory that all forks share.
        warm.spent = warm.spent or heard.crashed
        return heard

    def _alone(self, call: str, frame: bytes, place: Place, sink: Sink | None) -> Outcome:
        hand = start_single(self._native, place)
        try:
            limits = place.profile.limits
            heard = Talk(hand, place.profile, sink).hold(frame)
            confinement = self._confinement("python-process", place.profile)
            return heard.outcome(call, limits, hand.charge(), confinement)
        finally:
            hand.close()

    def _confinement(self, layer: str, profile: Profile) -> Confinement:
        promised, tier = self._native.promises(), self._native.tier
        held = bounds.held(
            profile.limits, tier, in_cgroup=self._groups is not None, direct=bool(profile.write)
        )
        # Without a cgroup nobody looks at how much a fork computes.
        unseen = share.WITHOUT_CGROUP if layer == "python-fork" else ()
        layers = (name for name in promised.layers if name not in unseen)
        return replace(promised, layers=(*layers, layer), held=held)

    def _warm(self, place: Place) -> _Warm | None:
        """Return the zygote of a place, started if need be; None where there can be none."""
        with self._lock:
            if self._closed:
                raise SandboxFailed("The Python engine is closed.", step="closed")
            if self.why_no_forks:
                return None
            key = _key(place)
            warm = self._zygotes.get(key)
            if warm and not warm.serves(place):
                self._retire(key)
                warm = None
            if warm is None:
                try:
                    confinement = self._confinement("python-fork", place.profile)
                    warm = _Warm(self._native, place, self._groups, confinement)
                except SandboxUnavailable as error:
                    if error.missing != "python-forks":
                        raise
                    self.why_no_forks = error.message
                    return None
                self._zygotes[key] = warm
                while len(self._zygotes) > _ZYGOTES_MAX:
                    self._retire(next(iter(self._zygotes)))
            self._zygotes.move_to_end(key)
            warm.calls += 1
            return warm

    def _leave(self, warm: _Warm) -> None:
        """Go back to having forks wait, off the caller's path."""
        with self._lock:
            warm.calls -= 1
            key = _key(warm.place)
            if warm.spent and self._zygotes.get(key) is warm:
                self._retire(key)
            elif not self._closed:
                self._later(partial(warm.tidy, self._waiting))

    def _discard(self, hand: Hand) -> None:
        """Free what a fork held, off the caller's path; its processes are gone."""
        with self._lock:
            if not self._closed and self._backlog.acquire(blocking=False):
                self._later(partial(self._close, hand))
                return
        hand.close()

    def _close(self, hand: Hand) -> None:
        self._backlog.release()
        hand.close()

    def _retire(self, key: _Key) -> None:
        """Give a zygote no more calls; it ends after its last one."""
        warm = self._zygotes.pop(key)
        warm.retired = True
        self._later(partial(warm.tidy, self._waiting))

    def _later(self, work: Callable[[], None]) -> None:
        if self._behind is None:
            self._behind = ThreadPoolExecutor(1, thread_name_prefix="python-tools")
        self._behind.submit(work)


class _Warm:
    """A zygote, who uses it, and what it was made for. ``calls`` is kept by the engine's lock."""

    def __init__(
        self,
        native: NativeSandbox,
        place: Place,
        groups: cgroup.Cgroups | None,
        confinement: Confinement,
    ) -> None:
        self.place = place
        self.confinement = confinement
        self.calls = 0
        self.spent = False
        self.retired = False
        # Taken before it starts: what changes meanwhile makes the next call start another.
        self._seen = _fingerprint(place)
        self._lock = threading.Lock()
        self._zygote = Zygote(native, place, groups)
        self._ended = False

    def serves(self, place: Place) -> bool:
        """Tell whether calls of ``place`` may run here: same picture, healthy, not worn out."""
        healthy = not (self.spent or self._zygote.spent) and self._zygote.alive()
        return healthy and self.place.shield == place.shield and self._seen == _fingerprint(place)

    def take(self) -> Hand:
        """Return a fork."""
        with self._lock:
            if self._ended:
                raise SandboxFailed("The Python engine is closed.", step="closed")
            return self._zygote.take()

    def tidy(self, waiting: int) -> None:
        """Refill, or end what nobody uses any more."""
        if self.retired and self.calls == 0:
            self.end()
            return
        with self._lock:
            if not (self._ended or self.retired or self.spent):
                # A zygote that died is noticed, and told, by the next call.
                with suppress(SandboxFailed):
                    self._zygote.refill(waiting)

    def end(self) -> None:
        """End it; safe to call twice."""
        with self._lock:
            if not self._ended:
                self._ended = True
                self._zygote.close()


def _key(place: Place) -> _Key:
    return place.profile, place.workspace, place.explain


def _frame(source: str, value: Json, function: str) -> bytes:
    body: Mapping[str, Json] = {"source": source, "function": function, "input": value}
    try:
        frame = msgspec.json.encode(body)
    except (UnicodeEncodeError, msgspec.MsgspecError) as error:
        raise ToolFailed("The code is not valid Unicode.", code="python.source") from error
    if len(frame) > python_call.CALL_BYTES_MAX:
        raise ToolFailed("The code and its input are too large.", code="python.too_large")
    return frame


def _fingerprint(place: Place) -> Sequence[tuple[int, ...]]:
    """Name the objects that a zygote shows or covers, not only their paths.

    A file that was replaced is another file under the same name, and a mount does not follow.
    """
    shield, profile = place.shield, place.profile
    seen: list[tuple[int, ...]] = []
    for path in (*profile.read, *profile.write, *shield.anchors):
        seen.append(_object(path)[:2])
    # These are covered, so nothing holds the object: its number may be given to another.
    seen += [_object(path) for path in (*shield.protected, *shield.hidden)]
    return seen


def _object(path: str) -> tuple[int, ...]:
    try:
        status = os.lstat(path)
    except OSError as error:
        return (0, 0, error.errno or 0)
    return (status.st_dev, status.st_ino, status.st_ctime_ns)
