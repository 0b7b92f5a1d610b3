"""The text of a configuration: what a file or an argument means, what is refused and in which words, and that writing loses nothing."""

import functools
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import yaml  # the library of YAML 1.1, which ours does not use: the reader of other programs

from fst_fast.config import Config
from fst_fast.config.keys import allowed, element_of, field_at, fields, section_of
from fst_fast.config.load import MAX_VALUES, check, config_hash, dump, load
from fst_fast.config.yaml_text import MAX_BYTES, MAX_DEPTH, YamlProblem, read_argument, read_yaml, write_yaml
from fst_fast.errors import UserError
from fst_fast.tasks.registry import load_task

CONFIGS = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))
ODD = [
    "a\x85b", "a\u2028b", "\u2029", "tab\there", "ends in spaces  ", "  begins", "line\r\nline\rline", "two\n\n\nbreaks\n", " \n \t\n", "\0", "\x1b[0m",
    "\ufeffmarked", "\x7f", "emoji 😀 \U0001f469\u200d\U0001f4bb", "𝔘𝔫𝔦", "\ue000", "\ufffe"[:0] + "\ufffd", "'quoted'", '"', "\\", "#", "a #b", "a: b", "- a", "? a",
    "<<", "=", "~", "null", "no", "y", "1:30", "0o14", "0x1F", "1_000", "1e3", ".5e3", "2026-01-01", "---", "...", "%YAML 1.1", "!!str", "&a", "*a", "|", ">", "@a",
    "long " * 60, "\u2028 " * 100, "x" * 400, "\t" * 200, "",
]  # fmt: skip


