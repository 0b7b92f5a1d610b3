"""The compiled kernels of csrc/, as shared libraries with a plain C interface.

"cuda" is the one that CMake builds with nvcc. "host" is the same source compiled with g++ at its first use, where CPU threads play the
CUDA threads (csrc/host): it is for tests and far too slow for work.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Literal

LibraryName = Literal["cuda", "host"]

_PACKAGE = Path(__file__).resolve().parent
_CHECKOUT = _PACKAGE.parents[1]
_COMPILED = ("policy_rows.cu", "sample_tokens.cu")
_SOURCES = (*_COMPILED, "policy_rows.h", "sample_tokens.h", "device.cuh", "host/threads.hpp")
_FLAGS = ("-x", "c++", "-std=c++20", "-O2", "-fPIC", "-shared", "-pthread")


def missing(name: LibraryName) -> str | None:
    """Why there is no such library and it cannot be made; None if it can be loaded."""
    if name == "cuda":
        places = " or ".join(str(p.parent) for p in _cuda_places())
        if not any(p.exists() for p in _cuda_places()):
            return f"{_cuda_places()[0].name} is not in {places}; where nvcc is, build it: cmake -S . -B build/csrc && cmake --build build/csrc"
        return None
    if not (_CHECKOUT / "csrc" / _COMPILED[0]).exists():
        return f"it compiles {_CHECKOUT / 'csrc'}, which is not there: it needs a source checkout"
    return None if _compiler() else "it needs g++, or another compiler named by CXX"


def load(name: LibraryName) -> tuple[ctypes.CDLL, Path]:
    """RuntimeError: missing, or g++ failed."""
    reason = missing(name)
    if reason is not None:
        raise RuntimeError(f"backend={name}: {reason}")
    path = next(p for p in _cuda_places() if p.exists()) if name == "cuda" else _build_host()
    return ctypes.CDLL(str(path)), path


def load_kernel(name: LibraryName, function: str, arguments: type[ctypes.Structure]) -> ctypes.CDLL:
    """The library, with `function(arguments *, stream)` and `fst_error` declared. RuntimeError: see load, or its arguments are others."""
    lib, path = load(name)
    size = getattr(lib, f"{function}_size")
    size.restype = ctypes.c_int64
    getattr(lib, function).argtypes = [ctypes.POINTER(arguments), ctypes.c_void_p]
    lib.fst_error.restype = ctypes.c_char_p
    theirs, ours = size(), ctypes.sizeof(arguments)
    if theirs != ours:
        raise RuntimeError(
            f"{path} was built from other sources (its arguments take {theirs} bytes, {ours} expected); build it again"
        )
    return lib


def _cuda_places() -> tuple[Path, ...]:
    return _PACKAGE / "libfst_cuda.so", _CHECKOUT / "build" / "csrc" / "libfst_cuda.so"


def _compiler() -> list[str] | None:
    """The command of the C++ compiler: CXX, words apart, or g++; None if it is not there."""
    command = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    return command if shutil.which(command[0]) else None


def _build_host() -> Path:
    """build/csrc/libfst_host-<hash of sources and command>.so, made if it is not there."""
    csrc, compiler = _CHECKOUT / "csrc", _compiler()
    assert compiler is not None
    stamp = hashlib.sha256(" ".join((*compiler, *_FLAGS)).encode())
    for source in _SOURCES:
        stamp.update((csrc / source).read_bytes())
    path = _CHECKOUT / "build" / "csrc" / f"libfst_host-{stamp.hexdigest()[:16]}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            made = Path(scratch) / path.name
            command = [*compiler, *_FLAGS, *(str(csrc / source) for source in _COMPILED), "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr.strip()}")
            made.replace(path)  # whole or not at all, also where several processes build it
    return path
