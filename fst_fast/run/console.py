"""What a person sees while a run goes on: a live status on a terminal, plain lines anywhere else (a file, a pipe, a cluster's log).

On a terminal two lines stay at the bottom (phase, bar, step, time left; reward, KL, tokens/s) and what happened scrolls above them. Elsewhere
there is one line per step at most. Only rank 0 says anything. Nothing here decides anything: a run without a console is the same run.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, TextIO

from rich.console import Console as RichConsole
from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fst_fast.contracts import CELLS


class Console:
    """total_steps: of the whole run. enabled: whether this process speaks. stream: where to write, standard output if not given."""

    def __init__(self, *, total_steps: int, enabled: bool = True, stream: TextIO | None = None) -> None:
        self._steps, self._silent = total_steps, not enabled
        self._stream = stream if stream is not None else sys.stdout
        self._rich = RichConsole(file=self._stream, highlight=False, markup=False, soft_wrap=True)
        self._phase, self._record, self._speed, self._left = "", {}, None, None  # type: tuple[str, dict[str, Any], Any, Any]
        self._named: set[str] = set()
        # (step, seconds) of the first step that this process saw
        self._began: tuple[int, float] | None = None
        self._has_status = enabled and self._rich.is_terminal and not self._rich.is_dumb_terminal
        self._live: Live | None = None  # from the first phase on

    def phase(self, name: str) -> None:
        """What is being done now. Without a terminal a phase is named once, when the run first comes to it."""
        self._phase = name
        if self._has_status and self._live is None:
            self._live = Live(
                get_renderable=self._status, console=self._rich, refresh_per_second=4, transient=True
            )
            self._live.start()
        if not self._has_status and name not in self._named:
            self._say(f"{name} ...")
        self._named.add(name)

    def step(self, record: Mapping[str, Any], timing: Mapping[str, Any]) -> None:
        """After an optimiser step: its records of metrics.jsonl and timing.jsonl."""
        step, seconds = int(record["step"]), float(timing["seconds"])
        if self._began is None:
            self._began = (step, seconds)
        elif step > self._began[0]:
            self._left = (seconds - self._began[1]) / (step - self._began[0]) * (self._steps - step)
        self._record, self._speed = dict(record), timing.get("tokens_per_s")
        if not self._has_status:
            parts = [f"step {step}/{self._steps}", f"cycle {record.get('cycle', 0)}", *self._values()]
            self._say("  ".join(parts + ([f"{duration(self._left)} left"] if self._left is not None else [])))

    def cycle(self, record: Mapping[str, Any]) -> None:
        """After a fast phase: its record of metrics.jsonl."""
        refused = record.get("refused") or {}
        reasons = f" ({', '.join(f'{reason} {n}' for reason, n in refused.items())})" if refused else ""
        self._say(
            f"cycle {record['cycle']}: {record.get('proposed', 0)} contexts proposed, {record.get('admitted', 0)} admitted, "
            f"{sum(refused.values())} refused{reasons}; mean reward {number(record.get('best_mean'))} best, "
            f"{number(record.get('seed_mean'))} seed"
        )
        population = [context for context in record.get("population", ()) if context.get("mean") is not None]
        if population:
            best = max(population, key=lambda context: float(context["mean"]))
            self._say(f"  best context: {' '.join(str(best['text']).split())[:160]}")

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """After an evaluation: its record of metrics.jsonl."""
        channels = record.get("channels", {})
        cells = [
            f"{name} {self._percent(channels[name])}"
            for name in CELLS
            if name in channels and channels[name]["n"]
        ]
        kls = [
            f"{name} {number(record[key], 4)}"
            for name, key in (("seed", "kl_seed"), ("evolved", "kl_evolved"))
            if record.get(key) is not None
        ]
        self._say(
            f"evaluation at step {record['step']}: {', '.join(cells) or 'nothing could be judged'}"
            + (f"; KL to base: {', '.join(kls)}" if kls else "")
        )

    def final_table(self, channels: Mapping[str, Mapping[str, Any]]) -> None:
        """The four cells of the final evaluation: mean reward over k samples with its standard error, and pass@k.

        A cell may say its k; one without problems (n = 0) was not measured."""
        k = next((cell["k"] for cell in channels.values() if cell.get("k")), "k")
        rows = [("", f"mean@{k}", f"pass@{k}", "problems")]
        for name, meaning in CELLS.items():
            cell, label = channels.get(name), f"{name}: {meaning}"
            if cell is None or not cell["n"]:
                rows.append((label, "not measured", "", ""))
            else:
                rows.append((label, self._percent(cell), f"{100 * cell['pass_at_k']:.1f} %", str(cell["n"])))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [
            row[0].ljust(widths[0])
            + "".join("   " + text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))
            for row in rows
        ]
        rule = "-" * len(lines[0])
        title = "Reward on the validation problems"
        self._say("\n".join(["", title, rule, lines[0], rule, *lines[1:], rule]))

    def note(self, text: str) -> None:
        """Anything else that a person should read."""
        self._say(text)

    def close(self) -> None:
        """Take the status away. May be called twice."""
        if self._live is not None:
            self._live.stop()
        self._live, self._has_status = None, False

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _say(self, text: str) -> None:
        if self._silent:
            return
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        text = text.encode(encoding, "replace").decode(encoding)
        if self._has_status:
            self._rich.print(text)
        else:
            self._stream.write(text + "\n")
            self._stream.flush()

    def _values(self) -> list[str]:
        values = [f"reward {number(self._record.get('reward'))}", f"KL {number(self._record.get('kl'), 4)}"]
        return values + ([f"{float(self._speed):,.0f} tokens/s"] if self._speed is not None else [])

    def _status(self) -> Group:
        step = int(self._record.get("step", 0))
        line = Table.grid(padding=(0, 2))
        line.add_row(
            Text(self._phase or "starting", style="bold"),
            ProgressBar(total=max(self._steps, 1), completed=step, width=30),
            f"step {step}/{self._steps}",
            f"{duration(self._left)} left" if self._left is not None else "",
        )
        return Group(line, Text("   ".join(self._values())) if self._record else Text(""))

    def _percent(self, cell: Mapping[str, Any]) -> str:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        sign = "±" if "±".encode(encoding, "replace") != b"?" else "+-"
        error = "" if cell["stderr"] is None else f" {sign} {100 * cell['stderr']:.1f}"
        return f"{100 * cell['mean']:.1f}{error} %"


def number(value: float | None, digits: int = 3) -> str:
    """A number with a fixed count of digits, `-` where there is none."""
    return "-" if value is None else f"{float(value):.{digits}f}"


def duration(seconds: float) -> str:
    """`2h05m`, `3m10s`, `12s`."""
    whole = max(round(seconds), 0)
    hours, minutes = whole // 3600, whole // 60 % 60
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{whole % 60:02d}s" if minutes else f"{whole}s"
