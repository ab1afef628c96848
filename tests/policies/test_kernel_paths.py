"""What a path leads to is asked of the kernel: it lies inside the grant if and only if allowed.

Random trees with links of every kind. The second opinion is the kernel's alone: the path is opened
by a plain open(2) below the workspace, and where the object lies is found by walking up its
folders (openat of `..`, compared by device and inode), not by any name.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest

from safeconduct.call import Call, Effect
from safeconduct.errors import Denied
from safeconduct.policies import Policy, canonicalize, decide, parse_policy

TREES = int(os.environ.get("SAFECONDUCT_PATH_TREES", "40"))
CALLS_PER_TREE = 60
NAMES = ["a", "b", "grant", "grant-x", "Grant", "x.py", "\u00e9", "e\u0301", ".env", "*"]
Identity = tuple[int, int]

GRANTS = {
    "grant/**": "everything in one folder",
    "**": "everything in the workspace",
    "*/grant/**": "a folder of that name one level down",
    "**/*.py": "every file whose real name ends in .py",
    "grant/*": "what lies directly in one folder",
}


@dataclass(frozen=True)
class Tree:
    """A workspace, and a folder beside it that no grant covers."""

    workspace: Path
    outside: Path


def grow(random: Random, root: Path) -> Tree:
    """Make folders, files and links: relative, absolute, upwards, circular, dangling, outside."""
    workspace, outside = root / "grant-me", root / "outside"
    folders = [workspace, workspace / "grant"]
    outside.mkdir(parents=True)
    (outside / "x.py").write_text("secret")
    (workspace / "grant").mkdir(parents=True)
    for _ in range(random.randint(4, 14)):
        parent = random.choice(folders)
        path = parent / random.choice(NAMES)
        if path.is_symlink() or path.exists():
            continue
        kind = random.random()
        if kind < 0.4:
            path.mkdir()
            folders.append(path)
        elif kind < 0.6:
            path.write_text("x")
        else:
            path.symlink_to(target(random, path, folders, workspace, outside))
    return Tree(workspace, outside)


def target(
    random: Random, link: Path, folders: list[Path], workspace: Path, outside: Path
) -> str | Path:
    somewhere = random.choice(folders)
    return random.choice(
        [
            os.path.relpath(somewhere, link.parent),
            os.path.relpath(somewhere / random.choice(NAMES), link.parent),
            somewhere,
            outside,
            os.path.relpath(outside, link.parent),
            os.path.relpath(workspace.parent, link.parent) + "/" + workspace.name + "/grant",
            link.name,
            "..",
            ".",
            "nothing",
            "/proc/self/cwd",
            "/",
        ]
    )


def spelling(random: Random, tree: Tree) -> str:
    """Spell a path as an agent might: through links, with dots, doubled slashes, absolute."""
    words = random.choices([*NAMES, ".", "", ".."], weights=[6] * len(NAMES) + [2, 2, 1], k=4)
    text = "/".join(words[: random.randint(1, 4)])
    if random.random() < 0.7:
        # What is there, and a step behind it, which may lead through a link.
        there = [str(path.relative_to(tree.workspace)) for path in tree.workspace.rglob("*")]
        behind = random.choice(["", "", "", "/", "/.", "/grant", "/x.py", "/..", "/" + text])
        text = random.choice(["", "", "./", ".//"]) + random.choice(there) + behind
    start = random.random()
    if start < 0.2:
        return f"{tree.workspace}/{text}"
    if start < 0.3:
        return str(tree.outside / random.choice(["x.py", "", "."]))
    return text or "."


@contextmanager
def opened(path: str, workspace: Path) -> Generator[int | None]:
    """Open what the words say, from the workspace, as any program would."""
    flags = os.O_PATH | os.O_CLOEXEC
    home = os.open(workspace, flags)
    fd: int | None = None
    try:
        fd = os.open(path, flags, dir_fd=home)
    except (OSError, ValueError):
        fd = None
    try:
        yield fd
    finally:
        os.close(home)
        if fd is not None:
            os.close(fd)


def identity(fd: int) -> Identity:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def chain(fd: int, parent: int | None) -> list[Identity]:
    """Return the object and every folder above it, asked of the kernel one by one."""
    found = [identity(fd)]
    at = os.dup(parent) if parent is not None else os.open("..", os.O_PATH, dir_fd=fd)
    while True:
        found.append(identity(at))
        above = os.open("..", os.O_PATH, dir_fd=at)
        os.close(at)
        if identity(above) == found[-1]:
            os.close(above)
            return found
        at = above


def holders(fd: int, workspace: Path) -> list[tuple[Identity, str]] | None:
    """Return the names from the workspace down to an object; None where it lies elsewhere.

    Found by looking for the inode in the folders, since the corpus makes no hard links.
    """
    wanted, home = identity(fd), os.stat(workspace)
    if wanted == (home.st_dev, home.st_ino):
        return []
    for folder, folders, files in os.walk(workspace):
        for name in (*folders, *files):
            path = os.path.join(folder, name)
            status = os.lstat(path)
            if (status.st_dev, status.st_ino) == wanted:
                names = os.path.relpath(path, workspace).split("/")
                return [(wanted, name) for name in names]
    return None


def granted(grant: str, names: list[str]) -> bool:
    """Say what each of the grants means, in plain words."""
    match grant:
        case "grant/**":
            return names[:1] == ["grant"]
        case "**":
            return True
        case "*/grant/**":
            return len(names) >= 2 and names[1] == "grant"
        case "**/*.py":
            return bool(names) and names[-1].endswith(".py")
        case _:
            return len(names) == 2 and names[0] == "grant"


def answer(policy: Policy, tool: str, path: str) -> tuple[bool, Identity | None]:
    """Judge a call; where it is allowed, say which object would be used."""
    call = Call(id="1", tool=tool, arguments={"path": path}, session="s")
    try:
        with canonicalize(policy, call) as canonical:
            allowed = decide(policy, canonical.document).effect is Effect.ALLOW
            resolved = canonical.descriptors.get("path")
            fd = resolved.fd if resolved else None
            return allowed, identity(fd) if fd is not None else None
    except Denied:
        return False, None


@pytest.mark.parametrize("grant", sorted(GRANTS), ids=[GRANTS[key] for key in sorted(GRANTS)])
def test_what_is_allowed_lies_inside(grant: str, tmp_path: Path) -> None:
    seen: Counter[bool] = Counter()
    for at in range(TREES):
        random = Random(f"{grant}-{at}")  # noqa: S311 - the same draws in every run
        tree = grow(random, Path(os.path.realpath(tmp_path)) / str(at))
        rule = f'{{allow: {{path: ["$WS/{grant}"]}}}}'
        text = f"version: 1\ntools: {{fs.read: {rule}, fs.list: {rule}}}\n"
        policy = parse_policy(text.encode(), name="p", workspace=tree.workspace)
        for _ in range(CALLS_PER_TREE):
            path = spelling(random, tree)
            seen[compare(policy, grant, path, tree)] += 1
    assert min(seen[True], seen[False]) > TREES // 2, seen


def compare(policy: Policy, grant: str, path: str, tree: Tree) -> bool:
    """Hold one verdict against the kernel's; return it."""
    with opened(path, tree.workspace) as fd:
        folder = fd is not None and os.path.isdir(f"/proc/self/fd/{fd}")
        allowed, used = answer(policy, "fs.list" if folder else "fs.read", path)
        if allowed:
            # INVARIANT of the product: never allowed unless the kernel says it lies inside.
            assert fd is not None, path
            assert used == identity(fd), path
            names = holders(fd, tree.workspace)
            assert names is not None, path
            assert granted(grant, [name for _, name in names]), (path, names)
            return True
        if fd is not None and reachable(path, tree):
            names = holders(fd, tree.workspace)
            inside = names is not None and granted(grant, [name for _, name in names])
            assert not inside, f"{path} lies inside, and is refused"
    return False


