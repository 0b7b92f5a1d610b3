"""Verification in killable child processes.

A grader is unknown code run on model output: it may loop forever, exhaust memory or crash the interpreter. So it runs
in child processes that are fresh interpreters (forking a process with CUDA and threads is unsafe), and the parent
enforces the time limit. A limit inside the child would need a signal, which only the main thread receives and which C
code, such as a backtracking regular expression, does not notice. A child over the limit is killed with everything that
it started (supervisor.py) and replaced; so is one that leaks threads, files, processes or memory.

Items are sent in chunks and answered one by one. So the limit applies to each item, while a trivial grader costs only
some ten microseconds per item. This protects against accidents, not adversaries: children run as the same user, with
the same files and network. Untrusted programs run in the stricter sandbox of run_code.py.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fst_fast.contracts import Problem, Verdict
from fst_fast.errors import UserError
from fst_fast.verify.episodes import OBSERVING, Move, Over
from fst_fast.verify.supervisor import STATUS
from fst_fast.verify.worker import HEADER, REPLY_LIMIT, check

_START_LIMIT_S = 120.0  # to import and build the task
_END_LIMIT_S = 10.0  # for a supervisor to kill all of its descendants
_CHUNK = 64
Answer = Verdict | Over | Mapping[str, Any]
_KINDS_LOGGED = 10
ISOLATION_VARIABLE = "FST_CODE_ISOLATION"  # read by run_code.py
# Threads of maths libraries and their heaps use address space; string hashes must be the same in every run.
_CHILD_ENV = {
    "MALLOC_ARENA_MAX": "2",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",
}


class VerifierPool:
    """`workers` child processes that hold the task `spec`, built with `args`. Use as a context manager, or call close().

    timeouts, failures: number of verdicts with reward None because of the time limit, or because the grader raised,
    crashed or returned no valid verdict. A grader that returns reward None itself counts in neither. replaced: children
    replaced because of leaks. runs_code: whether the task's module imports run_code. has_turns: whether it is played by `play`.
    tool_calls, observation_chars: as in verify/episodes.py.
    isolation: with `required`, run_code refuses to run a program that it cannot isolate. log: receives one line for the
    first failure of each kind. Raises UserError if a child cannot load the task."""

    def __init__(
        self,
        spec: str,
        args: Mapping[str, Any],
        *,
        workers: int,
        timeout_s: float,
        memory_mib: int,
        isolation: str = "available",
        tool_calls: str = "",
        observation_chars: int = 8000,
        log: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._job = {
            "spec": spec, "args": dict(args), "memory_mib": memory_mib,
            "tool_calls": tool_calls, "observation_chars": observation_chars,
        }  # fmt: skip
        self._env = {**_CHILD_ENV, ISOLATION_VARIABLE: isolation}
        self._folder = os.getcwd()  # base of the task's relative paths, also for children started later
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        # PR_SET_PDEATHSIG fires when the *thread* that started the child ends, so one thread with the pool's lifetime starts all children.
        self._spawn_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="verifier-starter")
        self._workers: list[_Worker] = []
        self._size = workers
        self._log = log
        self._logged: set[str] = set()
        self.timeouts = 0
        self.failures = 0
        self.replaced = 0
        self.runs_code = self.has_turns = False
        with self._killing_on_error():
            self._start_missing()
            while not all(worker.ready for worker in self._workers):
                self._serve_once(_Batch([], []))

    def verify(self, items: Sequence[tuple[Problem, str]]) -> list[Verdict]:
        """One verdict per (problem, response), in order. A failed verification has reward None and the reason as feedback.

        Of an environment the response is a gold one, or the list of an episode's."""
        with self.judging() as judging:
            for problem, response in items:
                judging.add(problem, response)
            return judging.verdicts()

    @contextlib.contextmanager
    def judging(self) -> Iterator[Judging]:
        """While open, responses can be added one by one and are verified meanwhile. The pool takes nothing else until it is closed."""
        with self._lock, self._killing_on_error():
            self._start_missing()
            judging = Judging(self, _Batch([], []))
            yield judging
            judging.verdicts()

    def play(self, moves: Sequence[Move]) -> list[Over | Mapping[str, Any]]:
        """What follows each move of an environment, in order: {"messages", "tools"} of a start, {"observation"}, or the episode's end. A
        failed move ends it with the verdict None and the reason as feedback.

        An episode stays with one child as long as it lives."""
        ids = [move.problem.id for move in moves]
        homes = [move.key % self._size for move in moves]
        return self._answers(_Batch([_pickled(move.problem, move) for move in moves], ids, homes))  # type: ignore[return-value]

    def fail(self, problem_id: str, failure: str) -> Over:
        """Count and log what the caller has found wrong with an environment; returns the end of the episode."""
        return Over(self._verdict({"failure": failure}, problem_id), "error")

    def _answers(self, batch: _Batch) -> list[Answer]:
        with self._lock, self._killing_on_error():
            self._start_missing()
            while batch.left:
                self._serve_once(batch)
        return [batch.answers[index] for index in range(len(batch.blobs))]

    def close(self) -> None:
        """Kill the children. Idempotent."""
        for worker in self._workers:
            worker.kill()
        self._workers = []
        self._spawn_thread.shutdown()

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _killing_on_error(self) -> Iterator[None]:
        """Kill all children on an error: answers still in flight must not be taken for answers to the next call."""
        try:
            yield
        except BaseException:
            for worker in self._workers:
                worker.kill()
            self._workers = []
            raise

    def _start(self) -> _Worker:
        return self._spawn_thread.submit(_Worker, self._job, self._folder, self._env).result()

    def _start_missing(self) -> None:
        """Replace children that died while idle and start those not yet running."""
        for worker in [w for w in self._workers if w.process.poll() is not None]:
            self._note_exit(worker, worker.receive())
            worker.kill()
            self._workers.remove(worker)
        while len(self._workers) < self._size:
            self._workers.append(self._start())

    def _serve_once(self, batch: _Batch, *, wait: bool = True) -> None:
        """Send chunks to idle children, wait for replies, process them, and replace children that are late or dead. wait=False: process what is
        there already."""
        for place, worker in enumerate(self._workers):
            waiting = batch.waiting if batch.homes is None else batch.at_home[place]
            if worker.ready and not worker.todo and waiting:
                # shrinks, so that all children finish at about the same time
                size = min(_CHUNK, len(waiting) // (2 * self._size) if batch.homes is None else _CHUNK)
                chosen = [waiting.popleft() for _ in range(min(max(size, 1), len(waiting)))]
                worker.give(chosen, batch, self._timeout_s)
        poll = select.poll()
        for worker in self._workers:
            worker.register(poll)
        first = min((w.deadline for w in self._workers if w.deadline is not None), default=None)
        limit = None if first is None else max(0, math.ceil((first - time.monotonic()) * 1000))
        poll.poll(limit if wait else 0)
        for place, worker in enumerate(self._workers):
            worker.send()
            replies = worker.receive()
            self._note_exit(worker, replies)
            for reply in replies:
                if "leaving" in reply:
                    continue
                if "taken" in reply:
                    worker.taken = True
                elif worker.ready and not worker.todo:
                    worker.ended = True  # a reply without a request
                elif worker.ready:
                    index = worker.todo.popleft()
                    speaks = "reward" not in reply and "failure" not in reply
                    batch.answer(index, reply, None if speaks else self._verdict(reply, batch.ids[index]))
                    worker.deadline = time.monotonic() + self._timeout_s if worker.todo else None
                elif "error" in reply:
                    raise UserError(reply["error"])
                else:
                    worker.ready, worker.deadline = True, None
                    self.runs_code = self.runs_code or bool(reply.get("runs_code"))
                    self.has_turns = bool(reply.get("turns"))
            late = worker.deadline is not None and time.monotonic() >= worker.deadline
            if worker.ended or late:
                self._kill_and_requeue(worker, batch, late)
                self._workers[place] = self._start()

    def _note_exit(self, worker: _Worker, replies: Sequence[Mapping[str, Any]]) -> None:
        """Record that a child exits on its own, and log why."""
        for reply in replies:
            if "leaving" in reply:
                worker.leaving = True
                self.replaced += 1
                self._log_first(f"a verifying process is replaced: {reply['leaving']}")

    def _kill_and_requeue(self, worker: _Worker, batch: _Batch, late: bool) -> None:
        """Kill the child, blame the item that it was working on, and put its other items back in the queue."""
        end = worker.kill()
        if not worker.ready:
            what = (
                f"did not start within {_START_LIMIT_S:g} s"
                if late
                else f"died while it loaded the task ({end})"
            )
            raise UserError(
                f"a verifying process for task={self._job['spec']} {what}; verify.memory_mib={self._job['memory_mib']} may be too little"
            )
        if worker.todo and (late or (worker.taken and not worker.leaving)):
            index = worker.todo.popleft()
            failure = (
                f"verification timed out after {self._timeout_s:g} s"
                if late
                else f"the verifying process died ({end})"
            )
            reply = {"failure": failure}
            batch.answer(index, reply, self._verdict(reply, batch.ids[index], late=late))
        batch.put_back(worker.todo)

    def _verdict(self, reply: Mapping[str, Any], problem_id: str, *, late: bool = False) -> Verdict:
        if "failure" not in reply:
            return Verdict(reply["reward"], reply["feedback"], reply["metrics"])
        self.timeouts += late
        self.failures += not late
        self._log_first(reply["failure"], f" (problem {problem_id!r}; the reward is None)")
        return Verdict(None, reply["failure"])

    def _log_first(self, what: str, where: str = "") -> None:
        """Log the first failure of a kind; the counters cover all of them."""
        kind = what[:40]
        if kind not in self._logged and len(self._logged) < _KINDS_LOGGED:
            self._logged.add(kind)
            self._log(f"{what}{where}; further ones are counted only")


class Judging:
    """Responses that are verified while others are still sampled; see VerifierPool.judging."""

    def __init__(self, pool: VerifierPool, batch: _Batch) -> None:
        self._pool, self._batch = pool, batch

    def add(self, problem: Problem, response: str) -> int:
        """The place of its verdict."""
        return self._batch.add(_pickled(problem, (problem, response)), problem.id)

    @property
    def left(self) -> int:
        """How many are not judged yet."""
        return self._batch.left

    def serve(self) -> None:
        """Give the children what waits and take what they have answered. Waits for nobody."""
        if self.left:
            self._pool._serve_once(self._batch, wait=False)

    def verdicts(self) -> list[Verdict]:
        """One for each response, in the order in which they were added. Waits for the children."""
        while self.left:
            self._pool._serve_once(self._batch)
        return [self._batch.answers[index] for index in range(len(self._batch.blobs))]  # type: ignore[misc]


class _Batch:
    """The items of one call: pickled, with their problem ids, the indices not yet sent, and the answers by index.

    homes: the child, by its place, that has to get each item; None: any may."""

    def __init__(self, blobs: list[bytes], ids: list[str], homes: list[int] | None = None) -> None:
        self.blobs = blobs
        self.ids = ids
        self.homes = homes
        self.waiting = deque(range(len(blobs)) if homes is None else ())
        self.at_home: dict[int, deque[int]] = defaultdict(deque)
        for index, home in enumerate(homes or ()):
            self.at_home[home].append(index)
        self.answers: dict[int, Answer] = {}

    @property
    def left(self) -> int:
        return len(self.blobs) - len(self.answers)

    def add(self, blob: bytes, problem_id: str) -> int:
        self.blobs.append(blob)
        self.ids.append(problem_id)
        self.waiting.append(len(self.blobs) - 1)
        return len(self.blobs) - 1

    def answer(self, index: int, reply: Mapping[str, Any], verdict: Verdict | None) -> None:
        """Keep the answer to an item. verdict: None for what an environment says."""
        if verdict is None or self.homes is None:
            self.answers[index] = reply if verdict is None else verdict
        else:
            self.answers[index] = Over(verdict, "error" if "failure" in reply else reply.get("ended", ""))

    def put_back(self, indices: Sequence[int]) -> None:
        """What a child was given and did not answer waits again, first in its order."""
        for index in reversed(indices):
            (self.waiting if self.homes is None else self.at_home[self.homes[index]]).appendleft(index)


class _Worker:
    """One child behind its supervisor, and its two pipes. Both are non-blocking, so a child that stops reading cannot block the trainer.

    todo: indices of the items sent and not yet answered, in order. taken: the child has read them; if it dies earlier,
    no item is to blame. leaving: it has announced that it exits after this reply."""

    def __init__(self, job: Mapping[str, Any], folder: str, env: Mapping[str, str]) -> None:
        # The child gets this process's sys.path, so that it can import the same modules.
        self._control, theirs = socket.socketpair()
        start = (
            f"import sys; sys.path[:] = {sys.path!r}; from fst_fast.verify.worker import main; "
            f"main({os.getpid()}, {theirs.fileno()})"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", start],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            cwd=folder,
            start_new_session=True,  # Ctrl-C goes to the trainer only
            pass_fds=(theirs.fileno(),),
            env={**os.environ, **env},
        )
        theirs.close()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._in, self._out = self.process.stdin.fileno(), self.process.stdout.fileno()
        os.set_blocking(self._in, False)
        os.set_blocking(self._out, False)
        self.unsent = bytearray()
        self._received = bytearray()
        self.todo: deque[int] = deque()
        self.ready = self.taken = self.leaving = self.ended = False
        self.deadline: float | None = None
        self._queue(pickle.dumps(dict(job)), _START_LIMIT_S)

    def give(self, indices: Sequence[int], batch: _Batch, timeout_s: float) -> None:
        self.todo.extend(indices)
        self.taken = False
        self._queue(pickle.dumps([batch.blobs[index] for index in indices]), timeout_s)

    def _queue(self, body: bytes, limit_s: float) -> None:
        self.unsent += HEADER.pack(len(body)) + body
        self.deadline = time.monotonic() + limit_s
        self.send()

    def register(self, poll: select.poll) -> None:
        poll.register(self._out, select.POLLIN)
        if self.unsent and not self.ended:
            poll.register(self._in, select.POLLOUT)

    def send(self) -> None:
        """Write as much as the pipe accepts."""
        try:
            while self.unsent:
                del self.unsent[: os.write(self._in, self.unsent[:65536])]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self.ended = True

    def receive(self) -> list[dict[str, Any]]:
        """Read what is available, within bounds; returns the complete replies."""
        with contextlib.suppress(BlockingIOError):
            while len(self._received) < 4 * REPLY_LIMIT:
                data = os.read(self._out, 65536)
                if not data:
                    self.ended = True
                    break
                self._received += data
        replies: list[dict[str, Any]] = []
        while len(self._received) >= HEADER.size:
            (size,) = HEADER.unpack_from(self._received)
            if len(self._received) < HEADER.size + min(size, REPLY_LIMIT + 1):
                break
            reply = _parsed(bytes(self._received[HEADER.size : HEADER.size + size]))
            if reply is None:  # the grader wrote to the pipe: nothing after this can be trusted
                self._received.clear()
                self.ended = True
                break
            del self._received[: HEADER.size + size]
            replies.append(reply)
        return replies

    def kill(self) -> str:
        """Kill the child and everything that it started; returns how it ended."""
        status = b""
        with contextlib.suppress(OSError):
            self._control.settimeout(_END_LIMIT_S)
            self._control.shutdown(socket.SHUT_WR)
            status = self._control.recv(STATUS.size)
        self.process.kill()  # if the supervisor did not answer; its child dies with it
        self.process.wait()
        self._control.close()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
        if len(status) < STATUS.size:
            return "its supervisor was killed"
        code = os.waitstatus_to_exitcode(STATUS.unpack(status)[0])
        return f"signal {-code}, {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _parsed(frame: bytes) -> dict[str, Any] | None:
    """A reply of the child, or None if it is malformed."""
    try:
        reply = json.loads(frame)
        if "reward" in reply and "failure" not in reply:
            ended = {"ended": str(reply["ended"])} if "ended" in reply else {}
            reply = check(Verdict(reply["reward"], reply["feedback"], reply["metrics"])) | ended
        texts = [reply[name] for name in ("failure", "error", "leaving") if name in reply]
        known = bool(texts) or any(name in reply for name in ("reward", "ready", "taken")) or _says(reply)
        return reply if known and all(isinstance(text, str) for text in texts) else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _says(reply: Mapping[str, Any]) -> bool:
    """Whether a reply is well-formed speech of an environment."""
    said = reply.get("messages", reply.get("observation"))
    if not isinstance(said, list) or not said:
        return False
    plain = all(
        isinstance(m, dict) and all(isinstance(v, str) for v in m.values()) and "content" in m for m in said
    )
    roles = OBSERVING if "observation" in reply else {*OBSERVING, "assistant"}
    return plain and all(m.get("role") in roles for m in said) and isinstance(reply.get("tools", []), list)


def _pickled(problem: Problem, item: Any) -> bytes:
    try:
        return pickle.dumps(item)
    except Exception as error:
        raise UserError(
            f"problem {problem.id!r} cannot be sent to a verifying process: {error}; its answer and meta must be plain data"
        ) from error
