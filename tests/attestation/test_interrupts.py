"""Recording under interrupts, threads that end, and closings that meet: nothing goes on by half.

A true SIGINT is raised at the step in question: what runs there is the code that a user's Ctrl-C
meets, and no test waits for a race.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Generator, ValuesView
from contextlib import contextmanager, suppress
from types import TracebackType

import pytest

from safeconduct.attestation import SignerClient, TraceWriter, read_entries
from safeconduct.attestation.chain import OpenSession
from safeconduct.attestation.writing.group_sync import GroupSync, _Waiter
from safeconduct.call import Durability, EntryKind
from safeconduct.errors import TraceInvalid

from .kit import Bench  # noqa: TID251 - the tests' own kit

_BOUND_S = 20.0


def intend(
    writer: TraceWriter, session: str, call: str, durability: Durability = Durability.VOLATILE
) -> int:
    body = {"call": call, "tool": "t", "caller": "l", "origin": "o", "parent": None}
    return writer.append(
        EntryKind.CALL_INTENT, body, session=session, committed={"document": 1},
        durability=durability,
    )  # fmt: skip


def end(writer: TraceWriter, session: str, call: str) -> int:
    body = {"call": call, "status": "denied", "code": "x"}
    return writer.append(EntryKind.CALL_OUTCOME, body, session=session)


@contextmanager
def a_writer(bench: Bench, signer: SignerClient) -> Generator[TraceWriter]:
    """Open a trace, and give it back whatever state the test left it in."""
    writer = TraceWriter.open(bench.trace, signer=signer, heartbeat_s=None)
    try:
        yield writer
    finally:
        with suppress(TraceInvalid):
            writer.close()


def interrupted_once(work: Callable[..., object]) -> Callable[..., object]:
    """Return the same work, with a SIGINT behind its first run in the main thread."""
    done: list[bool] = []

    def both(*args: object, **kwargs: object) -> object:
        result = work(*args, **kwargs)
        if threading.current_thread() is threading.main_thread() and not done:
            done.append(True)
            signal.raise_signal(signal.SIGINT)
        return result

    return both


def in_a_thread(work: Callable[[], object]) -> list[object]:
    """Do work in a thread that must end; return its result or its error."""
    results: list[object] = []

    def run() -> None:
        try:
            results.append(work())
        except TraceInvalid as error:
            results.append(error.code)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(_BOUND_S)
    assert not thread.is_alive(), "it waits for ever"
    return results


def test_an_interrupt_of_held_ends_recording(
    bench: Bench, signer: SignerClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    with a_writer(bench, signer) as writer:
        session = writer.open_session("l", "o")
        intend(writer, session, "c1")
        monkeypatch.setattr(os, "fdatasync", interrupted_once(os.fdatasync))
        with pytest.raises(KeyboardInterrupt), writer.held():
            pass
        with pytest.raises(TraceInvalid) as refused:
            intend(writer, session, "c2")
        assert refused.value.code == "trace.interrupted"
    TraceWriter.open(bench.trace, signer=signer).close()
    assert not bench.verify().findings


def test_frames_that_an_interrupt_lost_are_followed_by_none(
    bench: Bench, signer: SignerClient
) -> None:
    class Buffer(list[bytes]):
        armed = False

        def clear(self) -> None:
            super().clear()
            if self.armed and threading.current_thread() is threading.main_thread():
                signal.raise_signal(signal.SIGINT)

    with a_writer(bench, signer) as writer:
        session = writer.open_session("l", "o")
        writer.checkpoint()
        buffer = writer._journal._buffer = Buffer()
        buffer.armed = True
        with pytest.raises(KeyboardInterrupt):
            intend(writer, session, "c1", Durability.SYNC)
        buffer.armed = False
        late = in_a_thread(lambda: intend(writer, session, "c2", Durability.SYNC))
        assert late == ["trace.write_failed"]


def test_an_interrupt_at_any_step_of_the_leader_leaves_nobody_waiting() -> None:
    class Turn:
        """The group's lock, with a SIGINT before the n-th time that the main thread takes it."""

        def __init__(self, lock: threading.Lock, at: int) -> None:
            self.lock, self.left = lock, at

        def __enter__(self) -> None:
            if threading.current_thread() is threading.main_thread():
                self.left -= 1
                if not self.left:
                    signal.raise_signal(signal.SIGINT)
            self.lock.acquire()

        def __exit__(
            self,
            kind: type[BaseException] | None,
            error: BaseException | None,
            traceback: TracebackType | None,
        ) -> None:
            self.lock.release()

    for at in (1, 2, 3):
        reached = [0]

        def sync(reached: list[int] = reached) -> int:
            reached[0] += 1
            return reached[0]

        group = GroupSync(sync)
        group.start()
        group._turn = Turn(group._turn, at)  # type: ignore[assignment]
        with pytest.raises(KeyboardInterrupt):
            group.reach(0)
        assert in_a_thread(lambda group=group: group.reach(1)) == [None]  # type: ignore[misc]
        group.close()


