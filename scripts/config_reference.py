"""Write docs/reference/configuration.md from the docstrings of fst_fast/config/: `python scripts/config_reference.py`.

A test compares the committed page with what this script makes, so the page cannot go stale.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from pydantic.fields import FieldInfo

sys.path.insert(0, str(Path(__file__).parents[1]))

from fst_fast.config.keys import allowed, element_of, fields, section_of
from fst_fast.config.schema import Config

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "configuration.md"
HEAD = """# Configuration reference

<!-- Made by scripts/config_reference.py from fst_fast/config/: change the docstrings there. -->

Every key of the tree, as it is written on the command line, `--slow.lr=1e-5`; in a YAML file the parts are nested. How file, command line
and defaults go together: [configuration](../configuration.md). `fst train CONFIG.yaml --dry-run` prints the whole tree of a run.
"""


def page() -> str:
    """The whole page."""
    top = [(key, field) for key, field in fields() if "." not in key and section_of(field.annotation) is None]
    parts = [HEAD, "## The run\n", *table(top)]
    for name, field in Config.model_fields.items():
        section = section_of(field.annotation) or section_of(element_of(field.annotation))
        if section:
            parts += [f"\n## {name}\n", f"{section.__doc__}\n"]
            parts += table(
                [
                    (key, inner)
                    for key, inner in fields()
                    if key.startswith((f"{name}.", f"{name}[]."))
                    and section_of(inner.annotation) is not inner.annotation
                ]
            )
    return "\n".join(parts) + "\n"


def table(rows: list[tuple[str, FieldInfo]]) -> Iterator[str]:
    """The lines of one table."""
    yield "| key | allowed | default | meaning |\n|---|---|---|---|"
    for key, field in rows:
        cells = (f"`{key}`", allowed(field), default(field), " ".join((field.description or "").split()))
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def default(field: FieldInfo) -> str:
    """The default as YAML has it; `needed` where there is none."""
    if field.is_required():
        return "needed"
    value = field.get_default(call_default_factory=True)
    return f"`{json.dumps(value, default=lambda section: section.model_dump(exclude_defaults=True))}`"


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
