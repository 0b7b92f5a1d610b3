"""The run folder: opened by one process, never one that is not ours, never by two runs at a time.

A marker file, `fst-run.json`, says that a folder is ours and is written last: a folder whose making was cut off holds at most the lock and
the configuration, and is taken over. The lock is an flock, which the system drops when the process ends however it ends, so a run
killed with -9 leaves nothing to clean up. Every small file is replaced as a whole (temporary file, fsync, rename).
Only rank 0 opens the folder. docs/run_folder.md lists the files.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fst_fast.config.yaml_text import YamlProblem, read_yaml
from fst_fast.errors import UserError

MARKER = "fst-run.json"
FORMAT = 1
LOCK = "lock"
CONFIG = "config.yaml"
_PROBE = ".tmp-probe"
_PROBE_BYTES = 1 << 16
_ABSENT = object()
FIXED = (
    "method ",
    "task ",
    "task_args",
    "model.",
    "fast.population ",
    "fast.seed_context ",
)
"""How the changes begin that no permission allows: the weights, the optimiser's state or the population are those of the old value."""


@dataclass
class RunFolder:
    """An open run folder; hold it for as long as the run writes. resumed: it was there before."""

    path: Path
    resumed: bool
    _lock: int
    changes: list[str] = field(default_factory=list)  # of the configuration, accepted by allow_config_change

    def close(self) -> None:
        """Give the lock back. May be called twice."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_run(
    path: str | Path,
    *,
    resume: bool,
    config_yaml: str,
    config_hash: str,
    allow_config_change: bool = False,
    defaults: Mapping[str, Any] | None = None,
    moved: Collection[str] = (),
) -> RunFolder:
    """Make a new run folder, or with `resume` open the one that is there. Raises UserError where that cannot be done.

    config_hash decides whether the configuration is the same; where it differs, the two YAML trees name the keys. allow_config_change:
    take the new one, unless a key of FIXED differs. defaults: what keys mean that the run's tree does not have, since they came later.
    moved: keys that name the same thing at another place, whose change needs no permission."""
    path = Path(path).expanduser()
    if path.exists() and not path.is_dir():
        raise UserError(f"--run-dir {path} is a file; it must be a folder or not exist")
    with disk_errors(f"--run-dir {path} cannot be written"):
        names = sorted(os.listdir(path)) if path.exists() else []
    ours = MARKER in names
    if not ours and not set(names) <= {LOCK, CONFIG, _PROBE}:
        raise UserError(
            f"--run-dir {path} is not empty and not a run of fst (it holds {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}); "
            "choose a new folder"
        )
    if ours and not resume:
        raise UserError(
            f"--run-dir {path} already holds a run; continue it with --resume, or choose another --run-dir"
        )
    if resume and not ours:
        raise UserError(f"--resume: there is no run in {path}; without --resume a new one is started there")
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        with disk_errors(f"--run-dir {path} cannot be written"):
            path.mkdir(parents=True, exist_ok=True)
            _probe(path / _PROBE)
        lock = _take_lock(path)
        changes: list[str] = []
        try:
            if ours:
                changes = _check_config(
                    path, config_yaml, config_hash, allow_config_change, defaults or {}, moved
                )
            elif (path / MARKER).exists():
                raise UserError(f"--run-dir {path} was made by another run just now; choose another folder")
            else:
                _mark(path, config_yaml, config_hash)
        except BaseException:
            os.close(lock)
            raise
    except BaseException:
        for folder in made:  # leave no empty folders behind; one that another run has taken is not empty
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
    return RunFolder(path, resumed=ours, _lock=lock, changes=changes)


def _probe(file: Path) -> None:
    """Find out whether the disk takes bytes, not only names."""
    try:
        file.write_bytes(b"\0" * _PROBE_BYTES)
    finally:
        with contextlib.suppress(OSError):
            file.unlink()


def _mark(path: Path, config_yaml: str, config_hash: str) -> None:
    try:
        _write_config(path, config_yaml, config_hash)
    except BaseException:
        for name in (CONFIG, LOCK):
            (path / name).unlink(missing_ok=True)
        raise


def _write_config(path: Path, config_yaml: str, config_hash: str) -> None:
    write_atomic(path / CONFIG, config_yaml.encode())
    write_json(path / MARKER, {"format": FORMAT, "config_hash": config_hash})


def _take_lock(path: Path) -> int:
    with disk_errors(f"--run-dir {path} cannot be written"):
        lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(lock, 64).decode(errors="replace").strip() or "unknown"
            os.close(lock)
            raise UserError(
                f"--run-dir {path} is in use by another run (process {holder}); wait for it or choose another folder"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                os.close(lock)
                raise
            warnings.warn(
                f"{path}: this file system has no locks; do not start two runs in this folder", stacklevel=3
            )
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    return lock


def _check_config(
    path: Path,
    config_yaml: str,
    config_hash: str,
    allow_change: bool,
    defaults: Mapping[str, Any],
    moved: Collection[str],
) -> list[str]:
    try:
        marker = json.loads((path / MARKER).read_text())
        old_text = (path / CONFIG).read_text()
        old = read_yaml(old_text)
        known = marker["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError, YamlProblem) as error:
        raise UserError(
            f"--resume: {path / MARKER} or {path / CONFIG} is damaged ({error}); the run cannot be continued"
        ) from error
    if not known:
        raise UserError(
            f"--resume: {path} was written in format {marker['format']}, this version of fst reads format {FORMAT}"
        )
    if marker.get("config_hash") == config_hash:
        return []
    changes = changed_keys(_over(defaults, old), read_yaml(config_yaml))
    harmless = tuple(f"{key} " for key in moved)
    real = [change for change in changes if not (harmless and change.startswith(harmless))]
    if real and not allow_change:
        raise UserError(
            f"--resume: the configuration is not that of the run in {path}: {'; '.join(real)}; "
            "--allow-config-change continues with the new one"
        )
    fixed = [change for change in real if change.startswith(FIXED)]
    before, now = _over(defaults, old).get("stages") or [], read_yaml(config_yaml).get("stages") or []
    if before != now[: len(before)] or bool(before) != bool(now):
        fixed += [
            change for change in changes if change.startswith("stages ")
        ]  # more stages may follow, no other change
    if fixed:
        raise UserError(
            f"--allow-config-change: what the checkpoints hold depends on {'; '.join(fixed)}; start a new run for it"
        )
    if changes:
        _write_config(path, config_yaml, config_hash)
    return changes


def _over(defaults: Mapping[str, Any], tree: Any) -> Any:
    """The tree, with what it does not say as the defaults have it: a key that came later had its default then."""
    if not isinstance(tree, Mapping):
        return tree
    merged = {
        key: _over(value, tree[key]) if isinstance(value, Mapping) and key in tree else value
        for key, value in defaults.items()
    }
    return {
        **merged,
        **{key: value for key, value in tree.items() if not isinstance(merged.get(key), Mapping)},
    }


def changed_keys(old: Any, new: Any, at: str = "") -> list[str]:
    """`slow.lr was 1e-06, is 1e-05` for every leaf in which two trees differ."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = [*old, *(key for key in new if key not in old)]
        return [
            change
            for key in keys
            for change in changed_keys(
                old.get(key, _ABSENT), new.get(key, _ABSENT), f"{at}.{key}" if at else str(key)
            )
        ]
    if type(old) is type(new) and old == new:
        return []
    was, now = ("absent" if value is _ABSENT else repr(value) for value in (old, new))
    return [f"{at} was {was}, is {now}"]


@contextlib.contextmanager
def disk_errors(what_failed: str) -> Iterator[None]:
    """What the system refuses (full disk, permission, a folder that went away) becomes one sentence for the user.

    safetensors and torch report a full disk as errors of their own. torch's says only that the position in its archive
    (inline_container.cc) is not the expected one.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{what_failed}: {error.strerror or error}") from error
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        if any(sign in text for sign in ("No space left", "PytorchStreamWriter", "inline_container.cc")):
            raise UserError(f"{what_failed}, probably because the disk is full: {text}") from error
        if "(os error " in text:  # a quota, a file system that has become read-only
            raise UserError(f"{what_failed}: {text}") from error
        raise


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by strict JSON as a whole; on an error the old file stays."""
    write_atomic(path, (json.dumps(value, allow_nan=False, ensure_ascii=False, indent=1) + "\n").encode())


def write_atomic(path: Path, data: bytes) -> None:
    """Replace `path` as a whole; on an error the old file stays. Raises UserError where the disk refuses."""
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    with disk_errors(f"{path} cannot be written"):
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_folder(path.parent)


def fsync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
