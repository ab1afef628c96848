"""One load of a large policy in a fresh process, for bench_decision: its time, or its memory.

    python -m benchmarks.decision_load compile|memory|cached RULES FOLDER

prints milliseconds or megabytes. The modules are loaded before; what a first use of them costs
is part of the time.
"""

from __future__ import annotations

import gc
import sys
import time
import tracemalloc
from pathlib import Path

from safeconduct.policies.cache import PolicyCache
from safeconduct.policies.load import load_policy, parse_policy

from .decision_policies import items, to_policy


def main() -> None:
    """Load once and print one number."""
    what, size, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    file, workspace = folder / "policy.yaml", folder / "work"
    if not file.exists():
        file.write_bytes(to_policy(items(size)))
    kept = PolicyCache(folder / "kept") if what == "cached" else None
    gc.collect()
    if what == "memory":
        # What the first policy of a process brings along belongs to none.
        parse_policy(to_policy(items(10)), name="first", workspace=workspace)
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        policy = load_policy(file, workspace=workspace)
        gc.collect()
        print((tracemalloc.get_traced_memory()[0] - before) / 1e6)
        assert policy.version
        return
    begun = time.perf_counter()
    load_policy(file, workspace=workspace, cache=kept)
    print((time.perf_counter() - begun) * 1e3)


if __name__ == "__main__":
    main()
