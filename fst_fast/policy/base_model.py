"""Which files `model.path` names: a Hugging Face folder, `mini` or `mini_tools`, a model of the Hugging Face Hub (`org/name`), or a GGUF file.

`pin` decides it once, when a command begins: a branch or tag of the Hub becomes its commit, `model.dtype: auto` becomes the type of the
weights. Every later look-up of the pinned configuration finds the commit in the local cache and needs no network. Folders and files never
cause network access.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedConfig

from fst_fast import distributed, mini
from fst_fast.config import Config, ModelConfig
from fst_fast.errors import UserError
from fst_fast.policy.gguf import plain_folder

ALLOWED = "allowed are a Hugging Face model folder, a .gguf file, 'mini', 'mini_tools', or a model of the Hub (org/name)"
_HUB = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(?:/(?P<file>.+\.gguf))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "*.py"]
_TEXT_FILES = ["*.json", "*.model", "*.jinja", "*.txt", "*.py"]
_IGNORED = ["*/*", "consolidated*"]  # the same weights in other formats


@dataclass(frozen=True)
class Found:
    """files: a Hugging Face folder or a GGUF file. commit: of the Hub's repository, 40 hex digits; "" for local files."""

    files: Path
    commit: str = ""


def find(
    path: str | Path, revision: str | None = None, *, key: str = "model.path", weights: bool = True
) -> Found:
    """The files that `path` names; a model of the Hub is downloaded into the Hugging Face cache unless it is there.

    revision: branch, tag or commit of the Hub; None: main. key: the configuration key, for errors; a `model.tokenizer` may be written
    org/name@revision. weights=False downloads the configuration and the tokenizer alone. Raises UserError."""
    name = str(path)
    hub_id, at, given = name.partition("@")
    if key == "model.tokenizer" and at and not os.path.exists(os.path.expanduser(name)):
        name, revision = hub_id, given
    local = mini.path(name) if name in mini.BASES else Path(name).expanduser()
    on_hub = None if name in mini.BASES or os.path.exists(local) else _HUB.fullmatch(name)
    if on_hub is None:
        if revision is not None:
            raise UserError(
                f"model.revision={revision!r} goes with a model of the Hub (org/name), which {key}={name!r} is not"
            )
        return Found(_local_files(local, name, key))
    revision = revision or "main"
    if not re.fullmatch(r"[\w][\w./-]*", revision, re.ASCII) or ".." in revision:
        raise UserError(f"model.revision={revision!r} is not the name of a branch, a tag or a commit")
    try:
        files = _download(on_hub["repo"], on_hub["file"], revision, weights=weights)
    except Exception as error:  # also those of the HTTP library that huggingface_hub uses
        raise UserError(_hub_trouble(error, name, revision, key)) from error
    return Found(files, (files.parents[on_hub["file"].count("/")] if on_hub["file"] else files).name)


def model_folder(
    path: str | Path, revision: str | None = None, *, key: str = "model.path", weights: bool = True
) -> Path:
    """The Hugging Face folder of what `path` names, see `find`; a GGUF file is converted once (gguf.py). Raises UserError."""
    found = find(path, revision, key=key, weights=weights)
    return _folder(found.files, f"{key}={str(path)!r}", needs_config=key == "model.path")


def _folder(files: Path, where: str, *, needs_config: bool) -> Path:
    if files.is_file():
        return plain_folder(files, where)
    if needs_config and not (files / "config.json").is_file():
        raise UserError(
            f"{where} has no config.json; {ALLOWED}, or a GGUF file of the Hub (org/name/FILE.gguf)"
        )
    return files


def pin(config: Config, note: Callable[[str], None] = lambda _: None, *, weights: bool = True) -> Config:
    """The configuration with the commit of a model of the Hub as `model.revision` and without `auto`; downloads what is missing, on each
    machine once. All processes call it. weights: see `find`. Raises UserError, the same on all of them."""
    model: ModelConfig = distributed.broadcast_result(lambda: _pinned(config.model, note, weights))
    trouble = None
    # the first process of another machine
    if distributed.rank() and os.environ.get("LOCAL_RANK", "0") == "0":
        try:
            _pinned(model, lambda _: None, weights)
        except UserError as error:
            trouble = error
    for found in distributed.all_gather(trouble):
        if found is not None:
            raise found
    return config.model_copy(update={"model": model})


