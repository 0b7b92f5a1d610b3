"""rollout.backend=vllm against the fake server, in this process: tokens, log-probs, weights and stamps, and what a server can do wrong."""

from __future__ import annotations

import os
import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fst_fast.config import Config
from fst_fast.errors import UserError
from fst_fast.policy import lora
from fst_fast.policy.attention import load_model
from fst_fast.policy.trained import load
from fst_fast.rollout import vllm_hosts, weight_transfer
from fst_fast.rollout.engine import Request
from fst_fast.rollout.vllm import VllmEngine
from fst_fast.rollout.vllm_args import vllm_args
from fst_fast.rollout.vllm_client import VllmClient
from fst_fast.rollout.vllm_hosts import Hosts, Weights
from fst_fast.rollout.weight_transfer import Servers, VllmTransfer
from tests.fst_fast import fake_vllm

EOS = 5
PROMPT = np.array([7, 20, 31, 44, 9, 100, 33, 12])
REQUESTS = [Request(f"p{i}", "c", 0, np.append(PROMPT, 40 + i), seed=2**40 + i) for i in range(4)]
FLAGS = {
    "dtype": "float32",
    "max-model-len": "320",
    "logprobs-mode": "processed_logprobs",
    "weight-transfer-config": '{"backend": "fst_file"}',
    "enable-lora": "",
    "no-enable-chunked-prefill": "",
}


def config(**more: Any) -> Config:
    return Config.model_validate(
        {
            "rollout": {"backend": "vllm", "backend_args": more.pop("args", {}), **more.pop("rollout", {})},
            **more,
        }
    )


@contextmanager
def serving(flags: dict[str, str] = FLAGS) -> Iterator[tuple[str, fake_vllm.Server]]:
    """A fake server in a thread of this process, and its URL."""
    state = fake_vllm.Server(str(Path(vllm_hosts.__file__).parents[1] / "mini/data"), flags)
    handler = type("Handler", (fake_vllm.Handler,), {"state": state})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def hosted(url: str, tmp_path: Path, said: list[str] | None = None, **more: Any) -> Iterator[Hosts]:
    args = {"urls": [url], "folder": str(tmp_path), "retries": 1, "restarts": 1, **more.pop("args", {})}
    settings = config(args=args, **more)
    note = said.append if said is not None else lambda _: None
    hosts = Hosts(vllm_args(settings), settings, longest=320, probe_ids=PROMPT, pad_id=0, note=note)
    try:
        yield hosts
    finally:
        hosts.close()


def engine(hosts: Hosts, module: nn.Module, **parts: Any) -> VllmEngine:
    how: dict[str, Any] = {
        "base": False, "eos_ids": [EOS], "stop": (), "vocab_size": 186, "decode": lambda ids: " ".join(map(str, ids)),
        "encode": lambda _: [1],
    }  # fmt: skip
    return VllmEngine(hosts, module, **{**how, **parts})


def generate(of: VllmEngine, version: int, **how: Any) -> list[Any]:
    of.prepare(version)
    return of.generate(
        REQUESTS, **{"max_response_tokens": 8, "temperature": 1.0, "policy_version": version, **how}
    )


@torch.no_grad()
def recomputed(module: nn.Module, request: Request, ids: Any, temperature: float) -> Any:
    """Log-probs of a response by transformers' own model and forward, given the weights of `module`."""
    plain: Any = load_model("mini", torch.float32, attention="sdpa").eval()
    plain.load_state_dict(lora.merged_state_dict(module))
    whole = torch.tensor([[*request.prompt_ids.tolist(), *ids.tolist()]])
    rows = torch.log_softmax(plain(whole).logits[0].double() / temperature, -1)
    start = len(request.prompt_ids) - 1
    return rows[range(start, start + len(ids)), ids.tolist()].numpy()


@pytest.fixture(scope="module")
def base() -> nn.Module:
    return load(Config())


