"""The vLLM servers of a run, started by it or given: brought to the weights that are to sample, and brought back when they fail.

Which weights a server holds is said by a stamp, RUN:base or RUN:STEP, that it is given with them and that every answer carries. So an answer of old
weights, of a server that was started anew, or of one that another run has taken over is seen at once. After each transfer a probe compares the
server's log-probs of a fixed prompt with the trainer's.

`prepare` is called by all processes together before they sample; rank 0 acts. In between each process is alone with the servers: the first one that finds
them gone brings them back under a lock on RUN/vllm.lock and raises the generation written there, and the others see that it was done. Nothing moves the weights
meanwhile, and every process has them whole.

The base model's cells are sampled by the same servers: under full training by sending its weights (two transfers per evaluation that samples it, no
memory), with LoRA under the served model's own name.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fst_fast import distributed
from fst_fast.config import Config
from fst_fast.errors import UserError
from fst_fast.forest import Leaf
from fst_fast.policy.scoring import Batching, Scorer, micro_batches
from fst_fast.rollout.managed_server import WHOLE_PROMPTS, ManagedServer
from fst_fast.rollout.vllm_args import SECTION, USER, VllmArgs
from fst_fast.rollout.vllm_client import GoneError, RefusedError, VllmClient
from fst_fast.rollout.weight_transfer import FileTransfer, Servers, VllmTransfer, send_adapters

UNTOUCHED = "default"  # vLLM's stamp of weights that it loaded itself
LARGEST_MISMATCH = {"float32": 1e-3, "bfloat16": 0.05}
FOLDER = "fst-vllm-"
_WAIT_S = 0.2
_FRESH_S = 60.0  # a folder that young may be about to be locked


@dataclass(frozen=True)
class Weights:
    """Weights that are to sample. step: of the trained ones; None for the base model's, which those of step 0 are too."""

    module: nn.Module
    step: int | None

    @property
    def is_base(self) -> bool:
        return not self.step

    @property
    def name(self) -> str:
        return "base" if self.is_base else str(self.step)


@dataclass
class Shared:
    """What the processes of a run know together, in RUN/vllm.lock. generation: how often the servers were brought back. pid: of a managed server.
    adapters: the name of those that the servers hold."""

    run: str
    generation: int = 0
    pid: int | None = None
    adapters: str = ""