def _pinned(model: ModelConfig, note: Callable[[str], None], weights: bool) -> ModelConfig:
    found = find(model.path, model.revision, weights=weights)
    folder = _folder(found.files, f"model.path={model.path!r}", needs_config=True)
    changes: dict[str, Any] = {}
    if found.commit:
        changes["revision"] = found.commit
        note(f"model {model.path}: commit {found.commit} of {model.revision or 'main'}, in {found.files}")
    if model.dtype == "auto":
        changes["dtype"] = _dtype(folder, model)
        note(f"model.dtype=auto: {changes['dtype']}")
    if model.tokenizer is not None:
        commit = find(model.tokenizer, key="model.tokenizer", weights=False).commit
        if commit:
            changes["tokenizer"] = f"{model.tokenizer.partition('@')[0]}@{commit}"
    return model.model_copy(update=changes)


def read_config(folder: Path, path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config.json of a model folder. path: how errors name it. Raises UserError."""
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.path={str(path)!r}: its config.json cannot be used: {first_line(error)}"
        ) from error


def first_line(error: Exception) -> str:
    """An error of a library in one line."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _dtype(folder: Path, model: ModelConfig) -> str:
    """The type of the weights of a folder: what its config.json says, else that of the first tensor."""
    config = read_config(folder, model.path, trust_remote_code=model.trust_remote_code)
    dtype = config.dtype or config.get_text_config().dtype
    name = str(dtype).removeprefix("torch.")
    if dtype is None:
        name = "unknown"
        with contextlib.suppress(StopIteration, SafetensorError, OSError):
            with safe_open(next(iter(sorted(folder.glob("*.safetensors")))), "pt") as tensors:
                stored = tensors.get_slice(next(iter(tensors.keys()))).get_dtype()
            name = {"F32": "float32", "BF16": "bfloat16"}.get(stored, stored)
    if name not in ("float32", "bfloat16"):
        raise UserError(
            f"model.dtype=auto: the weights of model.path={model.path!r} are of type {name}, in which nothing is trained; allowed are float32, bfloat16"
        )
    return name


def _local_files(local: Path, name: str, key: str) -> Path:
    if os.path.isfile(local) and local.suffix == ".gguf":
        return local
    if not os.path.isdir(local):
        raise UserError(f"{key}={name[:200]!r} is neither a folder nor a .gguf file; {ALLOWED}")
    files = sorted(local.glob("*.gguf"))
    if (
        (local / "config.json").is_file()
        or not files
        or (key == "model.tokenizer" and (local / "tokenizer_config.json").is_file())
    ):
        return local
    if len(files) > 1:
        raise UserError(
            f"{key}={name!r} holds {len(files)} GGUF files; name one: {', '.join(str(local / file.name) for file in files[:5])}"
        )
    return files[0]


def _download(repo: str, file: str | None, revision: str, *, weights: bool) -> Path:
    """A snapshot of the Hub in the local cache, or one file of it. A commit that is there is taken without asking the Hub."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if file:
        return Path(hf_hub_download(repo, file, revision=revision))

    def snapshot(patterns: list[str], offline: bool) -> Path:
        return Path(
            snapshot_download(
                repo,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=_IGNORED,
                local_files_only=offline,
            )
        )

    wanted = _FILES if weights else _TEXT_FILES
    if _COMMIT.fullmatch(revision):
        with contextlib.suppress(LocalEntryNotFoundError):
            folder = snapshot(wanted, True)
            if not weights or any(folder.glob(f"*.{kind}") for kind in ("safetensors", "bin")):
                return folder
    folder = snapshot(wanted, False)
    if weights and not any(folder.glob("*.safetensors")):
        snapshot(["pytorch_model*"], False)
    return folder


def _hub_trouble(error: Exception, name: str, revision: str, key: str) -> str:
    """Why a model of the Hub is not to be had, in one sentence."""
    from huggingface_hub import constants, errors

    repo = "/".join(name.split("/")[:2])
    if isinstance(error, errors.GatedRepoError):
        return f"{key}={name!r}: the Hub gives it to those who have accepted its conditions; accept them at {constants.ENDPOINT}/{repo} and set HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{key}={name!r} is neither a folder here nor a model of the Hub that HF_TOKEN may read; {ALLOWED}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"model.revision={revision!r} is not a branch, a tag or a commit of {repo}"
    if isinstance(error, errors.LocalEntryNotFoundError):
        if constants.is_offline_mode():
            why = "HF_HUB_OFFLINE forbids a download"
        else:
            why = f"the Hub cannot be reached ({type(error.__cause__ or error).__name__})"
        return f"{key}={name!r} is neither a folder here nor whole in the Hugging Face cache {constants.HF_HUB_CACHE} (revision {revision}), and {why}"
    if isinstance(error, errors.EntryNotFoundError):
        return f"{key}={name!r}: {repo} has no such file"
    return f"{key}={name!r} cannot be downloaded: {type(error).__name__}: {first_line(error)}"
