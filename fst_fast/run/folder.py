"""The run folder: created or resumed by one process, never a foreign folder, never used by two runs at once.

A marker file, `fst-run.json`, identifies a run folder and is written last. So a folder whose creation was interrupted
holds at most the lock and the configuration, and can be reused. The lock is an flock, which the system releases when
the process ends in any way, so a run killed by SIGKILL leaves nothing to clean up. Every small file is replaced
atomically (temporary file, fsync, rename).
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
from fst_fast.run.metrics_schema import VERSION

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
    "fast.components",
    "fast.evolver ",
)
"""Prefixes of changes that allow_config_change does not permit: the weights, the optimiser's state or the population
depend on the old value."""
NEW_DEFAULTS = (
    "policy.optimizer was torch_adamw, is auto",
    "rollout.cuda_graphs was False, is auto",
    "verify.workers was 1, is None",
)
"""Changes that nobody made: these defaults were others once. They compute the same, on a GPU up to rounding."""


@dataclass
class RunFolder:
    """An open run folder; keep it open while the run writes. resumed: the run existed before. changes: of the configuration, permitted by
    allow_config_change and not written before `accept`."""

    path: Path
    resumed: bool
    _lock: int
    changes: list[str] = field(default_factory=list)
    _config: tuple[str, str] = ("", "")  # the text and its hash

    def accept(self) -> None:
        """From now on the run has the changed configuration: everything else about the resume has been checked."""
        if self.changes:
            _write_config(self.path, *self._config)

    def close(self) -> None:
        """Release the lock. Idempotent."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_folder(path: Path, *, resume: bool) -> bool:
    """Whether a run is there. Raises UserError where that is not what `resume` asks for, or where something else is there. Writes nothing."""
    if path.exists() and not path.is_dir():
        raise UserError(f"--run-dir {path} is a file; it must be a folder or not exist")
    with disk_errors(f"--run-dir {path} cannot be written"):
        names = sorted(os.listdir(path)) if path.exists() else []
    is_run = MARKER in names
    if not is_run and not set(names) <= {LOCK, CONFIG, _PROBE}:
        raise UserError(
            f"--run-dir {path} is not empty and not a run of fst (it holds {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}); "
            "choose a new folder"
        )
    if is_run and not resume:
        raise UserError(
            f"--run-dir {path} already holds a run; continue it with --resume, or choose another --run-dir"
        )
    if resume and not is_run:
        raise UserError(f"--resume: there is no run in {path}; without --resume a new one is started there")
    return is_run


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
    """Create a new run folder or, with `resume`, open an existing one. Raises UserError if that is not possible.

    config_hash decides whether the configuration is unchanged; if not, the two YAML trees are compared to name the
    keys. allow_config_change: accept the new configuration unless a key in FIXED differs. defaults: values of keys that
    are missing from the run's configuration because they were introduced later.
    moved: keys that name the same thing at another place, whose change needs no permission."""
    path = Path(path).expanduser()
    is_run = check_folder(path, resume=resume)
    created = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        with disk_errors(f"--run-dir {path} cannot be written"):
            path.mkdir(parents=True, exist_ok=True)
            _check_writable(path / _PROBE)
        lock = _take_lock(path)
        changes: list[str] = []
        try:
            if is_run:
                changes = check_config(
                    path, config_yaml, config_hash, allow_config_change, defaults or {}, moved
                )
            elif (path / MARKER).exists():
                raise UserError(f"--run-dir {path} was just created by another run; choose another folder")
            else:
                _initialise(path, config_yaml, config_hash)
        except BaseException:
            os.close(lock)
            raise
    except BaseException:
        for folder in created:  # leave no empty folders; one that another run uses is not empty
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
    return RunFolder(path, resumed=is_run, _lock=lock, changes=changes, _config=(config_yaml, config_hash))


def _check_writable(file: Path) -> None:
    """Test that the disk accepts data, not only names."""
    try:
        file.write_bytes(b"\0" * _PROBE_BYTES)
    finally:
        with contextlib.suppress(OSError):
            file.unlink()


