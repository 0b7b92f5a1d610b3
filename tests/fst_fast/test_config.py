import importlib.util
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fst_fast.config import Config
from fst_fast.config.derived import derived
from fst_fast.config.keys import field_at, keys
from fst_fast.config.load import config_hash, dump, load
from fst_fast.errors import UserError

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


def refusal(path: Path | None, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_no_file_and_no_overrides_give_the_defaults():
    assert load(None) == Config()


def test_an_override_beats_the_file_which_beats_the_default(tmp_path):
    path = written(tmp_path, "slow: {lr: 2e-3, steps: 7}\n")
    config = load(path, ["--slow.lr=1e-4", "--method", "rl"])
    assert (config.slow.lr, config.slow.steps, config.method) == (1e-4, 7, "rl")
    assert config.slow.group_size == Config().slow.group_size


def test_of_two_overrides_the_last_one_counts():
    assert load(None, ["--seed=1", "--seed=2"]).seed == 2


def test_numbers_without_a_point_and_negative_ones_are_numbers(tmp_path):
    assert load(written(tmp_path, "slow: {lr: 1e-3}")).slow.lr == 1e-3
    assert load(None, ["--slow.entropy_coef", "-0.5"]).slow.entropy_coef == -0.5
    assert load(None, ["--slow.warmup_steps=010"]).slow.warmup_steps == 10


def test_words_that_yaml_1_1_reads_as_booleans_stay_words(tmp_path):
    config = load(written(tmp_path, "fast: {seed_context: no}\ntask_args: {a: on, b: 1:30, c: 2026-01-01}"))
    assert config.fast.seed_context == "no"
    assert config.task_args == {"a": "on", "b": "1:30", "c": "2026-01-01"}


def test_text_keys_take_the_words_of_the_command_line_literally():
    config = load(None, ["--fast.seed_context=solve: it # now", "--model.path=123", "--track.wandb=null"])
    assert (config.fast.seed_context, config.model.path, config.track.wandb) == (
        "solve: it # now",
        "123",
        None,
    )


def test_keys_of_the_free_dictionaries_can_be_overridden():
    config = load(
        None,
        [
            "--task_args.arms=3",
            "--fast.reflector_args.base_url=http://localhost:1/v1",
            "--fast.reflector_args.x.y=true",
        ],
    )
    assert config.task_args == {"arms": 3}
    assert config.fast.reflector_args == {"base_url": "http://localhost:1/v1", "x": {"y": True}}


def test_lists_can_be_overridden():
    assert load(None, ["--slow.betas=[0.8, 0.95]"]).slow.betas == (0.8, 0.95)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--slow.lrr=1", "unknown key --slow.lrr; did you mean slow.lr?"),
        ("--sead=1", "unknown key --sead; did you mean seed?"),
        ("--lr=1", "unknown key --lr; did you mean slow.lr?"),
        ("--run-dri=x", "unknown key --run-dri; did you mean run-dir?"),
        ("--slow.lr=abc", '--slow.lr="abc" is refused; allowed: a number > 0'),
        ("--slow.lr=0", "--slow.lr=0 is refused; allowed: a number > 0"),
        ("--slow.lr=.inf", "--slow.lr=inf is refused; allowed: a finite number"),
        ("--slow.lr=.nan", "--slow.lr=nan is refused; allowed: a finite number"),
        ("--slow.steps=1.5", "--slow.steps=1.5 is refused; allowed: a whole number >= 0"),
        ("--slow.steps='3'", '--slow.steps="3" is refused; allowed: a whole number >= 0'),
        ("--seed=true", "--seed=true is refused; allowed: a whole number >= 0"),
        ("--slow.clip_low=1", "--slow.clip_low=1 is refused; allowed: a number >= 0 and < 1"),
        ("--slow.ratio_cap=0.5", "--slow.ratio_cap=0.5 is refused; allowed: a number >= 1"),
        ("--method=sft", '--method="sft" is refused; allowed: fst or rl or gepa'),
        ("--policy.zero_stage=5", "--policy.zero_stage=5 is refused; allowed: 0 or 1 or 2 or 3"),
        ("--policy.offload_optimizer=1", "--policy.offload_optimizer=1 is refused; allowed: true or false"),
        ("--slow.betas=[0.9]", "allowed: a list of 2 numbers"),
        (
            "--checkpoint=3",
            "--checkpoint=3 is refused; allowed: a section with the keys every, keep_last, keep_every",
        ),
        ("--checkpoint.keep_last=1", "--checkpoint.keep_last=1 is refused; allowed: a whole number >= 2"),
        ("--slow.steps=[", "--slow.steps=[: the value is not valid YAML: line 1"),
        ("--slow.lr", "--slow.lr has no value; write --slow.lr=value"),
        ("slow.lr=1", "argument 'slow.lr=1' is not understood; an override is written --dotted.key=value"),
        ("--slow.group_size=7", "slow.group_size=7 is not a multiple of fast.population=4; try 8"),
        (
            "--checkpoint.keep_every=30",
            "checkpoint.keep_every=30 is not a multiple of checkpoint.every=20; try 40",
        ),
        ("--policy.packing=padded", "policy.attention=tree does not go with policy.packing=padded"),
        ("--rollout.cuda_graphs=maybe", '--rollout.cuda_graphs="maybe" is refused; allowed: '),
        ("--fast.components=3", "--fast.components=3 is refused; allowed: texts by name"),
        ("--fast.components={system: 3}", "--fast.components.system=3 is refused; allowed: text"),
        (
            "--fast.components.role=x",
            '--fast.components has the key "role"; allowed: system, protocol, examples',
        ),
        ("--fast.anchor_size=97", "fast.anchor_size=97 is larger than the lookahead of 96 problems"),
    ],
)
def test_a_bad_override_is_refused_with_its_path_value_and_what_is_allowed(override, message):
    arithmetic = [
        "--slow.group_size=8",
        "--fast.population=4",
        "--slow.problems_per_step=16",
        "--fast.cycle_steps=6",
    ]
    assert message in refusal(None, *arithmetic, override)


