"""Mistakes a user can make. The command line prints their text on one line and exits with their code; it never shows a traceback."""


class GenkitError(Exception):
    """Something outside the program went wrong: a missing run, a full disk, weights that do not fit. Exit code 1."""

    exit_code = 1


class UsageError(GenkitError):
    """A wrong option, config key or value. Exit code 2."""

    exit_code = 2


def nearest(word: str, known: "list[str] | tuple[str, ...]") -> str:
    """The end of an error message: the closest known word, or all of them when none is close."""
    import difflib

    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f"did you mean '{close[0]}'?"
    return "known: " + ", ".join(sorted(known)) if known else "nothing is known here"
