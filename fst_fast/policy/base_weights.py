"""Which weights a run began with: the base model's folder is read again by every resume and `fst eval`, and nothing else guards it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fst_fast import distributed
from fst_fast.config import Config
from fst_fast.errors import UserError
from fst_fast.policy.base_model import find, pin
from fst_fast.policy.gguf import sha256

_PATTERNS = ("config.json", "*.safetensors", "pytorch_model*.bin")


def weights_hash(path: str | Path, revision: str | None = None) -> str:
    """SHA-256, as 64 hex digits, of the names and bytes of a model folder's config.json and weights, or of a GGUF file's bytes. Raises UserError
    where they cannot be read."""
    found = find(path, revision).files
    try:
        if found.is_file():
            return sha256(found)
        files = sorted(file for pattern in _PATTERNS for file in found.glob(pattern))
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            lines = [f"{file.name} {got}\n" for file, got in zip(files, pool.map(sha256, files), strict=True)]
    except OSError as error:
        raise UserError(
            f"model.path={str(path)!r}: {error.filename} cannot be read: {error.strerror}"
        ) from error
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def open_base(
    config: Config,
    note: Callable[[str], None] = lambda _: None,
    *,
    run_dir: Path | None = None,
    expected: str = "",
) -> tuple[Config, str]:
    """The configuration, pinned (see base_model.pin), and the hash of the base model's weights. All processes call it.

    run_dir, expected: a run that goes on and the hash in its checkpoint, "" in one of an earlier version. Raises UserError where the base model
    is gone or another."""
    try:
        config = pin(config, note)
        model = config.model
        found = distributed.broadcast_result(lambda: weights_hash(model.path, model.revision))
    except UserError as error:
        if run_dir is None:
            raise
        raise UserError(
            f"{error}. It is the base model of the run in {run_dir}, which is compared with the trained one; if it was moved, name its new folder "
            "by --model.path"
        ) from error
    if expected and found != expected:
        way_out = "put those back, or name their folder by --model.path"
        if model.revision is not None:
            way_out = f"name the run's commit, which {run_dir}/config.yaml holds, by --model.revision"
        raise UserError(
            f"model.path={model.path!r}{f' ({model.revision})' if model.revision else ''} holds other weights than the base model that the run in "
            f"{run_dir} began with; {way_out}"
        )
    return config, found
