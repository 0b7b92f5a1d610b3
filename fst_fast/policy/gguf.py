"""A GGUF file as a Hugging Face folder: transformers dequantises it once, and every later use reads the folder.

Reading a GGUF file takes a minute of parsing for a vocabulary of 50,000 tokens, and the model that comes out of it refuses to be saved or
trained. So its weights are put into a fresh model without the quantisation and written below the Hugging Face cache
($HF_HOME/assets/fst-fast), as float32: the exact values, 4 bytes a weight.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from fst_fast.errors import UserError
from fst_fast.run.folder import disk_errors


def plain_folder(file: Path, where: str) -> Path:
    """The folder that holds what is in the GGUF file, made at the first call. where: how errors name the file. Raises UserError."""
    from huggingface_hub import constants

    # A new transformers may read the same file better.
    name = f"{sha256(file)[:16]}-transformers-{transformers.__version__}"
    with disk_errors(f"{where} cannot be converted"):
        folder = Path(constants.HF_ASSETS_CACHE, "fst-fast", "gguf", name)
        if folder.is_dir():
            return folder
        missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
        if missing:
            raise UserError(
                f"{where} is a GGUF file, which needs the package {missing[0]}: pip install 'fst-fast[gguf]'"
            )
        tmp = folder.with_name(f".tmp-{name}-{os.getpid()}")
        try:
            _convert(file, tmp, where)
            os.rename(tmp, folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster
                raise
        finally:
            shutil.rmtree(tmp, ignore_errors=True)
    return folder


def sha256(file: Path) -> str:
    """The SHA-256 of a file, 64 hex digits; computed once while the file stays as it is."""
    return _digest(file, file.stat().st_size, file.stat().st_mtime_ns)


@functools.cache
def _digest(file: Path, size: int, mtime_ns: int) -> str:
    with open(file, "rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def _convert(file: Path, out: Path, where: str) -> None:
    how: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    more: dict[str, Any] = {}
    # newer versions can keep the weights packed, which cannot be trained
    if hasattr(transformers, "GgufConfig"):
        more["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        read, loading = AutoModelForCausalLM.from_pretrained(
            file.parent, dtype=torch.float32, output_loading_info=True, **how, **more
        )
    except Exception as error:  # the parser of the package gguf raises whatever a damaged file leads it to
        said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"{where} cannot be read as GGUF: {said}") from error
    refuse_missing(loading, where)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(read.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = read.generation_config
    plain.save_pretrained(out)
    try:
        AutoTokenizer.from_pretrained(file.parent, **how).save_pretrained(out)
    except Exception as error:  # noqa: BLE001 - tokenizers raises a plain Exception
        said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        warnings.warn(
            f"{where}: its tokenizer cannot be read ({said}); model.tokenizer can name another", stacklevel=2
        )


def refuse_missing(loading: dict[str, Any], where: str) -> None:
    """Raise UserError where a checkpoint lacks weights of its model, which transformers would fill with random numbers. loading: what
    from_pretrained says with output_loading_info."""
    missing = sorted(loading["missing_keys"])
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(f"{where} lacks weights of its model: {', '.join(missing[:3])}{more}")
