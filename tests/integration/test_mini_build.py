"""The mini base is built the same from the same seed."""

from __future__ import annotations

from pathlib import Path

import pytest

from fst_fast.mini import world
from fst_fast.mini.build import build_base


def test_the_same_seed_builds_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fst_fast.mini.build.measure_contexts", lambda *_, **__: {})
    monkeypatch.setattr("fst_fast.mini.build._DOCUMENTS", dict.fromkeys(world.KINDS, 2))
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        build_base(tmp_path / name, seed=seed, steps=6, threads=1, log=lambda line: None)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c
