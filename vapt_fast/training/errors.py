"""UserError: what a user asked for can't be done, and the message says what to change."""

__all__ = ["UserError"]


class UserError(ValueError):
    """A mistake in the arguments or the files of a run; one line: which, what was given, what is expected."""