def moved(module: nn.Module, by: float = 0.02) -> nn.Module:
    """A copy whose weights are others."""
    other = load(Config())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter, old in zip(other.parameters(), module.parameters(), strict=True):
            parameter.copy_(old + by * torch.randn(old.shape, generator=generator))
    return other


@pytest.fixture
def fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    path = tmp_path / "fault"
    monkeypatch.setattr(fake_vllm, "FAULT", path)
    return lambda what: path.write_text(what) and None


def test_tokens_and_log_probs_are_those_of_the_weights_that_were_sent(
    base: nn.Module, tmp_path: Path
) -> None:
    trained = moved(base)
    with serving() as (url, state), hosted(url, tmp_path) as hosts:
        for module, version in ((base, 0), (trained, 3), (trained, 4)):
            rollouts = generate(engine(hosts, module), version, temperature=0.7)
            assert state.version == f"{hosts.run_id}:{version or 'base'}"
            assert hosts.mismatch is not None
            assert hosts.mismatch < 1e-5
            for request, rollout in zip(REQUESTS[:2], rollouts, strict=False):
                own = recomputed(module, request, rollout.response_ids, 0.7)
                assert np.abs(own - rollout.logprobs).max() < 1e-4
            assert {r.policy_version for r in rollouts} == {version}
        assert generate(engine(hosts, base, base=True), 4)[0].logprobs[0] == pytest.approx(
            generate(engine(hosts, base), 0)[0].logprobs[0], abs=1e-5
        ), "the base's weights do not move with the version"
        assert not list(hosts.folder.glob("*.safetensors"))
    assert not hosts.folder.exists()


def test_weights_are_sent_once_for_a_version_however_often_it_samples(
    base: nn.Module, tmp_path: Path
) -> None:
    with serving() as (url, state), hosted(url, tmp_path) as hosts:
        sent: list[str] = []
        load_file = state.load
        state.load = lambda path: (sent.append(path), load_file(path))[1]  # type: ignore[assignment, func-returns-value]
        for version in (1, 1, 2, 2):
            generate(engine(hosts, base), version)
        assert len(sent) == 2


def test_large_models_go_in_buckets(base: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_transfer, "BUCKET_BYTES", 2**20)
    buckets = list(weight_transfer.buckets(base.named_parameters()))
    assert len(buckets) > 2
    assert [n for bucket in buckets for n in bucket] == [n for n, _ in base.named_parameters()]
    with serving() as (url, _), hosted(url, tmp_path) as hosts:
        hosts.prepare(Weights(moved(base), 1))
        assert hosts.mismatch is not None
        assert hosts.mismatch < 1e-5


def test_of_lora_only_the_adapters_are_sent(base: nn.Module, tmp_path: Path) -> None:
    settings = config(policy={"lora": {"rank": 4}})
    adapted = lora.with_adapters(base, settings)
    with torch.no_grad():
        for _, layer in lora.layers(adapted):
            layer.lora_B["default"].weight.normal_(0, 0.1)
    with serving() as (url, state), hosted(url, tmp_path, policy={"lora": {"rank": 4}}) as hosts:
        rollouts = generate(engine(hosts, adapted), 2)
        assert list(state.adapters) == [f"fst-{hosts.run_id}-2"]
        for request, rollout in zip(REQUESTS[:2], rollouts, strict=False):
            own = recomputed(adapted, request, rollout.response_ids, 1.0)
            assert np.abs(own - rollout.logprobs).max() < 1e-4
        generate(engine(hosts, base, base=True), 2)
        generate(engine(hosts, adapted), 3)
        assert list(state.adapters) == [f"fst-{hosts.run_id}-3"]
        state.adapters.clear()  # as after a restart
        again = generate(engine(hosts, adapted), 3)
        assert hosts.generation == 1
        assert len(again) == 4


