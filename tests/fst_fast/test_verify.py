"""The verifying child processes against graders that hang, crash, exhaust memory, print and lie."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fst_fast.contracts import Problem, Verdict
from fst_fast.errors import UserError
from fst_fast.tasks.registry import load_task
from fst_fast.verify.gold import check_gold
from fst_fast.verify.pool import VerifierPool, _parsed
from fst_fast.verify.supervisor import MAX_PROCESSES, children, unlimited_reason
from fst_fast.verify.worker import check

ROOT = Path(__file__).parents[2]
ARGS = {"form": "mini", "arms": 2, "path": 3, "ids": 20, "train": 30, "validation": 4}

# The response says what the grader does.
GRADER = """
import decimal, fractions, os, sys, time
import numpy
from fst_fast.contracts import Problem, Verdict

kept = []

class Tensor:
    # as those of torch: a shape and an item

    def __init__(self, shape, value):
        self.shape, self.value = shape, value

    def item(self):
        return self.value

class Grader:
    def problems(self, split):
        return [Problem(f"{split}{i}", [{"role": "user", "content": "?"}], i) for i in range(3)]

    def verify(self, problem, response):
        if response == "loop":
            while True:
                pass
        if response == "regex":
            import re
            re.match(r"(a+)+$", "a" * 60 + "b")  # backtracks for ages inside C code, holding the interpreter's lock
        if response == "exit":
            os._exit(3)
        if response == "kill":
            os.kill(os.getpid(), 9)
        if response == "leave":
            sys.exit(0)
        if response.startswith("start "):
            import subprocess
            sleeper = subprocess.Popen(["sleep", "600"])
            with open(response[6:], "w") as file:
                file.write(str(sleeper.pid))
            sleeper.wait()
        if response == "raise":
            raise KeyError("the key")
        if response == "print":
            print("x" * 100_000_000)
            os.write(1, b"y" * 100_000_000)
            os.write(2, b"z" * 100_000_000)
            sys.stdin.read()
        if response == "pipes":  # into every pipe that it has, the one to the trainer among them
            for fd in os.listdir("/proc/self/fd"):
                try:
                    os.set_blocking(int(fd), True)
                    os.write(int(fd), b"x" * 100_000_000)
                except OSError:
                    pass
        if response.startswith("forge "):
            import json, struct
            body = response[6:].encode()
            for fd in os.listdir("/proc/self/fd"):
                if int(fd) > 2 and os.readlink(f"/proc/self/fd/{fd}").startswith("pipe:"):
                    try:
                        os.write(int(fd), struct.pack("!I", len(body)) + body)
                    except OSError:
                        pass
            time.sleep(600)
        if response == "close":
            sys.stdout.close()
            sys.stderr.close()
            os.closerange(0, 3)
        if response == "memory":
            block = bytearray(10 << 30)
        if response.startswith("daemon "):  # a process that belongs to nobody: it makes its own session, its parent ends
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    with open(response.split()[1], "w") as file:
                        file.write(str(os.getpid()))
                    time.sleep(600)
                os._exit(0)
            while not os.path.exists(response.split()[1]) or not open(response.split()[1]).read():
                time.sleep(0.01)
            if response.endswith("exit"):
                os._exit(3)
            while response.endswith("loop"):
                pass
        if response.startswith("bomb "):
            while True:
                try:
                    if os.fork() == 0:
                        with open(response[5:], "a") as file:
                            file.write(f"{os.getpid()} ")
                except BlockingIOError:
                    pass
        if response == "fork":
            os.fork()
        if response == "ppid":
            os.kill(os.getppid(), 0)
        if response.startswith("kill "):
            os.kill(int(response[5:]), 0)  # 0: only asks whether it may
        if response == "threads":
            import threading
            for _ in range(20):
                threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
        if response == "files":
            kept.extend(open(__file__) for _ in range(70))
        if response == "processes":
            import subprocess
            for _ in range(20):
                kept.append(subprocess.Popen(["sleep", "600"]))
        if response == "hoard":
            kept.append(bytearray(800 << 20))  # of 1024, beside what the process itself takes
        if response == "modules":
            return Verdict(float("torch" in sys.modules), " ".join(sorted({"torch", "transformers"} & set(sys.modules))))
        if response == "pid":
            return Verdict(1.0, str(os.getpid()))
        if response == "surrogate":
            return Verdict(1.0, "\\ud800 " + problem.messages[0]["content"])
        if response == "long":
            return Verdict(1.0, "x" * 100_000)
        if response == "unjudged":
            return Verdict(None, "I cannot tell")
        if response.startswith("return "):
            return eval(response[7:])
        return Verdict(1.0 if response == str(problem.answer) else 0.0, f"said {response}", {"length": len(response)})
