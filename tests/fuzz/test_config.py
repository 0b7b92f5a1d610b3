"""Any file and any command line give one sentence, or a configuration that is written and read back without a change."""

import json
import string
from typing import Literal, get_args, get_origin

from hypothesis import given, settings
from hypothesis import strategies as st

from fst_fast import cli
from fst_fast.config.keys import element_of, fields, options, section_of
from fst_fast.config.load import config_hash, dump, load
from fst_fast.config.schema import Config
from fst_fast.errors import UserError

FUZZ = settings.get_profile("fuzz")
FIELDS = {key: field for key, field in fields() if "[]" not in key}
KEYS = list(FIELDS)
OPTIONAL = tuple(
    f"{key}." for key, f in FIELDS.items() if type(None) in options(f.annotation) and section_of(f.annotation)
)
"""Sections that may be null: a key of one brings its others along."""
FREE = ["task_args", "fast.reflector_args"]

# fmt: off
words = st.sampled_from([
    "", "fst", "rl", "both", "forest", "no", "on", "null", "~", "true", "1e-3", "010", "0o14", "0x1F", "1_000", "1:30", "2026-01-01", "<<",
    ".inf", ".nan", "1e999", "-0.0", ".5e3", "9" * 30, "9" * 200, "[", "{", "- a", "a: b", "a #b", "#a", "---", "...", "&a", "*a", "!x", "?",
    "|", ">-", "@", "`", "!!int 3", "!!binary aa", "%YAML 1.1", "'a", "a\tb", "a\r\nb", '"\\ud83d"', '"\\ud83d\\ude00"', '"\\N"', '"\\U00110000"',
])
# fmt: on
text = st.one_of(
    words,
    st.text(max_size=20),
    st.text("ab01.eE+-:#,[]{}&*!|>%@'\"\\?~= \n\t\r\x85\u2028\ufeffé😀", max_size=20),
)
whole = text.map(lambda value: value.encode("utf-8", "ignore").decode())  # no half characters
names = st.one_of(st.text(string.ascii_lowercase, min_size=1, max_size=3), whole)
leaves = st.one_of(
    whole, st.booleans(), st.none(), st.integers(), st.floats(allow_nan=False, allow_infinity=False)
)
values = st.recursive(
    leaves,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(names, inner, max_size=4)),
    max_leaves=10,
)


def fitting(field):
    """Values that a field's type takes; not all pass the checks of the whole."""
    if field.annotation is bool:
        return st.booleans()
    if get_origin(field.annotation) is Literal:
        return st.sampled_from(get_args(field.annotation))
    if int in options(field.annotation):
        return st.integers(1, 64)
    if float in options(field.annotation):
        return st.floats(0, 1, exclude_min=True) | st.just(1)
    if str in options(field.annotation):
        return whole
    if get_origin(field.annotation) is dict and get_args(field.annotation)[1] is str:
        known = st.sampled_from(["system", "protocol", "examples", "skill:a", "tool:b.c"])
        return st.dictionaries(known, whole, max_size=4) | st.dictionaries(names, values, max_size=2)
    if get_origin(field.annotation) is dict:
        return st.dictionaries(names, values, max_size=4)
    if element_of(field.annotation) is not None:
        return st.sampled_from(["both", ["both", "neither"], "q_proj", ["a", "b"], []])
    return st.just({})  # a section


@st.composite
def trees(draw):
    """A tree with keys that exist and mostly fit, and anything in the free dictionaries."""
    tree = {}
    for key in draw(st.lists(st.sampled_from(KEYS + FREE * 8), max_size=6, unique=True)):
        *sections, last = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                break
        else:
            node[last] = draw(fitting(FIELDS[key]) if draw(st.integers(0, 15)) else values)
    return tree


@st.composite
def files(draw):
    """The bytes of a file: a tree as JSON, whole or spliced with pieces of YAML; lines of YAML; or anything."""
    kind = draw(st.sampled_from(["tree", "tree", "tree", "spliced", "spliced", "lines", "bytes"]))
    if kind == "bytes":
        return draw(st.binary(max_size=40))
    if kind == "lines":
        line = st.tuples(
            st.sampled_from(["", " ", "  ", "- ", "\t", "? ", ": "]), st.sampled_from(KEYS) | text, st.sampled_from(["", ":", ": "]), text
        )  # fmt: skip
        body = "\n".join("".join(parts) for parts in draw(st.lists(line, max_size=8)))
    else:
        body = json.dumps(
            draw(trees()), ensure_ascii=draw(st.integers(0, 4)) > 0, indent=draw(st.sampled_from([None, 1]))
        )
    if kind == "spliced":
        for _ in range(draw(st.integers(1, 3))):
            start, length = draw(st.integers(0, len(body))), draw(st.integers(0, 6))
            body = body[:start] + draw(text) + body[start + length :]
    return body.encode("utf-8", draw(st.sampled_from(["ignore", "ignore", "surrogatepass"])))


