"""Errors that end a command in one line. Imports nothing, so that every module can import it."""


class UserError(Exception):
    """No defect of ours: the message says what is wrong, and no traceback is shown."""


def one_line(error: object) -> str:
    """What a foreign error says, without line breaks and runs of spaces, and what is wrong in a file that DVC does not take."""
    wrong = getattr(getattr(error, "exc", None), "errors", [])  # YAMLValidationError: the text says only how many
    said = [str(error), "; ".join(f"{'.'.join(map(str, each.path))}: {each.msg}" for each in wrong)]
    return " ".join(": ".join(filter(None, said)).split())