"""


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("grader") / "grader.py"
    path.write_text(GRADER)
    return f"{path}:Grader"


@pytest.fixture(scope="module")
def shared(spec: str) -> Iterator[VerifierPool]:
    with VerifierPool(spec, {}, workers=1, timeout_s=30, memory_mib=1024) as pool:
        yield pool


def ask(pool: VerifierPool, *responses: str) -> list[Verdict]:
    problem = Problem("p", [{"role": "user", "content": "?"}], 7)
    return pool.verify([(problem, response) for response in responses])


def test_responses_are_judged_while_others_are_added_and_verdicts_keep_their_order(
    shared: VerifierPool,
) -> None:
    problem = Problem("p", [{"role": "user", "content": "?"}], 7)
    with shared.judging() as judging:
        assert [judging.add(problem, response) for response in ("7", "exit", "8")] == [0, 1, 2]
        while judging.left:  # as often as a step is decoded
            judging.serve()
        judging.add(problem, "7")
        assert judging.left == 1
        rewards = [verdict.reward for verdict in judging.verdicts()]
    assert rewards == [1.0, None, 0.0, 1.0]

    def fails() -> None:
        with shared.judging() as judging:
            judging.add(problem, "7")
            raise RuntimeError("sampling failed")

    with pytest.raises(RuntimeError, match="sampling failed"):
        fails()
    assert ask(shared, "8", "7")[1].reward == 1.0, "no answer of before is taken for one of now"


def test_verdicts_come_in_the_order_of_the_items_whatever_the_number_of_children(spec: str) -> None:
    problems = [Problem(f"p{i}", [{"role": "user", "content": "?"}], i) for i in range(300)]
    items = [(problem, str(problem.answer + index % 2)) for index, problem in enumerate(problems)]
    with VerifierPool(spec, {}, workers=3, timeout_s=30, memory_mib=1024) as pool:
        verdicts = pool.verify(items)
    assert verdicts == [
        Verdict(float(i % 2 == 0), f"said {items[i][1]}", {"length": float(len(items[i][1]))})
        for i in range(300)
    ]
    assert (pool.timeouts, pool.failures) == (0, 0)


def test_a_call_without_items_gives_no_verdicts(shared: VerifierPool) -> None:
    assert shared.verify([]) == []


filtered = pytest.mark.skipif(
    bool(unlimited_reason()), reason=f"graders are not filtered: {unlimited_reason()}"
)
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
LIMIT_S = 2.0  # long enough for a harmless item on a machine that is busy with other things


def test_an_endless_verification_times_out_affects_no_other_item_and_is_logged_once(spec: str) -> None:
    lines: list[str] = []
    with VerifierPool(spec, {}, workers=1, timeout_s=LIMIT_S, memory_mib=1024, log=lines.append) as pool:
        verdicts = ask(pool, "7", "loop", "7", "8", "raise", "raise", "return Verdict(2.0)", "unjudged")
        assert [v.reward for v in verdicts] == [1.0, None, 1.0, 0.0, None, None, None, None]
        assert verdicts[1].feedback == "verification timed out after 2 s"
        assert (pool.timeouts, pool.failures) == (1, 3)
    once = " (problem 'p'; the reward is None); further ones are counted only"
    assert lines == [verdicts[i].feedback + once for i in (1, 4, 6)]


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs pidfd_open")
def test_what_a_grader_started_is_killed_with_it(spec: str, tmp_path: Path) -> None:
    note = tmp_path / "pid"
    with VerifierPool(spec, {}, workers=1, timeout_s=LIMIT_S, memory_mib=1024) as pool:
        assert ask(pool, f"start {note}")[0].reward is None
    try:
        sleeper = os.pidfd_open(int(note.read_text()))
    except ProcessLookupError:
        return
    try:
        assert select.select([sleeper], [], [], 20)[0], "the process that the grader started outlives it"
    finally:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(sleeper, signal.SIGKILL)
        os.close(sleeper)


def test_the_limit_works_from_any_thread_and_against_c_code_that_holds_the_lock(spec: str) -> None:
    found: list[Verdict] = []
    with VerifierPool(spec, {}, workers=1, timeout_s=LIMIT_S, memory_mib=1024) as pool:
        thread = threading.Thread(target=lambda: found.extend(ask(pool, "regex", "7")))
        thread.start()
        thread.join()
        assert [v.reward for v in found] == [None, 1.0]
        assert [v.reward for v in ask(pool, "7")] == [1.0]  # the thread is gone, its replacement child is not


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        ("exit", "the verifying process died (exit code 3)"),
        ("kill", "the verifying process died (signal 9, SIGKILL)"),
        ("leave", "verify raised SystemExit: 0 (grader.py:"),
        ("raise", "verify raised KeyError: 'the key' (grader.py:"),
        ("memory", "the verification ran out of memory (verify.memory_mib)"),
        ("return Verdict(float('nan'))", "verify returned reward=nan; it must be in [0, 1]"),
        ("return Verdict(float('inf'))", "verify returned reward=inf; it must be in [0, 1]"),
        ("return Verdict(-0.5)", "verify returned reward=-0.5; it must be in [0, 1]"),
        ("return Verdict(2.0)", "verify returned reward=2.0; it must be in [0, 1]"),
        ("return Verdict(1e999)", "verify returned reward=inf; it must be in [0, 1]"),
        ("return Verdict('1.0')", "verify returned reward='1.0'; it must be a number"),
        ("return Verdict('0.5')", "verify returned reward='0.5'; it must be a number"),
        ("return Verdict(b'1')", "verify returned reward=b'1'; it must be a number"),
        ("return Verdict([1.0])", "verify returned reward=[1.0]; it must be a number"),
        ("return Verdict(1j)", "verify returned reward=1j; it must be a number"),
        ("return Verdict(numpy.array('1'))", "verify returned reward=array('1'"),
        ("return Verdict(numpy.zeros(2))", "verify returned reward=array([0., 0.]); it must be a number"),
        ("return Verdict(numpy.zeros(0))", "verify returned reward=array([]"),
        ("return Verdict(numpy.float32('nan'))", "verify returned reward=nan; it must be in [0, 1]"),
        ("return Verdict(decimal.Decimal('NaN'))", "verify returned reward=nan; it must be in [0, 1]"),
        ("return Verdict(decimal.Decimal('sNaN'))", "verify returned reward=nan; it must be in [0, 1]"),
        ("return Verdict(10 ** 400)", "verify returned reward=inf; it must be in [0, 1]"),
        (
            "return Verdict(-fractions.Fraction(10 ** 400))",
            "verify returned reward=-inf; it must be in [0, 1]",
        ),
        ("return Verdict(decimal.Decimal('1.5'))", "verify returned reward=1.5; it must be in [0, 1]"),
        ("return Verdict(1, b'bytes')", "verify returned feedback of type bytes"),
        ("return Verdict(1.0, '', {'a': '1'})", "verify returned metrics['a']='1'"),
        (
            "return Verdict(1.0, '', {'a': decimal.Decimal('Infinity')})",
            "verify returned metrics['a']=Decimal",
        ),
        ("return Verdict(1.0, '', {'a': float('nan')})", "verify returned metrics['a']=nan"),
        ("return Verdict(1.0, '', {'a': object()})", "verify returned metrics['a']=<object object"),
        ("return Verdict(1.0, '', {i: 1 for i in range(101)})", "verify returned 101 metrics; at most 100"),
        ("return Verdict(1.0, '', 3)", "verify returned metrics of type int"),
        ("return 0.5", "verify returned a float; it must return a Verdict"),
        ("pipes", "the verifying process died (signal 9, SIGKILL)"),
        ("forge {}", "the verifying process died (signal 9, SIGKILL)"),
        ("forge [[1]]", "the verifying process died (signal 9, SIGKILL)"),
        ('forge {"failure": 3}', "the verifying process died (signal 9, SIGKILL)"),
        ("return None", "verify returned a NoneType; it must return a Verdict"),
        ("return 'good'", "verify returned a str; it must return a Verdict"),
    ],
)
def test_a_verification_that_fails_has_no_reward_says_why_and_is_counted(
    shared: VerifierPool, response: str, reason: str
) -> None:
    before = shared.failures
    verdicts = ask(shared, "7", response, "8")
    assert [v.reward for v in verdicts] == [1.0, None, 0.0]
    assert verdicts[1].feedback.startswith(reason)
    assert (shared.failures, shared.timeouts) == (before + 1, 0)


@filtered
@pytest.mark.parametrize(
    "whom",
    ["ppid", "kill -1", f"kill {os.getpid()}", f"kill -{os.getpgid(0)}"],
    ids=["its parent", "everybody", "the trainer", "the trainer's group"],
)
def test_a_grader_cannot_signal_its_ancestors(shared: VerifierPool, whom: str) -> None:
    verdicts = ask(shared, "7", whom, "8")
    assert [v.reward for v in verdicts] == [1.0, None, 0.0]
    assert verdicts[1].feedback.startswith(
        "verify raised PermissionError: [Errno 1] Operation not permitted (grader.py:"
    )


def test_a_grader_that_prints_or_closes_streams_does_not_corrupt_replies(shared: VerifierPool) -> None:
    verdicts = ask(shared, "print", "7", "close", "print", "7")
    assert [v.reward for v in verdicts] == [0.0, 1.0, 0.0, 0.0, 1.0]
    assert shared.verify([(Problem("p", [], 8), "8")])[0].reward == 1.0


def test_a_grader_that_forks_answers_once(shared: VerifierPool) -> None:
    assert [v.feedback for v in ask(shared, "fork", "7", "8")] == ["said fork", "said 7", "said 8"]


def alive(pid: int) -> bool:
    """Whether the process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@linux
