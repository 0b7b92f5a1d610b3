"""Disks that are full or read-only, real ones: the run says so in one sentence, and goes on bit-equal when there is room again."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import resource
import shutil
import sys
from pathlib import Path

import pytest

from tests.integration.crash import TINY, same, start, train

pytestmark = [pytest.mark.chaos, pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")]

_NEWNS, _NEWUSER, _REMOUNT, _READ_ONLY, _PRIVATE = 0x20000, 0x10000000, 32, 1, 1 << 18 | 1 << 14
REFUSED = 77


def files_of_at_most(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def one_refusal(printed: str) -> str:
    assert "Traceback" not in printed, printed
    [line] = re.findall(r"^fst: .*$", printed, re.MULTILINE)
    return line


def test_a_file_that_cannot_grow_ends_the_run_and_resume_is_bit_equal(tmp_path: Path) -> None:
    code, printed = train(tmp_path / "run", hook=functools.partial(files_of_at_most, 2 << 20))
    assert code == 2, printed
    assert "the checkpoint of step 1 cannot be written" in one_refusal(printed)
    assert not list((tmp_path / "run/checkpoints").glob("step-*"))
    for run in ("run", "unbroken"):
        code, printed = train(tmp_path / run, *(["--resume"] if run == "run" else []))
        assert code == 0, printed
    same(tmp_path / "run", tmp_path / "unbroken")


def on_a_disk_of_its_own(folder: Path, result: Path) -> None:
    """In a mount namespace, which an ordinary user gets inside a user namespace: a run on a disk that is too small, then on one that is
    read-only, then on one with room; what it left is copied to `result`."""
    libc = ctypes.CDLL(None, use_errno=True)

    def disk(options: str, flags: int) -> bool:
        return libc.mount(b"none", str(folder).encode(), b"tmpfs", flags, options.encode()) == 0

    folder.mkdir()
    user, group = os.getuid(), os.getgid()
    if libc.unshare(_NEWNS if user == 0 else _NEWNS | _NEWUSER) != 0:
        os._exit(REFUSED)
    if user:
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            Path(f"/proc/self/{name}").write_text(text)
    if libc.mount(b"none", b"/", None, _PRIVATE, None) != 0 or not disk("size=20m", 0):
        os._exit(REFUSED)
    argv = ["train", "--run-dir", str(folder / "run"), *TINY]
    assert run(argv) == 2
    print("whole:", *(p.name for p in sorted((folder / "run/checkpoints").glob("step-*"))))
    assert disk("", _REMOUNT | _READ_ONLY)
    assert run([*argv, "--resume"]) == 2
    assert run(["train", "--run-dir", str(folder / "other"), *TINY]) == 2
    assert run(["report", str(folder / "run")]) == 2
    assert disk("size=200m", _REMOUNT)
    assert run([*argv, "--resume"]) == 0
    shutil.copytree(folder / "run", result)
    os._exit(0)


def run(argv: list[str]) -> int:
    """One command in a process of its own."""
    from fst_fast.cli import main

    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = main(argv)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_disk_that_is_full_or_read_only_is_said_and_the_run_goes_on_when_it_is_not(tmp_path: Path) -> None:
    child, out = start(
        tmp_path / "x", hook=functools.partial(on_a_disk_of_its_own, tmp_path / "disk", tmp_path / "run")
    )
    child.join()
    printed = out.read_text()
    if child.exitcode == REFUSED:
        pytest.skip("no mount namespace here: neither root nor user namespaces")
    assert child.exitcode == 0, printed
    assert "Traceback" not in printed, printed
    full, *read_only = re.findall(r"^fst: .*$", printed, re.MULTILINE)
    assert re.search(r"does not fit on the disk of|cannot be written.*(No space left|disk is full)", full), (
        full
    )
    whole = re.search(r"whole:(.*)", printed)
    assert whole
    assert whole[1].split()  # those before it stay
    assert len(read_only) == 3
    assert all("Read-only file system" in line for line in read_only), read_only
    code, printed = train(tmp_path / "unbroken")
    assert code == 0, printed
    same(tmp_path / "run", tmp_path / "unbroken")
