"""`run_code`: run a Python program from a problem or a response and return what it prints.

For task authors, to be called in `verify`. The program runs in its own interpreter without site-packages, which
confines itself before the first line (confinement.py): no network, no files except the standard library, no processes
or threads, an empty environment, bounded memory, time and output. This works for an ordinary user, also in a container:
seccomp filters and Landlock need neither namespaces nor privileges and cost no set-up time. docs/own_reward.md lists what they do not hide.
"""

from __future__ import annotations

import functools
import marshal
import math
import os
import selectors
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fst_fast.verify import confinement, seccomp
from fst_fast.verify.pool import ISOLATION_VARIABLE

OUTPUT_LIMIT = 1 << 20  # bytes, for each of stdout and stderr
_OPEN_FILES = 64
_CHUNK = 1 << 16
_ENVIRONMENT = {
    "PATH": "",
    "LANG": "C.UTF-8",
    "PYTHONUTF8": "1",
    "PYTHONHASHSEED": "0",  # sets print in the same order every time
}
_LIBRARIES = (
    "/lib",
    "/lib64",
    "/usr/lib",
    "/usr/lib64",
    "/etc/ld.so.cache",
    "/usr/share/zoneinfo",
    "/dev/null",
    "/dev/zero",
    "/dev/urandom",
)


class IsolationError(RuntimeError):
    """verify.isolation=required, and this system lacks a layer; the program did not run."""


@dataclass(frozen=True)
class CodeResult:
    """status: `ok` (exit code 0), `error` (another exit code or a signal), `timeout`, or `output` (killed after
    printing more than OUTPUT_LIMIT). exit_code: as in subprocess, negative for a signal; None for the last two. stdout,
    stderr: at most OUTPUT_LIMIT each; a traceback shows only the program's own frames. missing: isolation layers that this system lacks."""

    status: Literal["ok", "error", "timeout", "output"]
    exit_code: int | None
    stdout: str
    stderr: str
    missing: str = ""


