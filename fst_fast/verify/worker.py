"""The child process that runs a task's `verify`. pool.py is the trainer's side and explains why there are children.

Parent and child exchange frames over the child's stdin and stdout: 4 bytes of length, then the body. Before any user
code runs, the pipes are moved to other descriptors, and descriptors 0 and 1 become /dev/null, so a grader's prints
cannot get between the frames. Requests are pickles of the trainer's own objects. Replies are JSON, so a response that
takes this process over still cannot run code in the trainer. No torch here: the process must start fast and stay small.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import resource
import socket
import struct
import sys
import threading
from collections.abc import Mapping
from typing import Any, BinaryIO

from fst_fast.contracts import Task, Verdict
from fst_fast.errors import UserError
from fst_fast.tasks.environments import has_turns
from fst_fast.tasks.user import describe
from fst_fast.tasks.verdicts import plain_number
from fst_fast.verify import supervisor
from fst_fast.verify.episodes import Episodes
from fst_fast.verify.supervisor import fork_supervised

HEADER = struct.Struct("!I")
REPLY_LIMIT = 1 << 20  # bytes
FEEDBACK_LIMIT = 8000
METRICS_LIMIT = 100
NAME_LIMIT = 200
# beyond this growth since loading, the child is replaced
_ALLOWED_GROWTH = {"threads": 16, "open files": 64, "processes": 16}
_MEMORY_SHARE = 0.75  # of the memory limit; beyond it the child is replaced


def main(trainer: int, control: int) -> None:
    """Serve until the trainer closes the pipe. trainer: its process id. control: the descriptor of the supervisor's socket."""
    fork_supervised(socket.socket(fileno=control), trainer)
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", buffering=0)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1):
        os.dup2(null, descriptor)
    job = read(requests)
    if job is None:
        return
    settings = pickle.loads(job)
    try:
        task = _load(settings)
    except UserError as error:
        return write(replies, {"error": str(error)})
    except BaseException as error:  # noqa: BLE001 - user code may raise SystemExit; the parent tells the user
        return write(
            replies, {"error": f"the task cannot be loaded in a verifying process: {describe(error)}"}
        )
    episodes = None
    if has_turns(task):
        episodes = Episodes(
            task, syntax=settings["tool_calls"], chars=settings["observation_chars"], check=check
        )
    write(
        replies,
        {
            "ready": True,
            "runs_code": "fst_fast.verify.run_code" in sys.modules,
            "turns": episodes is not None,
        },
    )
    own, loaded = os.getpid(), _resources()
    while (chunk := read(requests)) is not None:
        write(replies, {"taken": True})  # from here on, an item is to blame if the process dies
        items = pickle.loads(chunk)
        _redirect_streams(null)
        answers = (
            episodes.replies(list(map(pickle.loads, items)))
            if episodes
            else (judge(task, item) for item in items)
        )
        for reply in answers:
            _redirect_streams(null)
            if os.getpid() != own:  # verify forked and both processes returned: only one may answer
                os._exit(0)
            write(replies, _bounded(reply) if episodes else reply)
            if "out_of_memory" in reply:  # an earlier item's leak may be the cause
                return write(replies, {"leaving": "it ran out of memory"})
        # an episode may hold connections and processes; what is left behind shows when none is live
        if episodes and episodes.live:
            continue
        left = _leaked(loaded, settings["memory_mib"] << 20)
        if left:
            return write(replies, {"leaving": f"verify leaves {left} behind"})


def _bounded(reply: dict[str, Any]) -> dict[str, Any]:
    """The reply, or the sentence that it is too long for the trainer to read."""
    size = len(json.dumps(reply))
    if size <= REPLY_LIMIT:
        return reply
    return {
        "reward": None,
        "failure": f"a reply of {size} bytes; at most {REPLY_LIMIT} are taken (rollout.max_observation_chars)",
    }


def _redirect_streams(null: int) -> None:
    """Point the standard streams at /dev/null again, whatever the last verification did to them."""
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None or getattr(stream, "closed", False):
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115


def _resources() -> dict[str, int]:
    """This process's current resource usage; values that this system does not expose are omitted."""
    held = {"threads": threading.active_count()}
    if sys.platform == "linux":
        held["open files"] = len(os.listdir("/proc/self/fd"))
        with open("/proc/self/statm") as file:
            held["memory"] = int(file.read().split()[0]) * resource.getpagesize()
        children = supervisor.children(os.getpid())
        if children is not None:
            held["processes"] = len(children)
    return held