@pytest.mark.parametrize(
    ("then", "reason"),
    [("loop", "verification timed out"), ("exit", "the verifying process died (exit code 3)")],
)
def test_a_daemon_started_by_a_grader_is_killed_with_it(
    spec: str, tmp_path: Path, then: str, reason: str
) -> None:
    with VerifierPool(spec, {}, workers=1, timeout_s=LIMIT_S, memory_mib=1024) as pool:
        first, second = ask(pool, f"daemon {tmp_path / 'pid'} {then}", "7")
    assert first.feedback.startswith(reason)
    assert second.reward == 1.0
    assert not alive(int((tmp_path / "pid").read_text()))


@filtered
def test_a_fork_bomb_reaches_a_limit_and_all_of_it_is_killed(spec: str, tmp_path: Path) -> None:
    with VerifierPool(spec, {}, workers=1, timeout_s=LIMIT_S, memory_mib=1024) as pool:
        assert [v.reward for v in ask(pool, f"bomb {tmp_path / 'pids'}", "7")] == [None, 1.0]
        started = {int(pid) for pid in (tmp_path / "pids").read_text().split()}
        assert 1 <= len(started) < 2 * MAX_PROCESSES
        assert not any(map(alive, started))
        assert (pool.timeouts, pool.failures) == (1, 0)


