"""The programs a coding agent lives by, under the preset `coding-agent`, in both tiers.

Each runs as the preset says: the workspace is written directly, there is no network, and caches go
to the scratch folder that is HOME. What takes long runs once, in tier full;
with SAFECONDUCT_PROGRAMS=all everything runs in both tiers, by root and by an ordinary user.
docs/compatibility.md tells the outcome.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pytest

from safeconduct.call import Tier
from safeconduct.policies import read_preset
from safeconduct.runtime.sandbox.scratch import remove_tree

TESTS = Path(__file__).resolve().parents[1]
ORDINARY = 4242
# LIMIT: seconds for one answer; `go build` compiles its standard library first.
ANSWER_SECONDS = 180


@dataclass(frozen=True, kw_only=True)
class Desk:
    """A workspace and a runtime over it that somebody started."""

    workspace: Path
    tier: Tier
    owner: int
    ask: Callable[[list[str]], dict[str, str]]

    def run(self, *argv: str) -> str:
        """Run a program, expect success, return its output."""
        answer = self.ask(list(argv))
        assert answer["end"] == "0", answer
        return answer["output"]

    def sh(self, script: str) -> str:
        """Run a shell script that stops at the first failure."""
        return self.run("bash", "-euc", script)

    def folder(self, name: str, **files: str) -> Path:
        """Make a folder with files in the workspace that every user may write."""
        folder = self.workspace / name
        folder.mkdir()
        for file, text in files.items():
            (folder / file.replace("__", ".")).write_text(text)
        self.hand_over(folder)
        return folder

    def hand_over(self, folder: Path) -> None:
        """Give a folder to whoever runs the product, and let every user write.

        Started by root, tier landlock has neither the owner's id nor id-mapped mounts.
        """
        subprocess.run(["chown", "-R", f"{self.owner}:{self.owner}", str(folder)], check=True)
        subprocess.run(["chmod", "-R", "a+rwX", str(folder)], check=True)


def needs(*programs: str) -> None:
    """Skip where a program is missing on this machine."""
    for program in programs:
        if not any(os.path.exists(f"{folder}/{program}") for folder in SEARCH):
            pytest.skip(f"needs {program}")


SEARCH = ("/usr/local/bin", "/usr/bin", "/bin", "/usr/local/go/bin")


@contextmanager
def started(workspace: Path, tier: Tier, user: str) -> Generator[Desk]:
    """Start the product as root or as an ordinary user and talk to it."""
    with tempfile.TemporaryDirectory(prefix="home-") as home, ExitStack() as stack:
        policy = Path(home, "policy.yaml")
        policy.write_bytes(read_preset("coding-agent"))
        argv = [sys.executable, str(TESTS / "driver.py"), str(policy), str(workspace), str(tier)]
        owner = ORDINARY if user == "ordinary" and os.geteuid() == 0 else os.geteuid()
        subprocess.run(["chown", "-R", f"{owner}:{owner}", home, workspace], check=True)
        subprocess.run(["chmod", "-R", "a+rwX", workspace], check=True)
        if owner != os.geteuid():
            shown = [sys.prefix, sys.base_prefix, str(TESTS.parent)]
            script = str(TESTS / "as_user.py")
            start = ["unshare", "--mount", sys.executable, script, str(ORDINARY), *shown, "--"]
            argv = [*start, *argv]
        environment = {**os.environ, "HOME": home, "XDG_STATE_HOME": home, "XDG_CONFIG_HOME": home}
        process = stack.enter_context(
            subprocess.Popen(
                argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
                cwd="/",
            )
        )  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        asking, answering = process.stdin, process.stdout
        stack.callback(process.wait, 60)
        stack.callback(asking.close)
        line = answering.readline()
        assert line, "the driver did not start"
        first = cast("dict[str, str]", json.loads(line))
        if "refused" in first:
            pytest.skip(f"needs tier {tier}: {first['refused']}")

        def ask(argv: list[str]) -> dict[str, str]:
            asking.write(json.dumps(argv) + "\n")
            asking.flush()
            return cast("dict[str, str]", json.loads(answering.readline()))

        yield Desk(workspace=workspace, tier=tier, owner=owner, ask=ask)


USERS = ("root", "ordinary") if os.geteuid() == 0 else ("ordinary",)
EVERYTHING = os.environ.get("SAFECONDUCT_PROGRAMS") == "all"
MATRIX = [(tier, user) for tier in Tier for user in USERS]


def started_as(few: list[tuple[Tier, str]]) -> pytest.MarkDecorator:
    """Choose the combinations that a test runs in."""
    return pytest.mark.parametrize(
        "desk", MATRIX if EVERYTHING else few, indirect=True, scope="module",
        ids=lambda pair: f"{pair[0]}-{pair[1]}",
    )  # fmt: skip


once = started_as([(Tier.FULL, USERS[0])])
in_both_tiers = started_as([(Tier.FULL, USERS[0]), (Tier.LANDLOCK, USERS[-1])])


@pytest.fixture(scope="module")
def desk(request: pytest.FixtureRequest) -> Iterator[Desk]:
    tier, user = cast("tuple[Tier, str]", request.param)
    workspace = Path(os.path.realpath(tempfile.mkdtemp(prefix="desk-")))
    if user == "ordinary" and os.geteuid() == 0 and shutil.which("unshare") is None:
        pytest.skip("needs unshare to start as an ordinary user")
    repository(workspace)
    try:
        with started(workspace, tier, user) as one:
            yield one
    finally:
        remove_tree(str(workspace))


def repository(workspace: Path) -> None:
    """Make the workspace a repository, as its person did before any agent came."""
    if shutil.which("git") is None:
        return
    (workspace / "notes").mkdir()
    (workspace / "notes" / "text").write_text("first\n")
    for argv in (
        ["init", "-q"], ["config", "user.name", "Somebody"],
        ["config", "user.email", "a@b.example"], ["add", "notes"],
        ["commit", "-qm", "a first note"],
    ):  # fmt: skip
        subprocess.run(["git", "-C", str(workspace), *argv], check=True, capture_output=True)


def wheel(folder: Path) -> Path:
    """Write a wheel by hand: one module that says hello."""
    path = folder / "greeter-1.0-py3-none-any.whl"
    info = "greeter-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("greeter.py", "def greet():\n    return 'hello from a wheel'\n")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: greeter\nVersion: 1.0\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


def has_module(name: str) -> bool:
    """Tell whether the system's Python has a module."""
    done = subprocess.run(["/usr/bin/python3", "-I", "-c", f"import {name}"], capture_output=True)
    return done.returncode == 0