def _leaked(loaded: Mapping[str, int], memory_bytes: int) -> str:
    """Such as `80 threads` if usage has grown too much since the task was loaded; else ""."""
    now = _resources()
    for name, allowed in _ALLOWED_GROWTH.items():
        more = now.get(name, 0) - loaded.get(name, 0)
        if more > allowed:
            return f"{more} {name}"
    if now.get("memory", 0) > max(_MEMORY_SHARE * memory_bytes, loaded.get("memory", 0) + memory_bytes / 4):
        return f"{now['memory'] >> 20} MiB of {memory_bytes >> 20}"
    return ""


def read(stream: BinaryIO) -> bytes | None:
    header = stream.read(HEADER.size)
    if len(header) < HEADER.size:
        return None
    (size,) = HEADER.unpack(header)
    body = stream.read(size)
    return body if len(body) == size else None


def write(stream: Any, reply: Mapping[str, Any]) -> None:
    body = json.dumps(reply, allow_nan=False).encode()
    frame = memoryview(HEADER.pack(len(body)) + body)
    while frame:
        frame = frame[stream.write(frame) :]


def _load(job: Mapping[str, Any]) -> Any:
    limit = job["memory_mib"] << 20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from fst_fast.tasks.registry import load_task

    try:
        return load_task(job["spec"], job["args"], problems=False)
    except MemoryError:
        raise UserError(
            f"verify.memory_mib={job['memory_mib']} is too little to load task={job['spec']}"
        ) from None


def judge(task: Task, item: bytes) -> dict[str, Any]:
    """Verify one pickled (problem, response); every failure becomes a reply with reward None and `failure` set."""
    try:
        problem, response = pickle.loads(item)
        return check(task.verify(problem, response))
    except MemoryError:
        return {
            "reward": None,
            "failure": "the verification ran out of memory (verify.memory_mib)",
            "out_of_memory": True,
        }
    except BaseException as error:  # noqa: BLE001 - user code may raise anything; it becomes the verdict
        return {"reward": None, "failure": f"verify raised {describe(error)}"}


def check(verdict: Any) -> dict[str, Any]:
    """The reply for what `verify` returned; a reward or metric that is no finite number, or a reward outside [0, 1], is a failure.

    Numbers are taken as tasks/verdicts.py says. No feedback (None) is an empty one, a metric that is None was not measured."""
    if not isinstance(verdict, Verdict):
        return _wrong(f"a {type(verdict).__name__}; it must return a Verdict")
    given: dict[str, Any] = vars(verdict)  # whatever the annotations say
    feedback = "" if given["feedback"] is None else given["feedback"]
    if not isinstance(feedback, str):
        return _wrong(f"feedback of type {type(feedback).__name__}; it must be a text")
    measured = {} if given["metrics"] is None else given["metrics"]
    if not isinstance(measured, Mapping):
        return _wrong(f"metrics of type {type(measured).__name__}; it must be a dict of numbers")
    if len(measured) > METRICS_LIMIT:
        return _wrong(f"{len(measured)} metrics; at most {METRICS_LIMIT} are taken")
    metrics: dict[str, float] = {}
    for name, value in measured.items():
        if value is None:
            continue
        number = plain_number(value)
        if number is None or not math.isfinite(number):
            return _wrong(f"metrics[{name!r}]={value!r:.80}; it must be a finite number")
        metrics[_text(str(name)[:NAME_LIMIT])] = number
    reward = plain_number(given["reward"])
    if reward is None and given["reward"] is not None:
        return _wrong(f"reward={given['reward']!r:.80}; it must be a number in [0, 1] or None")
    if reward is not None and not 0 <= reward <= 1:  # NaN fails this too
        return _wrong(f"reward={reward}; it must be in [0, 1]")
    feedback = _text(feedback)
    if len(feedback) > FEEDBACK_LIMIT:
        feedback = feedback[:FEEDBACK_LIMIT] + " [cut]"
    return {"reward": reward, "feedback": feedback, "metrics": metrics}


def _text(text: str) -> str:
    """Text that any UTF-8 file can hold."""
    return text.encode("utf-8", "replace").decode()


def _wrong(what: str) -> dict[str, Any]:
    return {"reward": None, "failure": f"verify returned {what}"}
