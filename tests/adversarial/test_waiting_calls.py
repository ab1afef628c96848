"""Attack other sessions of a program by calls that wait: threads are what they share."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from safeconduct import Denied, Runtime
from safeconduct.call import Call, Decision

SECONDS = 20.0
# anyio lends so many threads to one program.
LENT = 40
POLICY = """
version: 1
profiles: {base: {read: ["$WS/**"]}}
tools: {fs.read: {allow: {path: ["$WS/free"]}}, fs.list: {ask: {path: ["$WS/**"]}}}
"""


class Person:
    """Somebody who has not made up their mind yet."""

    def __init__(self) -> None:
        self.asked = threading.Semaphore(0)
        self.decided = threading.Event()

    def __call__(self, call: Call, decision: Decision) -> str | None:
        self.asked.release()
        assert self.decided.wait(3 * SECONDS)
        return None

    def was_asked(self, times: int) -> None:
        """Wait until so many calls wait for the answer."""
        for _ in range(times):
            assert self.asked.acquire(timeout=SECONDS)


def start(folder: Path, approver: Person) -> Runtime:
    """Start a session of its own."""
    workspace = folder / "ws"
    workspace.mkdir(parents=True)
    (workspace / "free").write_text("free\n")
    (folder / "policy.yaml").write_text(POLICY)
    return Runtime.from_policy(
        folder / "policy.yaml", workspace=workspace, trace=folder / "trace", approver=approver
    )


@pytest.mark.parametrize("by", ["session", "sub-agent"])
def test_calls_that_wait_hold_up_no_other_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    person = Person()

    async def attack() -> None:
        with start(tmp_path / "one", person) as one, start(tmp_path / "two", person) as two:
            asking = one if by == "session" else one.delegate("helper")
            waiting = [asyncio.create_task(asking.acall("fs.list", path=".")) for _ in range(LENT)]
            await asyncio.to_thread(person.was_asked, LENT)
            try:
                async with asyncio.timeout(SECONDS):
                    others = [two] if by == "session" else [two, one]
                    for other in others:
                        assert (await other.acall("fs.read", path="free")).value == "free\n"
                    await anyio.to_thread.run_sync(str)
                    if by == "session":
                        await two.__aexit__(None, None, None)
            finally:
                person.decided.set()
                ended = await asyncio.gather(*waiting, return_exceptions=True)
            assert {type(end) for end in ended} == {Denied}

    asyncio.run(attack())


def test_one_session_is_lent_as_many_threads_as_before_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    person = Person()

    async def attack(one: Runtime) -> None:
        asks = [asyncio.create_task(one.acall("fs.list", path=".")) for _ in range(LENT + 1)]
        await asyncio.to_thread(person.was_asked, LENT)
        assert not person.asked.acquire(blocking=False)
        person.decided.set()
        ended = await asyncio.gather(*asks, return_exceptions=True)
        assert {type(end) for end in ended} == {Denied}

    with start(tmp_path / "one", person) as one:
        for _ in range(2):  # a Runtime belongs to no event loop, and may be used in several
            person.decided.clear()
            person.asked = threading.Semaphore(0)
            asyncio.run(attack(one))
