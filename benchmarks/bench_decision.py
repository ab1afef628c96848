"""How long does a decision take: matching alone, whole, whole with a path resolved, by policy size?

``whole`` is canonicalize plus decide, the digest of the policy included, as the pipeline does it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from safeconduct.call import Call
from safeconduct.policies import Policy, canonicalize, decide, parse_policy

from .harness import finish, interleave, options, spread

_SIZES = (10, 200, 5000)
_BATCH = 50
_RULES_PER_TOOL = 5


def policy_of(size: int, workspace: Path) -> tuple[Policy, float]:
    """Write and load a policy of about ``size`` rules over many tools; return it and the time."""
    lines = [
        "version: 1",
        "tools:",
        '  fs.read: {allow: {path: ["$WS/**"]}}',
        "  shell.run: {allow: {argv: [pytest, ...]}}",
    ]
    for number in range(2, size):
        if number % _RULES_PER_TOOL == 2:
            lines.append(f"  server{number % 40}.tool{number}:")
        lines.append(f"    - {{allow: {{name: [value{number}], rest: any}}}}")
    data = "\n".join(lines).encode()
    begun = time.perf_counter()
    policy = parse_policy(data, name="bench.yaml", workspace=workspace)
    return policy, time.perf_counter() - begun


def batched(run: Callable[[], object]) -> Callable[[], None]:
    """Repeat a call so short that a clock cannot see it."""

    def many() -> None:
        for _ in range(_BATCH):
            run()

    return many


def main() -> None:
    """Measure and print."""
    chosen = options(__doc__)
    subjects: dict[str, Callable[[], object]] = {}
    loads: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        workspace = Path(folder)
        (workspace / "file.txt").write_text("x")
        shell = Call(id="c", tool="shell.run", arguments={"argv": ["pytest", "-q"]}, session="s")
        read = Call(id="c", tool="fs.read", arguments={"path": "file.txt"}, session="s")

        def whole(policy: Policy, call: Call) -> None:
            with canonicalize(policy, call) as canonical:
                decide(policy, canonical.document)

        for size in _SIZES:
            policy, loads[size] = policy_of(size, workspace)
            document = canonicalize(policy, shell).document
            subjects[f"match_{size}"] = batched(partial(decide, policy, document))
            subjects[f"whole_{size}"] = batched(partial(whole, policy, shell))
            subjects[f"whole_path_{size}"] = batched(partial(whole, policy, read))
        samples = interleave(subjects, chosen.rounds(400))
    micro = {name: spread(times, scale=1e6 / _BATCH) for name, times in samples.items()}
    figures: dict[str, object] = {
        "whole_us_200": micro["whole_200"]["median"],
        "whole_path_us_200": micro["whole_path_200"]["median"],
        "match_us_200": micro["match_200"]["median"],
        "flat_5000_over_10": round(micro["match_5000"]["median"] / micro["match_10"]["median"], 2),
        "load_ms_5000": round(loads[5000] * 1e3, 1),
    }
    finish(__doc__ or "", figures, {f"{name}_us": value for name, value in micro.items()}, chosen)


if __name__ == "__main__":
    main()
