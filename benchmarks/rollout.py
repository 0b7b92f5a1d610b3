"""Rollouts: the forest engine versus transformers.generate, its continuous batching and vLLM, on the CPU, float32.

    python benchmarks/rollout.py [--threads 1] [--repeats 3] [--out benchmarks/results/rollout.json]
    python benchmarks/rollout.py --model FOLDER --problems 8 --samples 2 --new-tokens 32 --batches 8 16 32 --vllm ENV/bin/python
    python benchmarks/rollout.py --three-loads --vllm ENV/bin/python [--model FOLDER] [--threads 2]

All sides have the same weights, prompts and lengths. By default the shipped 0.8M model; 4 contexts x 256 tokens, 16 problems x 48 tokens, 8 samples of every
(context, problem), 64 new tokens each, no eos: 512 samples. Every side runs in its own process, so that peak memory is its own. Repeats alternate
between the sides; figures are medians. Loading and a short warm-up are not in them.

    shared      the engine
    unshared    the same engine with policy.packing=padded: every sequence with its own prompt, same sampler
    generate    transformers.generate, left-padded, in batches of the size that is fastest on one context's 128 samples
    one batch   transformers.generate, all samples at once
    continuous  transformers' generate_batch, if it finishes within its time limit
    vllm        vLLM in the environment of --vllm, prefix cache on and empty at the start, log-probs of the sampled tokens as for the engine

--three-loads takes the sides shared and vllm through LOADS and writes benchmarks/results/rollout_vllm_MODEL.json. vLLM's process stays between its turns,
in which it does nothing: it takes long to load.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from benchmarks import measure
from fst_fast.policy.attention import NAME, load_model
from fst_fast.policy.base_model import model_folder, read_config
from fst_fast.rollout import cascade
from fst_fast.rollout.decode import ForestDecoder
from fst_fast.rollout.engine import Request, RolloutEngine

PROBLEM_TOKENS = 48
CONTINUOUS_LIMIT_S = 120.0
RESULTS = Path(__file__).parent / "results"
PRODUCTS = (
    "aten::mm",
    "aten::addmm",
    "aten::addmm_",
    "aten::bmm",
    "aten::linear",
    "aten::_addmm_activation",
    "mkldnn::_linear_pointwise",
)


SHAPE = ("contexts", "context_tokens", "problems", "samples", "new_tokens")
LOADS = {
    "mini": {"forest": (4, 256, 16, 8, 64), "no shared prefix": (64, 256, 1, 1, 64), "long responses": (4, 64, 4, 2, 384)},
    "other models": {"forest": (4, 256, 8, 2, 32), "no shared prefix": (16, 256, 1, 1, 32), "long responses": (4, 256, 2, 2, 256)},
}  # fmt: skip
"""SHAPE of --three-loads, for the mini model, which has 512 positions, and for larger ones."""

# Reads the name of a file with a load from a line, answers with a line.
VLLM = """
import json, psutil, sys, time
given = json.loads(sys.argv[1])
from vllm import LLM, SamplingParams
llm = LLM(given["model"], dtype="float32", max_model_len=given["longest"], enforce_eager=True, max_num_seqs=given["max_batch"], generation_config="vllm")
def cpu():
    me = psutil.Process()
    return sum(t.user + t.system for t in (p.cpu_times() for p in [me, *me.children(recursive=True)]))
def run(prompts, new):
    llm.reset_prefix_cache()
    how = SamplingParams(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, max_tokens=new, min_tokens=new, ignore_eos=True, logprobs=0, detokenize=False)
    wall, before = time.perf_counter(), cpu()
    out = llm.generate([{"prompt_token_ids": ids} for ids in prompts], how, use_tqdm=False)
    assert all(len(o.outputs[0].token_ids) == new for o in out)
    return json.dumps({"seconds": time.perf_counter() - wall, "cpu_seconds": cpu() - before})
