"""What the pages of the report and of the experiments share: templates that escape every text, and the formats of numbers.

Much of a page was written by models or users: jinja2 escapes it, and no script runs on the page. Numbers are rounded for reading; the
full value stays in the `<data value=...>` around it.
"""

from __future__ import annotations

import base64
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

SHOWN = 4000  # characters of one prompt or response; longer ones lose their middle
DASH = "–"


def render(template: str, **values: Any) -> str:
    """A page from a template, named by its path below fst_fast/."""
    environment = Environment(
        loader=PackageLoader("fst_fast", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(value=value, count=count, duration=duration, cut=cut, embedded=embedded)
    return environment.get_template(template).render(values)


def embedded(png: bytes) -> str:
    """A PNG file as the address of an image inside the page."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def value(value: float | None, digits: int = 3, sign: bool = False, exponent: bool = False) -> Markup:
    """A rounded number; exponent: as 1.2e-05 where it is too small for the digits."""
    if value is None:
        return Markup(DASH)
    small = exponent and value != 0 and abs(value) < 10 ** -(digits - 1)
    text = f"{value:.2e}" if small else f"{value:{'+' if sign else ''}.{digits}f}"
    return _data(value, text.replace("-", "−"))


def count(value: float | None) -> Markup:
    """A whole number with thousands apart; millions and more shortened."""
    if value is None:
        return Markup(DASH)
    text = f"{value:,.0f}".replace(",", "\u202f")
    for unit, size in (("G", 1e9), ("M", 1e6)):
        if abs(value) >= 10 * size or (unit == "G" and abs(value) >= size):
            text = f"{value / size:.1f}{unit}"
            break
    return _data(value, text)


def duration(seconds: float | None) -> Markup:
    if seconds is None:
        return Markup(DASH)
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    if hours:
        return _data(seconds, f"{hours} h {minutes:02d} min")
    return _data(seconds, f"{minutes} min {whole % 60:02d} s" if minutes else f"{seconds:.1f} s")


def cut(text: str) -> str:
    if len(text) <= SHOWN:
        return text
    half = SHOWN // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half} characters left out …]\n{text[-half:]}"


def _data(value: float, text: str) -> Markup:
    return Markup('<data value="{}">{}</data>').format(value, text)