def written(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    return path


def refusal(path, *overrides):
    with pytest.raises(UserError) as caught:
        load(path, overrides)
    message = str(caught.value)
    assert message.isprintable(), message
    assert len(message) < 1500
    return message


# aliases and merge keys


def test_an_override_below_an_alias_leaves_the_anchor_alone(tmp_path):
    text = "rollout: {backend: openai, backend_args: &s {model: A}}\nfast: {reflector: openai, reflector_args: *s}\n"
    config = load(written(tmp_path, text), ["--rollout.backend_args.model=B"])
    assert (config.rollout.backend_args, config.fast.reflector_args) == ({"model": "B"}, {"model": "A"})


def test_an_override_below_an_anchor_leaves_every_alias_alone_also_inside_lists(tmp_path):
    path = written(tmp_path, "task_args:\n  a: &d {x: {y: 1}}\n  b: *d\n  c: [*d, {z: *d}]\n")
    args = load(path, ["--task_args.a.x.y=2", "--task_args.b.x.w=3"]).task_args
    assert args == {
        "a": {"x": {"y": 2}},
        "b": {"x": {"y": 1, "w": 3}},
        "c": [{"x": {"y": 1}}, {"z": {"x": {"y": 1}}}],
    }


@pytest.mark.parametrize(
    ("text", "args"),
    [
        ("task_args: {base: &a {form: mini, arms: 3}, more: {<<: *a, arms: 4}}", {"form": "mini", "arms": 4}),
        ("task_args: {base: &a {arms: 3}, more: {arms: 4, <<: *a, x: 1}}", {"arms": 4, "x": 1}),
        ("task_args: {base: &a {p: 1, q: 1}, more: {<<: [*a, {q: 2, r: 2}]}}", {"p": 1, "q": 1, "r": 2}),
        (
            "task_args: {base: &a {p: 1}, mid: &b {<<: *a, q: 2}, more: {<<: *b, r: 3}}",
            {"p": 1, "q": 2, "r": 3},
        ),
        ("task_args: {more: {'<<': 1}}", {"<<": 1}),
        ("task_args: {more: {x: <<}}", {"x": "<<"}),
    ],
)
def test_merge_keys_work_as_in_yaml_1_1_and_quoted_ones_are_text(tmp_path, text, args):
    assert load(written(tmp_path, text)).task_args["more"] == args
    if "x: <<" not in text:  # which the reader of version 1.1 refuses
        assert yaml.safe_load(text)["task_args"]["more"] == args


def test_a_merge_key_at_the_top_lends_whole_sections_and_an_override_changes_the_copy(tmp_path):
    path = written(tmp_path, "slow: &s {lr: 1e-3, steps: 7}\nfast: {reflector_args: {<<: *s}}\n")
    config = load(path, ["--fast.reflector_args.lr=5"])
    assert (config.slow.lr, config.fast.reflector_args) == (1e-3, {"lr": 5, "steps": 7})


# a list of one


LISTS = [
    (key, element_of(field.annotation)) for key, field in fields() if element_of(field.annotation) is not None
]


def test_every_list_of_the_tree_is_known_to_this_file():
    assert [key for key, _ in LISTS] == ["stages", "policy.lora.targets", "rollout.stop", "eval.cells"]


@pytest.mark.parametrize(
    ("key", "one"),
    [("eval.cells", "both"), ("rollout.stop", "</answer>"), ("rollout.stop", "Answer: "), ("rollout.stop", "3"), ("rollout.stop", "no"),
     ("policy.lora.targets", "q_proj"), ("stages", "{task: star_graph, steps: 3}")],
)  # fmt: skip
def test_a_key_that_holds_a_list_takes_a_single_value_on_the_command_line(key, one):
    *sections, last = key.split(".")
    node = load(None, [f"--{key}={one}"])
    for section in sections:
        node = getattr(node, section)
    [value] = getattr(node, last)
    assert value == one or (value.task, value.steps) == ("star_graph", 3)


def test_a_key_that_holds_a_list_takes_a_single_value_in_a_file(tmp_path):
    text = "eval: {cells: weights}\nrollout: {stop: 'END'}\npolicy: {lora: {targets: o_proj}}\nstages: {task: a.py:A, steps: 4}\n"
    config = load(written(tmp_path, text))
    assert (config.eval.cells, config.rollout.stop, config.policy.lora.targets) == (
        ["weights"],
        ("END",),
        ("o_proj",),
    )
    assert (config.stages[0].task, config.slow.steps) == ("a.py:A", 4)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--eval.cells=bot", '--eval.cells="bot" is refused; allowed: one or more of neither, context, weights, both'),
        ("--eval.cells=[both, bot]", '--eval.cells[1]="bot" is refused; allowed: one or more of neither, context'),
        ("--eval.cells=[]", "--eval.cells=[] is refused; allowed: one or more of neither"),
        ("--eval.cells=null", "--eval.cells=null is refused; allowed: one or more of neither"),
        ("--eval.cells=", "--eval.cells has no value; allowed: one or more of neither"),
        ("--rollout.stop=[3]", "--rollout.stop[0]=3 is refused; allowed: a list of texts that are not empty"),
        ("--rollout.stop=['']", '--rollout.stop[0]="" is refused; allowed: a list of texts that are not empty'),
        ("--policy.lora.targets=[]", "allowed: a list of texts that are not empty, at least one"),
        ("--slow.betas=0.9", "--slow.betas=0.9 is refused; allowed: a list of 2 numbers"),
        ("--slow.betas=[0.9, x]", '--slow.betas[1]="x" is refused; allowed: a list of 2 numbers'),
        ("--stages=a", '--stages="a" is refused; allowed: a list of sections with the keys task, task_args, steps'),
        ("--stages=[{task: a}]", "--stages[0].steps is missing; allowed: a whole number >= 1"),
        ("--stages={task: a, step: 3}", "unknown key --stages[0].step; did you mean stages[].steps?"),
        ("--policy.lora=3", "--policy.lora=3 is refused; allowed: null or a section with the keys rank, alpha, targets"),
        ("--policy.lora.rnk=3", "unknown key --policy.lora.rnk; did you mean policy.lora.rank?"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_list_or_an_optional_section_is_named(override, message):
    assert message in refusal(None, override)


# empty values and plain text on the command line


def test_an_empty_gold_means_no_gold_check_as_documented(tmp_path):
    (tmp_path / "grader.py").write_text("def right(problem, response):\n    return 1.0\n")
    rows = [json.dumps({"prompt": "?", "answer": "3"})] * 4
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    overrides = [f"--task={tmp_path / 'data.jsonl'}", f"--task_args.verify={tmp_path / 'grader.py'}:right"]

    def gold(*more):
        config = load(None, [*overrides, *more])
        task = load_task(config.task, config.task_args)
        return task.gold(task.problems("train")[0])

    assert gold() == "3"
    assert gold("--task_args.gold=") is None
    assert gold("--task_args.gold", "") is None
    assert gold("--task_args.gold=\\boxed{{answer}}") == "\\boxed{3}"


@pytest.mark.parametrize("key", ["task_args.a", "task_args.a.b", "fast.reflector_args.a", "stages_args"])
def test_an_empty_value_of_a_free_dictionary_is_an_empty_text_and_null_is_written_out(key):
    if key == "stages_args":
        assert load(None, ["--stages=[{task: a, steps: 1, task_args: {gold: ''}}]"]).stages[0].task_args == {
            "gold": ""
        }
        return
    for value, meant in (("", ""), ("null", None), ("~", None), ("''", ""), (" ", " ")):
        node = load(None, [f"--{key}={value}"]).model_dump()
        for part in key.split("."):
            node = node[part]
        assert node == meant


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("--track.wandb=", "null"), ("--policy.lora=", "null"), ("--rollout.kv_memory_bytes=", "null"), ("--fast.seed_context=", '""'),
        ("--seed=", "--seed has no value; allowed: a whole number >= 0"), ("--slow.lr= ", "--slow.lr has no value; allowed: a number > 0"),
        ("--slow=", "--slow has no value; allowed: a section"), ("--task_args=", "--task_args has no value; allowed: keys with values"),
        ("--method=", '--method="" is refused; allowed: fst or rl or gepa'),
    ],
)  # fmt: skip
def test_an_empty_value_of_a_typed_key_is_null_where_that_is_allowed_and_one_sentence_elsewhere(
    override, meant
):
    if meant.startswith("--"):
        assert meant in refusal(None, override)
        return
    section, key = override[2:].partition("=")[0].split(".")
    assert getattr(getattr(load(None, [override]), section), key) == json.loads(meant)