def test_a_named_text_is_literal_and_its_name_may_hold_dots():
    given = ["--fast.components.system=Answer: yes", "--fast.components.tool:a.b=42"]
    assert load(None, given).fast.components == {"system": "Answer: yes", "tool:a.b": "42"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slow: {lrr: 1}", "config.yaml: unknown key slow.lrr; did you mean slow.lr?"),
        ("slow:\n  lr: 1e-3\n  lr: 2e-3\n", "line 3: the key lr was already given on line 2"),
        ("slow: {lr: '3'}", 'config.yaml: slow.lr="3" is refused; allowed: a number > 0'),
        ("slow:\n", "slow=null is refused; allowed: a section with the keys steps,"),
        ("- method", "holds a list; it must hold keys"),
        ("fst", "holds the single value 'fst'; it must hold keys"),
        ("slow: [1\nseed: 2", "is not valid YAML: line 2"),
        ("1: 2", "line 1: the key 1 is not text"),
        (
            "task_args: {x: !!python/object:os.system y}",
            "is not valid YAML: line 1: could not determine a constructor",
        ),
        ("task_args: {x: !!set {y}}", "allowed are text, numbers, true, false, null, lists and keys"),
        ("task_args: {x: [1, .inf]}", "task_args.x[1]=inf is refused; allowed: a finite number"),
    ],
)
def test_a_bad_file_is_refused_with_the_file_and_the_place(tmp_path, text, message):
    said = refusal(written(tmp_path, text))
    assert message in said
    assert "config.yaml" in said


def test_every_mistake_is_named_not_only_the_first(tmp_path):
    said = refusal(written(tmp_path, "slow: {lr: -1}\nseeds: 1"), "--method=x")
    for part in ("config.yaml: slow.lr=-1", "config.yaml: unknown key seeds", '--method="x"'):
        assert part in said


def test_a_key_inside_a_value_is_refused():
    assert "--slow.lr.x: slow.lr is 1.0, which has no keys" in refusal(None, "--slow.lr=1.0", "--slow.lr.x=1")


