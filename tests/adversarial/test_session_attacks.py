"""What a call of a session tries on the calls after it, and on what is kept in the end."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from tests.overlay_desk import Desk, seated
from tests.overlay_kit import tree

from safeconduct.call import Outcome

POLICY = """\
version: 1
profiles:
  base: {read: ["$WS/**"], write: ["$WS/**"], workspace: session-overlay, limits: LIMITS}
  each: {like: base, workspace: overlay}
tools:
  shell.run:
    - {allow: {argv: [sh, -c, any]}}
    - {allow: {argv: [dash, -c, any]}, profile: each}
"""
EACH = ("dash",)


@pytest.fixture
def limits(request: pytest.FixtureRequest) -> str:
    return str(getattr(request, "param", "{wall: 20s}"))


@pytest.fixture
def desk(limits: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    with seated(monkeypatch, limits, POLICY) as one:
        yield one


def created(desk: Desk) -> int:
    """Keep the session and return how many entries it made."""
    (kept,) = desk.runtime.changes.keep_session()
    return kept.created


FILL = (
    "i=0; while (: > f$i) 2>/dev/null; do i=$((i+1)); done; for n in $(seq LEFT); do rm f$n; done"
)


@pytest.mark.parametrize("limits", ["{wall: 20s, disk: 4MiB, inodes: 256}"], indirect=True)
@pytest.mark.parametrize("left", range(5))
def test_no_call_fills_the_layer_so_that_it_cannot_be_mounted(desk: Desk, left: int) -> None:
    # The kernel makes files of its own when it mounts an overlay.
    filled = desk.run(FILL.replace("LEFT", str(left)))
    assert filled.ok
    names = desk.run("ls | wc -l; rm f10 f11 f12 f13 f14 f15; echo gone")
    assert names.stdout.endswith(b"gone\n"), names.stderr
    # What was lent for that moment is nobody's afterwards.
    outcome = desk.run("i=0; while : > g$i; do i=$((i+1)); done")
    assert outcome.limit == "inodes"
    held = int(desk.run("find . -xdev | wc -l").stdout)
    assert held <= 256 + len(tree(desk.workspace))


@pytest.mark.parametrize("limits", ["{wall: 20s, disk: 4101KiB}"], indirect=True)
def test_no_call_shuts_the_session_with_the_last_part_of_a_page(desk: Desk) -> None:
    assert desk.run("cat /dev/zero > big; ls").limit in ("disk", None)
    assert (desk.run("stat -c %s big").stdout, desk.run("rm big").exit_code) == (b"4199424\n", 0)


# Nobody can receive it any more, and only the kernel's garbage collection closes it: one a turn.
RING = """
import array, os, socket
def send(end, *given):
    rights = array.array("i", given)
    end.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
held = os.open("held", os.O_RDWR | os.O_CREAT)
for _ in range(DEPTH):
    one, other = socket.socketpair()
    send(one, held)
    os.close(held)
    one.close()
    held = other.detach()
one, other = socket.socketpair()
send(one, held, one.fileno(), other.fileno())
send(other, one.fileno(), other.fileno())
print("sent")
"""


def ring(desk: Desk, depth: int) -> Outcome:
    return desk.run(f"python3 - <<'END'\n{RING.replace('DEPTH', str(depth))}END")


def test_no_call_loses_the_session_by_files_that_are_under_way(desk: Desk) -> None:
    assert desk.run("echo x > new").ok
    assert ring(desk, 400).stdout == b"sent\n"
    # Some seconds, after which those that keep would have given up.
    assert created(desk) == 2
    assert ring(desk, 400).stdout == b"sent\n"
    assert desk.run("cat held; echo seen").stdout == b"seen\n"
    assert created(desk) == 1


@pytest.mark.parametrize("mode", ["000", "100", "300", "400", "600"])
def test_no_call_takes_the_right_away_to_look_at_its_changes(desk: Desk, mode: str) -> None:
    # Without root the layer belongs to whoever compares it, and the rights of an owner count.
    script = f"mkdir -p m/n; echo x > m/n/f; chmod {mode} m/n/f m/n m; chmod {mode} ."
    (kept,) = desk.run(script, under=EACH).changes
    assert kept.created == 3
    for _ in range(2):
        assert desk.run(f"chmod 700 m m/n 2>/dev/null; {script}").exit_code is not None
        (found,) = desk.runtime.changes.session()
        assert {change.path for change in found.changes} == {"m", "m/n", "m/n/f"}
    assert created(desk) == 3


@pytest.mark.parametrize("under", [("sh",), EACH], ids=["session", "call"])
def test_no_call_hides_what_the_overlay_noted(desk: Desk, under: tuple[str, ...]) -> None:
    # Without root an attribute of a file is told only to those who may read it.
    script = "rm -r sub; mkdir sub; echo x > sub/new; chmod 300 sub; chmod 200 file"
    outcome = desk.run(script, under=under)
    (kept,) = outcome.changes or desk.runtime.changes.keep_session()
    found = {change.path: str(change.kind) for change in desk.runtime.changes.load(kept.id).changes}
    assert found == {
        "file": "mode", "sub": "mode", "sub/inner": "deleted", "sub/other": "deleted",
        "sub/new": "created",
    }  # fmt: skip
    assert kept.conflicts == 0
    desk.runtime.changes.commit(kept.id)
    assert sorted(os.listdir(desk.workspace / "sub")) == ["new"]


def test_nothing_of_a_call_runs_in_the_next(desk: Desk) -> None:
    script = """
    python3 - <<'END' &
import ctypes, os, signal
libc = ctypes.CDLL(None)
for _ in range(6):
    libc.prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    if os.fork() == 0:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with open("alive", "a") as file:
            while True:
                file.write("x")
                file.flush()
END
    while [ ! -s alive ]; do :; done
    """
    assert desk.run(script).ok
    # The control: inside of one call it does go on.
    goes_on = "a=$(stat -c %s alive); while [ $(stat -c %s alive) = $a ]; do :; done; echo more"
    assert desk.run(script + goes_on).stdout == b"more\n"
    sizes = desk.run("stat -c %s alive; sleep 0.1; stat -c %s alive").stdout.split()
    assert sizes[0] == sizes[1]