@pytest.mark.parametrize(
    "value", ["#fff", "#\r|", "\ufeff>", "# Title\n- a", "a #b", "---", "two\nlines", "two\r\nlines", " a ", "3 # three", "\ufeffa", "no", "1:30", "2026-01-01", "1_000", "=", "<<"]
)  # fmt: skip
def test_plain_text_on_the_command_line_is_taken_as_it_is_written(value):
    assert load(None, [f"--task_args.x={value}"]).task_args == {"x": value}


@pytest.mark.parametrize(
    ("value", "meant"),
    [("3", 3), (" 3 ", 3), ("-1.5e3", -1500.0), ("true", True), ("'3'", "3"), ('"\\N"', "\x85"), ("!!str 3", "3"), ("[a, 1]", ["a", 1]),
     ("{a: {b: c}}", {"a": {"b": "c"}}), ("a: b", {"a": "b"}), ("- a\n- b", ["a", "b"]), ("{x: &a [1], y: *a}", {"x": [1], "y": [1]})],
)  # fmt: skip
def test_all_else_on_the_command_line_is_yaml(value, meant):
    assert load(None, [f"--task_args.x={value}"]).task_args == {"x": meant}


# the core schema


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10), ("-7", -7), ("+7", 7), ("0o14", 12), ("0x1F", 31), ("1e3", 1000.0), ("1.", 1.0), (".5", 0.5), (".5e3", 500.0), ("-.5E-3", -0.0005),
        ("true", True), ("False", False), ("NULL", None), ("~", None), ("", None), (".inf", math.inf), ("-.INF", -math.inf),
        # what the library takes for a date or a number, and what YAML 1.1 does
        *((text, text) for text in ("2026-01-01", "2026-01-01 10:00:00", "1_000", "0b11", "1:30", "-0x1F", "0O14", "tRUE", "yes", "off", "y", "=", "+.nan", "nan", "1e", "e3", "٣")),
    ],
)  # fmt: skip
def test_a_plain_scalar_means_what_the_core_schema_of_yaml_1_2_says(text, value):
    for document in (f"x: {text}", f"%YAML 1.1\n---\nx: {text}", f"[{text or '~'}]"):
        read = read_yaml(document)
        [read] = read.values() if isinstance(read, dict) else read
        assert (type(read), read) == (type(value), value)


def test_a_json_document_is_read_as_json_says():
    text = json.dumps({"a": ["\U0001f600", "\x85", "\0", 1e-7, None], "b\u2028": {"": "é"}})
    assert "\\ud83d\\ude00" in text  # the pair of one character
    assert read_yaml(text) == json.loads(text)


# round trips


