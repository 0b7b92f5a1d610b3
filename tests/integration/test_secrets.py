"""The key of the reflection endpoint is nowhere in what a run leaves, and a run folder from elsewhere executes nothing."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from tests.integration.crash import fst, start
from tests.integration.launch import records
from tests.integration.test_guard import spoil

KEY = "sk-marked-7c1f52d09be3"


class Endpoint(BaseHTTPRequestHandler):
    """Errors and answers in turn, each with the key that was sent."""

    keys: list[str]

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        key = self.headers["Authorization"].removeprefix("Bearer ")
        self.keys.append(key)
        turn = len(self.keys) % 4
        text = f"Incorrect API key provided: {key}"
        if turn == 1:
            self._send(401, {"error": {"message": text, "code": key}})
        elif turn == 2:
            self._send(500, {"error": {"message": text}})
        elif turn == 3:
            self._send(200, {"detail": text})
        else:
            content = f"I was sent {key}.\n```\nfind the goal {len(self.keys)} , never say {key} .\n```"
            message = {
                "index": 0,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": content},
            }
            self._send(
                200,
                {"id": key, "object": "chat.completion", "created": 0, "model": key, "choices": [message]},
            )

    def _send(self, status: int, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/json")
        self.send_header("X-Key", self.headers["Authorization"])
        self.send_header("retry-after-ms", "1")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def endpoint() -> Iterator[tuple[str, list[str]]]:
    handler = type("Handler", (Endpoint,), {"keys": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/v1", handler.keys
        finally:
            server.shutdown()
            thread.join()


def prepare() -> None:
    """The key, no proxy on the way to the endpoint, and a step with NaN, so that there is a dump."""
    os.environ["OPENAI_API_KEY"] = KEY
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        os.environ.pop(name, None)
    spoil()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, list[str]]:
    """A run with everything in it (checkpoints, a dump, a report), what was printed, and the keys that the endpoint was sent."""
    folder = tmp_path_factory.mktemp("secrets") / "run"
    with endpoint() as (url, keys):
        arguments = {"base_url": url, "model": "m", "retries": 1, "concurrency": 1}
        child, printed = start(
            folder, "--debug", "--fast.reflector=openai", f"--fast.reflector_args={json.dumps(arguments)}", "--on_nonfinite=skip",
            "--fast.max_context_tokens=200", "--rollout.max_prompt_tokens=400", hook=prepare,
        )  # fmt: skip
        child.join()
    said = printed.read_text()
    assert child.exitcode == 0, said
    code, drawn = fst("report", str(folder), printed=folder.with_name("report.out"))
    assert code == 0, drawn
    return folder, said + drawn, keys


def test_the_key_is_in_nothing_that_a_run_writes_or_says(finished: tuple[Path, str, list[str]]) -> None:
    folder, said, keys = finished
    assert set(keys) == {KEY}
    assert len(keys) > 4  # errors of every kind, and answers
    assert "never say ***" in (folder / "metrics.jsonl").read_text()
    errors = [json.dumps(cycle) for cycle in records(folder, "cycle")]
    assert any("***" in error for error in errors)
    assert (folder / "dumps/step-000001/dump.json").is_file()
    assert (folder / "report/report.html").is_file()
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []
    assert KEY not in said


@pytest.mark.parametrize(
    "words",
    [
        ["--fast.reflector_args.base_url=http://user:{key}@127.0.0.1:9/v1", "--fast.reflector_args.model=m"],
        ["--fast.reflector_args.base_url=http://127.0.0.1:9/v1?key={key}", "--fast.reflector_args.model=m"],
        ["--fast.reflector_args.api_key={key}", "--fast.reflector_args.model=m"],
    ],
)
def test_a_key_in_the_configuration_is_refused_unsaid_and_unwritten(words: list[str], tmp_path: Path) -> None:
    words = [word.format(key=KEY) for word in words]
    child, printed = start(tmp_path / "run", "--debug", "--fast.reflector=openai", *words)
    child.join()
    assert child.exitcode == 2
    assert "fst: fast.reflector_args" in printed.read_text()
    assert KEY not in printed.read_text().replace(" ".join(words), "")
    assert not (tmp_path / "run").exists()


class Evil:
    """What runs where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.mark,)


