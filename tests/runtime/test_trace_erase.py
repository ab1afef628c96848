"""`trace erase` and `trace export --redact` as a person types them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from safeconduct.attestation import SignerClient, TraceWriter, read_entries, read_opened
from safeconduct.attestation.privacy.erasure import finish_erasures
from safeconduct.attestation.privacy.opened import Opening
from safeconduct.attestation.privacy.vault import Vault
from safeconduct.attestation.writing.appending import Clock
from safeconduct.call import EntryKind, Json
from safeconduct.errors import Exit
from safeconduct.runtime.places import Places
from safeconduct.runtime.retention import expire_kept, keep_terms

SECONDS = 60
SECRET = "hunter2-correct-horse"
DAY_NS = 86_400 * 10**9


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Home:
    """A user's state folder with a log key, a vault and a trace."""

    root: Path

    @property
    def environment(self) -> dict[str, str]:
        return {
            "HOME": str(self.root),
            "XDG_STATE_HOME": str(self.root / "state"),
            "PATH": os.environ["PATH"],
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
        }

    @property
    def places(self) -> Places:
        return Places.of(self.environment)

    @property
    def trace(self) -> Path:
        return self.places.traces / "one"

    def run(self, *arguments: str | Path, **variables: str) -> Done:
        done = subprocess.run(
            [sys.executable, "-m", "safeconduct", *arguments],
            capture_output=True,
            text=True,
            cwd=self.root,
            env={**self.environment, **variables},
            timeout=SECONDS,
            check=False,
        )
        return Done(done.returncode, done.stdout, done.stderr)

    @contextmanager
    def writing(self, name: str = "one", *, days_ago: int = 0) -> Generator[TraceWriter]:
        trace, places = self.places.traces / name, self.places
        signer = SignerClient.start(places.key, state=places.signer, forbidden=[trace])
        try:
            clock = Clock(wall_ns=lambda: Clock().wall_ns() - days_ago * DAY_NS)
            vault = Vault.open(places.vault_key, forbidden=[trace])
            with TraceWriter.open(trace, signer=signer, vault=vault, clock=clock) as writer:
                yield writer
        finally:
            signer.close()

    def record(self, name: str = "one", *, days_ago: int = 0) -> str:
        """Record a session of one call in a trace, and return its id."""
        with self.writing(name, days_ago=days_ago) as writer:
            session = writer.open_session("local", "sdk")
            call: dict[str, Json] = {"call": "c", "tool": "t", "caller": "l", "origin": "o"}
            document: Json = {"tool": "t", "arguments": {"path": SECRET}, "workspace": "/"}
            writer.append(
                EntryKind.CALL_INTENT, call, session=session, committed={"document": document}
            )
            outcome: dict[str, Json] = {"call": "c", "status": "ok"}
            writer.append(
                EntryKind.CALL_OUTCOME, outcome, session=session, committed={"stdout": b"fine"}
            )
            writer.close_session(session)
        return session

    def opened(self, trace: Path | None = None) -> int:
        vault = Vault.find(self.places.vault_key)
        found = [one for *_, found in read_opened(trace or self.trace, vault=vault)
                 for one in found.values()]  # fmt: skip
        return sum(isinstance(one, Opening) for one in found)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path)
    home.places.prepare()
    return home


def redactions(trace: Path) -> list[dict[str, Json]]:
    return [entry.body for _, entry in read_entries(trace) if entry.kind is EntryKind.REDACTION]


def test_a_session_is_erased_by_the_beginning_of_its_name(home: Home) -> None:
    gone, kept = home.record(), home.record()
    shown = home.run("trace", "show", "one")
    assert SECRET in shown.out
    done = home.run("trace", "erase", "one", "--session", gone[:10], "--reason", "ticket 7")
    assert (done.code, gone in done.out) == (Exit.OK, True), done.err
    (body,) = redactions(home.trace)
    assert body == {"session": gone, "what": "openings", "by": "operator", "reason": "ticket 7"}
    assert home.opened() == 2
    shown = home.run("trace", "show", "one", "--session", gone)
    assert (SECRET in shown.out, "opening.missing" in shown.out) == (False, True)
    assert f"openings of session {gone} erased by operator" in home.run("trace", "show", "one").out
    assert SECRET in home.run("trace", "show", "one", "--session", kept).out
    key = home.places.public_key.read_text().strip()
    assert home.run("trace", "verify", "one", "--key", key).code == Exit.OK
    (row,) = json.loads(home.run("trace", "erase", "one", "--session", gone, "--json").out)
    assert (row["trace"], row["found"], row["blobs"]) == ("one", False, 0)


def test_by_age_all_traces_are_looked_at_without_naming_one(home: Home) -> None:
    home.record("old", days_ago=100)
    home.record("new", days_ago=80)
    home.record("older", days_ago=200)
    done = home.run("trace", "erase", "--older-than", "90d", "--json")
    assert done.code == Exit.OK, done.err
    assert [one["trace"] for one in json.loads(done.out)] == ["old", "older"]
    assert [home.opened(home.places.traces / name) for name in ("old", "new", "older")] == [0, 2, 0]
    assert home.run("trace", "erase", "--older-than", "90d").out == "there is nothing that old\n"
    assert home.run("trace", "erase", "new", "--older-than", "79d").code == Exit.OK
    assert home.opened(home.places.traces / "new") == 0