def test_weights_that_a_server_does_not_take_are_found_by_the_probe(
    base: nn.Module, tmp_path: Path, fault: Callable[[str], None]
) -> None:
    with serving() as (url, _), hosted(url, tmp_path) as hosts:
        fault("forget")
        with pytest.raises(
            UserError,
            match=rf"{url} was sent the weights of step 1, but its log-probs differ .* allowed is 0\.001",
        ):
            generate(engine(hosts, moved(base)), 1)
    with serving() as (url, _), hosted(url, tmp_path, args={"max_mismatch": 99.0}) as hosts:
        generate(engine(hosts, moved(base)), 1)
        assert hosts.mismatch is not None
        assert hosts.mismatch > 0.01


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (
            "stolen",
            r"answers with the weights 'other:7', but this run sent it '\w+:2'; does another run use it\?",
        ),
        ("stale", r"was started anew and has the weights of its start, after 1 restarts"),
    ],
)
def test_answers_of_other_weights_are_refused(
    base: nn.Module, tmp_path: Path, fault: Callable[[str], None], what: str, said: str
) -> None:
    with serving() as (url, _), hosted(url, tmp_path) as hosts:
        sampling = engine(hosts, base)
        fault(what)
        sampling.prepare(2)
        with pytest.raises(UserError, match=said):
            generate(sampling, 2)


def test_a_server_that_was_started_anew_is_sent_the_weights_again(base: nn.Module, tmp_path: Path) -> None:
    said: list[str] = []
    trained = moved(base)
    with serving() as (url, state), hosted(url, tmp_path, said) as hosts:
        first = generate(engine(hosts, trained), 2)
        state.version = "default"
        state.model.load_state_dict(base.state_dict())
        second = generate(engine(hosts, trained), 2)
    assert [r.response_ids.tolist() for r in first] == [r.response_ids.tolist() for r in second]
    assert len(said) == 1
    assert "was started anew and has the weights of its start; restart 1 of 1" in said[0]


def test_one_process_brings_a_server_back_for_all(base: nn.Module, tmp_path: Path) -> None:
    with serving() as (url, _), hosted(url, tmp_path) as hosts:
        hosts.prepare(Weights(base, 1))
        hosts.recover(Weights(base, 1), 0, "is gone")
        assert hosts.generation == 1
        hosts.recover(Weights(base, 1), 0, "is gone")  # found gone before it was brought back
        assert hosts.generation == 1
        with pytest.raises(UserError, match="is gone, after 1 restarts"):
            hosts.recover(Weights(base, 1), 1, "is gone")


def test_a_slow_answer_is_asked_for_again(
    base: nn.Module, tmp_path: Path, fault: Callable[[str], None]
) -> None:
    with serving() as (url, _), hosted(url, tmp_path, args={"concurrency": 1}) as hosts:
        sampling = engine(hosts, base)
        sampling.prepare(1)
        hosts.clients[0]._client.timeout = 0.5
        fault("slow")
        assert len(generate(sampling, 1)) == 4
        assert hosts.generation == 0


def test_a_response_that_is_given_up_is_unjudged(
    base: nn.Module, tmp_path: Path, fault: Callable[[str], None]
) -> None:
    said: list[str] = []
    with serving() as (url, _), hosted(url, tmp_path, said) as hosts:
        sampling = engine(hosts, base)
        sampling.prepare(1)
        fault("abort")
        rollouts = generate(sampling, 1)
    assert {r.finish for r in rollouts} == {"abort"}
    assert "gave up 4 of 4 responses (abort 4), each 2 times; they are not judged" in said[0]


def test_a_server_that_is_not_there_or_cannot_do_it_is_refused_at_the_start(
    base: nn.Module, tmp_path: Path
) -> None:
    with serving() as (url, _):
        pass
    with (
        hosted(url, tmp_path) as hosts,
        pytest.raises(UserError, match=rf"{url} does not answer \(ConnectError"),
    ):
        hosts.prepare(Weights(base, None))
    for flags, said in (
        (
            {"old": ""},
            r"says 404 to /weight_info: .*; needed is vLLM 0\.32 or newer \(it says 0\.11\.0\) with VLLM_SERVER_DEV_MODE=1",
        ),
        (
            {},
            "must be started with --dtype=float32 and --logprobs-mode=processed_logprobs and --no-enable-chunked-prefill and "
            """--weight-transfer-config='{"backend": "fst_file"}'""",
        ),
        (FLAGS | {"max-model-len": "100"}, "must be started with --max-model-len=320 or more"),
        (
            {name: value for name, value in FLAGS.items() if name != "no-enable-chunked-prefill"},
            "must be started with --no-enable-chunked-prefill$",
        ),
    ):
        with (
            serving(flags) as (url, _),
            hosted(url, tmp_path) as hosts,
            pytest.raises(UserError, match=said) as caught,
        ):
            hosts.prepare(Weights(base, None))
        assert "\n" not in str(caught.value)