print("found {}", flush=True)
for line in sys.stdin:
    load = json.load(open(line.strip()))
    run(load["prompts"][:4], 2)
    print("found", run(load["prompts"], load["new_tokens"]), flush=True)
"""


def requests(args: argparse.Namespace, vocabulary: int) -> list[Request]:
    """Prompts of random ids, the first six left out, which are special tokens of the mini model."""
    rng = np.random.default_rng(0)
    problems, samples = args.problems, args.samples
    context_ids = rng.integers(6, vocabulary, (args.contexts, args.context_tokens))
    problem_ids = rng.integers(6, vocabulary, (problems, PROBLEM_TOKENS))
    return [
        Request(str(p), str(c), s, np.concatenate([context_ids[c], problem_ids[p]]), seed=(c * problems + p) * samples + s)
        for c in range(args.contexts)
        for p in range(problems)
        for s in range(samples)
    ]  # fmt: skip


def ours(model: Any, load: list[Request], new_tokens: int, max_batch: int, packing: Any) -> RolloutEngine:
    engine = RolloutEngine(model, eos_ids=[], pad_id=0, max_batch=max_batch, packing=packing)
    rollouts = engine.generate(load, max_response_tokens=new_tokens, temperature=1.0, policy_version=0)
    assert all(len(r.response_ids) == new_tokens for r in rollouts)
    return engine


def generate(model: Any, load: list[Request], new_tokens: int, batch: int) -> None:
    for begin in range(0, len(load), batch):
        ids = torch.as_tensor(np.stack([r.prompt_ids for r in load[begin : begin + batch]]))
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                max_new_tokens=new_tokens,
                eos_token_id=None,
                pad_token_id=0,
            )
        assert out.shape[1] == ids.shape[1] + new_tokens


def continuous(model: Any, load: list[Request], new_tokens: int) -> None:
    how = GenerationConfig(
        max_new_tokens=new_tokens, do_sample=True, temperature=1.0, top_k=0, eos_token_id=None, pad_token_id=0
    )
    out = model.generate_batch(
        [r.prompt_ids.tolist() for r in load], generation_config=how, progress_bar=False
    )
    assert len(out) == len(load)


def kv_bytes_read(model: Any, load: list[Request], new_tokens: int, max_batch: int) -> dict[str, float]:
    """Bytes of keys and values read by the attention of one decode step, mean over the steps, and the minimum: every
    token of the prompt tree and of the responses once."""
    read, steps, floor = [0], [0], [0]
    attend, step = cascade.cascade_decode_attention, ForestDecoder._step

    def counting(q: Any, k: Any, v: Any, plan: Any, **rest: Any) -> Any:
        size = {"query_heads": q.shape[1], "kv_heads": k.shape[1], "head_dim": k.shape[2]}
        read[0] += plan.kv_bytes(**size, itemsize=k.element_size()).unique
        return attend(q, k, v, plan, **rest)

    def counted_step(self: Any, slots: Any, *rest: Any) -> Any:
        out = step(self, slots, *rest)
        nodes = np.unique(self.tree.path[slots.sequence])
        nodes = nodes[nodes >= 0]
        tokens = int((self.tree.end - self.tree.start)[nodes].sum())
        tokens += int(self.responses.length[slots.sequence].sum()) - len(slots.sequence)
        floor[0] += tokens * engine.token_bytes()
        steps[0] += 1
        return out

    engine = RolloutEngine(model, eos_ids=[], pad_id=0, max_batch=max_batch, packing="forest")
    cascade.cascade_decode_attention, ForestDecoder._step = counting, counted_step  # type: ignore[assignment, method-assign]
    try:
        engine.generate(load, max_response_tokens=new_tokens, temperature=1.0, policy_version=0)
    finally:
        cascade.cascade_decode_attention, ForestDecoder._step = attend, step  # type: ignore[method-assign]
    unshared = sum(len(r.prompt_ids) for r in load) + len(load) * (new_tokens / 2)
    return {
        "bytes_per_step": read[0] / steps[0],
        "floor_bytes_per_step": floor[0] / steps[0],
        "unshared_bytes_per_step": unshared * engine.token_bytes() * min(max_batch, len(load)) / len(load),
    }


def product_share(model: Any, load: list[Request], new_tokens: int, max_batch: int) -> dict[str, float]:
    """Share of the engine's CPU time that torch's matrix products take, by torch.profiler; the kernels of fst_kernels count as other work."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        ours(model, load, new_tokens, max_batch, "forest")
    events = found.key_averages()
    products = sum(e.self_cpu_time_total for e in events if e.key in PRODUCTS)
    return {"products": products / sum(e.self_cpu_time_total for e in events)}