@pytest.mark.parametrize("text", ODD, ids=ascii)
def test_a_text_survives_dump_and_load_exactly(tmp_path, text):
    fast = Config().fast.model_copy(update={"seed_context": text})
    args = {"value": text, "list": [text, {text: text}], "key": {text: 1}}
    config = Config().model_copy(update={"fast": fast, "task_args": args})
    again = load(written(tmp_path, dump(config)))
    assert again == config
    assert dump(again) == dump(config)
    assert load(None, [f"--fast.seed_context={text}"]).fast.seed_context == text


@pytest.mark.parametrize("text", [text for text in ODD if "\ufeff" not in text], ids=ascii)
def test_what_is_written_means_the_same_to_a_reader_of_yaml_1_1(text):
    tree = {"a": text, "b": [text], "c": {"x": 1e-7, "y": 10**20, "z": None}}
    assert yaml.safe_load(write_yaml(tree)) == tree


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_run_that_an_older_version_wrote_is_read_back_to_the_same_hash(tmp_path, path):
    """It wrote with PyYAML, which quotes by the rules of YAML 1.1."""
    more = {
        "rollout.stop": '["a\\nb", "it\'s", "no"]',
        "task_args.x": "{lr: 1.0e-06, n: '010', u: é, e: '', f: [[], {}]}",
    }
    config = load(path, [f"--{key}={value}" for key, value in more.items()])
    older = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)
    again = load(written(tmp_path, older))
    assert again == config
    assert config_hash(again) == config_hash(config)
    assert dump(config).splitlines()[:3] == older.splitlines()[:3]


