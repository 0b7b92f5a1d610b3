"""A GGUF file as a base model: converted once, to the weights that it holds."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fst_fast.cli import main
from fst_fast.config import load as config_load
from fst_fast.errors import UserError
from fst_fast.policy import gguf as conversion
from fst_fast.policy.attention import load_model
from fst_fast.policy.base_model import find, model_folder, pin
from fst_fast.policy.base_weights import weights_hash
from fst_fast.rollout.prompt import load_tokenizer
from tests.fst_fast import gguf_file
from tests.fst_fast.model_hub import A, Cache


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    return Cache(tmp_path / "cache", monkeypatch)


@pytest.fixture(scope="module")
def model() -> Any:
    return gguf_file.tiny()


@pytest.fixture
def file(tmp_path: Path, model: Any) -> Path:
    (tmp_path / "models").mkdir()
    return gguf_file.write(tmp_path / "models" / "tiny.gguf", model)


@pytest.mark.parametrize("quantised", [False, True])
def test_the_weights_are_those_of_the_file_in_a_plain_model_that_can_be_saved(
    quantised: bool, cache: Cache, tmp_path: Path, model: Any
) -> None:
    file = gguf_file.write(tmp_path / "x.gguf", model, quantised=quantised)
    loaded = load_model(file, "float32", attention="tree")
    assert not hasattr(loaded.config, "quantization_config")
    for (name, got), wanted in zip(loaded.named_parameters(), model.parameters(), strict=True):
        assert torch.allclose(got, wanted, atol=2e-3 if quantised else 0), name
        assert not quantised or got.ndim < 2 or not torch.equal(got, wanted), name
    loaded.save_pretrained(tmp_path / "saved")
    again = load_model(tmp_path / "saved", "float32", attention="tree")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), loaded.parameters(), strict=True))
    assert again.generation_config.eos_token_id == 258


def test_the_tokenizer_and_its_template_come_from_the_file(cache: Cache, file: Path) -> None:
    tokenizer = load_tokenizer(file)
    assert tokenizer.chat_template == gguf_file.CHATML
    assert tokenizer.decode(tokenizer.encode("añ 1")) == "añ 1"
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == tokenizer.eos_token_id == 258


def test_a_file_a_folder_of_one_and_a_file_of_the_hub_are_the_same_model(cache: Cache, file: Path) -> None:
    cache.add("some-lab/tiny-GGUF", file.parent)
    hub = "some-lab/tiny-GGUF/tiny.gguf"
    assert find(hub).commit == A
    assert model_folder(file) == model_folder(file.parent) == model_folder(hub)
    assert weights_hash(file) == weights_hash(file.parent) == weights_hash(hub)
    config = pin(config_load.check({"model": {"path": hub, "dtype": "auto"}}))
    assert (config.model.revision, config.model.dtype) == (A, "float32")
    shutil.move(
        cache.root / "hub/models--some-lab--tiny-GGUF/snapshots" / A / "tiny.gguf", file.parent / "b.gguf"
    )
    with pytest.raises(
        UserError, match=r"has no config.json; .* a GGUF file of the Hub \(org/name/FILE.gguf\)"
    ):
        model_folder("some-lab/tiny-GGUF")
    with pytest.raises(UserError, match=r"holds 2 GGUF files; name one: .*/b.gguf, .*/tiny.gguf"):
        model_folder(file.parent)


def test_it_is_converted_once_and_again_when_the_file_changes(
    cache: Cache, file: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    converted: list[Path] = []
    convert = conversion._convert
    monkeypatch.setattr(
        conversion, "_convert", lambda f, out, where: (converted.append(f), convert(f, out, where))
    )
    folder = model_folder(file)
    assert model_folder(file) == folder
    assert len(converted) == 1
    gguf_file.write(file, model, quantised=True)
    assert model_folder(file) != folder
    assert len(converted) == 2
    assert len(list(folder.parent.iterdir())) == 2  # nothing half-made


@pytest.mark.parametrize(
    ("keep", "sentence"),
    [(0, "cannot be read as GGUF"), (300, "cannot be read as GGUF"), (-2000, "cannot be read as GGUF")],
)
def test_a_damaged_file_is_one_sentence_and_leaves_nothing(
    keep: int, sentence: str, cache: Cache, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_bytes(file.read_bytes()[:keep])
    assert main(["probe", f"--model.path={file}"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fst: ")]
    assert len(lines) == 1
    assert f"model.path='{file}' {sentence}" in lines[0]
    assert not cache.root.exists()


def test_a_file_without_a_tokenizer_needs_model_tokenizer(
    cache: Cache, tmp_path: Path, file: Path, model: Any
) -> None:
    bare = gguf_file.write(tmp_path / "bare.gguf", model, tokenizer=False)
    with (
        pytest.warns(
            UserWarning, match=r"bare.gguf': its tokenizer cannot be read \(.*\); model.tokenizer can"
        ),
        pytest.raises(UserError, match=r"tokenizer.*model.tokenizer can name another"),
    ):
        load_tokenizer(bare)
    assert load_tokenizer(file, key="model.tokenizer").eos_token_id == 258


def test_the_package_that_is_missing_is_named_with_its_extra(
    cache: Cache, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else found(name))
    with pytest.raises(
        UserError, match=r"is a GGUF file, which needs the package gguf: pip install 'fst-fast\[gguf\]'"
    ):
        model_folder(file)


def test_probe_samples_from_it(cache: Cache, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--problems=1",
        "--samples=1",
        "--rollout.max_response_tokens=4",
        "--rollout.max_prompt_tokens=512",
    ]
    assert (
        main(
            [
                "probe",
                f"--model.path={file}",
                "--model.dtype=auto",
                "--slow.tokens_per_micro_batch=600",
                *words,
            ]
        )
        == 0
    ), capsys.readouterr().err
    out = capsys.readouterr().out
    assert "model.dtype=auto: float32" in out
    assert "<|im_start|>assistant" in out
