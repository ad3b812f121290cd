"""The one exception a user is meant to see."""


class UserError(ValueError):
    """Something the user can mend: one sentence that says what, where and how.

    Subclasses ValueError so that library callers can catch it as the plain built-in; the command line
    prints the sentence to stderr and exits with code 2.
    """


class ConfigError(UserError):
    """A configuration field has a wrong value, or two fields contradict each other."""
