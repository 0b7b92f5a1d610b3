"""Checkpoints that are complete or absent, wherever the process or the machine stops.

    RUN/checkpoints/.tmp-step-000020/     being written; ignored
    RUN/checkpoints/step-000020/          complete: manifest.json lists every file with size and SHA-256
    RUN/checkpoints/latest                the name of the newest one

The order of writes guarantees this: files, manifest, fsync of all, rename, atomic replacement of `latest`, and only
then are old checkpoints deleted. They are renamed to .tmp-... first, so an interrupted deletion leaves no partial
checkpoint. `latest()` accepts only checkpoints that match their manifest. The manifest also records what wrote the
checkpoint (versions, number of processes, configuration) and the length of the run's logs (RUN/*.jsonl); a resumed run
truncates them to it (metrics.py). With several processes rank 0 calls begin, all write into the shared folder, and
after a barrier rank 0 calls commit.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fst_fast.errors import UserError
from fst_fast.run.faults import reach
from fst_fast.run.folder import disk_errors, fsync_folder, write_atomic

FORMAT = 2  # format 1 held DeepSpeed's own files
MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{6,})")
_TEMPORARY = ".tmp-"
_ASIDE = f"{_TEMPORARY}old-"
_HASHERS = 8


def begin(run_dir: Path, step: int) -> Path:
    """Create an empty temporary folder for the checkpoint of `step`, after removing those of interrupted saves.

    Raises UserError if the disk has no room for a checkpoint as large as the last one."""
    root = run_dir / "checkpoints"
    with disk_errors(f"{root} cannot be written"):
        root.mkdir(exist_ok=True)
        for stale in root.glob(_TEMPORARY + "*"):
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
        previous = _by_step(root)
        needed = sum(size for folder in previous[:1] for size in _sizes(folder))
        free = shutil.disk_usage(root).free
        if needed > free:
            raise UserError(
                f"the checkpoint of step {step} does not fit on the disk of {root}: about {needed / 2**20:.0f} MiB are needed (as for "
                f"{previous[0].name}), {free / 2**20:.0f} MiB are free; make room and continue with --resume"
            )
        temporary = root / f"{_TEMPORARY}step-{step:06d}"
        temporary.mkdir()
    reach("save.begin")
    return temporary


def commit(
    run_dir: Path,
    tmp: Path,
    step: int,
    *,
    keep_last: int,
    keep_every: int = 0,
    written_by: Mapping[str, Any] | None = None,
) -> Path:
    """Turn `tmp` into the checkpoint of `step`, then delete older ones except the `keep_last` newest and every
    `keep_every`th step (0: none). written_by: recorded in the manifest and returned by `written_by`.

    Checkpoints of later steps are deleted too, since those steps are being run again. A complete checkpoint of this step
    stays where `tmp` is equal to it, and is replaced where something has changed, such as the data or the logs. Raises
    UserError on disk errors, which leave the old checkpoints unchanged."""
    assert keep_last >= 2, "keep_last must be at least 2: a damaged checkpoint needs a predecessor"
    root = run_dir / "checkpoints"
    final = root / f"step-{step:06d}"
    replaced: Path | None = None
    with disk_errors(f"the checkpoint of step {step} cannot be written to {root}"):
        try:
            _write_manifest(run_dir, tmp, step, written_by or {})
            reach("save.manifest")
            if final.exists() and find_damage(final) is None and _manifest(final) == _manifest(tmp):
                shutil.rmtree(tmp)
            else:
                if final.exists():
                    replaced = _set_aside(final)  # until the new one is there; see `latest`
                os.rename(tmp, final)
            fsync_folder(root)
            reach("save.rename")
            write_atomic(root / "latest", f"{final.name}\n".encode())
            reach("save.latest")
        except BaseException:
            shutil.rmtree(tmp, ignore_errors=True)
            raise
        past = [folder for folder in _by_step(root) if _step(folder) <= step]
        kept = past[:keep_last] + [
            folder for folder in past if keep_every and _step(folder) % keep_every == 0
        ]
        for folder in _by_step(root):
            if folder not in kept:
                shutil.rmtree(_set_aside(folder))
        if replaced is not None:
            shutil.rmtree(replaced)
    return final


def latest(run_dir: Path) -> Path | None:
    """The newest complete checkpoint, preferring the one that `latest` names; None if there are no checkpoints.

    Damaged ones are skipped with a warning. Raises UserError if all are damaged, since a run must not silently start over."""
    root = run_dir / "checkpoints"
    pointer = root / "latest"
    named = pointer.read_text().strip() if pointer.is_file() else ""
    aside = root / f"{_ASIDE}{named}"
    if (
        _NAME.fullmatch(named) and aside.is_dir() and not (root / named).exists()
    ):  # its replacement was interrupted
        with disk_errors(f"{root} cannot be written"):
            os.rename(aside, root / named)
    folders = _by_step(root)
    damage: str | None = None
    # stable sort: the others stay newest first
    for folder in sorted(folders, key=lambda folder: folder.name != named):
        damage = find_damage(folder)
        if damage is None:
            return folder
        warnings.warn(f"checkpoint {folder} is skipped: {damage}", stacklevel=2)
    if damage:
        raise UserError(
            f"no checkpoint in {root} is whole ({len(folders)} tried; the last one: {damage}); put a whole one back, or start a new run"
        )
    return None


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, naming the file; None if every file matches the manifest."""
    try:
        manifest = _manifest(folder)
        files: dict[str, dict[str, Any]] = manifest["files"]
        if manifest["format"] != FORMAT:
            return f"{MANIFEST} has format {manifest['format']}, this version of fst reads {FORMAT}"
        expected = {name: (entry["size"], entry["sha256"]) for name, entry in files.items()}
    except OSError as error:
        return f"{MANIFEST} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    for name, (size, _) in expected.items():  # sizes first, which are cheap
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    try:
        hashes = _hashes([folder / name for name in expected])
    except OSError as error:
        return f"{error.filename or 'a file'} cannot be read ({error.strerror})"
    return next(
        (
            f"{name} has the wrong SHA-256"
            for name, got in zip(expected, hashes, strict=True)
            if got != expected[name][1]
        ),
        None,
    )


