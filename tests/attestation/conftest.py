"""Fixtures of the attestation tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from safeconduct.attestation import SignerClient, write_key

from .kit import NAME, Bench  # noqa: TID251 - the tests' own kit


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path, write_key(tmp_path / "alice.key", NAME))


@pytest.fixture
def signer(bench: Bench) -> Iterator[SignerClient]:
    client = bench.signer()
    yield client
    client.close()
