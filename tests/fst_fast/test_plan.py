"""Predictions of memory and time: counts against the models themselves, rules against the code that they describe, figures against what was measured."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fst_fast import cli
from fst_fast.config import Config
from fst_fast.errors import UserError
from fst_fast.forest import Leaf, pack, split
from fst_fast.mini import path as mini_path
from fst_fast.plan import advice, machines, memory, workload
from fst_fast.plan.shapes import KNOWN, read_shape, shape_of
from fst_fast.plan.times import play
from fst_fast.plan.workload import Assumed, Work
from fst_fast.rollout.scheduler import Slots

ROOT = Path(__file__).parents[2]
QWEN3_8B = {
    "model_type": "qwen3", "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128, "intermediate_size": 12288, "vocab_size": 151936, "tie_word_embeddings": False,
}  # fmt: skip
TINY = {
    "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24,
    "intermediate_size": 96, "vocab_size": 300, "tie_word_embeddings": False,
}  # fmt: skip
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def eight_b(**sections) -> Config:
    tree = {
        "model": {"dtype": "bfloat16"},
        "rollout": {"max_prompt_tokens": 4096, "max_response_tokens": 8192},
        "slow": {"problems_per_step": 64, "tokens_per_micro_batch": 32768},
        "fast": {"anchor_size": 96, "max_context_tokens": 1024},
    }
    for section, keys in sections.items():
        tree[section] = {**tree.get(section, {}), **keys}
    return Config.model_validate(tree)


def planned(config: Config, *, gpus: int = 8, machine: str = "H200", **assumed) -> advice.Plan:
    return advice.plan(config, shape_of(QWEN3_8B, "x"), machines.machine(machine), gpus, Assumed(**assumed))


@pytest.mark.parametrize("kind", KNOWN)
def test_parameters_are_counted_as_the_model_has_them(kind):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tree = {"model_type": kind, **TINY, **(MOE if kind == "qwen3_moe" else {})}
    config = AutoConfig.for_model(**tree)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert shape_of(tree, "x").parameters == sum(p.numel() for p in model.parameters())


def test_adapters_are_counted_as_peft_makes_them():
    from fst_fast.policy import lora, trained

    config = Config.model_validate({"policy": {"lora": {"rank": 3}}})
    model = lora.with_adapters(trained.load(config), config)
    counted = read_shape(mini_path(), "mini").adapter_parameters(3, config.policy.lora.targets)
    assert counted == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("budget", [200, 333, 1000, 5000])
def test_micro_batches_are_those_that_the_packer_cuts(budget):
    rng = np.random.default_rng(budget)
    lengths = rng.integers(1, 90, 3 * 4 * 5)
    work = Work(3, 40, 4, 25, lengths, 90)
    contexts, problems = rng.integers(0, 10**6, (3, 40)), rng.integers(0, 10**6, (4, 25))
    leaves = [
        Leaf(np.concatenate([contexts[c], problems[p]]), rng.integers(0, 9, lengths[(c * 4 + p) * 5 + s]))
        for c in range(3)
        for p in range(4)
        for s in range(5)
    ]
    parts = [pack([leaves[i] for i in part]) for part in split(leaves, budget)]
    assert [m.tokens for m in work.micro_batches(budget)] == [len(part.token_ids) for part in parts]
    assert [m.rows for m in work.micro_batches(budget)] == [len(part.labels) for part in parts]
    visible = [sum(int(part.depth[i]) + 1 for i in range(len(part.depth))) for part in parts]
    assert [m.pairs for m in work.micro_batches(budget)] == pytest.approx(visible, rel=0.02)


@pytest.mark.parametrize("slots", [1, 3, 16, 64, 500])
def test_decode_steps_are_those_of_the_scheduler(slots):
    """The widths of all steps, one after the other, against the engine's own Slots."""
    lengths = np.random.default_rng(slots).integers(1, 40, 200)
    done = np.ones(len(lengths), dtype=int)  # the first token comes from the prefill
    real: list[int] = []
    queue = Slots(np.arange(len(lengths)), slots)
    while True:
        if queue.should_refill():
            queue.refill(lambda i: bool(lengths[i] > 1))
        if not len(queue.sequence):
            break
        real.append(len(queue.sequence))
        done[queue.sequence[queue.live]] += 1
        queue.live &= done[queue.sequence] < lengths[queue.sequence]
    mine = [s.width for s in play(lengths, slots) for _ in range(s.steps)]
    assert mine == real