@linux
@pytest.mark.parametrize("what", ["threads", "files", "processes", "hoard"])
def test_a_child_that_leaks_is_replaced_and_logged(spec: str, what: str) -> None:
    lines: list[str] = []
    with VerifierPool(spec, {}, workers=1, timeout_s=30, memory_mib=1024, log=lines.append) as pool:
        old = ask(pool, "pid")[0].feedback
        assert [v.reward for v in ask(pool, what)] == [0.0]
        new = ask(pool, "pid")[0].feedback
        assert (old != new, pool.replaced, pool.failures) == (True, 1, 0)
    said = {
        "threads": "20 threads",
        "files": "70 open files",
        "processes": "20 processes",
        "hoard": "MiB of 1024",
    }
    assert len(lines) == 1
    assert lines[0].startswith("a verifying process is replaced: verify leaves ")
    assert said[what] in lines[0]


@linux
def test_thousands_of_verifications_leave_no_zombie_descriptor_or_thread(spec: str) -> None:
    def held() -> tuple[int, int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count(), len(children(os.getpid()) or [])

    before = held()
    with VerifierPool(spec, {}, workers=2, timeout_s=LIMIT_S, memory_mib=1024) as pool:
        ask(pool, "7")
        running = held()
        assert running[2] == before[2] + 2
        for _ in range(4):
            verdicts = ask(pool, *["7", "8", "raise"] * 300, "exit", *["7"] * 300)
            assert sum(v.reward == 1.0 for v in verdicts) == 600
            ask(pool, "7")
            assert held() == running
    assert held() == before


@linux
def test_a_killed_supervisor_takes_its_child_with_it_and_is_replaced(spec: str) -> None:
    with VerifierPool(spec, {}, workers=1, timeout_s=30, memory_mib=1024) as pool:
        pid = int(ask(pool, "pid")[0].feedback)
        child = os.pidfd_open(pid)
        pool._workers[0].process.kill()
        assert select.select([child], [], [], 20)[0], "the child outlives its supervisor"
        os.close(child)
        assert ask(pool, "7")[0].reward == 1.0
        assert (pool.timeouts, pool.failures) == (0, 0)


def test_the_trainer_repeats_the_childs_check_of_a_reward() -> None:
    reply = _parsed(b'{"reward": NaN, "feedback": "", "metrics": {}}')
    assert reply is not None
    assert reply["failure"] == "verify returned reward=nan; it must be in [0, 1]"


def test_a_grader_that_cannot_judge_is_not_a_failure(shared: VerifierPool) -> None:
    before = shared.failures
    assert ask(shared, "unjudged") == [Verdict(None, "I cannot tell")]
    assert shared.failures == before


def test_feedback_is_valid_text_of_bounded_length(shared: VerifierPool) -> None:
    strange, long = ask(shared, "surrogate", "long")
    assert strange.feedback == "? ?"
    assert long.feedback == "x" * 8000 + " [cut]"


@pytest.mark.parametrize(
    ("value", "number"),
    [
        ("True", 1.0),
        ("False", 0.0),
        ("0", 0.0),
        ("numpy.float32(0.5)", 0.5),
        ("numpy.float16(0.25)", 0.25),
        ("numpy.bool_(True)", 1.0),
        ("numpy.array(0.75)", 0.75),
        ("numpy.array(1, dtype='int8')", 1.0),
        ("numpy.array([[0.5]])", 0.5),
        ("numpy.array(decimal.Decimal('0.5'), dtype=object)", 0.5),
        ("decimal.Decimal('0.625')", 0.625),
        ("fractions.Fraction(1, 3)", 1 / 3),
        ("Tensor((), 0.5)", 0.5),
        ("Tensor((1,), True)", 1.0),
    ],
)
def test_a_number_is_taken_where_its_value_is_plain(shared: VerifierPool, value: str, number: float) -> None:
    before = shared.failures
    [verdict] = ask(shared, f"return Verdict({value}, None, {{'m': {value}, 'none': None}})")
    assert verdict == Verdict(number, "", {"m": number})
    assert type(verdict.reward) is float
    assert ask(shared, f"return Verdict({value}, 'said', None)") == [Verdict(number, "said")]
    assert shared.failures == before


def test_scalars_of_torch_are_numbers() -> None:
    torch = pytest.importorskip("torch")
    for value in (torch.tensor(0.5, requires_grad=True), torch.tensor([[0.5]], dtype=torch.bfloat16)):
        assert check(Verdict(value, "", {"m": value})) == {
            "reward": 0.5,
            "feedback": "",
            "metrics": {"m": 0.5},
        }
    assert check(Verdict(torch.tensor(True)))["reward"] == 1.0
    for value in (torch.zeros(2), torch.zeros(0), torch.tensor(0.5, device="meta"), torch.tensor(1j)):
        assert "it must be a number" in check(Verdict(value))["failure"]


def test_a_child_does_not_import_torch(shared: VerifierPool) -> None:
    assert ask(shared, "modules") == [Verdict(0.0, "")]


def test_a_child_that_died_while_idle_is_replaced_and_nothing_is_counted(spec: str) -> None:
    with VerifierPool(spec, {}, workers=1, timeout_s=30, memory_mib=1024) as pool:
        pid = int(ask(pool, "pid")[0].feedback)
        os.kill(pid, signal.SIGKILL)
        (verdict,) = ask(pool, "pid")
        assert verdict.reward == 1.0
        assert int(verdict.feedback) != pid
        assert (pool.timeouts, pool.failures) == (0, 0)


def test_a_large_batch_to_a_child_that_does_not_read_does_not_block(spec: str) -> None:
    problem = Problem("p", [{"role": "user", "content": "x" * 300_000}], 7)
    with VerifierPool(spec, {}, workers=1, timeout_s=LIMIT_S, memory_mib=1024) as pool:
        os.kill(int(ask(pool, "pid")[0].feedback), signal.SIGSTOP)
        verdicts = pool.verify([(problem, "7")] * 4)
    assert [v.reward for v in verdicts] == [None, 1.0, 1.0, 1.0]


def test_close_ends_the_children_and_may_be_called_twice(spec: str) -> None:
    pool = VerifierPool(spec, {}, workers=2, timeout_s=30, memory_mib=1024)
    pids = [worker.process.pid for worker in pool._workers]
    pool.close()
    pool.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@linux
def test_all_verifying_processes_die_with_a_killed_trainer_even_inside_an_endless_verification(
    spec: str, tmp_path: Path
) -> None:
    code = f"""
import signal, threading
from fst_fast.contracts import Problem
from fst_fast.verify.pool import VerifierPool
pool = VerifierPool({spec!r}, {{}}, workers=1, timeout_s=600, memory_mib=1024)
print(pool.verify([(Problem("p", [], 7), "pid")])[0].feedback, pool._workers[0].process.pid, flush=True)
threading.Thread(target=lambda: pool.verify([(Problem("p", [], 7), "daemon {tmp_path}/pid loop")]), daemon=True).start()
signal.pause()
"""
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/kernels"}
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=env)
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    while not (note := tmp_path / "pid").exists() or not note.read_text():
        assert parent.poll() is None
        time.sleep(0.01)
    below = [os.pidfd_open(pid) for pid in (*pids, int(note.read_text()))]
    parent.kill()
    parent.wait()
    for process in below:
        assert select.select([process], [], [], 20)[0], "a process below outlives the trainer"
        os.close(process)