def reachable(path: str, tree: Tree) -> bool:
    """Tell whether the words and links stay in the workspace, which is a promise too.

    A path that says `..`, or goes through a link that is absolute or leads out and back again,
    is refused whatever it leads to.
    """
    if ".." in path.split("/"):
        return False
    at, names = tree.workspace, path.removeprefix(str(tree.workspace)).split("/")
    if path.startswith("/") and not path.startswith(f"{tree.workspace}/"):
        return False
    for _ in range(100):
        if not names:
            return True
        name = names.pop(0)
        if name in ("", "."):
            continue
        if name == ".." and at == tree.workspace:
            return False
        at = at.parent if name == ".." else at / name
        if at.is_symlink():
            link = os.readlink(at)
            if link.startswith("/"):
                return False
            names = link.split("/") + names
            at = at.parent
    return False


def test_a_new_file_lies_where_it_was_judged(tmp_path: Path) -> None:
    seen: Counter[bool] = Counter()
    for at in range(TREES):
        random = Random(f"new-{at}")  # noqa: S311 - the same draws in every run
        tree = grow(random, Path(os.path.realpath(tmp_path)) / str(at))
        text = 'version: 1\ntools: {fs.write: {allow: {path: ["$WS/grant/**"]}}}\n'
        policy = parse_policy(text.encode(), name="p", workspace=tree.workspace)
        for index in range(CALLS_PER_TREE):
            path = f"{spelling(random, tree)}/new{index}"
            seen[write(policy, path, tree)] += 1
    assert min(seen[True], seen[False]) > TREES // 2, seen


def write(policy: Policy, path: str, tree: Tree) -> bool:
    """Create what was allowed by its descriptor, and ask the kernel where it lies."""
    grant = os.stat(tree.workspace / "grant")
    call = Call(id="1", tool="fs.write", arguments={"path": path, "content": ""}, session="s")
    try:
        with canonicalize(policy, call) as canonical:
            if decide(policy, canonical.document).effect is not Effect.ALLOW:
                return False
            resolved = canonical.descriptors["path"]
            assert resolved.parent_fd is not None
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            fd = os.open(str(resolved.name), flags, 0o600, dir_fd=resolved.parent_fd)
            try:
                above = chain(fd, resolved.parent_fd)
            finally:
                os.close(fd)
    except Denied:
        return False
    assert (grant.st_dev, grant.st_ino) in above, path
    # The words say the same to any other program.
    with opened(path, tree.workspace) as other:
        assert other is not None
        assert identity(other) == above[0], path
    return True
