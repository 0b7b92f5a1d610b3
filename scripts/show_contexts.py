"""Show the contexts that a run ended with, best first, and where each comes from: `python scripts/show_contexts.py RUN`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    path = parser.parse_args(argv).run / "contexts.json"
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        print(f"error: {path} cannot be read: {error}", file=sys.stderr)
        return 2
    contexts = found["contexts"]
    print("\nContexts at the end, best first, with their lineage")
    for context_id in dict.fromkeys(found["population"]):
        line = contexts[context_id]
        mean = (
            "not scored"
            if line["mean"] is None
            else f"mean reward {line['mean']:.3f} over {line['n']} rollouts"
        )
        print(f"  {mean}: {line['text']!r}")
        parent = line["parent"]
        while parent in contexts:
            print(f"      from {contexts[parent]['text']!r}")
            parent = contexts[parent]["parent"]
    return 0


if __name__ == "__main__":
    sys.exit(main())