# refusals


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task_args: &a {x: *a}", "line 1: the alias *a is inside its own anchor"),
        ("task_args: {x: 1}\nfast:\n  reflector_args: &b\n    y: [*b]", "line 4: the alias *b is inside its own anchor"),
        ("task_args: &a {<<: *a}", "line 1: the alias *a is inside its own anchor"),
        ("x: *a", "line 1: found undefined alias 'a'"),
        ("[" * 3000, f"line 1: lists and keys are nested deeper than {MAX_DEPTH} levels"),
        ("x: " + "[" * 3000 + "]" * 3000, f"line 1: lists and keys are nested deeper than {MAX_DEPTH} levels"),
        ("{a: " * 3000, f"line 1: lists and keys are nested deeper than {MAX_DEPTH} levels"),
        ("- " * 3000, f"line 1: lists and keys are nested deeper than {MAX_DEPTH} levels"),
        ("\n".join(" " * i + "a:" for i in range(300)), f"line {MAX_DEPTH}: lists and keys are nested deeper than"),
        ("a0: &a0 [1]\n" + "\n".join(f"a{i + 1}: &a{i + 1} [*a{i}]" for i in range(3000)), "are nested deeper than"),
        ("a0: &a0 1\n" + "\n".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]" for i in range(30)), "more than 10,000 keys and values"),
        ("x: [" + "1, " * 20_000 + "1]", "line 1: more than 10,000 keys and values"),
        ("seed: " + "1" * 5000, "line 1: a whole number of 5,000 digits; at most 100 are taken"),
        ("seed: " + "1" * 99, "=1111"),
        ("seed: 9223372036854775808", "c.yaml: seed=9223372036854775808 is refused; allowed: a whole number of 64 bits"),
        ("slow:\n  lr: 1\n  lr: 2", "line 3: the key lr was already given on line 2"),
        ('{"seed": 1,\n "seed": 1}', "line 2: the key seed was already given on line 1"),
        ("task_args: {<<: {x: 1, x: 2}}", "line 1: the key x was already given on line 1"),
        ("task_args: {<<: 3}", "line 1: expected a mapping or list of mappings for merging, but found scalar"),
        ("task_args: {<<: [3]}", "line 1: expected a mapping for merging, but found scalar"),
        ("slow: {lr: 1e999}", "c.yaml: slow.lr=inf is refused; allowed: a finite number"),
        ("task_args: {x: {y: [1, -1e999]}}", "c.yaml: task_args.x.y[1]=-inf is refused; allowed: a finite number"),
        ("task_args: {x: .nan}", "c.yaml: task_args.x=nan is refused; allowed: a finite number"),
        ("slow: {lr: 2026-01-01}", 'c.yaml: slow.lr="2026-01-01" is refused; allowed: a number > 0 and <= 1'),
        ("task_args: {x: !!timestamp 2026-01-01}", "constructor for the tag '!!timestamp'; allowed are text, numbers, true"),
        ("task_args:\n  x: !!binary aGVsbG8=", "line 2: could not determine a constructor for the tag '!!binary'; allowed are text"),
        ("task_args: {x: !!omap [a: 1]}", "constructor for the tag '!!omap'; allowed are text"),
        ("task_args: {x: !mine 3}", "constructor for the tag '!mine'; allowed are text"),
        ("seed: !!int three", "line 1: 'three' is not a whole number"),
        ("model: {trust_remote_code: !!bool yes}", "line 1: 'yes' is not true or false"),
        ("slow:\n\tlr: 1", "line 2: found character '\\t' that cannot start any token; indent with spaces"),
        (b"\xff\xfes\0e\0e\0d\0", "cannot be read: line 1 is not UTF-8; save the file as UTF-8"),
        (b"seed: 1\nfast: {seed_context: caf\xe9}\n", "cannot be read: line 2 is not UTF-8; save the file as UTF-8"),
        (b"", "c.yaml is empty; it must hold keys such as `method: fst`, or a comment"),
        (b" \n\t\n", "c.yaml is empty; it must hold keys"),
        ("[seed, 1]", "c.yaml holds a list; it must hold keys such as `method: fst`"),
        ("- seed: 1", "c.yaml holds a list; it must hold keys such as `method: fst`"),
        ("seed: 1\n---\nseed: 2", "line 2: expected a single document in the stream, but found another document"),
        ("fast: {seed_context: a\u2028b}", 'line 1: the character U+2028 is refused; write it as "\\u2028", in double quotes'),
        ("seed: 1\nfast: {seed_context: 'a\x85b'}", 'line 2: the character U+0085 is refused; write it as "\\u0085", in double'),
        ("seed: 1\nfast: {seed_context: a\0b}", "line 2: the character U+0000 is refused; write it as an escape, in double quotes"),
        ('fast: {seed_context: "\\ud83d"}', "c.yaml: fast.seed_context holds U+D83D, which is half a character; allowed: text in UTF-8"),
        ('task_args: {"\\udc00": 1}', "c.yaml: task_args.\\udc00 holds U+DC00, which is half a character"),
        ('x: "\\U00110000"', "line 1: an escape names no character; the last one is \\U0010FFFF"),
        ('x: "\\UFFFFFFFF"', "line 1: an escape names no character; the last one is \\U0010FFFF"),
        ("? [a]\n: 1", "line 1: a sequence as a key is not text"),
        ("true: 1", "line 1: the key true is not text"),
        ("%YAML 2.0\n---\nseed: 1", "found incompatible YAML document (version 1.* is required)"),
        ("\n".join(f"k{i}: 1" for i in range(2000)), "and 1,995 more"),
        ("? " + "k" * 100_000, f"unknown key {'k' * 120}... (100,000 characters); known: method"),
        ("a" * (MAX_BYTES + 1), "c.yaml: the configuration is larger than 256 KiB; a task can read what is long from a file of its own"),
        (f"task_args: {{x: [{'1, ' * (MAX_VALUES + 1)}]}}", f"the configuration has more than {MAX_VALUES:,} values"),
    ],
    ids=lambda value: repr(value)[:50],
)  # fmt: skip
def test_a_file_that_cannot_be_meant_is_one_sentence_with_its_name_and_the_place(tmp_path, text, message):
    said = refusal(written(tmp_path, text))
    assert message in said
    assert "c.yaml" in said


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--seed=" + "1" * 5000, "... (5,000 characters): the value is not valid YAML: line 1: a whole number of 5,000 digits"),
        ("--task_args.n=-" + "7" * 300, "a whole number of 301 digits; at most 100 are taken"),
        ("--task_args.x=" + "[" * 3000, f"lists and keys are nested deeper than {MAX_DEPTH} levels"),
        ("--task_args." + "a." * 3000 + "b=1", f"--task_args.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a: lists and keys are nested deeper than {MAX_DEPTH}"),
        ("--task_args.x=&a [*a]", "the alias *a is inside its own anchor"),
        ("--task_args={x: [.inf]}", "--task_args.x[0]=inf is refused; allowed: a finite number"),
        ("--fast.seed_context=caf\udce9", "--fast.seed_context holds U+DCE9, which is half a character; allowed: text in UTF-8"),
        ("--task_args.\udce9=1", "--task_args.\\udce9 holds U+DCE9"),
        ("--slow.lr\n=1", "unknown key --slow.lr\\n; did you mean slow.lr?"),
        ("--task_args..x=1", "argument '--task_args..x=1' is not understood; an override is written --dotted.key=value"),
        ("--task_args.=1", "is not understood; an override is written --dotted.key=value"),
        ("--=1", "argument '--=1' is not understood"),
        ("--task_args.x='\n", "--task_args.x='\\n: the value is not valid YAML: line 2: found unexpected end of stream"),
        ("--method=" + "x" * 3000, "... (3,002 characters) is refused; allowed: fst or rl or gepa"),
        ("--task_args.x=a\tb", "--task_args.x=a\\tb: the value is not valid YAML: line 1: found character '\\t'"),
        ("--task_args.x=a\u2028b", "the character U+2028 is refused; write it as \"\\u2028\", in double quotes"),
    ],
    ids=lambda value: value[:40] if value.isprintable() else ascii(value)[:40],
)  # fmt: skip
def test_an_argument_that_cannot_be_meant_is_one_sentence_with_its_key(override, message):
    assert message in refusal(None, override)


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path):
    assert load(written(tmp_path, b"\xef\xbb\xbfseed: 3\r\nslow: {lr: 1e-3}\r\n")).seed == 3