def log_sizes(run_dir: Path, step: int) -> dict[str, int]:
    """The size in bytes of each log of the run, by name, when the checkpoint of `step` was written."""
    manifest = _manifest(run_dir / "checkpoints" / f"step-{step:06d}")
    return {str(name): int(size) for name, size in manifest["logs"].items()}


def written_by(folder: Path) -> dict[str, Any]:
    """What the manifest records about the writer of the checkpoint."""
    found: dict[str, Any] = _manifest(folder)["written_by"]
    return found


def _manifest(folder: Path) -> Any:
    return json.loads((folder / MANIFEST).read_text())


def _write_manifest(run_dir: Path, tmp: Path, step: int, written_by: Mapping[str, Any]) -> None:
    """Write the manifest and fsync everything under `tmp` and the run's logs."""
    logs = sorted(run_dir.glob("*.jsonl"))
    for path in logs:
        _fsync_file(path)
    folders = [tmp, *(path for path in tmp.rglob("*") if path.is_dir())]
    files = sorted(path for path in tmp.rglob("*") if path.is_file() and path != tmp / MANIFEST)
    for path in files:
        _fsync_file(path)
    entries = {
        str(path.relative_to(tmp)): {"size": path.stat().st_size, "sha256": digest}
        for path, digest in zip(files, _hashes(files), strict=True)
    }
    sizes = {path.name: path.stat().st_size for path in logs}
    manifest = {"format": FORMAT, "step": step, "written_by": written_by, "files": entries, "logs": sizes}
    (tmp / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    _fsync_file(tmp / MANIFEST)
    for folder in reversed(folders):
        fsync_folder(folder)


def _hashes(files: list[Path]) -> list[str]:
    """SHA-256 of each file, in parallel: hashing releases the GIL."""
    if not files:
        return []
    with ThreadPoolExecutor(min(_HASHERS, len(files), os.cpu_count() or 1)) as pool:
        return list(pool.map(_sha256, files))


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _set_aside(folder: Path) -> Path:
    """Rename a checkpoint that is to be deleted, which invalidates it at once."""
    doomed = folder.with_name(f"{_ASIDE}{folder.name}")
    os.rename(folder, doomed)
    fsync_folder(folder.parent)
    reach("save.cleanup")
    return doomed


def _by_step(root: Path) -> list[Path]:
    """The checkpoint folders, newest first."""
    found = (
        [path for path in root.iterdir() if path.is_dir() and _NAME.fullmatch(path.name)]
        if root.is_dir()
        else []
    )
    return sorted(found, key=_step, reverse=True)


def _step(folder: Path) -> int:
    match = _NAME.fullmatch(folder.name)
    assert match is not None
    return int(match[1])


def _sizes(folder: Path) -> list[int]:
    return [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