@once
def test_pip_installs_from_a_local_index(desk: Desk) -> None:
    needs("python3")
    if not has_module("pip"):
        pytest.skip("needs pip for the system's Python")
    folder = desk.folder("index")
    package = folder / "simple" / "greeter"
    package.mkdir(parents=True)
    made = wheel(package)
    (package / "index.html").write_text(f'<a href="{made.name}">{made.name}</a>')
    desk.hand_over(folder)
    install = "python3 -m pip install --disable-pip-version-check --no-index"
    desk.sh(f"cd index; {install} --find-links simple/greeter --target one greeter")
    index = f"--index-url file://{folder}/simple"
    index_only = "python3 -m pip install --disable-pip-version-check"
    desk.sh(f"cd index; {index_only} {index} --target two greeter")
    for target in ("one", "two"):
        hello = "import greeter; print(greeter.greet())"
        said = desk.sh(f"cd index; PYTHONPATH={target} python3 -c '{hello}'")
        assert said == "hello from a wheel\n"


@once
def test_pip_installs_into_a_virtual_environment(desk: Desk) -> None:
    needs("python3")
    if not has_module("ensurepip"):
        pytest.skip("needs venv with pip for the system's Python")
    folder = desk.folder("virtual")
    wheel(folder)
    desk.hand_over(folder)
    desk.sh(
        "cd virtual; python3 -m venv env; env/bin/pip install -q --disable-pip-version-check"
        " --no-index --find-links . greeter"
    )
    said = desk.sh("cd virtual; env/bin/python -c 'import greeter; print(greeter.greet())'")
    assert said == "hello from a wheel\n"


