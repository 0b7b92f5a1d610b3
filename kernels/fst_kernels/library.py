"""The compiled kernels of csrc/, as shared libraries with a plain C interface.

"cuda" is the one that CMake builds with nvcc. The others are compiled with g++ at their first use and kept, in build/csrc of a checkout, else
in the user's cache folder: "cpu" are the kernels for a CPU (csrc/cpu), "host" the CUDA sources, where CPU threads play the CUDA threads
(csrc/host): for tests and far too slow for work.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

LibraryName = Literal["cuda", "host", "cpu"]

_PACKAGE = Path(__file__).resolve().parent
_CHECKOUT = _PACKAGE.parents[1]


@dataclass(frozen=True)
class _Recipe:
    """What g++ makes a library of, files of csrc/. read: what the compiled ones include."""

    compiled: tuple[str, ...]
    read: tuple[str, ...]
    flags: tuple[str, ...]


_FLAGS = ("-std=c++20", "-fPIC", "-shared")
_RECIPES = {
    "host": _Recipe(
        compiled=("sample_tokens.cu",),
        read=("sample_tokens.h", "philox.h", "device.cuh", "host/threads.hpp"),
        flags=("-x", "c++", "-O2", "-pthread"),
    ),
    "cpu": _Recipe(
        compiled=("cpu/tree_attention.cpp", "cpu/rows.cpp", "cpu/sample_tokens.cpp"),
        read=(
            "cpu/tree_attention.h",
            "cpu/rows.h",
            "cpu/vector.hpp",
            "sample_tokens.h",
            "philox.h",
        ),
        flags=("-O3", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp"),
    ),
}
_ARCHITECTURES = {"AVX2": ("-march=x86-64-v3",), "AVX512": ("-march=x86-64-v4",)}  # by what torch found


def missing(name: LibraryName) -> str | None:
    """Why there is no such library and it cannot be made; None if it can be loaded."""
    if name == "cuda":
        places = " or ".join(str(p.parent) for p in _cuda_places())
        if not any(p.exists() for p in _cuda_places()):
            return f"{_cuda_places()[0].name} is not in {places}; where nvcc is, build it: cmake -S . -B build/csrc && cmake --build build/csrc"
        return None
    if not (_sources() / _RECIPES[name].compiled[0]).exists():
        return f"it compiles {_sources()}, which is not there"
    return None if _compiler() else "it needs g++, or another compiler named by CXX"


@functools.cache
def why_not_compiled(name: LibraryName) -> str | None:
    """As `missing`, after it was compiled: why there is no such library, or what the compiler said in one line. That is warned of: whoever
    has a compiler does not expect to do without."""
    reason = missing(name)
    if reason is not None:
        return reason
    try:
        load(name)
    except (RuntimeError, OSError) as error:
        lines = str(error).splitlines()
        reason = next((line for line in lines if "error" in line), lines[0])
        warnings.warn(f"fst_kernels: backend={name} could not be compiled: {reason}", stacklevel=2)
    return reason


def load(name: LibraryName) -> tuple[ctypes.CDLL, Path]:
    """RuntimeError: missing, or g++ failed."""
    reason = missing(name)
    if reason is not None:
        raise RuntimeError(f"backend={name}: {reason}")
    path = next(p for p in _cuda_places() if p.exists()) if name == "cuda" else _build(name)
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


def _sources() -> Path:
    """csrc/, of the checkout or as the wheel brought it."""
    return next((p for p in (_CHECKOUT / "csrc", _PACKAGE / "csrc") if p.is_dir()), _CHECKOUT / "csrc")


def _build_folder() -> Path:
    own = _sources().parent
    if own == _CHECKOUT and os.access(own, os.W_OK):
        return own / "build" / "csrc"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fst_kernels"


def _compiler() -> list[str] | None:
    """The command of the C++ compiler: CXX, words apart, or g++; None if it is not there."""
    command = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    return command if shutil.which(command[0]) else None


def _build(name: str) -> Path:
    """libfst_<name>-<hash of sources and command>.so, made if it is not there. RuntimeError: the compiler failed."""
    csrc, compiler, recipe = _sources(), _compiler(), _RECIPES[name]
    assert compiler is not None
    command = [*compiler, *_FLAGS, *recipe.flags]
    if name == "cpu":
        command += _ARCHITECTURES.get(torch.backends.cpu.get_cpu_capability(), ())
    stamp = hashlib.sha256(" ".join(command).encode())
    for source in (*recipe.compiled, *recipe.read):
        stamp.update((csrc / source).read_bytes())
    path = _build_folder() / f"libfst_{name}-{stamp.hexdigest()[:16]}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            made = Path(scratch) / path.name
            command += [*(str(csrc / source) for source in recipe.compiled), "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr.strip()}")
            made.replace(path)  # whole or not at all, also where several processes build it
    return path