def test_a_file_that_is_not_there_or_not_text_is_refused(tmp_path):
    assert "does not exist" in refusal(tmp_path / "none.yaml")
    assert "is a folder" in refusal(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in refusal(tmp_path / "binary.yaml")


def test_an_empty_file_gives_the_defaults(tmp_path):
    assert load(written(tmp_path, "# nothing\n")) == Config()


@given(
    lr=st.floats(1e-12, 1),
    context=st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=40),
    args=st.dictionaries(
        st.text("abc_", min_size=1),
        st.one_of(
            st.integers(),
            st.booleans(),
            st.text("no:#-+.01e ", max_size=5),
            st.sampled_from(["1e-1", "08", "no", "1:30", "~", ".inf", "<<", "1_0"]),
            st.none(),
        ),
    ),
)
def test_what_dump_writes_load_reads_back(tmp_path_factory, lr, context, args):
    slow, fast = (
        Config().slow.model_copy(update={"lr": lr}),
        Config().fast.model_copy(update={"seed_context": context}),
    )
    config = Config().model_copy(update={"slow": slow, "fast": fast, "task_args": args})
    path = tmp_path_factory.mktemp("dump") / "config.yaml"
    path.write_text(dump(config), encoding="utf-8")
    assert load(path) == config


def test_the_hash_follows_the_values_and_not_their_order(tmp_path):
    one = load(written(tmp_path, "seed: 3\nslow: {lr: 0.001, steps: 5}\ntask_args: {a: 1, b: 2}"))
    other = load(written(tmp_path, "slow: {steps: 5, lr: 1e-3}\nseed: 3\ntask_args: {b: 2, a: 1}"))
    assert config_hash(one) == config_hash(other)
    assert config_hash(one) != config_hash(load(None, ["--seed=4"]))


def test_derived_numbers_of_the_paper_s_setting():
    numbers = derived(load(CONFIGS / "paper/star_graph.yaml"), world_size=8)
    assert numbers["rollouts per step"] == 32 * 8
    assert numbers["rollouts per problem under one context"] == 1
    assert numbers["lookahead, problems per cycle"] == 192
    assert numbers["problems per step on one process"] == 4
    assert numbers["fast rollouts per cycle, at most"] == 960


def test_derived_numbers_tell_what_the_budget_of_a_fast_phase_pays():
    fast = {
        "population": 4,
        "parents": "front",
        "children": 2,
        "anchor_size": 20,
        "samples": 2,
        "generations": 3,
        "first_generations": 9,
    }
    given = [f"--fast.{key}={value}" for key, value in fast.items()]
    plenty = derived(load(None, [*given, "--fast.rollout_budget=400"]))
    assert plenty["anchor problems x samples, later cycles"] == "20 x 2"
    assert plenty["proposal waves, later cycles"] == 3  # (400 - 4 x 40) / (2 x 40)
    assert plenty["proposal waves, first cycle"] == 5  # (400 - 1 x 40) / (2 x 40), the last one narrower
    scarce = derived(load(None, [*given, "--fast.rollout_budget=130"]))
    assert scarce["anchor problems x samples, later cycles"] == "20 x 1"
    assert scarce["proposal waves, later cycles"] == 1
    assert derived(load(None, [*given, "--fast.rollout_budget=5"]))["proposal waves, later cycles"] == 0


def test_derived_numbers_leave_out_the_phase_that_a_method_does_not_have():
    assert not any("fast rollouts" in name for name in derived(load(None, ["--method=rl"])))
    assert "rollouts per step" not in derived(load(None, ["--method=gepa"]))
    assert (
        derived(load(None, ["--method=rl"]))["rollouts per problem under one context"]
        == Config().slow.group_size
    )


def test_a_share_that_is_not_whole_is_shown_as_two_numbers():
    assert (
        derived(load(None, ["--slow.problems_per_step=16"]), world_size=3)["problems per step on one process"]
        == "5 or 6"
    )


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_config_is_valid(path):
    config = load(path)
    assert config.slow.group_size % config.fast.population == 0


def test_every_key_has_a_description():
    for key in keys():
        field = field_at(key)
        assert field is not None, key
        assert field.description or "." not in key, f"{key} has no docstring"


def test_the_reference_page_is_what_the_docstrings_say():
    script = ROOT / "scripts" / "config_reference.py"
    spec = importlib.util.spec_from_file_location("config_reference", script)
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    assert reference.PAGE.read_text(encoding="utf-8") == reference.page(), (
        f"run python {script.relative_to(ROOT)}"
    )


def test_another_task_leaves_the_file_s_task_args_behind(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("task: star_graph\ntask_args: {form: mini}\n")
    assert load(path, ["--task_args.arms=4"]).task_args == {"form": "mini", "arms": 4}
    assert load(path, ["--task=star_graph"]).task_args == {"form": "mini"}
    for words in (["--task=my.py:T", "--task_args.size=3"], ["--task_args.size=3", "--task=my.py:T"]):
        assert load(path, words).task_args == {"size": 3}