def test_a_runtime_with_retention_looks_after_older_traces(home: Home) -> None:
    for name, days in (("old", 100), ("new", 80), ("busy", 100), ("broken", 100)):
        home.record(name, days_ago=days)
        (file,) = (home.places.traces / name / "openings").iterdir()
        past = time.time() - days * 86_400
        os.utime(file, (past, past))
    (home.places.traces / "broken" / "checkpoint").write_text("no note")
    told: list[str] = []
    with home.writing("busy"), home.writing("this") as writer:
        signer = SignerClient.start(home.places.key, state=home.places.signer)
        expire_kept(
            home.places,
            besides=home.places.traces / "this",
            days=90,
            now_ms=time.time_ns() // 1_000_000,
            signer=signer,
            vault=Vault.open(home.places.vault_key),
            tell=told.append,
        )
        signer.close()
        assert writer.size
    assert [home.opened(home.places.traces / name) for name in ("old", "new", "busy")] == [0, 2, 2]
    (body,) = redactions(home.places.traces / "old")
    assert (body["by"], body["reason"]) == ("retention", "older than 90 days")
    (line,) = told
    assert "broken" in line


def test_a_runtime_with_a_wrong_clock_tells_and_erases_nothing(home: Home) -> None:
    for name in ("one", "two"):
        home.record(name, days_ago=1)
    told: list[str] = []
    for _ in range(2):
        with home.writing(days_ago=-60_000) as writer:
            signer = SignerClient.start(home.places.key, state=home.places.signer)
            keep_terms(
                writer, places=home.places, trace=home.trace, days=90,
                now_ms=time.time_ns() // 1_000_000 + 60_000 * 86_400_000,
                signer=signer, vault=Vault.open(home.places.vault_key), tell=told.append,
            )  # fmt: skip
            signer.close()
    assert [home.opened(home.places.traces / name) for name in ("one", "two")] == [2, 2]
    assert [line.split()[0] for line in told] == ["one", "two"] * 2
    assert all("clock" in line and "--older-than 90d" in line for line in told)


def test_one_broken_trace_keeps_no_other_from_being_erased(home: Home) -> None:
    for name in ("a-first", "b-broken", "c-last"):
        home.record(name, days_ago=100)
    (home.places.traces / "b-broken" / "checkpoint").write_text("no note")
    done = home.run("trace", "erase", "--older-than", "90d")
    assert (done.code, "b-broken was not erased" in done.err) == (Exit.FAILURE, True), done
    assert [home.opened(home.places.traces / name) for name in ("a-first", "c-last")] == [0, 0]
    assert done.out.count("erased") == 2


def test_while_a_runtime_writes_it_is_ordered_and_done_later(home: Home) -> None:
    session = home.record()
    with home.writing() as writer:
        done = home.run("trace", "erase", "one", "--session", session)
        assert (done.code, "nothing is erased yet" in done.err) == (Exit.FAILURE, True)
        assert home.opened() == 2
        left_out = home.run("trace", "erase", "--older-than", "1d")
        assert (left_out.code, "was left out" in left_out.err) == (Exit.OK, True)
        assert [one.session for one in finish_erasures(writer)] == [session]
        assert home.opened() == 0
    assert len(redactions(home.trace)) == 1


def test_what_is_asked_wrongly_erases_nothing(home: Home) -> None:
    session = home.record()
    wrong: list[tuple[str, ...]] = [
        ("one",),
        ("one", "--session", session, "--older-than", "9d"),
        ("one", "--session", "0000"),
        ("one", "--session", ""),
        ("one", "--session", "../x"),
        ("one", "--older-than", "90"),
        ("one", "--older-than", "-1d"),
        ("one", "--older-than", "99999d"),
        ("one", "--session", session, "--reason", "two\nlines"),
        ("--session", session),
    ]
    for arguments in wrong:
        done = home.run("trace", "erase", *arguments)
        assert done.code == Exit.USAGE, (arguments, done)
    inside = home.run("trace", "erase", "one", "--session", session, SAFECONDUCT_SANDBOX="1")
    assert inside.code == Exit.DENIED
    absent = home.run("trace", "erase", "absent", "--session", session)
    assert absent.code not in (Exit.OK, Exit.BUG)
    assert not (home.root / "absent").exists()
    assert home.opened() == 2
    assert redactions(home.trace) == []


def test_an_exposed_vault_is_refused_by_name(home: Home) -> None:
    session = home.record()
    home.places.vault_key.chmod(0o644)
    for verb in (("trace", "show", "one"), ("trace", "erase", "one", "--session", session)):
        done = home.run(*verb)
        assert (done.code, "others can read it" in done.err) == (Exit.FAILURE, True), done
        assert f"chmod go= {home.places.vault_key}" in done.err
    assert redactions(home.trace) == []


def test_export_hands_on_what_was_not_redacted(home: Home) -> None:
    session = home.record()
    out = home.root / "copy"
    done = home.run("trace", "export", "one", "-o", out, "--redact", "document")
    assert done.code == Exit.OK, done.err
    assert "1 openings in plain, 1 redacted, 0 not there" in done.out
    held = b"".join(path.read_bytes() for path in out.rglob("*") if path.is_file())
    assert (SECRET.encode() in held, b"fine" in held) == (False, True)
    key = home.places.public_key.read_text().strip()
    assert home.run("trace", "verify", out, "--key", key).code == Exit.OK
    slip = home.run("trace", "export", "one", "-o", home.root / "slip", "--redact", "documents")
    assert (slip.code, (home.root / "slip").exists()) == (Exit.USAGE, False)
    whole = home.run("trace", "export", "one", "-o", home.root / "whole", "--openings")
    assert (whole.code, home.opened(home.root / "whole")) == (Exit.OK, 2)
    mixed = home.run(
        "trace", "export", "one", "-o", home.root / "mixed", "--redact", "stdout",
        "--session", session,
    )  # fmt: skip
    assert mixed.code == Exit.USAGE
