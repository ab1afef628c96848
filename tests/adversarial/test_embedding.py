"""A Runtime inside other people's programs: threads, asyncio, forks, signal handlers, exits.

Each program is a process of its own that prints one JSON object; it must end by itself and leave
no process behind.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from safeconduct.runtime.sandbox.machine import Machine

SECONDS = 120
POLICY = """\
version: 1
workspace: {workspace}
profiles: {{base: {{read: ["$WS/**"], limits: {{wall: 30s}}}}}}
tools: {{shell.run: {{allow: any}}}}
"""
HEAD = """
import asyncio, json, os, signal, sys, threading, time
from safeconduct.errors import Error
from safeconduct import Runtime
def start(): return Runtime.from_policy(sys.argv[1])
def echo(runtime, word): return runtime.call("shell.run", argv=["echo", str(word)]).stdout.decode()
"""

Program = Callable[[str], Any]


@pytest.fixture
def program(workspace: Path, tmp_path: Path, machine: Machine) -> Program:
    """Run a program with the package and return what it printed."""
    if all(machine.tiers.values()):
        pytest.skip("no tier is in force here")
    policy = tmp_path / "policy.yaml"
    policy.write_text(POLICY.format(workspace=workspace))

    def run(code: str) -> Any:  # noqa: ANN401 - a parse boundary
        done = subprocess.run(
            [sys.executable, "-c", HEAD + textwrap.dedent(code), str(policy)],
            capture_output=True, text=True, timeout=SECONDS, cwd=workspace, check=False,
            env={**os.environ, "XDG_STATE_HOME": str(tmp_path / "state")},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        # The signer, which has its key file open, ends when it sees that its channel is closed.
        deadline = time.monotonic() + SECONDS
        while (left := _holding(str(tmp_path))) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not left, "a process is left that holds the trace"
        return json.loads(done.stdout)

    return run


def _holding(folder: str) -> list[int]:
    """Return the processes that have a file below a folder open."""
    found: list[int] = []
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        try:
            held = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
        except OSError:
            continue
        if any(path.startswith(folder) for path in held):
            found.append(pid)
    return found


def test_many_threads_share_one_runtime(program: Program) -> None:
    said = program("""
        said = {}
        def work(number):
            for turn in range(4): said[f"{number}.{turn}"] = echo(runtime, f"{number}.{turn}")
        with start() as runtime:
            echo(runtime, "warm")
            before = len(os.listdir("/proc/self/fd"))
            threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
            for one in threads: one.start()
            for one in threads: one.join()
            # What a call held is freed off its path: wait for that, with a bound.
            deadline = time.monotonic() + 10
            while (after := len(os.listdir("/proc/self/fd"))) > before:
                if time.monotonic() > deadline: break
                time.sleep(0.01)
        print(json.dumps({"said": said, "more": after - before}))
    """)
    assert said["said"] == {f"{n}.{t}": f"{n}.{t}\n" for n in range(8) for t in range(4)}
    # The next sandbox may be at hand (its channel, its pidfd, the pipes of its output), and files
    # of the trace be open that come with its first head: fewer than one for each thread or call.
    assert said["more"] < 8, "descriptors grow with calls"


def test_gathered_calls_leave_the_loop_free(program: Program) -> None:
    said = program("""
        async def main():
            async with start() as runtime:
                ticks, over = 0, asyncio.Event()
                async def tick():
                    nonlocal ticks
                    while not over.is_set():
                        ticks += 1
                        await asyncio.sleep(0)
                ticking = asyncio.create_task(tick())
                calls = [runtime.acall("shell.run", argv=["echo", str(n)]) for n in range(16)]
                outcomes = await asyncio.gather(*calls)
                over.set()
                await ticking
            print(json.dumps({"said": [o.stdout.decode() for o in outcomes], "ticks": ticks}))
        asyncio.run(main())
    """)
    assert said["said"] == [f"{number}\n" for number in range(16)]
    assert said["ticks"] > 16


def test_a_cancelled_call_ends_and_the_runtime_lives(program: Program) -> None:
    said = program("""
        async def main():
            async with start() as runtime:
                waiting = asyncio.create_task(runtime.acall("shell.run", argv=["sleep", "1"]))
                await asyncio.sleep(0.1)
                waiting.cancel()
                try: await waiting
                except asyncio.CancelledError: cancelled = True
                after = (await runtime.acall("shell.run", argv=["echo", "after"])).stdout.decode()
            print(json.dumps([cancelled, after]))
        asyncio.run(main())
    """)
    assert said == [True, "after\n"]


def test_a_fork_of_a_threaded_program_is_refused_and_harms_nothing(program: Program) -> None:
    said = program("""
        with start() as runtime:
            stop, turns = threading.Event(), []
            def work():
                while not stop.is_set(): turns.append(echo(runtime, "thread"))
            thread = threading.Thread(target=work)
            thread.start()
            codes = []
            for _ in range(3):
                read, write = os.pipe()
                child = os.fork()
                if child == 0:
                    signal.alarm(60)
                    try: told = echo(runtime, "child")
                    except Error as error: told = error.code
                    os.write(write, told.encode())
                    runtime.close()
                    os._exit(0)
                os.close(write)
                with open(read) as pipe: codes.append(pipe.read())
                os.waitpid(child, 0)
            stop.set()
            thread.join()
            after = echo(runtime, "parent")
        print(json.dumps({"codes": codes, "turns": sorted(set(turns)), "after": after}))
    """)
    assert (said["turns"], said["after"]) == (["thread\n"], "parent\n")
    # Refused with a code, not answered with another process's call and not run unrecorded.
    assert all("." in code and "child" not in code for code in said["codes"]), said


def test_signal_handlers_and_masks_are_left_alone(program: Program) -> None:
    said = program("""
        def mine(*_): pass
        numbers = [s for s in signal.valid_signals() if s not in (signal.SIGKILL, signal.SIGSTOP)]
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGUSR1):
            signal.signal(number, mine)
        def state():
            handlers = {int(n): repr(signal.getsignal(n)) for n in numbers}
            return handlers, [int(n) for n in signal.pthread_sigmask(signal.SIG_BLOCK, [])]
        before = state()
        with start() as runtime:
            echo(runtime, "x")
            during = state()
        print(json.dumps([before == during, before == state()]))
    """)
    assert said == [True, True]


@pytest.mark.parametrize("handler", ["signal.SIG_IGN", "reap"])
def test_a_program_that_reaps_every_child_keeps_its_calls(program: Program, handler: str) -> None:
    # Servers do: the launcher's and the signer's exit codes are then gone when we ask.
    said = program(f"""
        def reap(*_):
            try:
                while os.waitpid(-1, os.WNOHANG)[0]: pass
            except ChildProcessError: pass
        signal.signal(signal.SIGCHLD, {handler})
        with start() as runtime:
            said = [echo(runtime, n) for n in range(3)]
        print(json.dumps(said))
    """)
    assert said == ["0\n", "1\n", "2\n"]


def test_a_thread_calls_on_while_the_main_thread_ends(program: Program) -> None:
    said = program("""
        runtime = start()
        def work():
            threading.main_thread().join()
            said = [echo(runtime, n) for n in range(3)]
            runtime.close()
            print(json.dumps(said))
        threading.Thread(target=work).start()
    """)
    assert said == ["0\n", "1\n", "2\n"]


def test_a_program_that_never_closes_leaves_nothing(program: Program) -> None:
    assert program('print(json.dumps(echo(start(), "x")))') == "x\n"


def test_closing_under_running_calls_ends_them_with_a_code(program: Program) -> None:
    said = program("""
        runtime, begun, told = start(), threading.Barrier(5), []
        def work():
            begun.wait()
            try: told.append(runtime.call("shell.run", argv=["sleep", "20"]).exit_code)
            except Error as error: told.append(error.code)
        threads = [threading.Thread(target=work) for _ in range(4)]
        for one in threads: one.start()
        begun.wait()
        runtime.close()
        for one in threads: one.join()
        print(json.dumps(told))
    """)
    assert len(said) == 4
    assert all(isinstance(code, str) and "." in code for code in said), said


def test_two_runtimes_in_one_program(program: Program) -> None:
    said = program("""
        with start() as one, start() as other:
            said = [echo(one, 1), echo(other, 2), echo(one, 3)]
            apart = one.trace != other.trace
        print(json.dumps([said, apart]))
    """)
    assert said == [["1\n", "2\n", "3\n"], True]