def run_code(source: str, stdin: str = "", *, timeout_s: float = 5.0, memory_mib: int = 512) -> CodeResult:
    """Run the Python program `source` with `stdin` as its standard input.

    timeout_s: wall-clock limit; keep it well below verify.timeout_s. memory_mib: address space. May be called from any
    thread. Raises IsolationError (see verify.isolation), ValueError for impossible limits, RuntimeError if no
    interpreter starts and on systems other than Linux."""
    if not timeout_s > 0 or not math.isfinite(timeout_s):
        raise ValueError(f"timeout_s={timeout_s} must be a number > 0")
    if memory_mib < 64:
        raise ValueError(f"memory_mib={memory_mib} must be at least 64: the interpreter itself needs some")
    if sys.platform != "linux":
        raise RuntimeError(f"run_code needs Linux, this is {sys.platform}")
    deadline = time.monotonic() + timeout_s
    # -S, -s: no site-packages; -P: nothing from the working folder; -B: no byte code written
    process = subprocess.Popen(
        [sys.executable, "-SsPB", "-c", _bootstrap()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
        cwd=_deleted_folder(),
        env=_ENVIRONMENT,
    )
    required = os.environ.get(ISOLATION_VARIABLE) == "required"
    job = {
        "source": source.encode("utf-8", "surrogatepass"),
        "parent": os.getpid(),
        "required": required,
        "memory_bytes": memory_mib << 20,
        "cpu_s": math.ceil(timeout_s) + 1,
        "open_files": _OPEN_FILES,
        "readable": _readable_paths(),
        "filter": seccomp.program_filter(process.pid) if seccomp.supported() else None,
        "seccomp": seccomp.number("seccomp") if seccomp.supported() else None,
    }
    frame = marshal.dumps(job)
    text = stdin.encode("utf-8", "replace")
    try:
        ended, out, err = _communicate(
            process, len(frame).to_bytes(confinement.HEADER, "big") + frame + text, deadline
        )
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            assert pipe is not None
            pipe.close()
    if not err.startswith(confinement.CONFINED) and ended != "timeout":
        raise RuntimeError(f"the program was not run: {err.decode(errors='replace').strip()[-300:]}")
    missing, _, said = err.removeprefix(confinement.CONFINED).partition(b"\n")
    layers = missing.decode(errors="replace")
    if layers and required:
        raise IsolationError(
            f"the program was not run: this system cannot isolate it ({layers}) and verify.isolation=required"
        )
    return CodeResult(
        status=ended or ("ok" if process.returncode == 0 else "error"),
        exit_code=None if ended else process.returncode,
        stdout=out.decode("utf-8", "replace"),
        stderr=said.decode("utf-8", "replace"),
        missing=layers,
    )


@functools.cache
def missing_layers() -> str:
    """The isolation layers that run_code lacks on this system, with the reasons; "" if none. Found by running a program, once."""
    if sys.platform != "linux":
        return f"seccomp and Landlock: {sys.platform} has neither"
    probe = run_code("print('here')", timeout_s=60)
    if probe.stdout != "here\n" and not probe.missing:
        return f"a confined program does not run: {probe.status}, {probe.stderr.strip()[-200:]}"
    return probe.missing


def isolation() -> str:
    """One sentence on how programs are confined on this system."""
    missing = missing_layers()
    if not missing:
        return "no network, no files, no processes (seccomp, Landlock, rlimits)"
    return f"NOT isolated as a whole: {missing}"


def _communicate(
    process: subprocess.Popen[bytes], data: bytes, deadline: float
) -> tuple[Literal["timeout", "output"] | None, bytes, bytes]:
    """Feed stdin and collect output until the program closes both streams. Returns the reason for stopping early (None:
    it ended), stdout and stderr."""
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    rest = memoryview(data)
    pipe: Any
    taken: dict[Any, bytearray] = {process.stdout: bytearray(), process.stderr: bytearray()}
    with selectors.DefaultSelector() as selector:
        for pipe in (process.stdin, *taken):
            os.set_blocking(pipe.fileno(), False)
            selector.register(pipe, selectors.EVENT_WRITE if pipe is process.stdin else selectors.EVENT_READ)
        while any(pipe in selector.get_map() for pipe in taken):
            left = deadline - time.monotonic()
            if left <= 0:
                return "timeout", bytes(taken[process.stdout]), bytes(taken[process.stderr])
            for key, _ in selector.select(left):
                pipe = key.fileobj
                if pipe is process.stdin:
                    try:
                        rest = rest[os.write(pipe.fileno(), rest[:_CHUNK]) :]
                    except BrokenPipeError:  # the program does not read all of its input, which is allowed
                        rest = rest[:0]
                    if not rest:
                        selector.unregister(pipe)
                        pipe.close()
                elif piece := os.read(pipe.fileno(), _CHUNK):
                    taken[pipe] += piece
                    if len(taken[pipe]) > OUTPUT_LIMIT:
                        del taken[pipe][OUTPUT_LIMIT:]
                        return "output", bytes(taken[process.stdout]), bytes(taken[process.stderr])
                else:
                    selector.unregister(pipe)
    try:
        # both streams are closed, but the program may still run
        process.wait(max(deadline - time.monotonic(), 0.0))
    except subprocess.TimeoutExpired:
        return "timeout", bytes(taken[process.stdout]), bytes(taken[process.stderr])
    return None, bytes(taken[process.stdout]), bytes(taken[process.stderr])


@functools.cache
def _bootstrap() -> str:
    """confinement.py as a precompiled `-c` program."""
    code = compile(Path(confinement.__file__).read_bytes(), confinement.__file__, "exec")
    return f"exec(__import__('marshal').loads(bytes.fromhex('{marshal.dumps(code).hex()}')))"


@functools.cache
def _deleted_folder() -> str:
    """A working folder that is empty, has been removed, and accepts no files."""
    folder = tempfile.mkdtemp(prefix="fst-code-")
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    os.rmdir(folder)
    return f"/proc/self/fd/{descriptor}"


@functools.cache
def _readable_paths() -> list[str]:
    """The standard library and the libraries that it links to."""
    own = [
        sysconfig.get_path("stdlib"),
        sysconfig.get_path("platstdlib"),
        str(Path(sys.base_prefix) / "lib"),
        sysconfig.get_config_var("LIBDIR") or "",
    ]
    return [*dict.fromkeys(path for path in [*own, *_LIBRARIES] if path)]
