"""The one exception that is a message to the user rather than a defect of the program."""

import re


class UserError(Exception):
    """Bad input: one sentence that names the thing, the value and what is allowed. The CLI prints it and exits with code 2."""


def one_line(text: str) -> str:
    """The text with escapes in the place of line breaks, control characters and half characters, which would break or garble a line."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ufeff\ud800-\udfff]", _escaped, text)


def _escaped(found: re.Match[str]) -> str:
    return found.group().encode("unicode_escape").decode("ascii")
