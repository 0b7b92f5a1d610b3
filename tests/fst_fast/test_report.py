"""The report: read from synthetic run folders of the three methods, since a page must be right before any run has ended."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fst_fast.errors import UserError
from fst_fast.report import curves, figures, write_report
from fst_fast.report.html import differences, outcome
from fst_fast.report.load import Cell, load_runs

EVIL = '<script>alert("x")</script>'
WORDS = [
    "list the edges .",
    "trace back from",
    "the goal first",
    "write",
    "the whole path .",
    "be brief .",
    "check each edge",
]


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer pixels: what is tested is the data."""
    monkeypatch.setattr(figures, "DPI", 30)


def write_run(
    folder: Path, method: str = "fst", *, steps: int = 40, seed: int = 0, finished: bool = True
) -> Path:
    """A run folder as the trainer writes it, with a saturating reward: fst learns fastest, gepa has no slow steps that move weights."""
    rng = np.random.default_rng([seed, *method.encode()])
    folder.mkdir(parents=True)
    metrics: list[dict[str, Any]] = []
    timing: list[dict[str, Any]] = []
    rollouts: list[dict[str, Any]] = []
    contexts = {"seed00": {"text": "solve the problem .", "parent": None, "born": 0}}
    alive = ["seed00"]
    counters = {
        "rollouts": 0,
        "fast_rollouts": 0,
        "reused_rollouts": 0,
        "tokens_computed": 0,
        "tokens_unshared": 0,
    }
    evolves, trains = method != "rl", method != "gepa"
    versions = {"torch": "2.13.0", "python": "3.11"}
    metrics.append(
        {
            "kind": "start",
            "method": method,
            "seed": seed,
            "task": "star_graph",
            "model": "mini",
            "config_hash": "ab12",
            "versions": versions,
        }
    )

    def reward(step: int, cycle: int) -> tuple[float, float]:
        """(seed context, evolved contexts)"""
        weights = 0.35 * step / (step + 15) if trains else 0.0
        texts = 0.35 * cycle / (cycle + 1) if evolves else 0.0
        return 0.04 + weights, 0.04 + weights + texts * (1 - weights)

    def cell(mean: float, n: int) -> dict[str, Any]:
        mean = float(np.clip(mean + rng.normal() * 0.01, 0, 1))
        return {
            "mean": mean,
            "stderr": (mean * (1 - mean) / n) ** 0.5,
            "pass_at_k": min(1.0, mean * 1.6),
            "n": n,
        }

    def evaluate(step: int, cycle: int, final: bool) -> dict[str, Any]:
        n = 128 if final else 64
        low, high = reward(step, cycle)
        texts = reward(0, cycle)[1]
        cells = {
            "neither": cell(0.04, n),
            "context": cell(texts, n),
            "weights": cell(low, n),
            "both": cell(high, n),
        }
        if not evolves:
            cells |= {"context": cells["neither"], "both": cells["weights"]}
        if not trains:
            cells |= {"weights": cells["neither"], "both": cells["context"]}
        kl = 0.002 * step if trains else 0.0
        line = {"kind": "eval", "step": step, "final": final, "k": 4, "channels": cells, **counters}
        line |= {"kl_seed": kl, "kl_evolved": kl * 0.8}
        metrics.append(line)
        clock["now"] += 1.5
        timing.append({"step": step, "seconds": clock["now"], "eval_s": 1.4})
        return line

    clock = {"now": 3.0}
    evaluate(0, 0, False)
    cycle = 0
    for step in range(1, steps + 1):
        spent = {
            "rollout_s": 2.0,
            "verify_s": 0.3,
            "score_s": 0.4,
            "train_s": 1.5 if trains else 0.0,
            "fast_s": 0.0,
            "eval_s": 0.0,
        }
        if evolves and (step - 1) % 6 == 0:
            cycle += 1
            born = []
            for j in range(4):
                parent = alive[int(rng.integers(len(alive)))]
                text = contexts[parent]["text"] + " " + " ".join(rng.choice(WORDS, 2))
                if j == 3:
                    text = " ".join(text.split()[2:]) + " now"
                id = f"c{cycle:02d}{j}aa"
                admitted = bool(rng.random() < 0.45)
                mean = float(np.clip(reward(step, cycle)[1] + rng.normal() * 0.05, 0, 1))
                contexts[id] = {"text": text, "parent": parent, "born": cycle}
                failures = [{"problem_id": f"train-{j}", "feedback": f"node 7 does not follow 3 {EVIL}"}]
                row = {
                    "id": id,
                    "text": text,
                    "parent": parent,
                    "born": cycle,
                    "admitted": admitted,
                    "mean": mean,
                    "n": 64,
                }
                born.append(
                    row
                    | {"failures": failures, "reflection": f"The path was cut short.\n```\n{text}\n```{EVIL}"}
                )
                if admitted:
                    alive.append(id)
            members = ([*alive[-3:], alive[0]]) if len(alive) > 3 else (alive * 4)[:4]
            scored = [{"id": id, **contexts[id], "mean": 0.3 + 0.02 * cycle, "n": 64} for id in members]
            counters["fast_rollouts"] += 300
            counters["rollouts"] += 300
            line = {"kind": "cycle", "cycle": cycle, "step": step - 1, "population": scored, "proposed": 4}
            line |= {
                "admitted": sum(row["admitted"] for row in born),
                "refused": {"duplicate": 1, "length": 2},
            }
            line |= {
                "fast_rollouts": 300,
                "best_mean": reward(step, cycle)[1],
                "seed_mean": reward(step, cycle)[0],
                "contexts": born,
            }
            metrics.append(line)
            spent["fast_s"] = 6.0
        if trains:
            counters["rollouts"] += 128
            counters["reused_rollouts"] += 20 if evolves else 0
        counters["tokens_computed"] += 9000
        counters["tokens_unshared"] += 40000
        if trains:
            now = float(np.clip(reward(step, cycle)[1] + rng.normal() * 0.04, 0, 1))
            line = {
                "kind": "step",
                "step": step,
                "cycle": cycle,
                "reward": now,
                "reward_std": 0.4,
                "groups": 16,
                "groups_kept": 11,
            }
            line |= {
                "loss": 0.01,
                "grad_norm": 0.3 + 0.1 * rng.random(),
                "lr": 1e-3,
                "kl": 0.002 * step,
                "entropy": 1.2 - step / 80,
            }
            line |= {
                "ratio_mean": 1 + rng.normal() * 1e-3,
                "clipped_fraction": 0.002,
                "mismatch_kl": 1e-6,
                "response_tokens": 14.5,
            }
            metrics.append(line | {"length_stopped": 0.1, "unjudged": 0, **counters})
        good = bool(rng.random() < 0.5)
        example = {
            "step": step,
            "phase": "slow" if trains else "fast",
            "problem_id": f"train-{step}",
            "context_id": alive[-1],
            "sample": 0,
        }
        example |= {
            "reward": float(good),
            "advantage": 1.0 if good else -0.5,
            "finish": "stop",
            "prompt": f"edges 1,2 2,3 {EVIL}",
        }
        rollouts.append(
            example
            | {
                "response": f"step {step}: \\boxed{{1,2,3}} {EVIL}",
                "feedback": "ok" if good else "wrong at 2",
            }
        )
        clock["now"] += sum(spent.values()) + 0.1
        timing.append({"step": step, "seconds": clock["now"], **spent, "tokens_per_s": 900.0})
        last = step == steps and finished
        if step % 5 == 0 and not last:
            evaluate(step, cycle, False)
    if finished:
        last_line = evaluate(steps, cycle, True)
        metrics.append({"kind": "end", "step": steps})
        summary = {
            "method": method,
            "seed": seed,
            "task": "star_graph",
            "model": "mini",
            "channels": last_line["channels"],
            "k": 4,
        }
        summary |= {
            "steps": steps,
            "seconds": clock["now"],
            "kl_seed": last_line["kl_seed"],
            "kl_evolved": last_line["kl_evolved"],
            **counters,
        }
        (folder / "summary.json").write_text(
            json.dumps(summary | {"peak_memory_bytes": 3 * 2**30, "config_hash": "ab12"})
        )
    for name, rows in (("metrics", metrics), ("timing", timing), ("rollouts", rollouts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    members = ([*alive[-3:], alive[0]]) if len(alive) > 3 else (alive * 4)[:4]
    (folder / "contexts.json").write_text(
        json.dumps({"population": members if evolves else ["seed00"], "contexts": contexts})
    )
    (folder / "config.yaml").write_text(f"method: {method}\nseed: {seed}\n")
    return folder


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def the_three(folder: Path) -> list[Path]:
    return [write_run(folder / method, method) for method in ("fst", "rl", "gepa")]


def shown(page: str, value: float) -> bool:
    return f'<data value="{value}">' in page


def test_one_run_gives_a_page_that_needs_nothing_else(tmp_path: Path) -> None:
    out = write_report([write_run(tmp_path / "run")], tmp_path / "out")
    page = out.read_text()
    assert out == tmp_path / "out" / "report.html"
    assert not re.search(r'(?:src|href)="(?!data:image/png;base64,|#)', page)
    assert "http://" not in page
    assert "https://" not in page
    assert "@import" not in page
    embedded = [
        base64.b64decode(data) for data in re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page)
    ]
    beside = [file.read_bytes() for file in (out.parent / "figures").iterdir()]
    assert len(embedded) == 8
    assert sorted(embedded) == sorted(beside)
    assert all(data.startswith(b"\x89PNG") for data in embedded)
    assert not [file for file in out.parent.rglob("*") if file.name.startswith(".")]


def test_the_page_shows_the_figures_of_the_summary(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    page = write_report([folder], tmp_path / "report.html").read_text()
    summary = json.loads((folder / "summary.json").read_text())
    for name, cell in summary["channels"].items():
        found = re.search(rf'<td[^>]* data-cell="{name}">(.*?)</td>', page)
        assert found
        assert all(shown(found[1], cell[key]) for key in ("mean", "stderr", "pass_at_k", "n"))
    for key in (
        "steps",
        "rollouts",
        "fast_rollouts",
        "reused_rollouts",
        "tokens_computed",
        "tokens_unshared",
        "seconds",
        "kl_seed",
        "kl_evolved",
    ):
        assert shown(page, summary[key]), key
    assert shown(page, summary["tokens_unshared"] / summary["tokens_computed"])
    assert "torch 2.13.0" in page
    assert "has not finished" not in page


def test_differences_are_in_standard_errors_of_the_difference() -> None:
    cells = {
        "both": Cell(mean=0.6, stderr=0.03),
        "weights": Cell(mean=0.4, stderr=0.04),
        "context": Cell(mean=0.5, stderr=0.0),
    }
    rows = {name: difference for name, _, difference in differences("fst", cells)}
    contexts = rows["both − weights"]
    assert isinstance(contexts, curves.Difference)
    assert contexts.value == pytest.approx(0.2)
    assert contexts.sigmas == pytest.approx(4.0)
    assert rows["context − neither"] is None


def test_a_channel_that_a_method_lacks_has_no_difference() -> None:
    cells = {name: Cell(mean=0.5, stderr=0.1) for name in ("neither", "context", "weights", "both")}
    rl = [name for name, _, difference in differences("rl", cells) if isinstance(difference, str)]
    gepa = [name for name, _, difference in differences("gepa", cells) if isinstance(difference, str)]
    assert rl == ["both − weights", "context − neither"]
    assert gepa == ["both − context", "weights − neither"]


def test_three_runs_share_the_panels_and_every_panel_holds_their_data(tmp_path: Path) -> None:
    runs = load_runs(the_three(tmp_path))
    drawn = figures.validation(runs)
    assert not isinstance(drawn, str)
    assert [ax.get_xlabel() for ax in drawn.axes] == [curves.AXES[axis] for axis in curves.FIGURE_AXES]
    for ax, axis in zip(drawn.axes, curves.FIGURE_AXES, strict=True):
        assert ax.get_ylabel() or ax not in drawn.axes[::2]
        lines = [line for line in ax.get_lines() if line.get_linestyle() != ":"]
        assert len(lines) == 4  # both of three runs, weights of fst
        for line, (run, cell) in zip(
            lines, [(0, "both"), (0, "weights"), (1, "both"), (2, "both")], strict=True
        ):
            series = curves.validation(runs[run], cell, axis)
            assert len(series) == 9
            assert np.array_equal(line.get_xydata(), np.column_stack([series.x, series.y]))
    drawn = figures.training(runs)
    assert not isinstance(drawn, str)
    assert [len(ax.get_lines()) for ax in drawn.axes] == [
        4,
        4,
        4,
        4,
    ]
    assert all(len(line.get_xdata()) == 40 for ax in drawn.axes for line in ax.get_lines())
    drawn = figures.diagnostics(runs)
    assert not isinstance(drawn, str)
    assert len(drawn.axes) == 8
    assert all(len(ax.get_lines()) == 2 for ax in drawn.axes)
    drawn = figures.time_split(runs)
    assert not isinstance(drawn, str)
    assert sum(bar.get_width() for bar in drawn.axes[0].patches) == pytest.approx(
        sum(run.timing[-1].seconds for run in runs)
    )
    drawn = figures.cells(runs, [outcome(run).channels for run in runs])
    assert not isinstance(drawn, str)
    assert len(drawn.axes[0].patches) == 12
    drawn = figures.kl_against_reward(runs)
    assert not isinstance(drawn, str)
    assert drawn.axes[0].get_lines()[0].get_xdata()[-1] == metrics_of(tmp_path / "fst")[-2]["kl_evolved"]


def test_axes_are_the_honest_ones(tmp_path: Path) -> None:
    run = load_runs([write_run(tmp_path / "run")])[0]
    evals = [line for line in metrics_of(tmp_path / "run") if line["kind"] == "eval"]
    seconds = {
        row.step: row.seconds for row in run.timing
    }  # the last row of a step is that of its evaluation
    for axis, expected in (
        ("steps", [line["step"] for line in evals]),
        ("rollouts", [line["rollouts"] for line in evals]),
        ("tokens", [line["tokens_computed"] for line in evals]),
        ("seconds", [seconds[line["step"]] for line in evals]),
    ):
        assert curves.validation(run, "both", axis).x.tolist() == expected
    first = {}
    for row in run.timing:
        first.setdefault(row.step, row.seconds)
    assert curves.training(run, "seconds").x.tolist() == [first[step] for step in range(1, 41)]


def test_the_report_of_three_methods_says_what_two_of_them_lack(tmp_path: Path) -> None:
    page = write_report(the_three(tmp_path), tmp_path / "report.html").read_text()
    assert "Method rl evolves no contexts" in page
    assert "weights frozen, 7 fast phases" in page
    assert page.count("the same cell: weights frozen") == 2
    assert page.count("the same cell: no evolved contexts") == 2
    assert "Reaching the peak of plain RL" in page
    assert len(list((tmp_path / "figures").iterdir())) == 9


def test_text_of_models_and_users_is_escaped(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run<i>", steps=8)
    contexts = json.loads((folder / "contexts.json").read_text())
    contexts["contexts"]["seed00"]["text"] = f"solve {EVIL}"
    (folder / "contexts.json").write_text(json.dumps(contexts))
    page = write_report([folder], tmp_path / "report.html").read_text()
    assert "<script" not in page
    assert "<i>" not in page
    assert page.count("&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt;") >= 6


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MARK = "document.documentElement.setAttribute('data-ran', '1')"
ATTACKS = (
    f"<script>{MARK}</script>",
    f"</pre></title></style><script>{MARK}</script>",
    f'<img src="x" onerror="{MARK}">',
    f'"><svg onload="{MARK}">',
    f"' onmouseover='{MARK}' autofocus onfocus='{MARK}' x='",
    f"{{{{ '<script>{MARK}</script>' }}}}",
    f'<iframe srcdoc="<script>parent.{MARK}</script>"></iframe>',
)


def dom(page: Path, profile: Path) -> str:
    """The page as it is after a browser has run everything in it that runs."""
    assert CHROMIUM
    quiet = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update disable-sync"
    command = [CHROMIUM, *(f"--{word}" for word in quiet.split()), f"--user-data-dir={profile}"]
    command += ["--virtual-time-budget=2000", "--dump-dom", page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (Debian package chromium)")
def test_no_text_of_models_and_users_runs_in_a_browser(tmp_path: Path) -> None:
    attack = "".join(ATTACKS)
    folder = write_run(tmp_path / "run", steps=8)
    for name in ("metrics.jsonl", "rollouts.jsonl", "contexts.json", "summary.json"):
        texts = (folder / name).read_text()
        for word in (EVIL, "star_graph", "mini", "train-", "solve", "wrong at 2"):
            texts = texts.replace(json.dumps(word)[1:-1], json.dumps(word + attack)[1:-1])
        (folder / name).write_text(texts)
    (folder / "config.yaml").write_text(f"method: fst\ntask: {json.dumps(attack)}\n")
    text = write_report([folder], tmp_path / "report.html").read_text()
    assert text.count("data-ran") > 100
    policy = re.search(r"<meta http-equiv=.Content-Security-Policy.*?>", text)
    assert policy
    pages = {
        "the control": f"<html><body>{attack}</body></html>",
        "the policy alone": f"<html><head>{policy[0]}</head><body>{attack}</body></html>",
        "the escaping alone": text.replace(policy[0], ""),
    }
    ran = []
    for name, content in pages.items():
        (tmp_path / "page.html").write_text(content)
        if 'data-ran="1"' in dom(tmp_path / "page.html", tmp_path / "profile").partition("<body")[0]:
            ran.append(name)
    assert ran == ["the control"]


def test_an_unfinished_run_shows_its_state_and_says_so(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=13, finished=False)
    page = write_report([folder], tmp_path / "report.html").read_text()
    assert "run has not finished: what is shown is its state after step 13 (evaluation after step 10)" in page
    lines = metrics_of(folder)
    assert shown(page, [line for line in lines if line["kind"] == "eval"][-1]["channels"]["both"]["mean"])
    assert shown(page, lines[-1]["rollouts"])


def test_a_run_that_has_only_begun_gives_a_page_with_reasons(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text(
        '{"kind":"start","method":"fst","seed":0,"task":"t","model":"mini"}\n'
    )
    page = write_report([folder], tmp_path / "report.html").read_text()
    assert page.count("No figure: ") == 8
    assert "No judged rollouts" in page


def test_a_torn_last_line_is_left_out_and_said(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=13, finished=False)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind":"step","step":14,"rew')
    page = write_report([folder], tmp_path / "report.html").read_text()
    number = len(metrics_of(write_run(tmp_path / "whole", steps=13, finished=False))) + 1
    assert f"metrics.jsonl:{number} was cut off while being written and is left out" in page


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ('{"kind":"step","step":', "not valid JSON"),
        ('{"kind":"step","step":7,"reward":NaN}', "NaN is not JSON"),
        ('{"kind":"step","step":7,"reward":"high"}', "reward='high'"),
        ('{"kind":"step","reward":0.5}', 'the key "step" is missing'),
        ("[1, 2]", "a JSON list instead of an object"),
        ('{"step":3}', 'the key "kind" is missing'),
    ],
)
def test_a_damaged_line_is_refused_with_file_and_line(tmp_path: Path, damage: str, says: str) -> None:
    folder = write_run(tmp_path / "run", steps=2)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join([*lines[:2], damage + "\n", *lines[2:]]))
    with pytest.raises(UserError) as refused:
        write_report([folder], tmp_path / "report.html")
    assert f"{folder / 'metrics.jsonl'}:3: " in str(refused.value)
    assert says in str(refused.value)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("name", ["timing.jsonl", "rollouts.jsonl", "summary.json", "contexts.json"])
def test_the_other_files_are_checked_too(tmp_path: Path, name: str) -> None:
    folder = write_run(tmp_path / "run", steps=2)
    (folder / name).write_text("{oops\n")
    with pytest.raises(UserError, match=re.escape(f"{folder / name}:1: not valid JSON")):
        load_runs([folder])


def test_what_is_not_a_run_is_refused_by_name(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=2)
    (tmp_path / "empty").mkdir()
    for paths, says in (
        ([tmp_path / "nowhere"], f"{tmp_path / 'nowhere'} does not exist"),
        ([run, tmp_path / "empty"], f"{tmp_path / 'empty'} has no metrics.jsonl"),
        ([run, run], "is given twice"),
        ([], "no run folder given"),
    ):
        with pytest.raises(UserError, match=re.escape(says)):
            write_report(paths, tmp_path / "report.html")
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "page.html"):
        with pytest.raises(UserError, match="cannot write the report"):
            write_report([run], out)


def test_runs_of_the_same_folder_name_are_told_apart(tmp_path: Path) -> None:
    runs = load_runs([write_run(tmp_path / name / "run", steps=2) for name in ("a", "b")])
    assert [run.label for run in runs] == ["a/run", "b/run"]


def test_steps_repeated_after_a_resume_count_once(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=4)
    rows = [json.loads(line) for line in (folder / "timing.jsonl").read_text().splitlines()]
    again = [row | {"seconds": row["seconds"] + 50} for row in rows[3:]]
    (folder / "timing.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows + again))
    run = load_runs([folder])[0]
    assert [row.step for row in run.timing] == [0, 1, 2, 3, 4, 4]  # evaluations at 0 and at 4
    assert [row.seconds for row in run.timing[3:]] == [row["seconds"] for row in again]
    spent = curves.time_split(run)
    assert sum(spent.values()) == pytest.approx(again[-1]["seconds"])
    assert spent["other"] > 50
    assert spent["rollouts"] == pytest.approx(8.0)
    assert spent["evaluation"] == pytest.approx(2.8)


def test_phases_that_overlap_are_said(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=2)
    assert not curves.phases_overlap(load_runs([folder])[0])
    rows = [json.loads(line) for line in (folder / "timing.jsonl").read_text().splitlines()]
    (folder / "timing.jsonl").write_text("".join(json.dumps(row | {"fast_s": 9.0}) + "\n" for row in rows))
    assert "run: the recorded phases add up to more" in write_report([folder], tmp_path / "b").read_text()


def test_a_mean_over_no_judged_problem_is_no_reward() -> None:
    assert Cell.model_validate({"mean": 0.0, "stderr": 0.0, "pass_at_k": 0.0, "n": 0, "k": 4}).mean is None
