"""A stand-in for `vllm serve`: the routes that rollout.backend=vllm uses, answered as vLLM 0.32 does, by transformers on this CPU.

    python fake_vllm.py serve MODEL --uds=SOCKET | --port=N ...

test_vllm_recorded.py holds it to answers recorded from the real one. FAKE_VLLM_FAULT names a file; what stands in it goes wrong:

    exit             the process exits at the next request for tokens, and the file is removed
    exit always      at every one
    hang             nothing is answered any more, by this process
    slow             the next request for tokens is answered after its reader has given up; then the file is removed
    stale            answers say and use weights that are not those sent last
    stolen           answers say that another run's weights made them
    forget           sent weights are not taken, and nothing is said of it
    abort            requests for tokens are given up
    no memory        (at the start) the process ends as vLLM does without memory for its cache
    old              (at the start) a vLLM without the routes of weights
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

FAULT = Path(os.environ.get("FAKE_VLLM_FAULT", "/nonexistent"))
if __name__ == "__main__" and FAULT.is_file() and FAULT.read_text() == "no memory":
    print(
        "(EngineCore pid=7) ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when initializing "
        "the engine."
    )
    sys.exit(1)

import torch  # noqa: E402 - seconds, which a server that cannot start does not need
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402


class HTTPError(Exception):
    def __init__(self, status: int, message: str, kind: str, param: str | None = None) -> None:
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": status}}


def fault() -> str:
    return FAULT.read_text().strip() if FAULT.is_file() else ""


class Server:
    """The model and what is known of its weights."""

    def __init__(self, model: str, args: dict[str, str]) -> None:
        self.args = args
        self.model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model)
        self.eos = self.model.generation_config.eos_token_id
        self.name = args.get("served-model-name", model)
        self.longest = int(args.get("max-model-len", self.model.config.max_position_embeddings))
        self.adapters: dict[str, Any] = {}
        self.version, self.updating, self.dead = "default", False, False
        self.running = threading.Event()
        self.running.set()
        self.computing = threading.Lock()

    # routes

    def get(self, path: str) -> Any:
        if path == "/health":
            return None
        if path == "/version":
            return {"version": "0.11.0" if "old" in self.args else "0.32.0"}
        if path == "/weight_info" and "old" not in self.args:
            return {"weight_version": self.version}
        if path == "/get_world_size":
            return {"world_size": 1}
        if path == "/server_info":
            transfer = self.args.get("weight-transfer-config")
            model = {
                "max_model_len": self.longest,
                "dtype": f"torch.{self.args.get('dtype', 'bfloat16')}",
                "logprobs_mode": self.args.get("logprobs-mode", "raw_logprobs"),
            }
            return {
                "vllm_config": {
                    "model_config": model,
                    "weight_transfer_config": json.loads(transfer) if transfer else None,
                    "lora_config": {} if "enable-lora" in self.args else None,
                    "device_config": {"device": "cpu"},
                    "scheduler_config": {
                        "enable_chunked_prefill": "no-enable-chunked-prefill" not in self.args
                    },
                }
            }
        raise KeyError(path)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        if path == "/inference/v1/generate":
            return self.generate(body)
        if path == "/pause":
            self.running.clear()
            return {"status": "paused"}
        if path == "/resume":
            self.running.set()
            return {"status": "resumed"}
        if path == "/reset_prefix_cache":
            return {"success": True}
        if path == "/update_weight_version":
            self.version = body["new_version"]
            return {"success": True, "new_version": self.version}
        if path == "/init_weight_transfer_engine":
            return {"message": "Weight transfer initialized"}
        if path == "/start_weight_update":
            if self.updating:
                raise worker_error(
                    "start_weight_update called while a weight update is already active. Call finish_weight_update first."
                )
            self.updating = True
            return {"message": "Weight update started"}
        if path == "/update_weights":
            self.load(body["update_info"]["path"])
            return {"message": "Weights updated"}
        if path == "/finish_weight_update":
            if not self.updating:
                raise worker_error("finish_weight_update called without a matching start_weight_update.")
            self.updating = False
            if fault() != "stale":
                self.version = body["weight_version"]
            return {"message": "Weight update finished"}
        if path == "/v1/load_lora_adapter":
            self.adapters[body["lora_name"]] = self.with_adapter(body["lora_path"])
            return f"Success: LoRA adapter '{body['lora_name']}' added successfully."
        if path == "/v1/unload_lora_adapter":
            del self.adapters[body["lora_name"]]
            return f"Success: LoRA adapter '{body['lora_name']}' removed successfully."
        raise KeyError(path)

    def load(self, path: str) -> None:
        if not Path(path).is_file():
            self.updating, self.dead = False, True
            raise worker_error(f"No such file or directory: {path}")
        if fault() != "forget":
            with self.computing:
                self.model.load_state_dict(load_file(path), strict=False)

    def with_adapter(self, path: str) -> Any:
        from peft import PeftModel

        whole = AutoModelForCausalLM.from_pretrained(self.model.config._name_or_path, dtype=torch.float32)
        return PeftModel.from_pretrained(whole, path).merge_and_unload()

    def generate(self, body: dict[str, Any]) -> dict[str, Any]:
        what = fault()
        if what.startswith("exit"):
            if what == "exit":
                FAULT.unlink()
            os._exit(1)
        if self.dead:
            raise HTTPError(
                500,
                "EngineCore encountered an issue. See stack trace (above) for the root cause.",
                "InternalServerError",
            )
        prompt, how = body["token_ids"], body["sampling_params"]
        if len(prompt) > self.longest:
            raise bad_request(
                f"The decoder prompt (length {len(prompt)}) is longer than the maximum model length of {self.longest}. "
                "Make sure that `max_model_len` is no smaller than the number of text tokens."
            )
        if max(prompt) >= self.model.config.vocab_size:
            raise bad_request(f"Token id {max(prompt)} is out of vocabulary")
        name = body.get("model") or self.name
        if name not in (self.name, *self.adapters):
            raise HTTPError(
                404,
                f"The model `{name}` does not exist. Valid aliases: {self.name}.",
                "NotFoundError",
                "model",
            )
        self.running.wait()
        if what == "slow":
            FAULT.unlink()
            time.sleep(3)
        with self.computing, torch.no_grad():
            return self.sample(self.adapters.get(name, self.model), name, prompt, how, what)

    def sample(
        self, model: Any, name: str, prompt: list[int], how: dict[str, Any], what: str
    ) -> dict[str, Any]:
        version = {"stolen": "other:7"}.get(what, self.version)
        generator = torch.Generator().manual_seed(how.get("seed") or 0)
        first = prompt_rows = torch.log_softmax(model(torch.tensor([prompt])).logits[0].float(), -1)
        room = min(how.get("max_tokens", 16), self.longest - len(prompt))
        ids: list[int] = []
        content = []
        finish, reason = "length", None
        cache = model(torch.tensor([prompt]), use_cache=True)
        while len(ids) < room and what != "abort":
            logits = cache.logits[0, -1].float()
            warm = how.get("temperature", 1.0)
            rows = torch.log_softmax(logits / warm if warm else logits, -1)
            token = int(torch.multinomial(rows.exp(), 1, generator=generator) if warm else rows.argmax())
            ids.append(token)
            one = {
                "token_id": token,
                "logprob": float(rows[token]),
                "rank": int((rows > rows[token]).sum()) + 1,
            }
            content.append({**one, "top_logprobs": [one]})
            if token in (how.get("stop_token_ids") or []):
                finish, reason = "stop", None if token == self.eos else token
                break
            text = self.tokenizer.decode(ids)
            if hit := next((stop for stop in how.get("stop") or [] if stop in text), None):
                finish, reason = "stop", hit
                break
            cache = model(torch.tensor([[token]]), past_key_values=cache.past_key_values, use_cache=True)
        scored = None
        if how.get("prompt_logprobs") is not None:
            scored = [None] + [
                {
                    str(token): {
                        "logprob": float(prompt_rows[at, token]),
                        "rank": int((first[at] > first[at, token]).sum()) + 1,
                        "decoded_token": self.tokenizer.decode([token]),
                    }
                }
                for at, token in enumerate(prompt[1:])
            ]
        choice = {
            "index": 0, "finish_reason": "abort" if what == "abort" else finish, "stop_reason": reason, "token_ids": ids,
            "routed_experts": None, "sampling_mask": None,
            "weight_versions": [{"version": version, "start": 0, "end": len(ids)}] if ids else None,
            "logprobs": None if how.get("logprobs") is None else {"content": content},
        }  # fmt: skip
        details = None
        if "enable-prompt-tokens-details" in self.args:
            details = {"cached_tokens": 0, "created_cache_tokens": None, "multimodal_tokens": None}
        usage = {
            "prompt_tokens": len(prompt), "total_tokens": len(prompt) + len(ids), "completion_tokens": len(ids),
            "prompt_tokens_details": details, "completion_tokens_details": None,
        }  # fmt: skip
        return {
            "request_id": "generate-tokens-0", "model": name, "created": 0, "usage": usage, "prompt_logprobs": scored,
            "prompt_token_id_logprobs": None, "prompt_token_ids": prompt, "mm_placeholders": None, "metrics": None,
            "kv_transfer_params": None, "ec_transfer_params": None, "output_mode": "tokens", "choices": [choice],
        }  # fmt: skip


def worker_error(said: str) -> HTTPError:
    message = f"Call to collective_rpc method failed: Worker failed with error '{said}', please check the stack trace above for the root cause"
    return HTTPError(500, message, "InternalServerError")


def bad_request(message: str) -> HTTPError:
    return HTTPError(400, message, "BadRequestError")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Server

    def answer(self, method: str) -> None:
        path = self.path.partition("?")[0]
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else {}
        while fault() == "hang":
            time.sleep(0.1)
        try:
            if path == "/health" and self.state.dead:
                self.send(503, None)
            else:
                self.send(200, self.state.get(path) if method == "get" else self.state.post(path, body))
        except HTTPError as error:
            self.send(error.status, error.body)
        except KeyError:
            self.send(404, {"detail": "Not Found"})

    def send(self, status: int, answer: Any) -> None:
        text = answer if isinstance(answer, str) else json.dumps(answer)
        content = b"" if answer is None else text.encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        except OSError:
            pass  # the reader has given up

    def do_GET(self) -> None:
        self.answer("get")

    def do_POST(self) -> None:
        self.answer("post")

    def address_string(self) -> str:
        return "-"

    def log_message(self, *_: object) -> None:
        pass


class UnixServer(ThreadingHTTPServer):
    address_family = socket.AF_UNIX

    def server_bind(self) -> None:
        self.socket.bind(self.server_address)  # type: ignore[arg-type]
        self.server_name, self.server_port = "vllm", 0


def main(arguments: list[str]) -> None:
    assert arguments[0] == "serve", arguments
    flags = dict(a.removeprefix("--").partition("=")[::2] for a in arguments[2:])
    if fault() == "old":
        flags["old"] = ""
    torch.set_num_threads(1)
    Handler.state = Server(arguments[1], flags)
    where: Any = flags["uds"] if "uds" in flags else ("127.0.0.1", int(flags["port"]))
    server = (UnixServer if "uds" in flags else ThreadingHTTPServer)(where, Handler)
    server.daemon_threads = True
    server.serve_forever()


if __name__ == "__main__":
    main(sys.argv[1:])