def _initialise(path: Path, config_yaml: str, config_hash: str) -> None:
    try:
        _write_config(path, config_yaml, config_hash)
    except BaseException:
        for name in (CONFIG, LOCK):
            (path / name).unlink(missing_ok=True)
        raise


def _write_config(path: Path, config_yaml: str, config_hash: str) -> None:
    write_atomic(path / CONFIG, config_yaml.encode())
    write_json(path / MARKER, {"format": FORMAT, "metrics": VERSION, "config_hash": config_hash})


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


def check_config(
    path: Path,
    config_yaml: str,
    config_hash: str,
    allow_change: bool,
    defaults: Mapping[str, Any],
    moved: Collection[str] = (),
) -> list[str]:
    """What of the configuration is not as the run in `path` knows it. Raises UserError where that may not be. Writes nothing."""
    try:
        marker = json.loads((path / MARKER).read_text())
        old_text = (path / CONFIG).read_text()
        old = read_yaml(old_text)
        known = marker["format"] == FORMAT and marker.get("metrics", VERSION) == VERSION
    except (OSError, ValueError, KeyError, TypeError, YamlProblem) as error:
        raise UserError(
            f"--resume: {path / MARKER} or {path / CONFIG} is damaged ({error}); the run cannot be continued"
        ) from error
    if not known:
        raise UserError(
            f"--resume: {path} was written in format {marker['format']} with metrics of version {marker.get('metrics', VERSION)}, this version "
            f"of fst reads format {FORMAT} and metrics of version {VERSION}"
        )
    if marker.get("config_hash") == config_hash:
        return []
    changes = changed_keys(_with_defaults(defaults, old), read_yaml(config_yaml))
    harmless = tuple(f"{key} " for key in moved)
    real = [c for c in changes if not (harmless and c.startswith(harmless)) and c not in NEW_DEFAULTS]
    fixed = [change for change in real if change.startswith(FIXED)]
    now = read_yaml(config_yaml).get("stages") or []
    before = _with_defaults(defaults, old).get("stages") or []
    if before != now[: len(before)] or bool(before) != bool(now):
        # stages may be appended, not changed
        fixed += [change for change in changes if change.startswith("stages ")]
    if fixed:
        raise UserError(
            f"--resume: what the checkpoints in {path} hold depends on {'; '.join(fixed)}; start a new run for it in another --run-dir"
        )
    if real and not allow_change:
        raise UserError(
            f"--resume: the configuration is not that of the run in {path}: {'; '.join(real)}; "
            "--allow-config-change continues with the new one"
        )
    return changes


def _with_defaults(defaults: Mapping[str, Any], tree: Any) -> Any:
    """The tree, with defaults filled in for the keys that it lacks: a key introduced later had its default value."""
    if not isinstance(tree, Mapping):
        return tree
    merged = {
        key: _with_defaults(value, tree[key]) if isinstance(value, Mapping) and key in tree else value
        for key, value in defaults.items()
    }
    return {
        **merged,
        **{key: value for key, value in tree.items() if not isinstance(merged.get(key), Mapping)},
    }


def changed_keys(old: Any, new: Any, at: str = "") -> list[str]:
    """`slow.lr was 1e-06, is 1e-05` for every leaf in which the two trees differ."""
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
    """Turn disk errors (full disk, permissions, a folder that disappeared) into one UserError.

    safetensors and torch report a full disk by errors of their own; torch only says that the position in its archive
    (inline_container.cc) is unexpected."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{what_failed}: {error.strerror or error}") from error
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        if any(sign in text for sign in ("No space left", "PytorchStreamWriter", "inline_container.cc")):
            raise UserError(f"{what_failed}, probably because the disk is full: {text}") from error
        if "(os error " in text:  # an exceeded quota, a file system that became read-only
            raise UserError(f"{what_failed}: {text}") from error
        raise


def write_json(path: Path, value: Any) -> None:
    """Atomically replace `path` by strict JSON; on an error the old file stays."""
    write_atomic(path, (json.dumps(value, allow_nan=False, ensure_ascii=False, indent=1) + "\n").encode())


def write_atomic(path: Path, data: bytes) -> None:
    """Atomically replace the contents of `path`; on an error the old file stays. Raises UserError on disk errors."""
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
    """Make the entries of a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
