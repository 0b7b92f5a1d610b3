"""A process that has the trainer imported and runs `fst` commands one after another, each in a forked child of its own. Importing torch and
transformers takes about ten seconds of a core, a run of the mini model from half a minute.

Between the two: a line of JSON to its input, {"commands": [[word, ...], ...], "log": path}; when they have ended, or one has failed, a line from it
over a pipe of its own: the exit code, negative for a signal. What a command prints goes to the log, what the process itself says to a file too.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from fst_fast.errors import UserError

COMMAND = (sys.executable, "-c", "from fst_fast.experiment import worker; worker.main()")


class Worker:
    """The caller's side. One job at a time: start, then poll until it gives the exit code; stop ends the job too, and the process."""

    def __init__(self, command: Sequence[str], said: Path) -> None:
        """said: file for what the process itself says, appended to."""
        self._said = said
        said.parent.mkdir(parents=True, exist_ok=True)
        # One thread a run. NVML: asking for GPUs must not initialise CUDA, which a forked child could then not use.
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
        self._answers, theirs = os.pipe()
        with said.open("ab") as output:
            self._process = subprocess.Popen(
                [*command, str(theirs)], stdin=subprocess.PIPE, stdout=output, stderr=output, env=env,
                pass_fds=[theirs], start_new_session=True,
            )  # fmt: skip
        os.close(theirs)

    def start(self, commands: Sequence[Sequence[str]], log: Path) -> None:
        """Raises UserError where the process is gone."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"commands": commands, "log": str(log)}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._gone() from error

    def poll(self) -> int | None:
        """The job's exit code; None: it is not done. Raises UserError where the process is gone."""
        if not select.select([self._answers], [], [], 0)[0]:
            return None
        line = os.read(self._answers, 64)  # one answer at a time, and written at once
        if not line:
            raise self._gone()
        return int(line)

    def stop(self) -> None:
        """A run that is under way ends after its step, with a checkpoint."""
        assert self._process.stdin is not None
        self._process.terminate()  # it tells its child; a run's own helpers go on until its step ends
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        os.close(self._answers)

    def _gone(self) -> UserError:
        return UserError(
            f"a process that makes runs has ended (exit code {self._process.wait()}); what it said is in {self._said}"
        )


def serve(run: Callable[[Sequence[str]], int], answers: int) -> None:
    """The process's side: run(words) for every command, each in a forked child, until the input ends. run: from a command's words to its exit
    code. answers: the file descriptor for them, the process's first argument."""
    child, told = 0, False

    def tell(*_: object) -> None:
        nonlocal told
        told = True
        if child:
            os.kill(child, signal.SIGTERM)

    signal.signal(signal.SIGTERM, tell)
    for line in sys.stdin:
        job = json.loads(line)
        code = 0
        for words in job["commands"]:
            if code:
                break
            sys.stdout.flush()
            sys.stderr.flush()
            pid = os.fork()
            if not pid:
                _child(run, words, job["log"], answers)
            child = pid
            if told:
                tell()  # it came before there was anybody to tell
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            child = 0  # before the number can be another process's
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.write(answers, f"{code}\n".encode())


def _child(run: Callable[[Sequence[str]], int], words: Sequence[str], log: str, answers: int) -> NoReturn:
    code = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.close(answers)  # so that its end is seen when this process's parent is gone
        said = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        null = os.open(os.devnull, os.O_RDONLY)
        for mine, standard in ((null, 0), (said, 1), (said, 2)):
            os.dup2(mine, standard)
        code = run(words)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:  # noqa: BLE001 - nothing may unwind into what the parent was doing
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    """Import what training and exporting need, then serve."""
    from fst_fast import cli
    from fst_fast.run.environment import prepare_environment

    prepare_environment()
    import fst_fast.commands.export
    import fst_fast.trainer  # noqa: F401

    serve(cli.main, int(sys.argv[1]))
