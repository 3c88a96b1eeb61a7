"""The error for whatever the person running can mend."""


class InputError(ValueError):
    """Bad input; the message names both sides, the row, and what to do."""
