"""The errors that are shown to users as one line, without a traceback."""


class UserError(ValueError):
    """An error that the user can correct. Its message is one sentence: what is wrong, where, and what to do.

    It subclasses ValueError so that callers of the library can catch the built-in. The command line prints the message
    to stderr and exits with code 2.
    """


class ConfigError(UserError):
    """A configuration field has a wrong value, or two fields contradict each other."""