class Hosts:
    """The servers as one process sees them. longest: of a sequence, in tokens. probe_ids int64 [P]: the fixed prompt. note: told of restarts.

    mismatch: of the last probe, nats per token."""

    def __init__(
        self,
        args: VllmArgs,
        config: Config,
        *,
        longest: int,
        probe_ids: NDArray[np.int64],
        pad_id: int,
        note: Callable[[str], None],
    ) -> None:
        self.args, self.config, self.note = args, config, note
        self.longest, self.probe_ids, self.lora = longest, probe_ids, config.policy.lora is not None
        slow = config.slow
        self._batching = Batching(
            config.policy.packing, slow.tokens_per_micro_batch, slow.head_chunk_rows, 1.0, pad_id
        )
        self._folder_lock: int | None = None
        self.run_id = distributed.broadcast_result(lambda: secrets.token_hex(4))
        self.folder = Path(distributed.broadcast_result(self._make_folder))
        self.managed = None if args.urls else ManagedServer(args, config, self.folder, longest)
        where = [url.rstrip("/") for url in args.urls] or [f"unix:{self.folder}/server"]
        self.clients = [VllmClient(w, timeout_s=args.timeout_s, connections=args.concurrency) for w in where]
        self.named = ", ".join(args.urls) or "the server of this run"
        self.generation = 0
        self.mismatch: float | None = None
        self._servers = Servers(self.clients, args.in_flight)
        self._lock = self.folder / "lock"
        self._up = False  # they have answered since they were last found gone
        self._held = ""  # what `prepare` brought them to, the same on all processes
        self._transfer: FileTransfer | VllmTransfer | None = None

    def enter(self, run_dir: Path) -> None:
        """Keep the lock and the server's log in the run folder, which several machines may share, and let a managed server begin to load."""
        self._lock = run_dir / "vllm.lock"
        if self.managed:
            self.managed.log = run_dir / "vllm.log"
            if distributed.rank() == 0:
                with self._locked() as shared:
                    shared.pid = self.managed.start()

    def _make_folder(self) -> str:
        """A folder for this run alone, locked while the process lives. What runs that were killed have left there is removed: it takes memory."""
        parent = Path(
            self.args.folder or ("/dev/shm" if os.path.isdir("/dev/shm") else tempfile.gettempdir())
        )
        try:
            folder = Path(tempfile.mkdtemp(prefix=FOLDER, dir=parent))
            now = folder.stat().st_mtime
            for old in parent.glob(f"{FOLDER}*"):
                if now - old.stat().st_mtime > _FRESH_S and (left := _lock_folder(old)) is not None:
                    os.close(left)
                    shutil.rmtree(old, ignore_errors=True)
        except OSError as error:
            raise UserError(f"{SECTION}.folder={parent}: {error.strerror}") from error
        self._folder_lock = _lock_folder(folder)
        return str(folder)

    def stamp(self, weights: Weights) -> str:
        """What the servers' answers carry once they have these weights. With LoRA the base stays, and the model's name says the rest."""
        return f"{self.run_id}:{'base' if self.lora else weights.name}"

    def model(self, weights: Weights) -> str | None:
        """The name of the model to ask for; None: the server's own."""
        return f"fst-{self.run_id}-{weights.step}" if self.lora and not weights.is_base else None

    def prepare(self, weights: Weights) -> None:
        """Bring the servers to these weights. All processes call it, and all raise what went wrong (UserError)."""
        if self._held == weights.name:
            return

        def act() -> None:
            with self._locked() as shared:
                if shared.generation != self.generation:  # another process has brought the servers back
                    self._transfer, self.generation = None, shared.generation
                    if self.managed:
                        self.managed.end()
                self._bring(weights, shared)

        distributed.on_rank_zero(act)
        self.generation, self.mismatch = distributed.broadcast((self.generation, self.mismatch))
        self._held = weights.name

    def agree(self) -> None:
        """Bring what all processes must know alike up to date, after rank 0 has used the servers alone. All processes call it."""
        self._held, self.generation, self.mismatch = distributed.broadcast(
            (self._held, self.generation, self.mismatch)
        )

    def recover(self, weights: Weights, seen: int, why: str) -> None:
        """Bring the servers back, unless another process has since `seen`, the generation that was found gone. Raises UserError."""
        with self._locked() as shared:
            self.generation = shared.generation
            if shared.generation == seen:
                self._restart(shared, why)
                self._bring(weights, shared)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[Shared]:
        descriptor = os.open(self._lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            text = os.pread(descriptor, 4096, 0).decode()
            shared = Shared(**json.loads(text)) if text else Shared(self.run_id)
            if shared.run != self.run_id:  # of a run that was continued
                shared = Shared(self.run_id)
            try:
                yield shared
            finally:
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(vars(shared)).encode(), 0)
        finally:
            os.close(descriptor)

    def _restart(self, shared: Shared, why: str) -> None:
        """Count a loss of the servers and end what is left of a managed one; `_bring` starts it again. Raises UserError after too many."""
        if shared.generation >= self.args.restarts:
            raise UserError(
                f"{USER}: {self.named} {why}, after {shared.generation} restarts ({SECTION}.restarts); {self._last_words()}"
            )
        why = f"{why}; {self._last_words()}" if self.managed else why
        self.note(f"{USER}: {self.named} {why}; restart {shared.generation + 1} of {self.args.restarts}")
        if self.managed:
            self.managed.end(shared.pid)
        shared.generation, shared.pid, shared.adapters = shared.generation + 1, None, ""
        self.generation, self._transfer, self._up = shared.generation, None, False

    def _bring(self, weights: Weights, shared: Shared) -> None:
        """Servers that run and have these weights. One that is lost meanwhile is restarted. Raises UserError."""
        while True:
            try:
                self._await_up(shared)
                self._send(weights, shared)
                self._probe(weights)
                return
            except GoneError as error:
                if self.args.urls and not self._held:
                    raise UserError(f"{USER}: {self.named} {error}") from None
                self._restart(shared, str(error))
            except RefusedError as error:
                raise UserError(f"{USER}: {self.named} {error}; {self._too_old()}") from None

    def _await_up(self, shared: Shared) -> None:
        """Wait until every server answers, after starting that of a managed run. Raises GoneError, RefusedError, UserError."""
        if self.managed and shared.pid is None:
            shared.pid = self.managed.start()
        until = time.monotonic() + self.args.start_timeout_s
        for client in self.clients:
            while not client.answers():
                if self._up:
                    raise GoneError("does not answer any more")
                if self.managed and self.managed.has_ended():
                    self.managed.end()
                    raise UserError(f"{USER}: the server did not start; {self._last_words()}")
                if self.args.urls and not self._held:
                    client.get("/health")  # says why it does not answer
                if time.monotonic() > until:
                    raise UserError(
                        f"{USER}: {self.named} does not come up in {self.args.start_timeout_s:g} s ({SECTION}.start_timeout_s); "
                        f"{self._last_words()}"
                    )
                time.sleep(_WAIT_S)
            self._check(client)
        self._up = True

    def _check(self, client: VllmClient) -> None:
        """Whether the server is one that this run can use, as far as it says. Raises GoneError, RefusedError, UserError."""
        try:
            stamp = client.get("/weight_info")["weight_version"]
            if self.managed or self._held:
                return
            info = client.get("/server_info", config_format="json")["vllm_config"]
            missing = self._missing_flags(info)
        except (TypeError, KeyError) as error:
            raise RefusedError(
                f"does not describe itself as vLLM does ({type(error).__name__}: {error})"
            ) from None
        if stamp != UNTOUCHED:
            self.note(f"{USER}: {client.where} has weights of another run ({stamp}); this run takes it over")
        if missing:
            raise UserError(f"{USER}: {client.where} must be started with {' and '.join(missing)}")

    def _missing_flags(self, info: Any) -> list[str]:
        """Flags without which a server of this configuration (of /server_info) cannot serve this run."""
        model = info["model_config"]
        wanted = {
            f"--max-model-len={self.longest} or more": model["max_model_len"] >= self.longest,
            f"--dtype={self.config.model.dtype}": model["dtype"] == f"torch.{self.config.model.dtype}",
            "--logprobs-mode=processed_logprobs": model["logprobs_mode"] == "processed_logprobs",
            WHOLE_PROMPTS: info["device_config"]["device"] != "cpu"
            or not info["scheduler_config"]["enable_chunked_prefill"],
        }
        if self.lora:
            wanted["--enable-lora"] = info["lora_config"] is not None
        else:
            backend = FileTransfer.backend if self.args.transfer == "file" else self.args.transfer
            has = info["weight_transfer_config"]
            flag = f'--weight-transfer-config=\'{{"backend": "{backend}"}}\''
            wanted[flag] = has is not None and has["backend"] == backend
        return [flag for flag, there in wanted.items() if not there]

    def _send(self, weights: Weights, shared: Shared) -> None:
        stamp = self.stamp(weights)
        if self.lora:
            for client in self.clients:
                client.post("/update_weight_version", {"new_version": stamp})
            name = self.model(weights)
            if name is not None and name != shared.adapters:
                send_adapters(self.clients, weights.module, self.folder, name, shared.adapters)
                shared.adapters = name
            return
        if self._transfer is None:
            how = self.args.transfer
            address = os.environ.get("MASTER_ADDR", "127.0.0.1")
            self._transfer = (
                FileTransfer(self._servers, self.folder)
                if how == "file"
                else VllmTransfer(self._servers, how, address)
            )
        self._servers.stamp = stamp
        self._transfer.send(weights.module)

    def _probe(self, weights: Weights) -> None:
        """Compare the servers' log-probs of the fixed prompt with the trainer's. Raises GoneError, RefusedError, UserError."""
        ids = self.probe_ids
        (micro,) = micro_batches([Leaf(ids[:1], ids[1:])], self._batching)
        own = Scorer(weights.module).logprobs(micro, self._batching).double().cpu().numpy()
        bound = self.args.max_mismatch or LARGEST_MISMATCH[self.config.model.dtype]
        asked = {"temperature": 1.0, "max_tokens": 1, "prompt_logprobs": 0, "seed": 0}
        body = {"token_ids": ids.tolist(), "sampling_params": asked, "model": self.model(weights)}
        self.mismatch = 0.0
        for client in self.clients:
            answer = client.post("/inference/v1/generate", body)
            try:
                rows = answer["prompt_logprobs"][1:]
                theirs = [
                    float(row[str(i)]["logprob"]) for row, i in zip(rows, ids[1:].tolist(), strict=True)
                ]
            except (TypeError, KeyError, ValueError):
                raise RefusedError("gives no log-probs of a prompt") from None
            mismatch = float(np.abs(own - np.array(theirs)).mean())
            if not mismatch <= bound:
                raise UserError(
                    f"{USER}: {client.where} was sent the weights of step {weights.step or 0}, but its log-probs differ from the trainer's by "
                    f"{mismatch:.3g} nats per token; allowed is {bound:g} ({SECTION}.max_mismatch)"
                )
            self.mismatch = max(self.mismatch, mismatch)

    def _last_words(self) -> str:
        return self.managed.last_words() if self.managed else "see its log"

    def _too_old(self) -> str:
        """What a server needs that refuses a route."""
        found = "unknown"
        with contextlib.suppress(GoneError, RefusedError, TypeError, KeyError):
            found = str(self.clients[0].get("/version")["version"])
        return f"needed is vLLM 0.32 or newer (it says {found}) with VLLM_SERVER_DEV_MODE=1 and --enable-scale-out"

    def close(self) -> None:
        """End the server that this process started and remove what was written for it. May be called twice."""
        if self.managed:
            self.managed.end()
        for client in self.clients:
            client.close()
        if self._folder_lock is not None:  # on rank 0
            shutil.rmtree(self.folder, ignore_errors=True)
            os.close(self._folder_lock)
            self._folder_lock = None


def _lock_folder(folder: Path) -> int | None:
    """A descriptor that holds the folder's lock, or None where another process does."""
    descriptor = None
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        if descriptor is not None:
            os.close(descriptor)
        return None
    return descriptor
