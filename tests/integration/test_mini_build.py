"""The mini base is built the same from the same seed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fst_fast.mini import world
from fst_fast.mini.build import RECIPES, build_base


def test_the_same_seed_builds_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fst_fast.mini.build.measure_contexts", lambda *_, **__: {})
    few = replace(RECIPES["mini"], documents=dict.fromkeys(world.KINDS, 2))
    monkeypatch.setitem(RECIPES, "mini", few)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        build_base(tmp_path / name, seed=seed, steps=6, threads=1, log=lambda line: None)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_a_build_that_is_killed_goes_on_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fst_fast.mini.build.measure_contexts", lambda *_, **__: {})
    monkeypatch.setattr("fst_fast.mini.build._KEPT_EVERY", 2)
    few = replace(RECIPES["mini_tools"], documents={"hidden_facts": 2}, steps=4)
    monkeypatch.setitem(RECIPES, "mini_tools", few)

    def killed(line: str) -> None:
        if line.startswith("step 4"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_base(tmp_path / "b", "mini_tools", log=killed)
    said: list[str] = []
    build_base(tmp_path / "b", "mini_tools", log=said.append)
    assert said[0] == "continued at step 2"
    for name, seed in (("a", 0), ("c", 1)):
        build_base(tmp_path / name, "mini_tools", seed=seed, log=lambda line: None)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c
    assert {file.name for file in (tmp_path / "a").iterdir()} == {
        file.name for file in (tmp_path / "b").iterdir()
    }
