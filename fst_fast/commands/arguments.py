"""Types of command-line arguments for argparse: each returns the value or raises ArgumentTypeError with what is allowed."""

from __future__ import annotations

import argparse
import re


def count(text: str) -> int:
    """A whole number >= 1."""
    if not text.isdecimal() or len(text) > 18 or int(text) < 1:
        shown = repr(text) if len(text) <= 40 else f"a text of {len(text):,} characters"
        raise argparse.ArgumentTypeError(
            f"{shown} is refused; allowed: a whole number >= 1 of at most 18 digits"
        )
    return int(text)


def not_negative(text: str) -> float:
    """A number from 0 to below 1e6."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < 1e6:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is refused; allowed: a number from 0 to below 1e6")
    return number


def port(text: str) -> int:
    """A TCP port; 0: a free one."""
    if not re.fullmatch("[0-9]{1,5}", text) or int(text) > 65535:
        raise argparse.ArgumentTypeError(
            f"{text[:40]!r} is refused; allowed: a port from 0 (a free one) to 65535"
        )
    return int(text)


def text(text: str) -> str:
    """Text that UTF-8 can hold."""
    if re.search("[\ud800-\udfff]", text):
        raise argparse.ArgumentTypeError(f"{text!r} is refused; allowed: text in UTF-8")
    return text
