"""What ends a command in one line; imports nothing, so that every command can know it."""


class UserError(Exception):
    """No defect of ours: the message says what is wrong, and no traceback is shown."""
