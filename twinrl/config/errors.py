"""Errors whose message is the whole story: what, got, expected, likely fix."""


class InputError(Exception):
    """The user's input was wrong; the command line prints the message on one line and exits with 2.

    Arguments:
        what: what is wrong, e.g. ``"unknown key optim.lrr"``.
        got: what was found, if that helps.
        expected: what would have been right.
        fix: the likely remedy.

    *When to use*: for everything a user can mend by changing a file, a flag or a path. Bugs and failures of
    the run itself keep their own exception types (exit code 1).
    """

    def __init__(self, what: str, *, got: object = None, expected: object = None, fix: str | None = None):
        parts = [what]
        if got is not None:
            parts.append(f"got {got}")
        if expected is not None:
            parts.append(f"expected {expected}")
        if fix is not None:
            parts.append(f"fix: {fix}")
        super().__init__(" ".join("; ".join(parts).split()))