@linux
@pytest.mark.parametrize("event", ["call", "return"])
def test_a_supervisor_stopped_at_any_moment_still_kills_its_descendants(event: str) -> None:
    """When the trainer dies, the socket closes and SIGTERM arrives, in either order. Here SIGTERM comes as the watch
    begins or right after its end, and again during the clean-up."""
    code = f"""
import os, signal, socket, sys, time
from fst_fast.verify import supervisor
begun = False
def trace(frame, event, argument):
    global begun
    if frame.f_code.co_name not in ("_supervise", "_watch"):
        return None
    if begun and event == "line":
        os.kill(os.getpid(), signal.SIGTERM)
    begun = begun or (event == {event!r} and frame.f_code.co_name == "_watch")
    return trace
signal.signal(signal.SIGTERM, supervisor._stop)
ours, theirs = socket.socketpair()
control, trainer = socket.socketpair()
child = os.fork()
if not child:
    trainer.close()
    theirs.send(b".")
    time.sleep(600)
print(child, flush=True)
trainer.close()
kill_descendants = supervisor.kill_descendants
def told_again(*arguments):
    os.kill(os.getpid(), signal.SIGTERM)
    return kill_descendants(*arguments)
supervisor.kill_descendants = told_again
sys.settrace(trace)
supervisor._supervise(control, child, ours)
"""
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/kernels"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=15, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert not Path(f"/proc/{int(done.stdout)}").exists()


