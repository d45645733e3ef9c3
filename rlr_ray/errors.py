"""The error that a user can mend."""


class UserError(ValueError):
    """Says what was found, what is allowed and the remedy; the commands print it without a traceback."""
