"""The one error of the package."""


class FewstepError(ValueError):
    """Something the caller asked for cannot be done.

    The message is one sentence that names what was found, what was expected and the likely fix:
    `FewstepError("found steps = 0, expected at least 1, fix: pass --steps 4")`. The command line prints it as one
    paragraph and exits with code 2; everything else that escapes is a bug and keeps its traceback.
    """
