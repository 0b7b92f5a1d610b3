"""What model.path may name, where it is found, and what is said where it is not."""

from __future__ import annotations

import json
import re
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from fst_fast import mini
from fst_fast.cli import main
from fst_fast.commands.train import resolve_config
from fst_fast.config import Config
from fst_fast.config import load as config_load
from fst_fast.errors import UserError
from fst_fast.policy.attention import load_model
from fst_fast.policy.base_model import find, model_folder, pin
from fst_fast.policy.base_weights import open_base, weights_hash
from fst_fast.rollout.prompt import load_tokenizer
from fst_fast.rollout.template import check_vocabulary, configured_chat
from tests.fst_fast.model_hub import A, B, Cache, serve

REPO = "some-lab/Mini-0.8M"
MINI = Path(mini.path())


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    return Cache(tmp_path / "cache", monkeypatch)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MINI, tmp_path / "copy"))


def configured(**model: Any) -> Config:
    return config_load.check({"model": model})


def change_weights(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({k: v + 1 for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def test_a_folder_and_mini_are_taken_as_they_are(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(copy.parent))
    monkeypatch.chdir(copy.parent)
    assert find("~/copy").files == find(copy).files == copy
    assert find("copy").files == Path("copy")
    assert find("mini").files == MINI
    config = configured(path=str(copy))
    assert pin(config) == config


def test_a_folder_that_looks_like_a_hub_id_is_the_folder(
    copy: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.add(REPO, MINI)
    local = copy.parent / REPO
    shutil.copytree(copy, local)
    monkeypatch.chdir(copy.parent)
    assert find(REPO).files == Path(REPO)
    assert find(REPO).commit == ""


def test_a_cached_model_of_the_hub_is_found_offline_and_its_commit_recorded(cache: Cache) -> None:
    snapshot = cache.add(REPO, MINI)
    said: list[str] = []
    config = pin(configured(path=REPO), said.append)
    assert config.model.revision == A
    assert said == [f"model {REPO}: commit {A} of main, in {snapshot}"]
    assert model_folder(REPO, A) == snapshot
    assert pin(config) == config
    assert weights_hash(REPO) == weights_hash("mini")
    loaded = load_model(REPO, "float32", attention="tree", revision=A)
    plain = load_model("mini", "float32", attention="tree")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("command", [["train", "--run-dir", "{run}"], ["probe"], ["probe", "--template"]])
def test_a_model_that_is_not_cached_is_one_sentence_offline_and_nothing_is_written(
    command: list[str], cache: Cache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    words = [word.format(run=tmp_path / "run") for word in command]
    assert main([*words, f"--model.path={REPO}"]) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line]
    assert line == (
        f"fst: model.path='{REPO}' is neither a folder here nor whole in the Hugging Face cache {cache.root}/hub (revision main), "
        "and HF_HUB_OFFLINE forbids a download"
    )
    assert sorted(tmp_path.rglob("*")) == before


def test_a_model_of_the_hub_is_downloaded_once_and_then_needs_no_network(
    cache: Cache, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (copy / "onnx").mkdir()
    (copy / "consolidated.safetensors").write_bytes(b"the same once more")
    with serve(monkeypatch) as hub:
        hub.repositories[REPO] = {"main": (A, copy), "v2": (B, MINI)}
        config = pin(configured(path=REPO))
        assert config.model.revision == A
        folder = model_folder(REPO, A)
        assert weights_hash(folder) == weights_hash("mini")
        assert not (folder / "consolidated.safetensors").exists()
        asked = len(hub.asked)
        assert load_tokenizer(REPO, revision=A).chat_template
        assert open_base(config)[0] == config
        assert len(hub.asked) == asked  # a commit that is cached asks nothing
        assert pin(configured(path=REPO, revision="v2")).model.revision == B
        hub.repositories[REPO]["main"] = (B, MINI)
        assert pin(configured(path=REPO)).model.revision == B  # a branch follows the Hub
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert pin(configured(path=REPO, revision="v2")).model.revision == B
    assert find(REPO, A).files == folder


def test_weights_that_are_no_safetensors_are_downloaded_where_there_are_no_others(
    cache: Cache, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    with serve(monkeypatch) as hub:
        hub.repositories[REPO] = {"main": (A, copy)}
        assert not (find(REPO).files / "pytorch_model.bin").exists()
        (copy / "model.safetensors").unlink()
        hub.repositories[REPO] = {"main": (B, copy)}
        assert (find(REPO).files / "pytorch_model.bin").exists()
        assert load_model(REPO, "float32", attention="tree", revision=B).config.model_type == "qwen3"


def test_what_the_hub_refuses_is_one_sentence(
    cache: Cache, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(monkeypatch) as hub:
        hub.repositories[REPO] = {"main": (A, MINI)}
        hub.refuse["some-lab/gated"] = (403, "GatedRepo")
        hub.refuse["some-lab/ill"] = (500, "")
        for path, revision, sentence in (
            ("some-lab/none", None, "is neither a folder here nor a model of the Hub that HF_TOKEN may read"),
            ("some-lab/gated", None, f"accept them at {constants.ENDPOINT}/some-lab/gated and set HF_TOKEN"),
            ("some-lab/ill", None, "and the Hub cannot be reached (HfHubHTTPError)"),
            (REPO, "v3", f"model.revision='v3' is not a branch, a tag or a commit of {REPO}"),
            (REPO, "c" * 40, f"is not a branch, a tag or a commit of {REPO}"),
            (f"{REPO}/Q4.gguf", None, f"{REPO} has no such file"),
            (REPO, "../../etc/passwd", "is not the name of a branch, a tag or a commit"),
            ("mini", "main", "model.revision='main' goes with a model of the Hub (org/name), which model.path='mini' is not"),
            (str(copy), "main", "goes with a model of the Hub"),
            ("a/b/c", None, "is neither a folder nor a .gguf file; allowed are"),
            ("some lab/x", None, "is neither a folder nor a .gguf file; allowed are"),
            ("https://huggingface.co/a/b", None, "is neither a folder nor a .gguf file; allowed are"),
            ("x" * 5000, None, "is neither a folder nor a .gguf file; allowed are"),
            ("a--b/" + "x" * 95, None, "cannot be downloaded: HFValidationError"),
        ):  # fmt: skip
            with pytest.raises(UserError, match=re.escape(sentence)) as refusal:
                find(path, revision)
            assert "\n" not in str(refusal.value)


def test_a_folder_causes_no_network_access_whatever_the_environment_allows(
    copy: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: Any, **_: Any) -> Any:
        raise AssertionError(f"network access: {args}")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    words = [f"--model.path={copy}", "--problems=1", "--samples=1", "--rollout.max_response_tokens=2"]
    assert main(["probe", *words]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16", None])
def test_dtype_auto_is_the_type_of_the_checkpoint(stored: str | None, copy: Path) -> None:
    tree = json.loads((copy / "config.json").read_text())
    tree.pop("torch_dtype", None)
    tree.pop("dtype", None)
    if stored:
        tree["dtype"] = stored
    (copy / "config.json").write_text(json.dumps(tree))
    config = configured(path=str(copy), dtype="auto")
    if stored == "float16":
        with pytest.raises(
            UserError,
            match=r"are of type float16, in which nothing is trained; allowed are float32, bfloat16",
        ):
            pin(config)
    else:
        first = next(iter(load_file(copy / "model.safetensors").values())).dtype
        assert pin(config).model.dtype == (stored or str(first).removeprefix("torch."))


def test_another_tokenizer_is_taken_from_a_folder_or_the_hub_and_pinned(copy: Path, cache: Cache) -> None:
    tokenizers = copy.parent / "tokenizer"
    tokenizers.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (copy / name).rename(tokenizers / name)
    with pytest.raises(
        UserError,
        match=r"makes no token of a text; is tokenizer.json missing\? model.tokenizer can name another",
    ):
        configured_chat(configured(path=str(copy)).model)
    cache.add(REPO, tokenizers)
    own, _ = configured_chat(configured(path="mini").model)
    for name, pinned in (
        (str(tokenizers), str(tokenizers)),
        (REPO, f"{REPO}@{A}"),
        (f"{REPO}@main", f"{REPO}@{A}"),
    ):
        config = pin(configured(path=str(copy), tokenizer=name))
        assert config.model.tokenizer == pinned
        chat, _ = configured_chat(config.model)
        assert chat.tokenizer.get_vocab() == own.tokenizer.get_vocab()
    with pytest.raises(
        UserError, match=r"model.tokenizer='nobody/nothing' is neither a folder here nor whole in"
    ):
        pin(configured(tokenizer="nobody/nothing"))


def test_a_tokenizer_with_tokens_that_the_model_does_not_have_is_refused() -> None:
    chat, _ = configured_chat(configured().model)
    size = len(chat.tokenizer)
    check_vocabulary(chat, size)
    with pytest.raises(
        UserError,
        match=rf"it has token {size - 1}, the model's vocabulary ends at {size - 2}; model.tokenizer",
    ):
        check_vocabulary(chat, size - 1)
    chat.tokenizer.add_tokens(["<never in a prompt>"])  # as Gemma 3's token for images
    check_vocabulary(chat, size)
    chat.tokenizer.eos_token = "<never in a prompt>"
    with pytest.raises(UserError, match=rf"it has token {size}"):
        check_vocabulary(chat, size)


def test_a_base_of_other_weights_is_refused_with_the_way_back(
    copy: Path, cache: Cache, tmp_path: Path
) -> None:
    expected = weights_hash("mini")
    change_weights(copy)
    with pytest.raises(
        UserError,
        match=r"holds other weights than the base model that the run in r began with; put those back",
    ):
        open_base(configured(path=str(copy)), run_dir=Path("r"), expected=expected)
    cache.add(REPO, MINI)
    cache.add(REPO, copy, B)  # main moves on
    with pytest.raises(
        UserError,
        match=rf"\({B}\) holds other weights .* the run's commit, which r/config.yaml holds, by --model.revision",
    ):
        open_base(configured(path=REPO), run_dir=Path("r"), expected=expected)
    assert open_base(configured(path=REPO, revision=A), run_dir=Path("r"), expected=expected)[1] == expected


def test_another_model_leaves_the_revision_of_the_old_one_behind(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(f"model: {{path: {REPO}, revision: {A}, dtype: bfloat16}}\n")
    for words, revision in (
        ([], A),
        ([f"--model.path={REPO}"], A),
        (["--model.path=mini"], None),
        (["--model.path=mini", "--model.revision=v1"], "v1"),
        (["--model.revision=v1"], "v1"),
    ):
        config = config_load.load(file, words)
        assert (config.model.revision, config.model.dtype) == (revision, "bfloat16")
    assert resolve_config(file, model="mini").model.revision is None
    assert resolve_config(file, model=REPO).model.revision == A