def test_a_task_that_does_not_load_in_a_child_is_refused_in_one_sentence(spec: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no 'Nothing'"):
        VerifierPool(spec.replace(":Grader", ":Nothing"), {}, workers=2, timeout_s=5, memory_mib=1024)
    (tmp_path / "t.py").write_text("import os\nos._exit(5)\n")
    with pytest.raises(UserError, match=r"died while it loaded the task \(exit code 5\)"):
        VerifierPool(f"{tmp_path}/t.py:A", {}, workers=1, timeout_s=5, memory_mib=1024)
    (tmp_path / "u.py").write_text("hog = bytearray(2 << 30)\n")
    with pytest.raises(UserError, match=r"memory_mib=512 is too little|MemoryError"):
        VerifierPool(f"{tmp_path}/u.py:A", {}, workers=1, timeout_s=5, memory_mib=512)


def test_a_problem_that_cannot_be_sent_is_named(shared: VerifierPool) -> None:
    with pytest.raises(UserError, match="problem 'odd' cannot be sent"):
        shared.verify([(Problem("odd", [], lambda: 0), "7")])


def test_objects_of_a_users_own_class_reach_the_child(tmp_path: Path) -> None:
    text = GRADER.replace("class Grader:", "class Key:\n    right = '7'\n\nclass Grader:").replace(
        "str(problem.answer)", "problem.answer.right"
    )
    (tmp_path / "own.py").write_text(text)
    spec = f"{tmp_path}/own.py:Grader"
    key = sys.modules[type(load_task(spec, {})).__module__].Key()
    with VerifierPool(spec, {}, workers=1, timeout_s=30, memory_mib=1024) as pool:
        assert pool.verify([(Problem("p", [], key), "7")])[0].reward == 1.0


def test_the_star_graph_passes_its_own_gold_through_the_children() -> None:
    with VerifierPool("star_graph", ARGS, workers=1, timeout_s=30, memory_mib=1024) as pool:
        check_gold(load_task("star_graph", ARGS), pool)
