"""Hostile bytes and descriptors for the real launcher: it answers `failed` or closes, and lives.

The parsers themselves are fuzzed in native/launcher/src/fuzz.rs; here is what the process does.
"""

from __future__ import annotations

import importlib.resources
import os
import random
import resource
import select
import socket
import subprocess
import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import msgspec
import pytest

from safeconduct.call import Limits, Profile, Tier
from safeconduct.runtime.sandbox import seccomp
from safeconduct.runtime.sandbox.channel import encode
from safeconduct.runtime.sandbox.launcher import VERSION
from safeconduct.runtime.sandbox.layout import lay_out
from safeconduct.runtime.sandbox.plan import identity
from safeconduct.runtime.sandbox.shield import Shield

SEED = 0x5AFEC04D
ANSWER_SECONDS = 10.0
# LIMIT: what a hostile document may make the launcher keep.
GROWTH_KIB_MAX = 8 << 10
RUN: Mapping[str, object] = {
    "argv": ["true"], "environment": ["PATH=/usr/bin"], "cwd": "/", "search": ["/usr/bin"],
    "wall_ms": 5000, "rlimits": (), "descriptors": (),
}  # fmt: skip


class Server:
    """The launcher's executable, started as the supervisor starts it."""

    def __init__(self, tier: Tier) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        place = importlib.resources.files("safeconduct.runtime")
        with theirs:
            self.process = subprocess.Popen(
                [str(place / "bin" / "safeconduct-launcher"), str(theirs.fileno()), str(tier)],
                stdin=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env={},
                pass_fds=(theirs.fileno(),),
            )
        self.control = ours
        self.hello = msgspec.json.decode(receive(ours))

    def ask(self, kind: bytes, descriptors: Sequence[int] = ()) -> socket.socket:
        """Send a datagram; return where the answer comes, the first of its descriptors."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                socket.send_fds(self.control, [kind], [theirs.fileno(), *descriptors])
        except BaseException:
            ours.close()
            raise
        return ours

    def refuses(self, kind: bytes, descriptors: Sequence[int] = ()) -> bool:
        """Tell whether a request ends in `failed` or a closed line."""
        with self.ask(kind, descriptors) as answer:
            return refused(receive(answer))

    def children(self) -> list[str]:
        pid = self.process.pid
        return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()

    def memory_kib(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if "VmRSS" in line)

    def descriptors(self) -> int:
        with suppress(PermissionError):  # it is not dumpable: only root may look
            return len(os.listdir(f"/proc/{self.process.pid}/fd"))
        return 0

    def close(self) -> None:
        self.control.close()
        self.process.wait(timeout=ANSWER_SECONDS)
        assert self.process.stderr is not None
        self.process.stderr.close()


def receive(end: socket.socket) -> bytes:
    """Take one datagram and drop its descriptors; empty at the end. Fails where it hangs."""
    assert select.select([end], [], [], ANSWER_SECONDS)[0], "no answer in time"
    try:
        data, descriptors, _, _ = socket.recv_fds(end, 64 << 10, 253, socket.MSG_CMSG_CLOEXEC)
    except ConnectionResetError:
        return b""
    for fd in descriptors:
        os.close(fd)
    return data


def refused(answer: bytes) -> bool:
    return answer == b"" or answer.startswith(b'{"failed":')


def plan_of(tier: Tier, workspace: Path) -> dict[str, object]:
    """Return a plan as the supervisor writes it, without cgroups and scratch folders."""
    folder = str(workspace)
    ids, mapped = identity(folder, tier)
    granted = Profile(name="fuzz", read=(folder,), write=(folder,), limits=Limits())
    layout = lay_out(granted, tier, cwd="/", shield=Shield(), mapped=mapped)
    layers = ["landlock", "seccomp", "capabilities"]
    return {
        "version": VERSION, "layers": layers + (["namespaces"] if tier is Tier.FULL else []),
        "identity": ids, "network": "shared", "mounts": layout.mounts, "landlock": layout.landlock,
        "rlimits": [{"name": "core", "value": 0}], "cgroups": [], "name": "fuzz", "scratch": None,
        "late": False, "explain": False,
    }  # fmt: skip


@pytest.fixture(params=list(Tier), ids=str)
def tier(request: pytest.FixtureRequest) -> Tier:
    return Tier(request.param)


@pytest.fixture
def server(tier: Tier) -> Iterator[Server]:
    """Check around each attack that the launcher lives, works and has grown by nothing."""
    one = Server(tier)
    if "failed" in one.hello:
        one.close()
        pytest.skip(f"needs tier {tier}: {one.hello}")
    yield one
    one.close()


@pytest.fixture
def valid(server: Server, tier: Tier, workspace: Path) -> Iterator[tuple[bytes, bytes]]:
    """Return a document and a filter that are good, and see that they still are afterwards."""
    document = encode(plan_of(tier, workspace))
    program = seccomp.compile_filter(tier)
    works(server, document, program)
    before, memory = server.descriptors(), server.memory_kib()
    yield document, program
    works(server, document, program)
    assert server.process.poll() is None
    assert server.descriptors() == before
    assert server.memory_kib() - memory < GROWTH_KIB_MAX


def works(server: Server, document: bytes, program: bytes) -> None:
    """Make a template and a sandbox, run a program in it, and wait until all of it is gone."""
    with files(document, program) as handed, server.ask(b"template", handed) as template:
        assert b"template" in receive(template)
        with born(template) as channel:
            channel.send(encode(RUN))
            assert b'"code":0' in receive(channel)
    gone(server)


def gone(server: Server) -> None:
    deadline = time.monotonic() + ANSWER_SECONDS
    while server.children():
        assert time.monotonic() < deadline, "a template was left"
        time.sleep(0.005)


def born(template: socket.socket) -> socket.socket:
    """Have one sandbox made and return the line to it."""
    template.send(b"1")
    assert select.select([template], [], [], ANSWER_SECONDS)[0], "no sandbox in time"
    data, descriptors, _, _ = socket.recv_fds(template, 64 << 10, 16, socket.MSG_CMSG_CLOEXEC)
    assert b"sandbox" in data, data
    for fd in descriptors[1:]:
        os.close(fd)
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fileno=descriptors[0])


class Files(ExitStack):
    """Memory files, closed at the end."""

    def made(self, content: bytes, size: int | None = None) -> int:
        """Return one that holds ``content``, cut or filled up to ``size``."""
        fd = os.memfd_create("fuzz", os.MFD_CLOEXEC)
        self.callback(os.close, fd)
        os.write(fd, content)
        if size is not None:
            os.ftruncate(fd, size)
        return fd


@contextmanager
def files(*contents: bytes) -> Generator[list[int]]:
    with Files() as held:
        yield [held.made(content) for content in contents]


def chosen() -> random.Random:
    """Return where mutations come from: the same in every run."""
    return random.Random(SEED)  # noqa: S311 - nothing secret


def mutate(choice: random.Random, valid: bytes) -> bytes:
    data = bytearray(valid)
    for _ in range(choice.randint(1, 4)):
        at, to = sorted(choice.randrange(len(data) + 1) for _ in range(2))
        to = min(to, at + 64)
        kind = choice.randrange(5)
        if kind == 0:
            del data[at:to]
        elif kind == 1:
            data[at:at] = data[at:to]
        elif kind == 2:
            data[at:to] = choice.randbytes(to - at)
        elif kind == 3:
            data[at:at] = choice.choice((b"null", b"[", b"}", b"-1", b'"', b"\\u0000", b"../"))
        elif data:
            del data[at + choice.randrange(200) :]
            data.extend(b"}" * choice.randrange(2))
        data = data or bytearray(b"{")
    return bytes(data)


def test_unknown_kinds_and_sizes_are_refused(server: Server, valid: tuple[bytes, bytes]) -> None:
    choice = chosen()
    kinds = [b"", b"\0", b"template\0", b"TEMPLATE", b"clone ", b"x" * 8192, b"x" * 8193]
    kinds += [choice.randbytes(choice.randint(1, 9000)) for _ in range(100)]
    kinds += [b"template" + b"x" * 60_000]
    with files(*valid) as handed:
        for kind in kinds[1:]:
            assert server.refuses(kind, handed)


def test_any_number_of_descriptors_is_refused(server: Server, valid: tuple[bytes, bytes]) -> None:
    with files(*valid) as handed:
        for kind, right in ((b"template", 2), (b"clone", 1)):
            for count in (0, 1, 2, 3, 15, 62, 63, 64, 100, 252):
                if count != right:
                    assert server.refuses(kind, (handed * 126)[:count])
        # One more than the kernel passes along, unix(7) SCM_MAX_FD.
        with pytest.raises(OSError, match="Invalid argument"):
            server.refuses(b"template", (handed * 127)[:253])
    # Without even one there is nowhere to answer.
    server.control.send(b"template")


def test_an_end_of_file_ends_it(server: Server) -> None:
    """An empty datagram reads as the end: the supervisor never sends one."""
    server.control.send(b"")
    assert server.process.wait(timeout=ANSWER_SECONDS) == 0


def odd_files(held: Files, document: bytes) -> Iterator[int]:
    """Yield descriptors that are no documents, or not what they look like."""
    yield held.made(b"", 1 << 40)
    yield held.made(b"", 4 << 20)
    yield held.made(document, len(document) - 1)
    yield held.made(document, len(document) + 1)
    for path, flags in (
        ("/", os.O_RDONLY), ("/usr/bin/true", os.O_PATH), ("/dev/zero", os.O_RDONLY),
        ("/dev/null", os.O_WRONLY), ("/proc/self/mem", os.O_RDONLY), ("/dev/ptmx", os.O_RDWR),
    ):  # fmt: skip
        fd = os.open(path, flags | os.O_CLOEXEC)
        held.callback(os.close, fd)
        yield fd
    for fd in (*os.pipe2(os.O_CLOEXEC), os.eventfd(0), os.pidfd_open(os.getpid())):
        held.callback(os.close, fd)
        yield fd
    for kind in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET):
        for end in socket.socketpair(socket.AF_UNIX, kind):
            held.enter_context(end)
            yield end.fileno()


def test_what_is_no_document_is_refused(server: Server, valid: tuple[bytes, bytes]) -> None:
    document, program = valid
    with files(program) as handed, Files() as held:
        for odd in odd_files(held, document):
            assert server.refuses(b"template", (odd, *handed))
            assert server.refuses(b"clone", (odd,))


def test_a_file_that_changes_while_it_is_read(server: Server, valid: tuple[bytes, bytes]) -> None:
    document, program = valid
    stop = threading.Event()
    with files(document, program) as (changing, filter_):

        def never_rest() -> None:
            while not stop.is_set():
                for size in (1 << 20, 0, len(document), 4 << 20, 5 << 20):
                    os.ftruncate(changing, size)
                os.pwrite(changing, document, 0)

        writer = threading.Thread(target=never_rest)
        writer.start()
        try:
            for _ in range(200):
                with server.ask(b"template", (changing, filter_)) as answer:
                    receive(answer)  # whichever: it answers
        finally:
            stop.set()
            writer.join()
    gone(server)


def test_mutated_plans_and_clones(server: Server, valid: tuple[bytes, bytes]) -> None:
    document, program = valid
    choice = chosen()
    clone = encode(
        {
            "identity": {"uid": 1, "gid": 1, "inside": 1, "owner": None},
            "mounts": [{"kind": "bind", "source": "/usr", "target": "/usr"}],
        }
    )
    failures = 0
    for _ in range(200):
        with files(mutate(choice, document), program) as handed:
            failures += server.refuses(b"template", handed)
        with files(mutate(choice, clone)) as handed:
            failures += server.refuses(b"clone", handed)
    assert failures > 200
    gone(server)


def test_odd_filters_make_no_sandbox(server: Server, valid: tuple[bytes, bytes]) -> None:
    document, program = valid
    odd = [b"", program[:-1], program + b"\0", b"\xff" * 8, program[8:-8] + b"\xff" * 8]
    odd += [b"\0" * 32768, b"\0" * 32769]
    for broken in odd:
        with files(document, broken) as handed, server.ask(b"template", handed) as template:
            if refused(receive(template)):
                continue
            with born(template) as channel:
                with suppress(BrokenPipeError):
                    channel.send(encode(RUN))
                assert refused(receive(channel)), broken
    gone(server)


def test_mutated_programs_reach_no_further_than_their_sandbox(
    server: Server, valid: tuple[bytes, bytes]
) -> None:
    choice = chosen()
    document = encode(RUN)
    others = [b"", b"\0", b"[" * 8000, b"{" * 8192, b"x" * 8193, b"\0\0"]
    with files(*valid) as handed, server.ask(b"template", handed) as template:
        receive(template)
        for number in range(150):
            data = others[number] if number < len(others) else mutate(choice, document)
            with born(template) as channel, files(data, data) as given:
                socket.send_fds(channel, [data], given[: number % 3])
                answer = receive(channel)
                assert refused(answer) or b"exited" in answer
        with born(template) as channel, files(b"{}") as given:
            socket.send_fds(channel, [encode(RUN)], given * 200)
            assert refused(receive(channel))
    gone(server)


def test_garbage_for_a_template_makes_at_most_sandboxes(
    server: Server, valid: tuple[bytes, bytes]
) -> None:
    choice = chosen()
    with files(*valid) as handed, server.ask(b"template", handed) as template:
        receive(template)
        for _ in range(50):
            socket.send_fds(template, [choice.randbytes(choice.randint(1, 9000))], handed * 20)
            data = receive(template)
            assert b"sandbox" in data or refused(data)
    gone(server)


def test_out_of_descriptors_it_refuses_and_recovers(
    server: Server, valid: tuple[bytes, bytes]
) -> None:
    document, program = valid
    pid, before = server.process.pid, server.descriptors()
    if not before:
        pytest.skip("only root may count the descriptors of a process that is not dumpable")
    bounds = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    answers = 0
    with files(document, program) as handed:
        for spare in range(1, 12):
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (before + spare, bounds[1]))
            with server.ask(b"template", handed) as answer:
                answers += not refused(receive(answer))
            gone(server)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, bounds)
    assert answers < 11


def test_many_requests_at_once_are_bounded(server: Server, valid: tuple[bytes, bytes]) -> None:
    """Whoever asks without reading the answers fills no memory of the launcher."""
    document, program = valid
    with files(document, program) as handed, ExitStack() as open_:
        for _ in range(20):
            answer = open_.enter_context(server.ask(b"template", handed))
            with suppress(BlockingIOError):
                answer.setblocking(False)
                for _ in range(5):
                    answer.send(b"1")
    gone(server)
