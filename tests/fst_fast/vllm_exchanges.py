"""What is asked of a vLLM server, real or fake, to record how it answers: `python -m tests.fst_fast.vllm_exchanges PATH_OF_VLLM` writes vllm_answers.json.

The model is the shipped mini one, so the tokens, log-probs and errors are the same wherever it runs.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors.torch import save_file

from fst_fast.config import Config
from fst_fast.policy.attention import load_model, model_folder
from fst_fast.rollout.managed_server import ManagedServer
from fst_fast.rollout.vllm_args import VllmArgs
from fst_fast.rollout.vllm_client import VllmClient

ANSWERS = Path(__file__).with_name("vllm_answers.json")
PROMPT = [7, 20, 31, 44, 9, 100, 33, 12]
LOGPROBS = 1e-4  # of fp32 on two machines
VOLATILE = {"request_id", "created", "model"}
SAMPLING: dict[str, Any] = {
    "n": 1, "max_tokens": 8, "min_tokens": 0, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "presence_penalty": 0.0,
    "frequency_penalty": 0.0, "repetition_penalty": 1.0, "seed": 3, "stop": [], "stop_token_ids": [5], "ignore_eos": False,
    "include_stop_str_in_output": True, "skip_special_tokens": False, "spaces_between_special_tokens": False, "detokenize": True,
    "logprobs": 0, "prompt_logprobs": None, "logit_bias": None, "allowed_token_ids": None, "bad_words": [], "structured_outputs": None,
    "thinking_token_budget": None, "repetition_detection": None, "watermarking": False,
}  # fmt: skip


def ask(prompt: list[int], model: str | None = None, **changes: Any) -> tuple[str, str, dict[str, Any]]:
    body = {
        "token_ids": prompt,
        "sampling_params": {**SAMPLING, **changes},
        "model": model,
        "return_token_ids": True,
    }
    return "POST", "/inference/v1/generate", body


def update(path: str) -> tuple[str, str, dict[str, Any]]:
    return "POST", "/update_weights", {"update_info": {"path": path}}


def exchanges(folder: Path) -> list[tuple[str, str, dict[str, Any] | None]]:
    """(method, path, body) in order. After the last two the real server's engine is dead, and soon the server ends."""
    model = load_model("mini", torch.float32, attention="sdpa")
    weights = {name: (0.9 * p).detach().contiguous() for name, p in model.named_parameters()}
    names = sorted(weights)
    for part, some in (("a", names[: len(names) // 2]), ("b", names[len(names) // 2 :])):
        save_file({name: weights[name] for name in some}, folder / part)
    start, end = (
        ("POST", "/start_weight_update", None),
        ("POST", "/finish_weight_update", {"weight_version": "r:1"}),
    )
    return [
        ("GET", "/health", None),
        ("GET", "/version", None),
        ("GET", "/weight_info", None),
        ("GET", "/get_world_size", None),
        ("GET", "/nope", None),
        ask(PROMPT),
        ask(PROMPT, max_tokens=1, temperature=1.0, prompt_logprobs=0),
        ask(PROMPT, stop=["17"], max_tokens=32),
        ask(PROMPT, temperature=0.7),
        ask(PROMPT, "nope"),
        ask([7] * 400),
        ask([9999]),
        ("POST", "/pause?mode=wait", None),
        ("POST", "/init_weight_transfer_engine", {"init_info": {}}),
        start,
        start,
        update(str(folder / "a")),
        update(str(folder / "b")),
        end,
        ("POST", "/reset_prefix_cache?reset_running_requests=false", None),
        ("POST", "/resume", None),
        ("GET", "/weight_info", None),
        ask(PROMPT),
        ask(PROMPT, max_tokens=32),
        start,
        update("/nonexistent/weights"),
        ask(PROMPT),
    ]  # fmt: skip


def answers(server: ManagedServer, folder: Path) -> list[dict[str, Any]]:
    """Start the server and ask everything."""
    server.start()
    client = VllmClient(f"unix:{server.socket}", timeout_s=60, connections=1)
    try:
        while not client.answers():
            assert not server.has_ended(), server.last_words()
            time.sleep(0.1)
        found = []
        for method, path, body in exchanges(folder):
            said = _once_more(client._client, method, path, body)
            answer = said.json() if said.content else None
            found.append({"asked": f"{method} {path}", "status": said.status_code, "answer": answer})
        return found
    finally:
        client.close()
        server.end()


def _once_more(client: httpx.Client, method: str, path: str, body: Any) -> httpx.Response:
    """After an error 500 the real server closes the connection, which the next request may notice too late."""
    for _ in range(2):
        try:
            return client.request(method, path, json=body)
        except httpx.RemoteProtocolError:
            pass
        except httpx.ReadError:
            pass
    raise AssertionError(f"no answer to {method} {path}")


def managed(command: list[str], folder: Path) -> ManagedServer:
    config = Config.model_validate(
        {"rollout": {"backend": "vllm", "max_prompt_tokens": 256, "max_response_tokens": 64}}
    )
    args = VllmArgs(
        command=tuple(command),
        env={"VLLM_CPU_KVCACHE_SPACE": "1"},
        args=("--enforce-eager", "--served-model-name=mini"),
    )
    assert model_folder("mini").is_dir()
    return ManagedServer(args, config, folder, 320)


def same(recorded: Any, now: Any, at: str = "") -> list[str]:
    """Where two answers differ: other keys, texts or ids, or log-probs by more than LOGPROBS."""
    if isinstance(recorded, dict) and isinstance(now, dict):
        if set(recorded) != set(now):
            return [f"{at}: keys {sorted(set(recorded) ^ set(now))}"]
        return [
            line for k in recorded if k not in VOLATILE for line in same(recorded[k], now[k], f"{at}.{k}")
        ]
    if isinstance(recorded, list) and isinstance(now, list) and len(recorded) == len(now):
        return [
            line
            for i, (a, b) in enumerate(zip(recorded, now, strict=True))
            for line in same(a, b, f"{at}[{i}]")
        ]
    if isinstance(recorded, float) and isinstance(now, float):
        return [] if abs(recorded - now) <= LOGPROBS else [f"{at}: {recorded} and {now}"]
    return [] if recorded == now else [f"{at}: {recorded!r} and {now!r}"]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        recorded = answers(managed(sys.argv[1:], Path(made)), Path(made))
    ANSWERS.write_text(json.dumps(recorded, indent=1) + "\n")
    print(f"{len(recorded)} answers in {ANSWERS}")
