"""How long does a decision take, by the size of the policy, and beside other policy engines?

``match`` is decide alone; ``whole`` is canonicalize plus decide, as the pipeline does it, of calls
without a path; ``whole_path`` the same of calls with one path that exists. Each is timed for ten
calls: six allowed by rules from the first to the last one, three denied, one asked about; the
figure is the median over all of them, and the slowest of the ten is in ``slowest_call`` of
the details (one that no rule grants: the operator is told what would).

The peers get the same 200 rules in their own words and the Documents that we made, ready-made as
their input, so they have less to do: ``vs_best_peer`` is the best of them over our ``whole``. A
peer that is not installed is named in ``missing_peers`` (`make peers` and the `dev` extra).
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeAlias

from safeconduct.call import Call, Document
from safeconduct.policies import Policy, canonicalize, decide, parse_policy

from .decision_policies import Case, cases, items, to_policy
from .harness import finish, interleave, options, spread
from .policy_peers import Peers, peers

_SIZES = (10, 200, 5000)
_PEER_SIZE = 200
_BATCH = 50
_LOADS = 5
_TOOLS = ("crm.read", "shell.run", "http.get")
_PATH_TOOLS = ("fs.read",)


# What is timed by a name: which kind of question, and which of its calls.
_Subjects: TypeAlias = "dict[tuple[str, int], Callable[[], object]]"


def _call(case: Case) -> Call:
    return Call(id="c", tool=case.tool, arguments=case.arguments, session="s")


def _whole(policy: Policy, call: Call) -> None:
    for _ in range(_BATCH):
        with canonicalize(policy, call) as canonical:
            decide(policy, canonical.document)


def _match(policy: Policy, document: Document) -> None:
    for _ in range(_BATCH):
        decide(policy, document)


def _documents(policy: Policy, chosen: Sequence[Case]) -> list[Document]:
    """Make the Documents of some calls and check what we say about them."""
    documents: list[Document] = []
    for case in chosen:
        with canonicalize(policy, _call(case)) as canonical:
            decision = decide(policy, canonical.document)
            assert decision.effect == case.verdict, (case, decision)
            documents.append(canonical.document)
    return documents


def _ours(workspace: Path) -> tuple[_Subjects, list[Document]]:
    """Return what is timed of ours, and the Documents the peers are asked about."""
    subjects: _Subjects = {}
    peer_documents: list[Document] = []
    for size in _SIZES:
        rules = items(size)
        policy = parse_policy(to_policy(rules), name="bench.yaml", workspace=workspace)
        plain, paths = cases(rules, _TOOLS), cases(rules, _PATH_TOOLS)
        for case in paths:
            file = workspace / str(case.arguments["path"])
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("x")
        documents = _documents(policy, plain)
        _documents(policy, paths)
        if size == _PEER_SIZE:
            peer_documents = documents
        for at, document in enumerate(documents):
            subjects[f"match_{size}", at] = partial(_match, policy, document)
            subjects[f"whole_{size}", at] = partial(_whole, policy, _call(plain[at]))
            subjects[f"whole_path_{size}", at] = partial(_whole, policy, _call(paths[at]))
    return subjects, peer_documents


def _check(found: Peers, chosen: Sequence[Case]) -> None:
    """A peer that judges otherwise does not answer the same question."""
    for name, asked in found.asked.items():
        for ask, case in zip(asked, chosen, strict=True):
            assert ask() == case.verdict, (name, case)


def _loads(folder: Path, what: str, runs: int = _LOADS) -> list[float]:
    command = [sys.executable, "-m", "benchmarks.decision_load", what, "5000", str(folder)]
    return [
        float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        for _ in range(runs)
    ]


def _micro(
    samples: Mapping[tuple[str, int], Sequence[float]],
) -> dict[str, dict[str, float]]:
    """Pool the samples of all calls of a kind; a peer is asked once per sample."""
    pooled: dict[str, list[float]] = {}
    slowest: dict[str, float] = {}
    for (kind, _), times in samples.items():
        scale = 1.0 if kind.startswith("peer_") else 1 / _BATCH
        pooled.setdefault(kind, []).extend(time * scale for time in times)
        median = round(statistics.median(times) * scale * 1e6, 3)
        slowest[kind] = max(slowest.get(kind, 0.0), median)
    return {
        kind: spread(times, scale=1e6) | {"slowest_call": slowest[kind]}
        for kind, times in pooled.items()
    }


def main() -> None:
    """Measure and print."""
    chosen = options(__doc__)
    with tempfile.TemporaryDirectory() as name:
        workspace, files = Path(name).resolve() / "work", Path(name) / "files"
        workspace.mkdir()
        files.mkdir()
        subjects, documents = _ours(workspace)
        rules = items(_PEER_SIZE)
        with peers(rules, documents, files) as found:
            _check(found, cases(rules, _TOOLS))
            for peer, asked in found.asked.items():
                subjects |= {(f"peer_{peer}", at): ask for at, ask in enumerate(asked)}
            named = {f"{kind} {at}": subject for (kind, at), subject in subjects.items()}
            timed = interleave(named, chosen.rounds(300))
            micro = _micro({key: timed[f"{key[0]} {key[1]}"] for key in subjects})
            missing, names = found.missing, tuple(found.asked)
        cold, memory = _loads(workspace.parent, "compile"), _loads(workspace.parent, "memory", 1)
        cached = _loads(workspace.parent, "cached", _LOADS + 1)[1:]
    best = min((micro[f"peer_{peer}"]["median"] for peer in names), default=None)
    whole = micro["whole_200"]["median"]
    figures: dict[str, object] = {
        "whole_us_200": whole,
        "whole_path_us_200": micro["whole_path_200"]["median"],
        "match_us_200": micro["match_200"]["median"],
        "flat_5000_over_10": round(micro["match_5000"]["median"] / micro["match_10"]["median"], 2),
        "load_ms_5000": round(statistics.median(cold), 1),
        "cached_load_ms_5000": round(statistics.median(cached), 1),
        "memory_mb_5000": round(memory[0], 2),
        "vs_best_peer": None if best is None else round(best / whole, 1),
    }
    details: dict[str, object] = {f"{name}_us": value for name, value in micro.items()}
    details |= {"load_ms": sorted(cold), "cached_load_ms": sorted(cached)}
    finish(__doc__ or "", figures, details | {"missing_peers": missing}, chosen)


if __name__ == "__main__":
    main()
