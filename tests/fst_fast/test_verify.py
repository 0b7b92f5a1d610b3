"""The verifying children against graders that hang, crash, eat memory, print and lie."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fst_fast.contracts import Problem, Verdict
from fst_fast.errors import UserError
from fst_fast.tasks.registry import check_gold, load_task
from fst_fast.tasks.verify import VerifierPool

ROOT = Path(__file__).parents[2]
ARGS = {"form": "mini", "arms": 2, "path": 3, "ids": 20, "train": 30, "validation": 4}

# The response says what the grader does.
GRADER = """
import os, sys, time
from fst_fast.contracts import Problem, Verdict

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
            print("x" * 1_000_000)
            os.write(1, b"y" * 1_000_000)
            os.write(2, b"z" * 1_000_000)
            sys.stdin.read()
        if response == "memory":
            block = bytearray(4 << 30)
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


LIMIT_S = 2.0  # long enough for a harmless item on a machine that is busy with other things


def test_an_endless_verification_is_cut_and_costs_no_other_item_its_verdict(spec: str) -> None:
    with VerifierPool(spec, {}, workers=1, timeout_s=LIMIT_S, memory_mib=1024) as pool:
        verdicts = ask(pool, "7", "loop", "7", "8")
        assert [v.reward for v in verdicts] == [1.0, None, 1.0, 0.0]
        assert verdicts[1].feedback == "verification timed out after 2 s"
        assert (pool.timeouts, pool.failures) == (1, 0)


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
        ("return Verdict(2.0)", "verify returned reward=2.0; it must be in [0, 1]"),
        ("return Verdict(-0.1)", "verify returned reward=-0.1; it must be in [0, 1]"),
        ("return Verdict('1.0')", "verify returned reward='1.0'; it must be a number"),
        ("return Verdict(1.0, None)", "verify returned feedback of type NoneType"),
        ("return Verdict(1.0, '', {'a': float('nan')})", "verify returned metrics['a']=nan"),
        ("return Verdict(1.0, '', 3)", "verify returned metrics of type int"),
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


def test_what_a_grader_prints_does_not_get_into_the_answers(shared: VerifierPool) -> None:
    assert [v.reward for v in ask(shared, "print", "7")] == [0.0, 1.0]


def test_a_grader_that_cannot_judge_is_not_a_failure(shared: VerifierPool) -> None:
    before = shared.failures
    assert ask(shared, "unjudged") == [Verdict(None, "I cannot tell")]
    assert shared.failures == before


def test_feedback_is_valid_text_of_bounded_length(shared: VerifierPool) -> None:
    strange, long = ask(shared, "surrogate", "long")
    assert strange.feedback == "? ?"
    assert long.feedback == "x" * 8000 + " [cut]"


def test_numbers_of_numpy_and_bools_are_rewards(shared: VerifierPool) -> None:
    verdicts = ask(
        shared,
        "return Verdict(True)",
        "return Verdict(__import__('numpy').float32(0.5))",
        "return Verdict(0)",
    )
    assert [v.reward for v in verdicts] == [1.0, 0.5, 0.0]
    assert all(type(v.reward) is float for v in verdicts)


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
        ask(pool, "7")
        os.kill(pool._workers[0].process.pid, signal.SIGSTOP)
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


@pytest.mark.skipif(sys.platform != "linux", reason="needs PR_SET_PDEATHSIG")
def test_children_die_with_a_killed_parent_even_inside_an_endless_verification(spec: str) -> None:
    code = f"""
import os, signal, threading
from fst_fast.contracts import Problem
from fst_fast.tasks.verify import VerifierPool
pool = VerifierPool({spec!r}, {{}}, workers=1, timeout_s=600, memory_mib=1024)
threading.Thread(target=lambda: pool.verify([(Problem("p", [], 7), "pid"), (Problem("p", [], 7), "loop")]), daemon=True).start()
print(pool._workers[0].process.pid, flush=True)
signal.pause()
"""
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/kernels"}
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=env)
    assert parent.stdout is not None
    child = os.pidfd_open(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    assert select.select([child], [], [], 20)[0], "the verifying child outlives its parent"
    os.close(child)


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