def test_constants_are_those_of_the_code_they_describe():
    import inspect

    from fst_fast.policy import cpu_forward, trained
    from fst_fast.rollout import engine
    from fst_kernels.linear_logprob import rows

    assert trained.GATHER_BUCKET == memory.GATHER_BUCKET
    assert inspect.signature(engine.RolloutEngine).parameters["prefill_tokens"].default == memory.PREFILL
    assert cpu_forward.CHUNK_ROWS == memory.CPU_CHUNK
    assert (rows.GATHERED_BYTES, rows.GATHERED_CHUNKS) == (memory.GATHERED_BYTES, memory.GATHERED_CHUNKS)
    assert engine.DEVICE_FRACTION == advice.DEVICE_FRACTION


def test_a_higher_stage_never_holds_more():
    held = []
    for stage in range(4):
        plan = planned(eight_b(policy={"zero_stage": stage, "activation_checkpointing": True}))
        held.append(
            sum(v for k, v in plan.memory[2].items.items() if k in ("weights", "optimiser", "gradients"))
        )
    assert held == sorted(held, reverse=True)
    assert held[0] > 4 * held[3]


def test_every_remedy_that_is_named_makes_it_fit():
    plan = planned(eight_b(policy={"activation_checkpointing": True}), machine="H100")
    assert not plan.fits
    remedies = advice.remedies(plan)
    assert remedies
    for change, _ in remedies:
        assert plan.changed(change).fits


def test_every_gain_that_is_named_fits_and_is_one():
    config = eight_b(
        policy={"activation_checkpointing": True, "zero_stage": 3}, rollout={"cuda_graphs": False}
    )
    plan = planned(config, response=2000)  # with longer ones a decode step takes longer than its launches
    gains = advice.improvements(plan)
    assert {"rollout.cuda_graphs": True} in [change for change, _ in gains]
    for change, better in gains:
        assert better.fits
        assert better.step.seconds < plan.step.seconds
        assert plan.changed(change).step.seconds == better.step.seconds


def test_stragglers_wait_where_lengths_differ_and_not_where_they_are_alike():
    config = eight_b(policy={"activation_checkpointing": True, "zero_stage": 1})
    assert planned(config, spread=0.0).step.idle == pytest.approx(0.0, abs=1e-9)
    near, far = (planned(config, gpus=32, response=1000, spread=spread).step.idle for spread in (0.1, 0.6))
    assert far > near > 0.0


def test_lengths_have_the_mean_that_was_asked_for():
    assert workload.draw_lengths(20000, 100, 0.5, 10**6, 0).mean() == pytest.approx(100, rel=0.03)
    assert set(workload.draw_lengths(50, 100, 0.0, 64, 0)) == {64}


def results(name: str) -> dict:
    return json.loads((ROOT / "benchmarks/results" / name).read_text())


def test_memory_is_predicted_within_a_tenth_of_every_measured_peak():
    from benchmarks.plan_step import Load, configure

    measured = results("plan_memory.json")
    assert {row["model"] for row in measured["rows"].values()} == {"mini", "smollm2"}
    for name, row in measured["rows"].items():
        load = Load(**row["load"])
        config = configure("mini", load, row["keys"])
        shape = shape_of(measured["models"][row["model"]], name)
        [work, *_] = workload.works(
            config, Assumed(load.context, load.problem, load.response, 0.0), row["processes"]
        )
        phases = memory.memory(memory.Setting(shape, config, row["processes"], gpu=False), work)
        peak = max(top for top, _ in row["peaks"].values())
        assert max(p.total for p in phases) == pytest.approx(peak, rel=0.1), name


