"""The vLLM server that a run starts for itself: how it is started, what its log says, and how it ends with the run.

It listens on a Unix socket in a folder of the run's user alone, so it needs no port and no key, and two runs cannot meet on one server. It is started
through verify/attached.py and so never outlives the run.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import time
from pathlib import Path

import psutil

from fst_fast.config import Config
from fst_fast.policy.base_model import model_folder
from fst_fast.rollout.vllm_args import VllmArgs
from fst_fast.rollout.weight_transfer import FileTransfer
from fst_fast.run.environment import for_others
from fst_fast.verify import attached

WORKER = Path(__file__).parent / "vllm_worker"
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that --max-lora-rank may be
WHOLE_PROMPTS = "--no-enable-chunked-prefill"
"""On a CPU vLLM's engine dies where it would take back what a request with a seed has drawn, as it does for a part of a prompt."""
_FOLLOWS = ("initialization failed", "EngineDeadError", "See stack trace")
"""In what the front end says once the engine has failed, for every request that it had."""


class ManagedServer:
    """The server of a run as one process sees it. longest: of a sequence, in tokens."""

    def __init__(self, args: VllmArgs, config: Config, folder: Path, longest: int) -> None:
        self.args, self.config, self.longest = args, config, longest
        self.socket, self.log = folder / "server", folder / "vllm.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._log_begins = 0  # bytes of the log that are of earlier starts

    def has_ended(self) -> bool:
        """Whether the server that this process started has exited."""
        return self._process is not None and self._process.poll() is not None

    def start(self) -> int:
        """Start it; its output is added to the log. Returns the id of the process that it is attached to."""
        self.socket.unlink(missing_ok=True)
        log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._log_begins = os.fstat(log).st_size
        try:
            self._process = attached.start(self.command(), log=log, changes=self.environment())
        finally:
            os.close(log)
        return self._process.pid

    def command(self) -> list[str]:
        config, lora = self.config, self.config.policy.lora
        command = [
            *self.args.command, "serve", str(model_folder(config.model.path, config.model.revision)), f"--uds={self.socket}", f"--dtype={config.model.dtype}",
            f"--max-model-len={self.longest}", f"--seed={config.seed}",
            "--logprobs-mode=processed_logprobs", "--generation-config=vllm", "--enable-scale-out", "--enable-prompt-tokens-details",
            "--disable-uvicorn-access-log",
        ]  # fmt: skip
        if self.args.gpus is None:
            command.append(WHOLE_PROMPTS)
        if config.model.trust_remote_code:
            command.append("--trust-remote-code")
        if config.model.tokenizer is not None:
            folder = model_folder(config.model.tokenizer, key="model.tokenizer", weights=False)
            command.append(f"--tokenizer={folder}")
        if lora:
            rank = next((r for r in LORA_RANKS if r >= lora.rank), lora.rank)
            command += ["--enable-lora", f"--max-lora-rank={rank}", "--max-loras=1", "--max-cpu-loras=2"]
        elif self.args.transfer == "file":
            command += [
                f'--weight-transfer-config={{"backend": "{FileTransfer.backend}"}}',
                "--worker-extension-cls=fst_weights.Registered",
            ]
        else:
            command += [f'--weight-transfer-config={{"backend": "{self.args.transfer}"}}']
        return [*command, *self.args.args]

    def environment(self) -> dict[str, str | None]:
        """What its environment has besides, or (None) has not."""
        changes: dict[str, str | None] = dict.fromkeys(LAUNCHER) | for_others()
        changes |= {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "PYTHONPATH": str(WORKER)}
        if self.config.policy.lora:
            changes["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
        if self.args.transfer == "ipc":
            changes["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
        if self.args.gpus is not None:
            changes["CUDA_VISIBLE_DEVICES"] = self.args.gpus
        return {**changes, **self.args.env}

    def end(self, pid: int | None = None) -> None:
        """End the one that this process started, and wait until it is gone. pid: end also this one, of another process of the run."""
        if self._process is not None:
            attached.end(self._process)
            pid = None if pid == self._process.pid else pid
            self._process = None
        if pid is not None:
            with contextlib.suppress(psutil.Error):
                other = psutil.Process(pid)
                other.terminate()
                while other.is_running() and other.status() != psutil.STATUS_ZOMBIE:
                    time.sleep(0.1)

    def last_words(self) -> str:
        """Where the log is, and the last error in it since the start that does not follow from another."""
        own = other = ""
        if self.log.is_file():
            with self.log.open("rb") as file:
                file.seek(self._log_begins)
                for raw in file:
                    line = raw.decode(errors="replace").strip()
                    match = re.search(r"\b\w*(Error|Exception): .*|\berror: .*", line)
                    if match is None or " WARNING " in line:
                        continue
                    if any(words in line for words in _FOLLOWS):
                        other = match.group()
                    else:
                        own = match.group()
        found = own or other
        return f"{self.log} says: {found[:300]}" if found else f"see {self.log}"
