"""What can go wrong in a way that a user can mend, and the exit code of each.

Owns the exceptions that the command line turns into one sentence, and how another library's error becomes one. Imports
nothing, so that everything may import it.
"""


class A2DError(Exception):
    """An error whose message is one clear sentence for the user: what is wrong, and what to do about it."""

    exit_code = 1


class BadInput(A2DError):
    """What the user passed cannot be used: a path, a file, a flag. Nothing has been written."""

    exit_code = 2


class Refused(A2DError):
    """The input is well formed, but this project does not convert it; the message carries the reason."""


class GateFailed(A2DError):
    """A gate found that the conversion is not exact, or did not take effect. Nothing has been trained."""


class SaveFailed(A2DError):
    """A file could not be written: disk full, read-only target. What was finished before is untouched."""


class Interrupted(KeyboardInterrupt):
    """The run was stopped from outside after it had put its state away; `a2d resume` continues it."""


def first_sentence(error: BaseException) -> str:
    """The first line of an error's text, shortened, ending in a full stop."""
    text = str(error).strip().split("\n")[0].strip() or type(error).__name__
    text = text if len(text) <= 300 else f"{text[:297]}..."
    return text if text.endswith((".", "!", "?")) else f"{text}."