@in_both_tiers
def test_git_works_in_the_persons_repository(desk: Desk) -> None:
    needs("git")
    desk.sh("echo second >> notes/text")
    assert desk.sh("git log --format=%s%n%an") == "a first note\nSomebody\n"
    assert "modified:   notes/text" in desk.sh("git status")
    commit = "git add notes; git commit -qm 'a second note'; git gc -q; git switch -qc topic"
    if desk.tier is Tier.LANDLOCK:
        # `.git` holds protected names, and Landlock cannot take them out of a folder that may grow.
        answer = desk.ask(["bash", "-euc", commit])
        assert "index.lock': Permission denied" in answer["output"], answer
    else:
        desk.sh(commit)
        assert desk.sh("git log --oneline | wc -l").strip() == "2"
    for attack in ("git config core.pager evil", "echo evil > .git/hooks/post-commit"):
        assert desk.ask(["bash", "-euc", attack])["end"] != "0"


@in_both_tiers
def test_git_makes_a_repository_in_a_folder(desk: Desk) -> None:
    needs("git")
    desk.folder("fresh", text="x\n")
    made = desk.sh(
        "cd fresh; git init -q; git add .; "
        "git -c user.name=Agent -c user.email=agent@b.example commit -qm own; git log --format=%s"
    )
    assert made == "own\n"


@once
def test_pytest_tests_a_project(desk: Desk) -> None:
    needs("python3")
    text = (
        "def test_kept(tmp_path):\n"
        "    (tmp_path / 'x').write_text('1')\n"
        "    assert (tmp_path / 'x').read_text() == '1'\n"
    )
    folder = desk.folder("project", test_sum__py=text)
    (folder / "lib").mkdir()
    for name in ("pytest", "_pytest", "py", "pluggy", "iniconfig", "packaging", "pygments"):
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        if spec.submodule_search_locations is None:
            shutil.copy(spec.origin, folder / "lib")
        else:
            shutil.copytree(spec.submodule_search_locations[0], folder / "lib" / name)
    desk.hand_over(folder)
    assert "1 passed" in desk.sh("cd project; PYTHONPATH=lib python3 -m pytest -q test_sum.py")


@once
def test_node_and_npm_test(desk: Desk) -> None:
    needs("node", "npm")
    test = "require('node:test')('adds', () => require('node:assert').strictEqual(1 + 1, 2));\n"
    package = '{"name": "sum", "version": "1.0.0", "scripts": {"test": "node --test"}}'
    desk.folder("web", package__json=package, sum__test__js=test)
    assert desk.run("node", "-e", "console.log(6 * 7)") == "42\n"
    assert "pass 1" in desk.sh("cd web; npm test")
    desk.sh("cd web; npm pack --silent; test -s sum-1.0.0.tgz; test -d ~/.npm")


@once
def test_npm_installs_a_local_package(desk: Desk) -> None:
    needs("node", "npm")
    desk.folder("dep", package__json='{"name": "dep", "version": "1.0.0"}',
                index__js="module.exports = 'from dep';\n")  # fmt: skip
    desk.folder("app", package__json='{"name": "app", "version": "1.0.0"}')
    desk.sh("cd app; npm install --silent --no-audit --no-fund --install-links ../dep")
    assert desk.sh("cd app; node -p 'require(\"dep\")'") == "from dep\n"