@contextmanager
def vllm(
    args: argparse.Namespace, longest: int
) -> Iterator[Callable[[argparse.Namespace, int], dict[str, Any]]]:
    """vLLM in a process of another environment: takes a load and the size of the vocabulary, gives the seconds of its generate call, wall clock and of all its processes."""
    given = {"model": str(model_folder(args.model)), "longest": longest, "max_batch": args.max_batch}
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "2", "OMP_NUM_THREADS": str(args.threads), "VLLM_CPU_OMP_THREADS_BIND": args.bind or f"0-{args.threads - 1}"}  # fmt: skip
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        (folder / "run.py").write_text(f"if __name__ == '__main__':\n{textwrap.indent(VLLM, '    ')}")
        with (folder / "errors").open("w") as errors:
            process = subprocess.Popen(
                [args.vllm, f"{folder}/run.py", json.dumps(given)],
                cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
            )  # fmt: skip

        assert process.stdin is not None
        assert process.stdout is not None
        words, answers = process.stdin, process.stdout

        def answer() -> dict[str, Any]:
            for line in answers:  # vLLM's log comes the same way
                if line.startswith("found "):
                    found: dict[str, Any] = json.loads(line.removeprefix("found "))
                    return found
            said = (folder / "errors").read_text().strip().splitlines()
            return {"skipped": (said or ["no message"])[-1][:300]}

        def ask(load: argparse.Namespace, vocabulary: int) -> dict[str, Any]:
            if loaded:
                return loaded
            prompts = [r.prompt_ids.tolist() for r in requests(load, vocabulary)]
            (folder / "load.json").write_text(json.dumps({"prompts": prompts, "new_tokens": load.new_tokens}))
            with contextlib.suppress(BrokenPipeError):
                print(folder / "load.json", file=words, flush=True)
            return answer()

        loaded = answer()  # empty, or why it was not
        try:
            yield ask
        finally:
            with process:  # closes its input, at whose end it leaves
                pass


def three_loads(args: argparse.Namespace) -> None:
    """The sides shared and vllm in turn on each of LOADS, written after each. A ratio is one of rounds."""
    loads = LOADS["mini" if args.model == "mini" else "other models"]
    out = args.out or RESULTS / f"rollout_vllm_{Path(args.model).name}.json"
    vocabulary = read_config(model_folder(args.model), args.model).vocab_size
    longest = max(context + PROBLEM_TOKENS + new for _, context, _, _, new in loads.values())
    result: dict[str, Any] = {
        "model": f"{Path(args.model).name}, float32",
        "threads": args.threads,
        **surroundings(),
        "loads": {},
    }
    with vllm(args, longest) as ask:
        for name, shape in loads.items():
            load = argparse.Namespace(**vars(args) | dict(zip(SHAPE, shape, strict=True)))
            rounds = [(child(load, "shared"), ask(load, vocabulary)) for _ in range(args.repeats)]
            for found in (found for pair in rounds for found in pair if "skipped" in found):
                raise SystemExit(f"{name}: {found['skipped']}")
            figures: dict[str, Any] = dict(zip(SHAPE, shape, strict=True))
            for kind in ("seconds", "cpu_seconds"):
                ratios = [theirs[kind] / own[kind] for own, theirs in rounds]
                figures[kind] = {
                    "vllm_over_engine": statistics.median(ratios), "ratios": ratios, "engine": [own[kind] for own, _ in rounds],
                    "vllm": [theirs[kind] for _, theirs in rounds],
                }  # fmt: skip
                print(f"{name:17s} {kind:11s} engine {statistics.median(figures[kind]['engine']):6.2f}, vLLM {statistics.median(figures[kind]['vllm']):6.2f}: {statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})", flush=True)  # fmt: skip
            figures |= {key: rounds[0][0][key] for key in ("tokens_computed", "tokens_unshared")}
            result["loads"][name] = {**figures, "load_average_1min": os.getloadavg()[0]}
            measure.write(out, result)