def test_a_tree_from_python_is_held_to_the_same():
    assert check({"rollout": {"stop": ("a", "b")}, "task_args": {"n": 2**80}}).rollout.stop == ("a", "b")
    recursive = {}
    recursive["x"] = recursive
    for tree, message in (
        ({"task_args": recursive}, "lists and keys are nested deeper than"),
        ({"task_args": {"x": {1, 2}}}, "task_args.x is of type set; allowed are text, numbers"),
        ({"task_args": {"x": Path("a")}}, "task_args.x is of type PosixPath; allowed are text"),
        ({"task_args": {3: 1}}, "task_args has the key 3, which is not text"),
        ({"task_args": {"x": math.nan}}, "task_args.x=nan is refused"),
    ):
        with pytest.raises(UserError, match=message.replace("[", r"\[")):
            check(tree)


def test_a_configuration_too_large_to_be_read_back_is_not_written():
    config = Config().model_copy(update={"task_args": {"x": "\x01" * (MAX_BYTES // 5)}})
    with pytest.raises(UserError, match="the configuration is larger than 256 KiB"):
        check(config.model_dump(mode="json"))
    nested = {"x": functools.reduce(lambda inner, _: [inner], range(MAX_DEPTH - 5), ["short"] * 3000)}
    config = check({"task_args": nested})  # indented, it is larger
    with pytest.raises(UserError, match="the configuration is larger than 256 KiB"):
        dump(config)


def test_the_task_that_counts_is_the_last_one_and_the_default_is_a_task_like_any_other(tmp_path):
    path = written(tmp_path, "task_args: {form: mini}")  # of star_graph, the default
    assert load(path, ["--task=star_graph"]).task_args == {"form": "mini"}
    assert load(path, ["--task=a.py:A", "--task=star_graph"]).task_args == {"form": "mini"}
    assert load(path, ["--task=star_graph", "--task=a.py:A"]).task_args == {}


# the package


def test_the_tree_is_imported_without_torch_or_a_yaml_library():
    code = "import sys, fst_fast.config, fst_fast.config.derived; print(*{'torch', 'numpy', 'ruamel', 'ruamel.yaml', 'yaml'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "\n"


def test_every_field_says_in_words_what_it_allows():
    for key, field in fields():
        assert allowed(field), key
        assert section_of(field.annotation) or field.description, f"{key} has no docstring"
        assert field_at(key.replace("[]", "[0]")) is field, key
    assert field_at("slow.lr.x") is field_at("eval.cells[0]") is field_at("nothing") is field_at("") is None


def test_the_reader_keeps_the_root_of_an_argument_apart_from_its_text():
    assert read_argument("") == ""
    assert read_argument("'' ") == ""
    with pytest.raises(YamlProblem, match="line 1: "):
        read_argument("[")
