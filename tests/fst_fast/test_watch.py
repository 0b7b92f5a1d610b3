"""fst watch: the run folder is followed as it grows and never written to; the server answers this machine only; the page works in a browser."""

from __future__ import annotations

import json
import os
import shutil
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fst_fast.cli import main
from fst_fast.commands.watch import open_server
from fst_fast.errors import UserError
from fst_fast.report import follow
from fst_fast.report.follow import Columns, Follower, Tail
from tests.fst_fast.chromium import PROGRAM, Page

EVIL = '<script>document.title = "owned"</script><img src=x onerror="document.title = 1">'
TROUBLE = {"groups_flat": {"value": 0.95, "limit": 0.9, "count": 4}}
START = {"kind": "start", "method": "fst", "seed": 7, "task": f"task {EVIL}", "model": "mini"}


def lines(*records: Any) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def step(i: int, **fields: Any) -> dict[str, Any]:
    fixed = {
        "kind": "step",
        "step": i,
        "reward": i / 100,
        "kl": None if i % 2 else 0.1,
        "groups": 4,
        "groups_kept": 3,
        "entropy": 1.0,
    }
    return (
        fixed
        | {"mismatch_kl": 1e-5, "grad_norm": 1.0, "response_tokens": 9.0, "length_stopped": 0.0}
        | fields
    )


def timing(i: int) -> dict[str, Any]:
    spent = {"rollout_s": 2.0, "verify_s": 0.1, "train_s": 3.0, "fast_s": 4.0 * (i % 6 == 0), "eval_s": 0.0}
    return {"step": i, "seconds": 10.0 * i, **spent, "tokens_per_s": 900.0}


def evaluation(i: int) -> dict[str, Any]:
    cell = {"mean": 0.25, "stderr": 0.02, "pass_at_k": 0.5, "n": 8, "k": 4}
    cells = {
        "neither": cell,
        "context": {**cell, "mean": 0.5},
        "weights": {**cell, "mean": None, "stderr": None, "pass_at_k": None},
        "both": {**cell, "mean": 1.0},
    }
    return {
        "kind": "eval",
        "step": i,
        "final": False,
        "channels": cells,
        "k": 4,
        "kl_seed": 0.1,
        "kl_evolved": None,
    }


def rollout(i: int, **fields: Any) -> dict[str, Any]:
    shown = {
        "prompt": f"question {i} {EVIL}",
        "response": f"answer {i} {EVIL}",
        "feedback": f"wrong {EVIL}",
        "finish": "stop",
    }
    return (
        {
            "step": i,
            "phase": "slow",
            "problem_id": f"p{i}",
            "context_id": "aaa",
            "sample": 0,
            "reward": (i % 3) / 2,
            "advantage": 0.5,
        }
        | shown
        | fields
    )