def surroundings(*packages: str) -> dict[str, Any]:
    """Machine and versions, as the results of this benchmark and of end_to_end.py have them."""
    return {
        "hardware": {"machine": platform.machine(), "cpus": os.cpu_count(), "cpu": torch.backends.cpu.get_cpu_capability(), "load_average_1min": os.getloadavg()[0]},
        "versions": measure.versions(("torch", "transformers", *packages)),
    }  # fmt: skip


def side(args: argparse.Namespace) -> dict[str, Any]:
    """Measure one side in this process."""
    torch.set_num_threads(args.threads)
    attention = {"shared": NAME, "kv": NAME, "products": NAME, "continuous": "paged|sdpa"}.get(
        args.side, "sdpa"
    )
    model: Any = load_model(args.model, "float32", attention="tree" if attention == NAME else "sdpa").eval()
    load = requests(args, model.config.vocab_size)
    model.set_attn_implementation(attention)
    if args.side == "kv":
        return kv_bytes_read(model, load, args.new_tokens, args.max_batch)
    if args.side == "products":
        return product_share(model, load, args.new_tokens, args.max_batch)
    runs = {
        "shared": lambda some, n: ours(model, some, n, args.max_batch, "forest"),
        "unshared": lambda some, n: ours(model, some, n, args.batch, "padded"),
        "generate": lambda some, n: generate(model, some, n, args.batch),
        "one batch": lambda some, n: generate(model, some, n, len(load)),
        "continuous": lambda some, n: continuous(model, some, n),
    }
    run = runs[args.side]
    run(load[:4], 2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    wall, cpu = time.perf_counter(), time.process_time()
    result = run(load[: args.count or len(load)], args.new_tokens)
    out: dict[str, Any] = {
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "peak_bytes_added": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before,
    }
    if isinstance(result, RolloutEngine):
        out |= {"tokens_computed": result.tokens_computed, "tokens_unshared": result.tokens_unshared}
    return out


def child(
    args: argparse.Namespace, name: str, *, limit_s: float | None = None, **more: Any
) -> dict[str, Any]:
    options = {"model": args.model, "threads": args.threads, "max-batch": args.max_batch, **more}
    options |= {name.replace("_", "-"): getattr(args, name) for name in SHAPE}
    command = [sys.executable, __file__, "--side", name, *(f"--{k}={v}" for k, v in options.items())]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return {"skipped": f"no end within {limit_s:g} s"}
    if done.returncode:
        return {"skipped": (done.stderr.strip().splitlines() or ["no message"])[-1][:300]}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--model", default="mini", help="folder, Hub id or .gguf file")
    parser.add_argument(
        "--vllm", metavar="PYTHON", help="interpreter of an environment with vLLM, for the side vllm"
    )
    parser.add_argument("--three-loads", action="store_true", help="see above")
    parser.add_argument("--bind", help="cores of vLLM's threads; nobind: on a machine with other work")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    for name, default in zip(SHAPE, LOADS["mini"]["forest"], strict=True):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--max-batch", type=int, default=512, help="of the engine")
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 64, 128], help="tried for generate")
    parser.add_argument(
        "--sides", nargs="+", default=["shared", "unshared", "generate", "one batch", "continuous"]
    )
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, default=64, help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.side:
        print(json.dumps(side(args)))
        return
    if args.three_loads:
        if not args.vllm:
            parser.error("--three-loads needs --vllm")
        three_loads(args)
        return

    sides = [*args.sides, *(["vllm"] if args.vllm else [])]
    vocabulary = read_config(model_folder(args.model), args.model).vocab_size
    total = args.contexts * args.problems * args.samples
    tried = {b: child(args, "generate", batch=b, count=total // args.contexts) for b in args.batches}
    best = min(tried, key=lambda b: tried[b]["cpu_seconds"])
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    with contextlib.ExitStack() as stack:
        longest = args.context_tokens + PROBLEM_TOKENS + args.new_tokens
        ask = stack.enter_context(vllm(args, longest)) if args.vllm else None
        for _ in range(args.repeats):
            for name, results in runs.items():
                if not (results and "skipped" in results[-1]):
                    limit_s = CONTINUOUS_LIMIT_S if name == "continuous" else None
                    results.append(
                        ask(args, vocabulary)
                        if name == "vllm" and ask
                        else child(args, name, batch=best, limit_s=limit_s)
                    )
    figures = {}
    for name, results in runs.items():
        if "skipped" in results[-1]:
            figures[name] = results[-1]
            continue
        median = {key: statistics.median(r[key] for r in results) for key in results[0]}
        figures[name] = {
            **median,
            "samples_per_s": total / median["seconds"],
            "samples_per_cpu_s": total / median["cpu_seconds"] if "cpu_seconds" in median else None,
            "tokens_per_s": total * args.new_tokens / median["seconds"],
            "runs": results,
        }
    shared = figures["shared"]
    ratios = {
        name: {
            "by_wall_clock": shared["samples_per_s"] / f["samples_per_s"],
            "by_cpu_seconds": f["samples_per_cpu_s"] and shared["samples_per_cpu_s"] / f["samples_per_cpu_s"],
            "peak_memory": shared["peak_bytes_added"] / f["peak_bytes_added"]
            if "peak_bytes_added" in f
            else None,
        }
        for name, f in figures.items()
        if name != "shared" and "skipped" not in f
    }
    result = {
        "load": {"contexts": [args.contexts, args.context_tokens], "problems": [args.problems, PROBLEM_TOKENS], "samples": args.samples, "new_tokens": args.new_tokens},
        "model": f"{Path(args.model).name}, float32",
        "max_batch": args.max_batch,
        "generate_batch": best,
        "generate_by_batch": tried,
        "sides": figures,
        "shared_against": ratios,
        "kv": child(args, "kv"),
        "products_share": child(args, "products").get("products"),
        "threads": args.threads,
        **surroundings(),
    }  # fmt: skip
    measure.write(args.out or RESULTS / "rollout.json", result)
    for name, f in figures.items():
        if "skipped" in f:
            print(f"{name:11s} skipped: {f['skipped']}")
            continue
        line = f"{name:11s} {f['seconds']:7.2f} s {f['samples_per_s']:7.1f} samples/s {f['tokens_per_s']:8.0f} tokens/s"
        if f["samples_per_cpu_s"]:
            line += f" {f['cpu_seconds']:7.2f} s CPU"
        if "peak_bytes_added" in f:
            line += f" {f['peak_bytes_added'] / 2**20:7.0f} MiB"
        if name in ratios:
            line += f"   engine: {ratios[name]['by_wall_clock']:.2f}x"
            if ratios[name]["by_cpu_seconds"]:
                line += f", by CPU {ratios[name]['by_cpu_seconds']:.2f}x, memory {ratios[name]['peak_memory']:.2f}"
        print(line)
    if result["products_share"] is not None:
        print(f"matrix products: {100 * result['products_share']:.0f} % of the engine's time")
    kv = result["kv"]
    print(f"keys and values read per decode step: {kv['bytes_per_step'] / 2**20:.1f} MiB, floor {kv['floor_bytes_per_step'] / 2**20:.1f}, unshared {kv['unshared_bytes_per_step'] / 2**20:.1f}")  # fmt: skip


if __name__ == "__main__":
    main()
