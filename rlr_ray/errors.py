"""What a user can mend."""


class UserError(ValueError):
    """Bad input. The message says what was found, what is allowed and the remedy; no traceback is shown."""