EXTRA = (
    "model/pytorch_model.bin", "model/adapter_model.bin", "model/training_args.bin", "model/optimizer.pt", "model/rng_state.pth",
    "model/model.pt", "deepspeed/mp_rank_00_model_states.pt", "deepspeed/zero_pp_rank_0_mp_rank_00_optim_states.pt",
    "optimiser/rank-00000-0000.pt", "optimiser/rank-00000-0000.bin", "state.pkl", "state.pt", "random.pkl",
)  # fmt: skip


def plant(folder: Path, mark: Path, *, instead: bool) -> None:
    """Pickles beside the files of a run folder, or in their place, with manifests that vouch for them."""
    torch.save({"model": Evil(mark)}, mark.with_suffix(".pt"))
    evil = mark.with_suffix(".pt").read_bytes()
    for place in [*(folder / "checkpoints").glob("step-*"), *(folder / "dumps").glob("step-*")]:
        for name in EXTRA:
            (place / name).parent.mkdir(exist_ok=True)
            (place / name).write_bytes(pickle.dumps(Evil(mark)) if name.endswith(".pkl") else evil)
        for path in place.rglob("*.safetensors") if instead else ():
            path.write_bytes(evil)
        if instead and (place / "state.json").exists():
            (place / "state.json").write_bytes(pickle.dumps(Evil(mark)))
        config = place / "model" / "config.json"
        (place / "model" / "modeling_evil.py").write_text(f"open({str(mark)!r}, 'w')\n")
        tree = json.loads(config.read_text()) | {
            "auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "modeling_evil.Evil"}
        }
        config.write_text(json.dumps(tree))
        if (place / "manifest.json").exists():
            manifest = json.loads((place / "manifest.json").read_text())
            files = [path for path in place.rglob("*") if path.is_file() and path.name != "manifest.json"]
            manifest["files"] = {
                str(path.relative_to(place)): {
                    "size": path.stat().st_size,
                    "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                }
                for path in files
            }
            (place / "manifest.json").write_text(json.dumps(manifest))
    for name in ("metrics.pkl", "config.pkl", "contexts.pkl", "sitecustomize.py", "conftest.py"):
        (folder / name).write_bytes(
            f"open({str(mark)!r}, 'w')\n".encode() if name.endswith(".py") else pickle.dumps(Evil(mark))
        )


def test_the_trap_itself_works(tmp_path: Path) -> None:
    torch.save(Evil(tmp_path / "mark"), tmp_path / "x.pt")
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    "instead", [pytest.param(False, id="beside", marks=pytest.mark.chaos), pytest.param(True, id="instead")]
)
def test_pickles_and_code_in_a_run_folder_from_elsewhere_do_not_run(
    finished: tuple[Path, str, list[str]], tmp_path: Path, instead: bool
) -> None:
    folder, mark = tmp_path / "run", tmp_path / "mark"
    shutil.copytree(finished[0], folder)
    (folder / "summary.json").unlink()  # or there would be nothing to resume
    plant(folder, mark, instead=instead)
    commands = {
        "report": ["report", str(folder)],
        "eval": ["eval", str(folder), "--problems", "1", "--samples", "1"],
        "export": ["export", str(folder), str(tmp_path / "out")],
        "replay": ["replay", str(folder / "dumps/step-000001")],
        "resume": ["train", "--run-dir", str(folder), "--resume"],
    }
    codes = {}
    for name, argv in commands.items():
        codes[name], printed = fst(*argv, printed=tmp_path / f"{name}.out")
        assert not mark.exists(), f"{name} has run the pickle"
        assert "Traceback" not in printed, printed
    if instead:
        assert codes["report"] == 0
        assert {codes[name] for name in ("eval", "replay", "resume")} == {2}
    else:
        assert codes == dict.fromkeys(commands, 0)
