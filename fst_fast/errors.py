"""The one exception that is a message to the user rather than a defect of the program."""


class UserError(Exception):
    """Bad input: one sentence that names the thing, the value and what is allowed. The CLI prints it and exits with code 2."""
