"""Errors that are the user's to mend: the launcher prints their message and exits with 2, without a traceback."""

import difflib
from collections.abc import Iterable


def did_you_mean(found: str, allowed: Iterable[str]) -> str:
    """``; did you mean 'x'?`` for the allowed word nearest to the one found, or nothing where none is near."""
    near = difflib.get_close_matches(found, list(allowed), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def one_line(error: BaseException) -> str:
    """What another library says of a folder or configuration, in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return "it needs code of its own, and code in a folder is never run" if "trust_remote_code" in text else text


def first_line(error: BaseException) -> str:
    """What an error says first; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class UserError(ValueError):
    """Bad input: the message names the file, key or rank, what was found and what is allowed.

    Attributes:
        on_all_ranks: every process rank raises the same, so one of them is enough to say it.
    """

    on_all_ranks = False

    def shared(self) -> "UserError":
        """Mark the error as the same on all ranks."""
        self.on_all_ranks = True
        return self


class ConfigError(UserError):
    """A configuration that does not hold; all problems found, one a line."""

    def __init__(self, source: str, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(f"{source}: {problem}" for problem in problems))


class DataError(UserError):
    """Training data or a tokenizer that is missing, empty or damaged."""


class CheckpointError(UserError):
    """A checkpoint that is damaged or does not belong to this run."""
