"""One table of the results that scripts/gpu_check.sh has written, beside the rates that `fst plan` assumes of the machine.

    python -m benchmarks.table FOLDER [--machine H200]

A row is a case of a benchmark with its time, and what it reached: TFLOP/s, TB/s, times the byte floor, or seconds against the prediction of the whole step.
`assumed` is the same quantity in fst_fast/plan/machines.py; a ratio below 1 is slower than assumed. Cases that nothing is assumed of have none.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import measure
from fst_fast.plan.machines import Machine, found_here, machine

ORDER = ("linear_policy_loss", "linear_logprob", "tree_attention", "decode_step", "sampling", "step", "training_step", "cascade_decode")  # fmt: skip
NAMES = ("name", "peer", "side", "variant", "rules", "dtype")
TIMES = (("ms", 1.0), ("step_ms", 1.0), ("median_ms", 1.0), ("seconds", 1e3))


def assumed(benchmark: str, row: dict[str, Any], m: Machine) -> tuple[float | None, float | None]:
    """(reached, assumed), both where larger is better, in FLOP/s, bytes/s or steps of the floor."""
    if benchmark in ("linear_policy_loss", "linear_logprob") and row.get("tflop_per_s"):
        return row["tflop_per_s"] * 1e12, m.product
    if benchmark == "tree_attention" and row.get("tflop_per_s"):
        forward, both = m.attention, 14 / (4 / m.attention + 10 / m.attention_backward)
        return row["tflop_per_s"] * 1e12, forward if row.get("variant") == "forward" else both
    if benchmark == "decode_step" and row.get("times_floor"):
        return 1 / row["times_floor"], m.bandwidth / 4.3e12
    if benchmark == "sampling" and row.get("tb_per_s"):
        return row["tb_per_s"] * 1e12, m.bandwidth
    if benchmark == "step" and row.get("seconds"):
        return 1 / row["seconds"], 1 / row["predicted"]
    return None, None


def lines(folder: Path, m: Machine) -> list[str]:
    out = [f"{'benchmark':20} {'case':44} {'ms':>10} {'ratio to assumed':>17}"]
    for benchmark in ORDER:
        path = folder / f"{benchmark}_cuda.json"
        rows = json.loads(path.read_text())["rows"] if path.is_file() else []
        for row in rows:
            case = ", ".join(str(row[k]) for k in NAMES if row.get(k) is not None)[:44]
            ms = next((row[k] * scale for k, scale in TIMES if row.get(k) is not None), None)
            reached, said = assumed(benchmark, row, m)
            ratio = f"{reached / said:17.2f}" if reached and said else " " * 17
            took = "   skipped" if ms is None else f"{ms:10.2f}"
            out.append(f"{benchmark:20} {case:44} {took} {ratio}")
    return out


def main() -> None:
    parser = measure.arguments(__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--machine", help="default: the GPU that the driver reports, else H200")
    args = parser.parse_args()
    here = found_here()
    m = machine(args.machine or ("H200" if here == "cpu" else here))
    print(f"assumed of an {m.name} by fst_fast/plan/machines.py; predicted, not measured")
    print("\n".join(lines(args.folder, m)))


if __name__ == "__main__":
    main()
