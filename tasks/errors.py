"""Errors that end a command in one line. Imports nothing, so that every module can import it."""


class UserError(Exception):
    """No defect of ours: the message says what is wrong, and no traceback is shown."""


def one_line(error: object) -> str:
    """What a foreign error says, without line breaks and runs of spaces."""
    return " ".join(str(error).split())
