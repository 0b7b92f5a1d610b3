"""Which weights a run began with: the base model's folder is read again by every resume and `fst eval`, and nothing else guards it."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fst_fast.errors import UserError
from fst_fast.policy.attention import model_folder

_PATTERNS = ("config.json", "*.safetensors", "pytorch_model*.bin")


def weights_hash(path: str | Path) -> str:
    """SHA-256, as 64 hex digits, of the names and bytes of a model folder's config.json and weights. Raises UserError where they cannot be read."""
    folder = model_folder(path)
    files = sorted(file for pattern in _PATTERNS for file in folder.glob(pattern))

    def digest(file: Path) -> str:
        with open(file, "rb") as data:
            return hashlib.file_digest(data, "sha256").hexdigest()

    try:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            lines = [f"{file.name} {got}\n" for file, got in zip(files, pool.map(digest, files), strict=True)]
    except OSError as error:
        raise UserError(
            f"model.path={str(path)!r}: {error.filename} cannot be read: {error.strerror}"
        ) from error
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def check_base(path: str | Path, expected: str, run_dir: Path) -> str:
    """The hash of the base model of a run that goes on. expected: as its checkpoint has it; "" in one of an earlier version.

    Raises UserError where the base model is gone or another."""
    try:
        found = weights_hash(path)
    except UserError as error:
        raise UserError(
            f"{error}. It is the base model of the run in {run_dir}, which is compared with the trained one; if it was moved, name its new folder "
            "by --model.path"
        ) from error
    if expected and found != expected:
        raise UserError(
            f"model.path={str(path)!r} holds other weights than the base model that the run in {run_dir} began with; put those back, or name "
            "their folder by --model.path"
        )
    return found