def test_a_steps_time_is_predicted_within_a_fifth_in_the_median():
    from benchmarks.plan import FIT, JUDGED, check, fit

    measured = results("plan_times.json")
    errors = [abs(row["error"]) for row in check(measured, JUDGED)]
    assert len(errors) >= 12
    assert statistics.median(errors) <= 0.2
    assert not FIT.keys() & JUDGED.keys()
    for rate, value in fit(measured).items():
        assert getattr(machines.CPU_CORE, rate) == pytest.approx(value, rel=0.01), rate


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--machine", "A10"], "--machine A10: not known; known are A100, H100, H200, B200, cpu"),
        (["--memory", "80 XB"], "--memory 80 XB: a size such as 80GB or 79.5GiB is needed"),
        (["--memory", "0GB"], "--memory 0GB: a size such as 80GB"),
        (["--memory", "🙂"], "--memory 🙂: a size such as 80GB"),
        (["--gpus", "99999"], "--gpus 99999: at most 4,096"),
        (["--gpus", "0"], "a whole number >= 1"),
        (["--response-tokens", "4000"], "--response-tokens 4000 is more than rollout.max_response_tokens=32"),
        (
            ["--context-tokens", "250", "--problem-tokens", "60"],
            "are more than rollout.max_prompt_tokens=256",
        ),
        (["--slow.problems_per_step", "1000000"], "8,000,000 rollouts; a plan plays through at most 200,000"),
        (["--spread", "nan"], "a number from 0"),
        (["--model.path", "/nowhere"], "model.path='/nowhere' is neither a folder"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_sentence(words, sentence, capsys):
    assert cli.main(["plan", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert sentence in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "its config.json cannot be read"),
        ("[1]", "holds a list, not an object"),
        (b"\xff\xfe", "its config.json cannot be read"),
        ('{"model_type": "llama"}', "no usable hidden_size, num_hidden_layers"),
        (json.dumps({**QWEN3_8B, "hidden_size": "many"}), "no usable hidden_size;"),
        (json.dumps({**QWEN3_8B, "num_attention_heads": 0}), "no usable num_attention_heads;"),
        (json.dumps({**QWEN3_8B, "head_dim": "wide"}), "no usable head_dim;"),
        (json.dumps({"text_config": [], **QWEN3_8B, "vocab_size": 10**30}), "no usable vocab_size;"),
    ],
)
def test_a_config_that_gives_no_sizes_is_refused(tmp_path, content, sentence):
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(UserError, match=sentence):
        read_shape(tmp_path, "m")


def test_an_architecture_that_is_not_known_is_taken_for_llama_and_said_so(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({**QWEN3_8B, "model_type": "novel"}))
    assert cli.main(["plan", "--model.path", str(tmp_path), "--machine", "h200", "--gpus", "8"]) == 0
    out = capsys.readouterr().out
    assert "model_type=novel is not known to fst plan; it is taken for a decoder like Llama's" in out
    assert "predicted, not measured" in out


def test_a_plan_needs_no_weights_and_a_dry_run_loads_no_torch(tmp_path):
    """Without --machine both look at this one; the model folder holds a config.json alone."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_8B))
    code = (
        "import sys; from fst_fast import cli; "
        f"assert cli.main(['train', '--dry-run', '--model.path', {str(tmp_path)!r}]) == 0; "
        f"assert cli.main(['plan', '--model.path', {str(tmp_path)!r}, '--machine', 'cpu', '--memory', '64GiB']) == 0; "
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "memory of one process, GB" in done.stdout
    assert "does not fit" in done.stdout


def test_a_dry_run_of_a_model_that_is_not_here_says_so(capsys):
    assert cli.main(["train", "--dry-run", "--model.path", "models/none"]) == 0
    assert (
        "memory is not predicted: there is no config.json in model.path='models/none'"
        in capsys.readouterr().out
    )


def test_the_json_has_what_the_lines_have(capsys):
    assert cli.main(["plan", "--machine", "cpu", "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree["predicted"] is True
    assert tree["step_seconds"] == pytest.approx(sum(tree["seconds"].values()))
    for phase in tree["memory_bytes"].values():
        assert phase.pop("total") == sum(phase.values())