@st.composite
def overrides(draw):
    """Words of the command line: keys that exist with values that mostly fit, keys of free dictionaries, and anything."""
    given = []
    for _ in range(draw(st.integers(0, 4))):
        key = draw(st.sampled_from(KEYS))
        value = draw(fitting(FIELDS[key]))
        kind = draw(st.sampled_from(["fits", "fits", "free", "free", "any"]))
        if kind == "free":
            key, value = f"{draw(st.sampled_from(FREE))}.{draw(names)}", draw(text | values)
        elif kind == "any":
            key, value = draw(st.sampled_from(KEYS) | text), draw(text | values)
        value = value if isinstance(value, str) else json.dumps(value)
        given += [f"--{key}={value}"] if draw(st.booleans()) else [f"--{key}", value]
    return given


def leaves_of(node, path=""):
    if isinstance(node, dict) and node:
        return {
            k: v
            for name, inner in node.items()
            for k, v in leaves_of(inner, f"{path}.{name}" if path else name).items()
        }
    return {path: repr(node)}


def attempt(bounded, path, overrides=()):
    """The configuration, or None where one line refuses it."""
    try:
        return bounded(lambda: load(path, overrides))
    except UserError as error:
        message = str(error)
        assert message
        assert message.isprintable() or "\n" not in message
        assert len(message.splitlines()) == 1
        assert len(message) < 4000
        return None


@settings(FUZZ)
@given(content=files(), words=overrides())
def test_a_configuration_is_refused_in_one_line_or_survives_its_own_dump(bounded, tmp_path, content, words):
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    config = attempt(bounded, path, words)
    if config is None:
        return
    text = bounded(lambda: dump(config))
    path.write_text(text, encoding="utf-8", newline="")
    again = bounded(lambda: load(path))
    assert again == config
    assert repr(again) == repr(config)  # 1, 1.0 and True are equal
    assert config_hash(again) == config_hash(config)


@settings(FUZZ)
@given(args=st.dictionaries(names, values, max_size=4), ascii=st.booleans())
def test_what_json_says_in_a_free_dictionary_is_what_is_read(bounded, tmp_path, args, ascii):
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps({"task_args": args}, ensure_ascii=ascii), encoding="utf-8", newline="")
    config = attempt(bounded, path)
    if config is not None:
        assert repr(config.task_args) == repr(args)


@settings(FUZZ)
@given(value=text)
def test_an_override_s_text_is_kept_unless_it_is_written_as_yaml(bounded, value):
    config = attempt(bounded, None, [f"--task_args.key={value}"])
    if (
        config is not None
        and isinstance(config.task_args["key"], str)
        and not value.lstrip().startswith(("'", '"', "!", "&", "|", ">"))
    ):
        assert config.task_args["key"] == value
    if config is not None and value.lstrip().startswith(("#", "\ufeff")):
        assert config.task_args["key"] == value


@settings(FUZZ)
@given(
    tree=trees(),
    key=st.sampled_from(KEYS + [f"{free}.a" for free in FREE]),
    value=text,
    shared=st.dictionaries(names, leaves, max_size=3),
)
def test_an_override_changes_only_the_key_that_it_names(bounded, tmp_path, tree, key, value, shared):
    """Also where the file shares one dictionary between two keys, by an alias."""
    tree = {name: section for name, section in tree.items() if name not in ("task_args", "fast")}
    lines = [f"{json.dumps(name)}: {json.dumps(section)}" for name, section in tree.items()]
    lines += [f"task_args: &shared {json.dumps(shared)}", "fast: {reflector_args: *shared}"]
    path = tmp_path / "c.yaml"
    path.write_text("\n".join(lines), encoding="utf-8", newline="")
    before, after = attempt(bounded, path), attempt(bounded, path, [f"--{key}={value}"])
    brings_others = ("task", "stages", "fast.components", "model.path")
    if before is None or after is None or key in brings_others or key.startswith(OPTIONAL):
        return
    old, new = leaves_of(before.model_dump(mode="json")), leaves_of(after.model_dump(mode="json"))
    assert [k for k in old.keys() | new.keys() if old.get(k) != new.get(k) and not named(k, key)] == []


def named(leaf, key):
    return leaf == key or leaf.startswith(f"{key}.") or key.startswith(f"{leaf}.")


@settings(FUZZ)
@given(content=files(), words=overrides(), options=st.lists(st.sampled_from(["--resume", "--run-dir", "--run-dir=x", "--debug", "--local_rank=0", "-x", "--", "c.yaml"]), max_size=2))  # fmt: skip
def test_the_command_line_answers_with_a_tree_or_with_one_line(
    bounded, tmp_path, capsys, content, words, options
):
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    capsys.readouterr()
    code = bounded(lambda: cli.main(["train", "--dry-run", str(path), *options, *words]))
    out, err = capsys.readouterr()
    refusals = [line for line in err.splitlines() if line.startswith("fst: ")]
    assert (code, len(refusals)) in ((0, 0), (2, 1))
    assert ("Traceback" in err) == (code == 2 and "--debug" in options)
    if code == 0:
        path.write_text(out, encoding="utf-8", newline="")
        assert isinstance(load(path), Config)
    else:
        assert out == ""