def test_an_interrupt_before_waking_the_next_leaves_nobody_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started, go = threading.Event(), threading.Event()
    reached = [0]

    def sync() -> int:
        started.set()
        assert go.wait(_BOUND_S)
        reached[0] += 1
        return reached[0] * 10

    group = GroupSync(sync)
    group.start()
    waiters = [threading.Thread(target=group.reach, args=(1,), daemon=True) for _ in range(3)]

    def helper() -> None:
        assert started.wait(_BOUND_S)
        for waiter in waiters:
            waiter.start()
        while len(group._waiting) < len(waiters):
            os.sched_yield()
        go.set()

    thread = threading.Thread(target=helper, daemon=True)
    thread.start()
    real = _Waiter.wake_next

    def wake_next(self: _Waiter) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.raise_signal(signal.SIGINT)
        real(self)

    monkeypatch.setattr(_Waiter, "wake_next", wake_next)
    with pytest.raises(KeyboardInterrupt):
        group.reach(0)
    for one in (thread, *waiters):
        one.join(_BOUND_S)
        assert not one.is_alive()
    group.close()


def test_closing_the_group_lets_go_of_who_waits() -> None:
    started, go = threading.Event(), threading.Event()

    def sync() -> int:
        started.set()
        assert go.wait(_BOUND_S)
        return 1

    group = GroupSync(sync)
    leader = threading.Thread(target=group.reach, args=(0,), daemon=True)
    leader.start()
    assert started.wait(_BOUND_S)
    codes: list[object] = []
    waiter = threading.Thread(
        target=lambda: codes.extend(in_a_thread(lambda: group.reach(5))), daemon=True
    )
    waiter.start()
    while not group._waiting:
        os.sched_yield()
    group.close()
    waiter.join(_BOUND_S)
    go.set()
    leader.join(_BOUND_S)
    assert codes == ["trace.write_failed"]
    assert in_a_thread(lambda: group.reach(0)) == [None]  # what is on disk is on disk


def test_an_interrupt_behind_an_append_leaves_it_to_be_signed(
    bench: Bench, signer: SignerClient
) -> None:
    with a_writer(bench, signer) as writer:
        session = writer.open_session("l", "o")
        writer.checkpoint()
        at = writer.size
        published = threading.Event()
        real = writer._checkpointing._heads.publish

        def publish(news: object) -> None:
            real(news)  # type: ignore[arg-type]
            if writer._checkpointing.published > at:
                published.set()

        writer._checkpointing._heads.publish = publish  # type: ignore[method-assign]
        place = writer._place
        writer._place = interrupted_once(place)  # type: ignore[method-assign,assignment]
        with pytest.raises(KeyboardInterrupt):
            intend(writer, session, "c")
        assert published.wait(_BOUND_S)


def test_a_thread_that_ends_ends_recording(bench: Bench, signer: SignerClient) -> None:
    def broken(*_: object, **__: object) -> None:
        ended.set()
        raise MemoryError

    for name, durability in (("_checkpoint_alone", None), ("sync", Durability.BATCH)):
        ended = threading.Event()
        with a_writer(bench, signer) as writer:
            session = writer.open_session("l", "o")
            writer.checkpoint()
            if durability is None:
                thread = writer._checkpointing._thread
                setattr(writer._checkpointing, name, broken)
            else:
                thread = writer._commits._thread
                setattr(writer._journal, name, broken)
            intend(writer, session, "c", durability or Durability.VOLATILE)
            assert ended.wait(_BOUND_S)
            thread.join(_BOUND_S)
            assert not thread.is_alive()
            with pytest.raises(TraceInvalid) as refused:
                intend(writer, session, "d")
            assert refused.value.code == "trace.interrupted"