def test_a_server_of_another_run_is_taken_over_and_that_is_said(base: nn.Module, tmp_path: Path) -> None:
    said: list[str] = []
    with serving() as (url, state), hosted(url, tmp_path, said) as hosts:
        state.version = "other:7"
        hosts.prepare(Weights(base, None))
    assert "has weights of another run (other:7); this run takes it over" in said[0]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"url": "http://h"}, r"rollout\.backend_args has no url; allowed: urls, command"),
        ({"urls": ["http://user:secret@h"]}, r"urls must be http\(s\)://host:port without user name"),
        ({"urls": ["h:8000"]}, r"urls must be http\(s\)://host:port"),
        ({"urls": ["http://h/v1"]}, r"urls must be http\(s\)://host:port"),
        (
            {"urls": ["http://h"], "gpus": "0"},
            "gpus is for a server that the run starts, but urls names some",
        ),
        ({"command": ["no-such-vllm"]}, "command='no-such-vllm' is not a program that can be run"),
        ({"transfer": "nccl"}, "transfer=nccl needs a GPU"),
        ({"transfer": "rdma"}, r"rollout\.backend_args\.transfer='rdma'"),
        ({"restarts": -1}, r"rollout\.backend_args\.restarts=-1"),
        ({"gpus": "all", "urls": []}, r"rollout\.backend_args\.gpus='all'"),
        ({"command": [sys.executable], "folder": "/" + "x" * 90}, "longer than 80 bytes"),
    ],
)
def test_arguments_that_cannot_work_are_refused(
    args: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=said) as caught:
        vllm_args(config(args=args))
    assert "secret" not in str(caught.value)


def test_a_list_of_one_may_be_written_without_brackets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert vllm_args(config(args={"urls": "http://h:1"})).urls == ("http://h:1",)
    assert vllm_args(config(args={"command": sys.executable})).command == (sys.executable,)


def test_a_folder_that_is_full_or_missing_is_one_sentence(
    base: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="folder=/nonexistent"):
        Hosts(
            vllm_args(config(args={"urls": ["http://h"], "folder": "/nonexistent"})),
            config(),
            longest=320,
            probe_ids=PROMPT,
            pad_id=0,
            note=print,
        )

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(weight_transfer, "save_file", full)
    with (
        serving() as (url, _),
        hosted(url, tmp_path) as hosts,
        pytest.raises(
            UserError,
            match=rf"folder: the weights cannot be written to {hosts.folder}: No space left on device",
        ),
    ):
        hosts.prepare(Weights(base, None))


def test_what_a_killed_run_left_in_memory_is_removed_and_what_a_living_one_has_is_not(tmp_path: Path) -> None:
    settings = config(args={"urls": ["http://h"], "folder": str(tmp_path)})

    def made() -> Hosts:
        return Hosts(vllm_args(settings), settings, longest=320, probe_ids=PROMPT, pad_id=0, note=print)

    left = tmp_path / "fst-vllm-left"
    left.mkdir()
    (left / "weights.safetensors").write_text("")
    first = made()
    for folder in (left, first.folder):
        os.utime(folder, (0, 0))
    second = made()
    assert not left.exists()
    assert first.folder.exists()
    first.close()
    second.close()
    assert not list(tmp_path.iterdir())


