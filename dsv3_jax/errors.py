"""The errors that are shown to users as one line, without a traceback."""

import re


class UserError(ValueError):
    """An error that the user can correct. Its message is one sentence: what is wrong, where, and what to do.

    It subclasses ValueError so that callers of the library can catch the built-in. The command line prints the message
    to stderr and exits with code 2.
    """


class ConfigError(UserError):
    """A configuration field has a wrong value, or two fields contradict each other."""


def reason_of(error: BaseException) -> str:
    """Returns in one short line why the operating system, or a library that reports its error, failed."""
    if strerror := getattr(error, "strerror", None):
        return str(strerror)
    text = " ".join(str(error).split())
    if "No space left on device" in text or re.search(r"\d+ requested and \d+ written", text):  # tensorstore, numpy
        return "No space left on device"
    return text[:200] or type(error).__name__
