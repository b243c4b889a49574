"""The one error that is shown to a user as a single line."""


class FourfoldError(Exception):
    """Bad input or an impossible request: says what is wrong, where, and what to do about it."""