def test_the_docs_name_every_parameter_of_a_request(base: nn.Module) -> None:
    sampling = VllmEngine.sampling(engine(None, base), REQUESTS[0], max_tokens=1, temperature=1.0, top_p=None)  # type: ignore[arg-type]
    page = (Path(__file__).parents[2] / "docs/vllm.md").read_text()
    assert not [name for name in sampling if f"`{name}`" not in page]


class Recorded:
    """Stands for vLLM's trainer side of nccl and ipc: calls what the real engine calls, in its order."""

    calls: list[Any]

    def __init__(self, info: Any, client: Servers, source: Any) -> None:
        self.client, self.source = client, source
        client.init_weight_transfer_engine(
            {"rank_offset": 1, "world_size": info["world_size"]} if info else {}
        )

    def send_weights(self) -> None:
        self.client.start_weight_update()
        self.client.update_weights({"names": [name for name, _ in self.source.module.named_parameters()]})
        self.client.finish_weight_update()


def test_vllms_own_engines_are_driven_as_vllm_drives_them(
    base: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("vllm", "vllm.distributed", "vllm.distributed.weight_transfer", "base", "factory", "nccl_engine")
    for name in names:
        path = name if name.startswith("vllm") else f"vllm.distributed.weight_transfer.{name}"
        monkeypatch.setitem(sys.modules, path, types.ModuleType(path))
    package = "vllm.distributed.weight_transfer."
    made: list[Recorded] = []

    def trainer_init(info: Any, *, client: Any, source: Any) -> Recorded:
        made.append(Recorded(info, client, source))
        return made[-1]

    sys.modules[package + "base"].ModuleSource = lambda module: types.SimpleNamespace(module=module)  # type: ignore[attr-defined]
    sys.modules[package + "factory"].WeightTransferTrainerFactory = types.SimpleNamespace(
        trainer_init=trainer_init
    )  # type: ignore[attr-defined]
    sys.modules[package + "nccl_engine"].NCCLTrainerInitInfo = dict  # type: ignore[attr-defined]
    posts: list[tuple[int, str, Any]] = []

    class Client:
        def __init__(self, at: int, size: int) -> None:
            self.at, self.size = at, size

        def get(self, _: str) -> Any:
            return {"world_size": self.size}

        def post(self, path: str, body: Any, **params: str) -> None:
            posts.append((self.at, path, body))

    servers = Servers([Client(0, 2), Client(1, 4)], "wait")  # type: ignore[list-item]
    transfer = VllmTransfer(servers, "nccl", "127.0.0.1")
    for stamp in ("r:1", "r:2"):
        servers.stamp = stamp
        transfer.send(base)
    assert len(made) == 1, "one group of processes for all transfers"
    init = {at: body["init_info"] for at, path, body in posts if path == "/init_weight_transfer_engine"}
    assert {at: info["rank_offset"] for at, info in init.items()} == {0: 1, 1: 3}
    assert init[0]["world_size"] == 7
    ends = [(at, body["weight_version"]) for at, path, body in posts if path == "/finish_weight_update"]
    assert sorted(ends) == [(0, "r:1"), (0, "r:2"), (1, "r:1"), (1, "r:2")]
    order = [path for at, path, _ in posts if at == 0]
    assert order[1:7] == [
        "/pause", "/start_weight_update", "/update_weights", "/finish_weight_update", "/reset_prefix_cache", "/resume",
    ]  # fmt: skip


def test_the_trainer_says_that_vllm_is_missing_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(
        UserError, match="transfer=ipc needs the package vllm in the trainer's environment too"
    ):
        VllmTransfer(Servers([], "wait"), "ipc", "127.0.0.1")


def test_a_key_goes_to_given_servers_and_into_no_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "sk-secret-123")
    client = VllmClient("http://127.0.0.1:9", timeout_s=1, connections=1)
    assert client._client.headers["Authorization"] == "Bearer sk-secret-123"
    assert client.redact("no sk-secret-123 here") == "no *** here"
    assert "Authorization" not in VllmClient("unix:/tmp/x", timeout_s=1, connections=1)._client.headers
