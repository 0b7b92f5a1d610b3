"""Verification in killable child processes.

A grader is code that we do not know, run on text that a model made up: it may loop for ever, eat the memory, crash the interpreter. So it
runs in children that are fresh interpreters (not forks: a fork of a process with CUDA and threads is not safe), and the parent
keeps the clock: a limit kept inside the child would need a signal, which only the main thread gets and which C code (a
backtracking regular expression) does not see. A child past the limit is killed with everything that it started (supervise.py) and
replaced; so is one that leaves threads, files, processes or memory behind.

Items go out in chunks, answers come back one by one, so the limit applies to each item while a trivial grader costs no more than some
ten microseconds. This guards against accidents, not against an adversary: children run under the same user, with the same files and
network. Programs that nobody vouches for run under more than that: code.py.
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
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fst_fast.contracts import Problem, Verdict
from fst_fast.errors import UserError
from fst_fast.verify.supervisor import STATUS
from fst_fast.verify.worker import HEADER, REPLY_LIMIT, check

_START_LIMIT_S = 120.0  # to import and make the task
_END_LIMIT_S = 10.0  # for a supervisor to end everything below it
_CHUNK = 64
_KINDS_LOGGED = 10
ISOLATION_VARIABLE = "FST_CODE_ISOLATION"  # read by code.py
# Threads of a maths library, and a heap for each thread, cost address space; hashes of texts must be the same in every run.
_CHILD_ENV = {
    "MALLOC_ARENA_MAX": "2",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",
}


class VerifierPool:
    """`workers` children that hold the task `spec` made with `args`. Use as a context manager, or close().

    timeouts, failures: verdicts so far with reward None because the limit passed, or because the grader raised, crashed or returned
    something that is no verdict. A grader that itself returns reward None is counted in neither. replaced: children that were ended for
    what they had left behind. runs_code: whether the task's module takes run_code (code.py).
    isolation: `required` has run_code refuse to run a program that it cannot isolate. log: gets one line for the first trouble of each kind.
    Raises UserError where the task cannot be loaded in a child."""

    def __init__(
        self,
        spec: str,
        args: Mapping[str, Any],
        *,
        workers: int,
        timeout_s: float,
        memory_mib: int,
        isolation: str = "available",
        log: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._job = {"spec": spec, "args": dict(args), "memory_mib": memory_mib}
        self._env = {**_CHILD_ENV, ISOLATION_VARIABLE: isolation}
        self._folder = (
            os.getcwd()
        )  # where relative paths of the task start, also for a child that is started later
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        # PR_SET_PDEATHSIG goes off when the *thread* that started the child ends, so one thread that lives with the pool starts all.
        self._spawn_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="verifier-starter")
        self._workers: list[_Worker] = []
        self._size = workers
        self._log = log
        self._logged: set[str] = set()
        self.timeouts = 0
        self.failures = 0
        self.replaced = 0
        self.runs_code = False
        with self._killing_on_error():
            self._start_missing()
            while not all(worker.ready for worker in self._workers):
                self._serve_once(_Batch([], []))

    def verify(self, items: Sequence[tuple[Problem, str]]) -> list[Verdict]:
        """One verdict for each (problem, response), in their order. A verification that failed has reward None and says why."""
        batch = _Batch(
            [_pickled(problem, response) for problem, response in items], [problem.id for problem, _ in items]
        )
        with self._lock, self._killing_on_error():
            self._start_missing()
            while batch.left:
                self._serve_once(batch)
        return [batch.verdicts[index] for index in range(len(items))]

    def close(self) -> None:
        """Kill the children. May be called twice."""
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
        """Answers still under way must not be taken for answers to the next question."""
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
        """Replace children that something else ended while they were idle, and start those that are not there yet."""
        for worker in [w for w in self._workers if w.process.poll() is not None]:
            self._note_exit(worker, worker.receive())
            worker.kill()
            self._workers.remove(worker)
        while len(self._workers) < self._size:
            self._workers.append(self._start())

    def _serve_once(self, batch: _Batch) -> None:
        """Hand out chunks, wait for whatever comes first, take it in, replace the children that are late or dead."""
        for worker in self._workers:
            if worker.ready and not worker.todo and batch.waiting:
                size = min(
                    _CHUNK, len(batch.waiting) // (2 * self._size)
                )  # shrinks: all children end at about the same time
                worker.give([batch.waiting.popleft() for _ in range(max(size, 1))], batch, self._timeout_s)
        poll = select.poll()
        for worker in self._workers:
            worker.register(poll)
        first = min((w.deadline for w in self._workers if w.deadline is not None), default=None)
        poll.poll(None if first is None else max(0, math.ceil((first - time.monotonic()) * 1000)))
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
                    worker.ended = True  # an answer to nothing
                elif worker.ready:
                    index = worker.todo.popleft()
                    batch.verdicts[index] = self._verdict(reply, batch.ids[index])
                    worker.deadline = time.monotonic() + self._timeout_s if worker.todo else None
                elif "error" in reply:
                    raise UserError(reply["error"])
                else:
                    worker.ready, worker.deadline = True, None
                    self.runs_code = self.runs_code or bool(reply.get("runs_code"))
            late = worker.deadline is not None and time.monotonic() >= worker.deadline
            if worker.ended or late:
                self._kill_and_requeue(worker, batch, late)
                self._workers[place] = self._start()

    def _note_exit(self, worker: _Worker, replies: Sequence[Mapping[str, Any]]) -> None:
        """Note that a child ends of its own accord, and why."""
        for reply in replies:
            if "leaving" in reply:
                worker.leaving = True
                self.replaced += 1
                self._log_first(f"a verifying process is replaced: {reply['leaving']}")

    def _kill_and_requeue(self, worker: _Worker, batch: _Batch, late: bool) -> None:
        """Kill it, blame the item it was at, put the others back."""
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
            batch.verdicts[index] = self._verdict({"failure": failure}, batch.ids[index], late=late)
        batch.waiting.extendleft(reversed(worker.todo))

    def _verdict(self, reply: Mapping[str, Any], problem_id: str, *, late: bool = False) -> Verdict:
        if "failure" not in reply:
            return Verdict(reply["reward"], reply["feedback"], reply["metrics"])
        self.timeouts += late
        self.failures += not late
        self._log_first(reply["failure"], f" (problem {problem_id!r}; the reward is None)")
        return Verdict(None, reply["failure"])

    def _log_first(self, what: str, where: str = "") -> None:
        """Log the first of its kind; the counters have them all."""
        kind = what[:40]
        if kind not in self._logged and len(self._logged) < _KINDS_LOGGED:
            self._logged.add(kind)
            self._log(f"{what}{where}; further ones are counted only")


class _Batch:
    """The items of one call: pickled, the ids of their problems, those not handed out yet, and the verdicts by index."""

    def __init__(self, blobs: list[bytes], ids: list[str]) -> None:
        self.blobs = blobs
        self.ids = ids
        self.waiting = deque(range(len(blobs)))
        self.verdicts: dict[int, Verdict] = {}

    @property
    def left(self) -> int:
        return len(self.blobs) - len(self.verdicts)


class _Worker:
    """One child behind its supervisor, and its two pipes, both non-blocking: a child that stopped reading must not stop the trainer.

    todo: indices of the items that it was given and has not answered, in order. taken: it has read them; where it dies before that, no
    item is to blame. leaving: it said that it ends after this reply."""

    def __init__(self, job: Mapping[str, Any], folder: str, env: Mapping[str, str]) -> None:
        # The child sees the modules that this process sees, however they got onto the path.
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
            start_new_session=True,  # Ctrl-C is ours
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
        """Write what the pipe takes."""
        try:
            while self.unsent:
                del self.unsent[: os.write(self._in, self.unsent[:65536])]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self.ended = True

    def receive(self) -> list[dict[str, Any]]:
        """Read what there is, within bounds; the complete replies."""
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
            if reply is None:  # the grader found the descriptor: nothing that follows can be trusted
                self._received.clear()
                self.ended = True
                break
            del self._received[: HEADER.size + size]
            replies.append(reply)
        return replies

    def kill(self) -> str:
        """End it and everything that it started; how it ended."""
        status = b""
        with contextlib.suppress(OSError):
            self._control.settimeout(_END_LIMIT_S)
            self._control.shutdown(socket.SHUT_WR)
            status = self._control.recv(STATUS.size)
        self.process.kill()  # a supervisor that did not answer: its child dies with it
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
    """A reply of the child, None where it is not what a child says."""
    try:
        reply = json.loads(frame)
        if "reward" in reply and "failure" not in reply:
            reply = check(Verdict(reply["reward"], reply["feedback"], reply["metrics"]))
        texts = [reply[name] for name in ("failure", "error", "leaving") if name in reply]
        known = bool(texts) or any(name in reply for name in ("reward", "ready", "taken"))
        return reply if known and all(isinstance(text, str) for text in texts) else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _pickled(problem: Problem, response: str) -> bytes:
    try:
        return pickle.dumps((problem, response))
    except Exception as error:
        raise UserError(
            f"problem {problem.id!r} cannot be sent to a verifying process: {error}; its answer and meta must be plain data"
        ) from error