def test_a_task_that_comes_behind_the_close_is_told(bench: Bench, signer: SignerClient) -> None:
    with a_writer(bench, signer) as writer:
        session = writer.open_session("l", "o")
        place = writer._append

        def slow(*args: object, **kwargs: object) -> int:
            index = place(*args, **kwargs)  # type: ignore[arg-type]
            in_a_thread(writer.close)
            return index

        writer._append = slow  # type: ignore[method-assign]
        body = {"call": "c", "tool": "t", "caller": "l", "origin": "o", "parent": None}
        coming = writer.append_async(
            EntryKind.CALL_INTENT, body, session=session, committed={"document": 1}
        )
        with pytest.raises(TraceInvalid) as refused:
            asyncio.run(asyncio.wait_for(coming, _BOUND_S))
        assert refused.value.code == "trace.closed"


def test_sessions_may_be_opened_while_the_heartbeat_counts_them(
    bench: Bench, signer: SignerClient
) -> None:
    class Open(dict[str, OpenSession]):
        def values(self) -> ValuesView[OpenSession]:  # type: ignore[override]
            assert lock.locked()  # who opens a session holds it
            return super().values()

    with a_writer(bench, signer) as writer:
        lock = writer._lock
        writer._chains.open = Open(writer._chains.open)
        writer._heartbeat()


def test_closing_from_many_threads_closes_once(bench: Bench, signer: SignerClient) -> None:
    writer = TraceWriter.open(bench.trace, signer=signer, heartbeat_s=None)
    writer.open_session("l", "o")
    barrier = threading.Barrier(3)
    codes: list[object] = []

    def close() -> None:
        barrier.wait(_BOUND_S)
        codes.extend(in_a_thread(writer.close))

    threads = [threading.Thread(target=close, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(_BOUND_S)
    assert codes == [None, None, None]


def test_a_close_that_is_interrupted_twice_still_gives_the_trace_back(
    bench: Bench, signer: SignerClient
) -> None:
    writer = TraceWriter.open(bench.trace, signer=signer, heartbeat_s=None)
    writer.open_session("l", "o")
    commits, checkpointing = writer._commits, writer._checkpointing
    commits.close = interrupted_once(commits.close)  # type: ignore[method-assign,assignment]
    checkpointing.close = interrupted_once(checkpointing.close)  # type: ignore[method-assign,assignment]
    with pytest.raises(KeyboardInterrupt):
        writer.close()
    writer.close()
    TraceWriter.open(bench.trace, signer=signer).close()


def test_a_close_that_is_interrupted_ends_the_log_once(bench: Bench, signer: SignerClient) -> None:
    writer = TraceWriter.open(bench.trace, signer=signer, heartbeat_s=None)
    writer.open_session("l", "o")
    writer.checkpoint = interrupted_once(writer.checkpoint)  # type: ignore[method-assign,assignment]
    with pytest.raises(KeyboardInterrupt):
        writer.close()
    writer.close()
    TraceWriter.open(bench.trace, signer=signer).close()
    assert not bench.verify().findings


def test_calls_may_end_while_the_trace_closes(bench: Bench, signer: SignerClient) -> None:
    writer = TraceWriter.open(bench.trace, signer=signer, heartbeat_s=None)
    session = writer.open_session("l", "o")
    calls = [f"c{number}" for number in range(600)]
    for call in calls:
        intend(writer, session, call)
    begun = threading.Event()
    codes: set[object] = set()

    def work() -> None:
        for call in calls:
            begun.set()
            codes.update(in_a_thread(lambda call=call: end(writer, session, call)))  # type: ignore[misc]

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert begun.wait(_BOUND_S)
    writer.close()
    thread.join(_BOUND_S)
    kinds = [entry.kind for _, entry in read_entries(bench.trace)]
    assert kinds.count(EntryKind.CALL_OUTCOME) == len(calls)
    assert kinds[-2:] == [EntryKind.SESSION_CLOSE] * 2
    assert not bench.verify().findings


def test_the_checkpoint_thread_ends_although_its_wake_up_was_cleared(
    bench: Bench, signer: SignerClient
) -> None:
    with a_writer(bench, signer) as writer:
        session = writer.open_session("l", "o")
        writer.checkpoint()
        checkpointing = writer._checkpointing
        real, there, go = checkpointing._heads.news, threading.Event(), threading.Event()

        def news() -> object:
            if threading.current_thread() is checkpointing._thread:
                there.set()
                assert go.wait(_BOUND_S)
            return real()

        checkpointing._heads.news = news  # type: ignore[method-assign,assignment]
        intend(writer, session, "c")
        assert there.wait(_BOUND_S)
        checkpointing._wake()
        go.set()
        checkpointing._thread.join(_BOUND_S)
        assert not checkpointing._thread.is_alive()
        checkpointing._aside.submit(lambda: None).result(_BOUND_S)
