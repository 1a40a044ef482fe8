"""Errors of the commands."""


class UsageError(ValueError):
    """The command cannot do what was asked; nothing was started. The message is one sentence. Exit code 2."""
