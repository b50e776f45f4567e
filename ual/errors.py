"""The exceptions that the command line prints without a traceback: users' mistakes, and signals."""

import signal


class UserError(Exception):
    """An error that says what is wrong, where, and what to do.

    Args:
        problem: one sentence that names the argument, file or field, what was expected and what was given.
        place: where it was found, such as ``train.jsonl, line 7, field "messages"``; may be empty.
        remedy: the next step, such as ``set data.overlong to "truncate"``; may be empty.

    >>> print(UserError("uncertainty is nan", place="train.jsonl, line 7", remedy="remove the sample"))
    train.jsonl, line 7: uncertainty is nan
    remove the sample
    """

    exit_code = 2

    def __init__(self, problem: str, *, place: str = "", remedy: str = "") -> None:
        self.problem, self.place, self.remedy = problem, place, remedy
        super().__init__((f"{place}: " if place else "") + problem + (f"\n{remedy}" if remedy else ""))


class Stopped(KeyboardInterrupt):
    """A signal that ended the work, after what must be saved was saved.

    >>> print(Stopped(15))
    stopped by SIGTERM outside of training; --resume auto continues the run
    """

    def __init__(
        self, number: int, where: str = "outside of training; --resume auto continues the run"
    ) -> None:
        self.number = number
        super().__init__(f"stopped by {signal.Signals(number).name} {where}")


class FailedRequestsError(UserError):
    """Too many requests of an elicitation gave no value. The same command sends them again."""

    exit_code = 3
