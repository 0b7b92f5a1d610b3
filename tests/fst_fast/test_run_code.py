"""Untrusted programs: an honest one does its work, a hostile one is refused everything else."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fst_fast.contracts import Problem
from fst_fast.verify import seccomp
from fst_fast.verify.pool import VerifierPool
from fst_fast.verify.run_code import (
    OUTPUT_LIMIT,
    CodeResult,
    IsolationError,
    isolation,
    missing_layers,
    run_code,
)

ROOT = Path(__file__).parents[2]
LIMIT_S = 30.0  # for programs that end by themselves, on a busy machine

pytestmark = pytest.mark.skipif(
    bool(missing_layers()), reason=f"this system cannot isolate programs: {missing_layers()}"
)


def test_an_honest_program_reads_its_input_and_its_output_comes_back() -> None:
    source = "import sys\nfor line in sys.stdin:\n    print(int(line) ** 2)\nprint('größe', file=sys.stderr)"
    assert run_code(source, "3\n12\n", timeout_s=LIMIT_S) == CodeResult("ok", 0, "9\n144\n", "größe\n")


def test_the_standard_library_is_there() -> None:
    modules = "bisect, collections, csv, datetime, decimal, fractions, hashlib, heapq, itertools, json, math, random, re, sqlite3, statistics, string, time, typing, zoneinfo"
    source = f"import {modules}\nprint(datetime.datetime(2026, 1, 1, tzinfo=zoneinfo.ZoneInfo('UTC')).isoformat(), hashlib.sha256(b'').hexdigest()[:4])"
    assert run_code(source, timeout_s=LIMIT_S).stdout == "2026-01-01T00:00:00+00:00 e3b0\n"


def test_large_input_and_output_pass_whole_and_an_input_that_is_not_read_does_no_harm() -> None:
    text = "abcdefghi\n" * 100_000
    assert run_code("import sys; sys.stdout.write(sys.stdin.read())", text, timeout_s=LIMIT_S).stdout == text
    assert run_code("print(1)", text * 3, timeout_s=LIMIT_S).stdout == "1\n"


def test_sets_are_in_the_same_order_every_time() -> None:
    results = {run_code("print({'a', 'b', 'c', 'd', 'e', 'f'})", timeout_s=LIMIT_S).stdout for _ in range(3)}
    assert len(results) == 1


@pytest.mark.parametrize(
    ("source", "code", "said"),
    [
        ("import sys\nsys.exit(3)", 3, r""),
        ("raise SystemExit('no answer')", 1, r"no answer\n"),
        ("1 / 0", 1, r'Traceback .*\n  File "program", line 1, in <module>\nZeroDivisionError: division by zero\n'),
        ("def (", 1, r'  File "program", line 1\n    def \(\n        \^\nSyntaxError: invalid syntax\n'),
        ("x = bytearray(10 << 30)", 1, r"(?s)Traceback.*MemoryError\n"),
        ("def f(): f()\nf()", 1, r"(?s).*RecursionError: maximum recursion depth exceeded\n"),
        ("import os\nos.kill(os.getpid(), 9)", -9, r""),
        ("import os\nos.abort()", -6, r""),
    ],
)  # fmt: skip
def test_a_program_that_fails_says_how(source: str, code: int, said: str) -> None:
    result = run_code(source, timeout_s=LIMIT_S)
    assert (result.status, result.exit_code) == ("error", code)
    assert re.fullmatch(said, result.stderr)


SOCKET = "import socket\nsocket.socket(socket.{0}, socket.SOCK_STREAM)"
LIBC = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
RAW = LIBC + "print(libc.{0}, ctypes.get_errno())"

REFUSED = {
    "network": SOCKET.format("AF_INET"),
    "network, v6": SOCKET.format("AF_INET6"),
    "socket of the machine": SOCKET.format("AF_UNIX"),
    "http": "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:{port}/').read()",
    "read a file": "print(open('/etc/passwd').read())",
    "read a file of ours": "print(open('{file}').read())",
    "read our environment": "print(open('/proc/{pid}/environ').read())",
    "read our memory": "open('/proc/{pid}/mem', 'rb').read(1)",
    "list a folder": "import os\nprint(os.listdir('/'))",
    "write a file": "open('{folder}/new', 'w').write('x')",
    "write a file here": "open('new', 'w').write('x')",
    "append to a file": "open('{file}', 'a').write('x')",
    "truncate a file": "import os\nos.truncate('{file}', 0)",
    "remove a file": "import os\nos.remove('{file}')",
    "rename a file": "import os\nos.rename('{file}', '{file}2')",
    "link to a file": "import os\nos.link('{file}', '{file}2')",
    "make a folder": "import os\nos.mkdir('{folder}/new')",
    "change rights": "import os\nos.chmod('{file}', 0o777)",
    "temporary file": "import tempfile\ntempfile.TemporaryFile()",
    "file in memory": "import os\nos.memfd_create('x')",
    "start a program": "import subprocess\nsubprocess.run(['/bin/true'])",
    "fork": "import os\nos.fork()",
    "become a program": "import os\nos.execv('/bin/true', ['true'])",
    "thread": "import threading\nthreading.Thread(target=print).start()",
    "signal to the parent": "import os\nos.kill(os.getppid(), 0)",
    "signal to all": "import os\nos.kill(-1, 0)",
    "signal by descriptor": "import os, signal\nsignal.pidfd_send_signal(os.pidfd_open(os.getppid()), 0)",
    "signal by file owner": "import fcntl\nfcntl.fcntl(0, fcntl.F_SETOWN, {pid})",
    "raise its own limits": "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (9, 9))",
    "limits of others": "import resource\nresource.prlimit({pid}, resource.RLIMIT_CPU, (1, 1))",
    "another user": "import os\nos.setuid(1)",
    "namespace": RAW.format("unshare(0x10000000)"),
    "mount": RAW.format("mount(b'none', b'/mnt', b'tmpfs', 0, None)"),
    "trace us": RAW.format("ptrace(16, {pid}, 0, 0)"),
    "io_uring": RAW.format("syscall(425, 8, 0)"),
    "shared memory": RAW.format("shmget(1, 4096, 0o1666)"),
    "keys": RAW.format("syscall(250, 0, 0, 0, 0)"),
    "prctl": RAW.format("prctl(15, b'x', 0, 0, 0)"),
}


@pytest.fixture(scope="module")
def secret(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("secret") / "file"
    path.write_text("the secret")
    return path


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize("what", REFUSED)
def test_a_program_is_refused_what_the_sandbox_forbids(what: str, secret: Path, port: int) -> None:
    source = (
        REFUSED[what]
        .replace("{port}", str(port))
        .replace("{pid}", str(os.getpid()))
        .replace("{file}", str(secret))
        .replace("{folder}", str(secret.parent))
    )
    result = run_code(source, timeout_s=LIMIT_S)
    if result.status == "ok":
        assert re.fullmatch(r"-1 (1|13|38)\n", result.stdout)  # EPERM, EACCES, ENOSYS
    else:
        assert (result.status, result.exit_code) == ("error", 1)
        last = result.stderr.splitlines()[-1]
        assert re.search(
            r"PermissionError|Operation not permitted|not implemented|can't start new thread|not allowed|No usable temporary", last
        ), result.stderr  # fmt: skip
    assert secret.read_text() == "the secret"
    assert [p.name for p in secret.parent.iterdir()] == ["file"]


def test_a_program_sees_neither_our_environment_nor_our_descriptors(
    monkeypatch: pytest.MonkeyPatch, secret: Path
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-marked")
    with open(secret) as file:
        os.set_inheritable(file.fileno(), True)
        source = f"import os\nprint(sorted(os.environ))\nos.fstat({file.fileno()})"
        result = run_code(source, timeout_s=LIMIT_S)
    assert result.stdout == "['LANG', 'PATH', 'PYTHONHASHSEED', 'PYTHONUTF8']\n"
    assert "Bad file descriptor" in result.stderr


def test_an_endless_program_is_killed_at_its_time_limit_whatever_it_does() -> None:
    for source in (
        "while True: pass",
        "import signal\nfor n in range(1, 32):\n    try: signal.signal(n, signal.SIG_IGN)\n    except (OSError, ValueError): pass\nwhile True: pass",
        "import re\nre.match(r'(a+)+$', 'a' * 60 + 'b')",
        "import os, sys\nsys.stdout.close(); os.close(1); os.close(2)\nwhile True: pass",
        "print('before', flush=True)\ninput()\nwhile True: pass",
    ):
        result = run_code(source, "\n", timeout_s=1.0)
        assert (result.status, result.exit_code) == ("timeout", None)


def test_what_a_program_prints_is_bounded() -> None:
    result = run_code("while True: print('x' * 1000)", timeout_s=LIMIT_S)
    assert result.status == "output"
    assert len(result.stdout) == OUTPUT_LIMIT


def test_run_code_works_from_any_thread_and_leaks_nothing() -> None:
    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    before = held()
    with ThreadPoolExecutor(4) as pool:
        sources = [f"print({i})" for i in range(8)] + ["while True: pass"]
        results = list(pool.map(lambda s: run_code(s, timeout_s=LIMIT_S if "print" in s else 1.0), sources))
    assert [r.stdout for r in results] == [f"{i}\n" for i in range(8)] + [""]
    assert held() == before
    assert not list(Path("/tmp").glob("fst-code-*"))


def test_impossible_limits_are_refused() -> None:
    with pytest.raises(ValueError, match="timeout_s=0 must be a number > 0"):
        run_code("", timeout_s=0)
    with pytest.raises(ValueError, match="memory_mib=10 must be at least 64"):
        run_code("", memory_mib=10)


def test_where_a_layer_is_missing_the_result_says_so_and_required_does_not_run_it(
    monkeypatch: pytest.MonkeyPatch, secret: Path
) -> None:
    monkeypatch.setattr(seccomp, "supported", lambda: False)
    result = run_code("print(1)", timeout_s=LIMIT_S)
    assert (result.stdout, result.missing) == (
        "1\n",
        "seccomp: no table of system calls for this architecture",
    )
    monkeypatch.setenv("FST_CODE_ISOLATION", "required")
    with pytest.raises(IsolationError, match=r"cannot isolate it \(seccomp: no table"):
        run_code(f"open({str(secret)!r}, 'w')", timeout_s=LIMIT_S)
    assert secret.read_text() == "the secret"


WITHOUT_LANDLOCK = """
import sys
from fst_fast.verify import confinement
from fst_fast.verify import seccomp
seccomp._OTHER["landlock"] = (444, 444)
rule = seccomp._rule("landlock", [], seccomp._refuse(38), 0)
program = seccomp._assemble([*rule, (seccomp._RETURN, 0, 0, seccomp._ALLOW)], other_architecture=seccomp._ALLOW)
confinement.install_filter(program, seccomp.number("seccomp"))
from fst_fast.verify.run_code import isolation, run_code
print(isolation())
print(run_code(f"print(open({sys.argv[1]!r}).read())", timeout_s=30).stdout, end="")
print(run_code(f"open({sys.argv[1]!r}, 'a')", timeout_s=30).stderr.splitlines()[-1])
"""


def python(code: str, *arguments: str, before: tuple[str, ...] = ()) -> list[str]:
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/kernels"}
    command = [*before, sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, check=True).stdout.splitlines()


def test_without_landlock_files_can_be_read_but_not_written_and_it_is_said(secret: Path) -> None:
    assert python(WITHOUT_LANDLOCK, str(secret)) == [
        "NOT isolated as a whole: Landlock: Function not implemented",
        "the secret",
        f"PermissionError: [Errno 13] Permission denied: '{secret}'",
    ]


ORDINARY = """
import os
from fst_fast.verify.run_code import isolation, run_code
from fst_fast.verify.supervisor import unlimited_reason
print(os.getuid() != 0, isolation(), repr(unlimited_reason()))
print(run_code("print(open('/etc/passwd').read())", timeout_s=30).stderr.splitlines()[-1])
"""


def test_the_sandbox_works_for_an_ordinary_user() -> None:
    user: tuple[str, ...] = ()
    if os.getuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("this is root, and there is no setpriv to become somebody else")
        user = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
        # the interpreter may lie in root's own folder: the only privilege that stays is to read it
        user += ("--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search")
    assert python(ORDINARY, before=user) == [
        "True no network, no files, no processes (seccomp, Landlock, rlimits) ''",
        "PermissionError: [Errno 13] Permission denied: '/etc/passwd'",
    ]


def test_a_grader_runs_programs_and_the_pool_knows_it(tmp_path: Path) -> None:
    (tmp_path / "t.py").write_text(
        "from fst_fast.contracts import Verdict\n"
        "from fst_fast.verify.run_code import run_code\n"
        "class Task:\n"
        "    def problems(self, split): return []\n"
        "    def verify(self, problem, response):\n"
        "        result = run_code(response, '4', timeout_s=20)\n"
        "        return Verdict(float(result.stdout.strip() == problem.answer), result.stderr)\n"
    )
    with VerifierPool(f"{tmp_path}/t.py:Task", {}, workers=1, timeout_s=60, memory_mib=1024) as pool:
        assert pool.runs_code
        right, wrong = pool.verify(
            [
                (Problem("p", [], "16"), "print(int(input()) ** 2)"),
                (Problem("p", [], "16"), "open('/etc/passwd')"),
            ]
        )
    assert right.reward == 1.0
    assert wrong.reward == 0.0
    assert "PermissionError" in wrong.feedback


def test_the_isolation_is_described_in_one_sentence() -> None:
    assert isolation() == "no network, no files, no processes (seccomp, Landlock, rlimits)"