def contexts() -> dict[str, Any]:
    def one(text: str, parent: str | None, born: int, mean: float | None) -> dict[str, Any]:
        failures = [{"problem_id": "p1", "feedback": f"no {EVIL}"}]
        return {
            "text": text,
            "parent": parent,
            "born": born,
            "admitted": True,
            "mean": mean,
            "n": 8,
            "failures": failures,
            "reflection": f"because {EVIL}",
        }

    tree = {
        "aaa": one("solve it .", None, 0, 0.1),
        "bbb": one(f"solve it step by step . {EVIL}", "aaa", 0, 0.5),
        "ccc": one("solve step by step .", "bbb", 1, None),
    }
    return {"population": ["bbb", "ccc", "bbb"], "contexts": tree}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run that is going on: this process holds its lock, as far as anyone can tell."""
    folder = tmp_path / "a run"
    (folder / "processes").mkdir(parents=True)
    (folder / "fst-run.json").write_text('{"format": 1, "metrics": 1, "config_hash": "x"}')
    (folder / "config.yaml").write_text("slow:\n  steps: 200\n")
    (folder / "lock").write_text(f"{os.getpid()}\n")
    (folder / "processes/0").write_text("step 40, fast phase")
    (folder / "metrics.jsonl").write_text(
        lines(START, evaluation(0), *map(step, range(1, 40)), step(40, troubles=TROUBLE))
    )
    (folder / "timing.jsonl").write_text(lines(*map(timing, range(1, 41))))
    (folder / "rollouts.jsonl").write_text(lines(*map(rollout, range(1, 41))))
    (folder / "contexts.json").write_text(json.dumps(contexts()))
    return folder


def append(path: Path, text: str) -> None:
    with open(path, "a") as file:
        file.write(text)


def test_a_run_that_is_going_on_shows_phase_time_left_and_troubles(run: Path) -> None:
    status = Follower(run).snapshot()["status"]
    assert (status["state"], status["step"], status["steps"], status["phase"]) == (
        "running",
        40,
        200,
        "fast phase",
    )
    assert status["seconds"] == 400.0
    assert status["left_s"] == 1600.0, "10 s a step"
    [trouble] = status["troubles"]
    assert trouble["says"].startswith("95% of the groups of the last 8 steps")
    assert (trouble["page"], trouble["count"], trouble["unit"]) == (
        "docs/troubles.md#groups-are-flat",
        4,
        "step",
    )


def test_what_is_not_known_yet_is_null(run: Path) -> None:
    (run / "timing.jsonl").write_text(lines(timing(1)))
    (run / "config.yaml").unlink()
    status = Follower(run).snapshot()["status"]
    assert (status["left_s"], status["steps"], status["seconds"]) == (None, None, 10.0)
    for name in ("metrics.jsonl", "timing.jsonl", "rollouts.jsonl", "contexts.json", "processes/0"):
        (run / name).unlink()
    found = Follower(run).snapshot()
    assert (found["status"]["step"], found["status"]["phase"], found["status"]["seconds"]) == (0, None, None)
    assert found["curves"]["steps"]["reward"] == []
    assert found["contexts"]["population"] == []


def test_curves_cells_contexts_and_rollouts(run: Path) -> None:
    found = Follower(run).snapshot()
    curves = found["curves"]
    assert curves["steps"]["step"] == list(range(1, 41))
    assert curves["steps"]["reward"] == [i / 100 for i in range(1, 41)]
    assert curves["steps"]["kl"][:2] == [None, 0.1]
    assert set(curves["steps"]["kept"]) == {0.75}
    assert curves["cells"]["both"]["mean"] == 1.0
    assert (curves["evals"]["both"], curves["evals"]["weights"]) == ([1.0], [None])
    assert sum(curves["seconds"]["fast_s"]) == pytest.approx(24.0)
    assert len(curves["seconds"]["edges"]) == 41
    lineage = found["contexts"]
    assert [(m["id"], m["copies"], m["chain"]) for m in lineage["population"]] == [
        ("bbb", 2, ["aaa", "bbb"]),
        ("ccc", 1, ["aaa", "bbb", "ccc"]),
    ]
    assert [what for what, _ in lineage["nodes"]["ccc"]["changes"]] == ["same", "del", "same", "del"]
    assert [r["step"] for r in found["rollouts"]["rollouts"]] == list(range(40, 0, -1))


def test_only_what_is_new_is_read_and_sent(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    follower = Follower(run)
    have = {name: part["version"] for name, part in follower.snapshot().items() if name != "status"}
    assert list(follower.snapshot(have)) == ["status"]
    append(run / "metrics.jsonl", lines(step(41)))
    read: list[dict[str, Any]] = []
    take = Follower._take
    monkeypatch.setattr(Follower, "_take", lambda self, record: (read.append(record), take(self, record))[1])
    found = follower.snapshot(have)
    assert list(found) == ["status", "curves"]
    assert [record["step"] for record in read] == [41]
    assert Follower(run).snapshot(have).keys() > {"curves", "rollouts"}, (
        "versions of another watcher say nothing"
    )


def test_a_half_written_last_line_waits_for_its_rest(run: Path) -> None:
    follower = Follower(run)
    whole = lines(step(41))
    append(run / "metrics.jsonl", whole[:30])
    assert follower.snapshot()["status"]["step"] == 40
    append(run / "metrics.jsonl", whole[30:])
    status = follower.snapshot()["status"]
    assert (status["step"], status["damaged"]) == (41, 0)


def test_a_resumed_run_that_cut_its_files_back_is_read_again(run: Path) -> None:
    follower = Follower(run)
    follower.snapshot()
    for name, maker in (("metrics", step), ("timing", timing), ("rollouts", rollout)):
        path = run / f"{name}.jsonl"
        kept = [line for line in path.read_text().splitlines(True) if json.loads(line).get("step", 0) <= 20]
        path.write_text(
            "".join(kept)
            + lines(*({**maker(i), "reward": 0.9, "seconds": 5.0 * i + 100} for i in range(21, 61)))
        )
    found = follower.snapshot()
    assert found["curves"]["steps"]["step"] == list(range(1, 61)), (
        "longer than before: the size alone does not tell"
    )
    assert found["curves"]["steps"]["reward"][19:21] == [0.2, 0.9]
    assert (found["status"]["step"], found["status"]["seconds"]) == (60, 400.0)
    assert found["status"]["troubles"] == []
    assert [r["step"] for r in found["rollouts"]["rollouts"]] == list(range(60, 0, -1))


def test_finished_stopped_and_reused_process_numbers(run: Path) -> None:
    def state() -> str:
        return str(Follower(run).snapshot()["status"]["state"])

    assert state() == "running"
    os.utime(run / "lock", (1, 1))
    assert state() == "stopped", (
        "this process is younger than the lock: it only has the number of the one that ended"
    )
    (run / "lock").write_text("no number")
    assert state() == "stopped"
    append(run / "metrics.jsonl", lines({"kind": "end", "step": 200}))
    status = Follower(run).snapshot()["status"]
    assert (status["state"], status["step"], status["left_s"]) == ("finished", 200, None)


def test_damaged_lines_are_counted_and_left_out(run: Path) -> None:
    append(
        run / "metrics.jsonl",
        'no json\n[1]\n{"kind": "step", "step": 41, "groups": "x", "groups_kept": 1}\n' + lines(step(42)),
    )
    append(run / "timing.jsonl", '{"step": 1e400, "seconds": 3}\n{"step": "x"}\n')
    found = Follower(run).snapshot()
    assert (found["status"]["step"], found["status"]["damaged"]) == (42, 3)
    json.dumps(found, allow_nan=False)


def test_a_long_run_is_averaged_and_its_rollouts_are_read_from_the_end(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = Columns("reward")
    for i in range(100_000):
        columns.add(i, {"reward": None if i < 250 else float(i)})
    found = columns.averaged()
    assert len(found["step"]) == follow.POINTS
    assert found["step"][:2] == [249.0, 499.0]
    assert found["reward"][:2] == [None, 374.5]
    monkeypatch.setattr(follow, "TAIL_BYTES", 2000)
    tail = Tail(run / "rollouts.jsonl", only_end=True)
    _, records = tail.read()
    assert 1 < len(records) < 10
    assert records[-1]["step"] == 40
    monkeypatch.setattr(follow, "CHUNK", 100)
    assert Follower(run).snapshot()["curves"]["records"] == 40, "lines longer than what is read at a time"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda run: shutil.rmtree(run), "does not exist"),
        (lambda run: [shutil.rmtree(run), run.write_text("")], "is a file"),
        (
            lambda run: [(run / name).unlink() for name in ("fst-run.json", "metrics.jsonl")],
            "holds no run of fst",
        ),
        (
            lambda run: (run / "fst-run.json").write_text('{"format": 9}'),
            "has format 9 with metrics of version 1; this version of fst reads format 1",
        ),
        (lambda run: (run / "fst-run.json").write_text('{"metrics": 2}'), "metrics of version 2"),
        (lambda run: (run / "fst-run.json").write_text("[]"), "fst-run.json is damaged"),
    ],
)
def test_what_is_no_run_of_this_version_is_one_sentence_before_and_while_watching(
    run: Path, spoil: Any, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    follower = Follower(run)
    spoil(run)
    assert main(["watch", str(run)]) == 2
    assert said in capsys.readouterr().err
    with pytest.raises(UserError, match=said):
        follower.snapshot()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--host", "0.0.0.0"],
            "served on this machine only, 127.0.0.1; from another one: ssh -L 8000:127.0.0.1:8000",
        ),
        (["--host", "::"], "on this machine only"),
        (["--port", "65536"], "'65536' is refused; allowed: a port from 0"),
        (["--port", "-1"], "'-1' is refused"),
    ],
)
def test_another_host_and_impossible_ports_are_refused(
    run: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["watch", str(run), *words]) == 2
    assert said in capsys.readouterr().err


@pytest.fixture
def url(run: Path) -> Iterator[str]:
    with open_server(run, host="localhost", port=0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def get(url: str, **headers: str) -> Any:
    return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30)


def test_a_port_that_is_taken_is_one_sentence(
    run: Path, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    port = url.rpartition(":")[2]
    assert main(["watch", str(run), "--port", port]) == 2
    assert f"--port {port} cannot be taken: Address already in use" in capsys.readouterr().err


def test_the_server_answers_localhost_only_and_lets_no_foreign_script_run(url: str) -> None:
    with get(url) as page:
        policy = page.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert page.headers["X-Content-Type-Options"] == "nosniff"
        text = page.read().decode()
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in text
    assert "innerHTML" not in text
    for host in ("localhost", "127.0.0.1", "localhost:1", "127.0.0.1:8000"):
        with get(f"{url}/data", Host=host) as reply:
            assert json.load(reply)["status"]["step"] == 40
    for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "", "127.0.0.1.nip.io"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            get(f"{url}/data", Host=host)
        assert refused.value.code == 403
    for path in ("/../../etc/passwd", "/metrics.jsonl", "/data/"):
        with pytest.raises(urllib.error.HTTPError) as missing:
            get(url + path)
        assert missing.value.code == 404


def test_the_run_folder_is_left_as_it_is(run: Path, url: str) -> None:
    def state() -> list[tuple[str, int, int]]:
        return sorted((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in [run, *run.rglob("*")])

    before = state()
    for _ in range(3):
        get(f"{url}/data").close()
    assert state() == before


def test_a_folder_that_goes_away_is_said_on_the_page(run: Path, url: str) -> None:
    shutil.rmtree(run)
    with get(f"{url}/data") as reply:
        assert "does not exist" in json.load(reply)["error"]


CONTRAST = """(() => {
  const rgba = c => { const m = c.match(/[\\d.]+/g).map(Number); return c.startsWith("color(srgb") ? [m[0]*255, m[1]*255, m[2]*255, m[3] ?? 1] : [m[0], m[1], m[2], m[3] ?? 1]; };
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4).reduce((t, v, i) => t + v * [.2126, .7152, .0722][i], 0);
  const ground = el => { for (; el; el = el.parentElement) { const c = rgba(getComputedStyle(el).backgroundColor); if (c[3] > .99) return c; } return [255, 255, 255]; };
  const found = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const el = walk.currentNode.parentElement, style = getComputedStyle(el);
    if (!walk.currentNode.textContent.trim() || !el.getClientRects().length || el.closest("script, .skip")) continue;
    const a = light(rgba(el.closest("svg") ? style.fill : style.color)), b = light(ground(el)), ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) found.push([ratio.toFixed(2), el.tagName, el.className.baseVal ?? el.className, walk.currentNode.textContent.slice(0, 30)]);
  }
  return found;
})()"""
NAMELESS = """[...document.querySelectorAll("button, a, [tabindex], progress, section, article, nav, summary")].filter(el => el.getClientRects().length
  && !(el.getAttribute("aria-label") || el.textContent.trim() || document.getElementById(el.getAttribute("aria-labelledby"))?.textContent)).map(el => el.outerHTML.slice(0, 80))"""


@pytest.mark.skipif(PROGRAM is None, reason="needs a chromium, which is not installed here")
def test_the_page_in_a_browser(run: Path, url: str, tmp_path: Path) -> None:
    pytest.importorskip("websockets")
    with Page(tmp_path / "profile") as page:
        for dark in (False, True):
            page.open(url, dark=dark, still=True)
            page.eval("choose('ccc'); document.querySelectorAll('details').forEach(d => d.open = true)")
            assert page.eval(CONTRAST) == []
            assert page.eval(NAMELESS) == []
            background = page.eval("getComputedStyle(document.body).backgroundColor")
            assert (sum(map(int, background[4:-1].split(","))) < 200) is dark
            assert page.eval("document.querySelector('.pill').getAnimations({subtree: true}).length") == 0, (
                "motion is reduced"
            )
        # what the run says, as text
        text = page.eval("document.body.innerText")
        for part in (
            "40 of 200 steps",
            "fast phase",
            "26 min 40 s left",
            "Groups are flat",
            "100.0 %",
            "not measured",
            "answer 40",
            f"wrong {EVIL}",
            "because",
        ):
            assert part in text
        assert page.eval("document.title") == "40/200 · a run"
        assert page.eval("[document.scripts.length, document.images.length]") == [1, 0]
        assert page.eval("document.querySelectorAll('ins, del').length > 0")
        # the keyboard: skip link, a curve, the lineage, a rollout
        page.eval("document.body.focus(), document.activeElement.blur(), scrollTo(0, 0)")
        page.key("Tab")
        assert page.eval("document.activeElement.className") == "skip"
        page.eval("charts.reward.svg.focus()")
        page.key("Home")
        page.key("ArrowRight")
        assert page.eval("document.activeElement.getAttribute('aria-valuetext')") == "step 2: 0.02"
        page.key("End")
        assert page.eval("document.activeElement.getAttribute('aria-valuetext')") == "step 40: 0.4"
        page.eval("tree.focus()")
        page.key("Home")
        assert "aaa" in page.eval("document.getElementById('chosen').innerText")
        page.key("ArrowRight")
        said = page.eval("tree.getAttribute('aria-valuetext')")
        assert said == "bbb, born in cycle 0, mean reward 0.5 over 8 rollouts"
        page.eval("document.querySelector('#examples summary').focus()")
        page.eval("document.querySelector('#examples details').open = false")
        page.key("Enter")
        assert page.eval("document.querySelector('#examples details').open") is True
        # what comes in later: the open rollout stays open, the new one stands in front, focus stays
        append(run / "metrics.jsonl", lines(step(41)))
        append(run / "rollouts.jsonl", lines(rollout(41, phase="fast", reward=None)))
        page.eval("poll()")
        page.wait("document.querySelector('#examples details').innerText.includes('step 41')")
        assert page.eval(
            "document.activeElement.parentElement.open && document.activeElement.innerText.includes('step 40')"
        )
        assert page.eval("document.title") == "41/200 · a run"
        page.eval(
            "[...document.querySelectorAll('#filters button')].find(b => b.innerText === 'not judged').click()"
        )
        assert (
            page.eval("[...document.querySelectorAll('#examples details')].filter(d => !d.hidden).length")
            == 1
        )
        assert page.errors == []
        # narrow: nothing sticks out
        page.call(
            "Emulation.setDeviceMetricsOverride", width=380, height=800, deviceScaleFactor=1, mobile=True
        )
        assert page.eval("document.documentElement.scrollWidth") <= 380
        (run / "fst-run.json").write_text('{"format": 9}')
        page.eval("poll()")
        page.wait("document.getElementById('alert').innerText.includes('has format 9')")