@once
def test_go_builds_and_its_program_runs(desk: Desk) -> None:
    needs("go")
    main = 'package main\n\nimport "fmt"\n\nfunc main() { fmt.Println("hello from go") }\n'
    desk.folder("gopher", go__mod="module example.com/hello\n\ngo 1.21\n", main__go=main)
    assert desk.sh("cd gopher; go build -o hello . && ./hello") == "hello from go\n"


@once
def test_java_compiles_and_runs(desk: Desk) -> None:
    needs("java", "javac")
    main = 'class Main { public static void main(String[] a) { System.out.println("java"); } }\n'
    desk.folder("coffee", Main__java=main)
    assert desk.sh("cd coffee; javac Main.java && java Main") == "java\n"


@in_both_tiers
def test_gcc_and_make(desk: Desk) -> None:
    needs("gcc", "make")
    main = '#include <stdio.h>\nint main(void) { puts("made"); return 0; }\n'
    makefile = "main: main.c\n\tgcc -O1 -o $@ $<\n\nrun: main\n\t@./main\n"
    desk.folder("metal", main__c=main, Makefile=makefile)
    assert desk.sh("cd metal; make -s -j2 run") == "made\n"


@in_both_tiers
def test_python_multiprocessing(desk: Desk) -> None:
    needs("python3")
    code = "import multiprocessing as m\nwith m.Pool(2) as p: print(sum(p.map(abs, range(-9, 0))))"
    if desk.tier is Tier.LANDLOCK:
        answer = desk.ask(["python3", "-c", code])
        assert "Permission" in answer["output"] or "/dev/shm" in answer["output"], answer
        pytest.skip("tier landlock has no /dev/shm, so no POSIX semaphores")
    assert desk.run("python3", "-c", code) == "45\n"


@in_both_tiers
def test_sqlite(desk: Desk) -> None:
    needs("python3")
    desk.folder("records")
    code = (
        "import sqlite3 as s; c = s.connect('records/one.db'); c.execute('create table t(a)');"
        "c.execute('pragma journal_mode=wal'); c.execute('insert into t values (42)'); c.commit();"
        "print(c.execute('select a from t').fetchone()[0])"
    )
    assert desk.run("python3", "-c", code) == "42\n"
    needs("sqlite3")
    assert desk.run("sqlite3", "records/one.db", "select a + 1 from t") == "43\n"


@in_both_tiers
def test_archives(desk: Desk) -> None:
    needs("tar", "gzip")
    desk.folder("papers", note="kept\n")
    said = desk.sh(
        "tar czf papers.tgz papers && mkdir out && tar xzf papers.tgz -C out && cat out/papers/note"
        if desk.tier is Tier.FULL
        else "cd papers; tar czf all.tgz note; mkdir out; tar xzf all.tgz -C out; cat out/note"
    )
    assert said == "kept\n"


@in_both_tiers
def test_a_program_is_told_that_there_is_no_network(desk: Desk) -> None:
    needs("curl")
    answer = desk.ask(["curl", "-sS", "--max-time", "5", "http://127.0.0.1:9/"])
    assert answer["end"] == "7", answer
    assert answer["output"].startswith("curl: (7) "), answer


@in_both_tiers
def test_what_is_told_of_the_machine(desk: Desk) -> None:
    needs("python3", "nproc", "free")
    count = str(len(os.sched_getaffinity(0)))
    assert desk.run("nproc").strip() == count
    assert desk.run("python3", "-c", "import os; print(os.cpu_count())").strip() != "None"
    for name in ("uptime", "loadavg", "stat"):
        assert desk.run("cat", f"/proc/{name}"), name
    # The processor and the memory of the machine are not shown, and who asks is told nothing.
    for name in ("cpuinfo", "meminfo"):
        answer = desk.ask(["cat", f"/proc/{name}"])
        assert answer["output"] == "" or "Permission denied" in answer["output"], answer
    assert desk.ask(["free"])["end"] != "0"
    if desk.tier is Tier.FULL:  # in the other tier no program sees a process, its own included
        assert "ps -ef" in desk.run("ps", "-ef")
