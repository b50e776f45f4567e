"""Progress of a run: bars on a terminal, plain lines elsewhere, and the log file."""

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from logging.handlers import MemoryHandler
from pathlib import Path

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import (
    Progress as Bars,
)
from rich.table import Column
from rich.text import Text

log = logging.getLogger(__name__)

_PAUSE = 10.0
"""Seconds between two lines of a task, where lines replace its bar."""
_NEVER = float("inf")


class Progress:
    """Tasks of a run: bars on a terminal, lines in a pipe or a log, nothing without a console."""

    def __init__(self, console: Console | None) -> None:
        self._bars = _Bars(console or Console(quiet=True))
        # FORCE_COLOR, as CI sets it, makes rich take a log for a terminal; a dumb one cannot redraw a line
        self.is_drawn = self._bars.console.is_interactive and self._bars.console.file.isatty()

    def __enter__(self) -> "Progress":
        if self.is_drawn:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_drawn:
            self._bars.stop()

    def task(self, what: str, total: int | None, *, completed: int = 0, logs: bool = False) -> "Task":
        """Add a task.

        Args:
            what: its name, a few words.
            total: units of work; None if their number is unknown.
            completed: units that an earlier process has completed.
            logs: where lines replace the bar, print one for each `Task.log`, and no others.
        """
        id = self._bars.add_task(what, total=total, completed=completed)
        return Task(self, self._bars, id, _NEVER if logs else _PAUSE)

    def say(self, line: str) -> None:
        """Print a line above the bars. A broken pipe or a full disk there does not stop the work."""
        try:
            self._bars.console.print(line, highlight=False, markup=False, soft_wrap=True)
        except (OSError, SystemExit) as error:  # rich exits when a pipe is broken
            self._bars.console.quiet = True
            log.warning("progress cannot be printed any more: %s", error.__context__ or error)


class Task:
    """A part of the work. Called with a number of units, it advances by as many."""

    def __init__(self, progress: Progress, bars: "_Bars", id: TaskID, pause: float) -> None:
        self._progress, self._bars, self._id, self._pause = progress, bars, id, pause
        self._said_at = time.monotonic()

    def __call__(self, done: int) -> None:
        of = self._bars.tasks[self._id]
        done += int(of.completed)  # shares of several processes are rounded up
        self.update(done if of.total is None else min(done, int(of.total)))

    def update(self, completed: int, total: int | None = None, figures: str | None = None) -> None:
        """Set the units that are completed and, if given, the number of all units and the figures to show."""
        self._bars.update(self._id, total=total, completed=completed, figures=figures)
        complete = completed == self._bars.tasks[self._id].total and self._pause < _NEVER
        if complete or time.monotonic() - self._said_at >= self._pause:
            self._line()

    def log(self, figures: str) -> None:
        """Show figures: below the bars, or at once as a line."""
        self._bars.update(self._id, figures=figures)
        self._line()

    def _line(self) -> None:
        if self._progress.is_drawn:
            return
        self._said_at = time.monotonic()
        of = self._bars.tasks[self._id]
        count = f"{int(of.completed):,}" + ("" if of.total is None else f" of {int(of.total):,}")
        parts = [f"{of.description} {count}", of.fields.get("figures"), f"{_clock(of.elapsed)} elapsed"]
        if of.time_remaining:
            parts.append(f"{_clock(of.time_remaining)} left")
        self._progress.say(", ".join(part for part in parts if part))


class _Bars(Bars):
    """Bars that fit 80 columns, and below them the last task's figures."""

    def __init__(self, console: Console) -> None:
        super().__init__(
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=None, table_column=Column(ratio=1, max_width=40)),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        figures = next((f for task in reversed(self.tasks) if (f := task.fields.get("figures"))), None)
        if figures:
            yield Text(f"  {figures}")


def _clock(seconds: float | None) -> str:
    return str(timedelta(seconds=int(seconds or 0)))


class _LogFile(logging.FileHandler):
    """A log that says once on stderr if it cannot be written. Other files of the run then end it."""

    _failed = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        if not self._failed:
            self._failed = True
            sys.stderr.write(f"warning: {self.baseFilename} is incomplete: {sys.exception()}\n")

    def close(self) -> None:
        with suppress(OSError):  # of what is still in the buffer
            super().close()


@contextmanager
def log_file(path: Path, writes: bool) -> Iterator[Callable[[], None]]:
    """Write every logger's messages, and warnings, to the log file, if this process writes it.

    Yields the function that opens the file. Messages are kept until then, so a run that is refused before
    writes nothing.
    """
    if not writes:
        yield lambda: None
        return
    kept = MemoryHandler(capacity=1, flushLevel=logging.CRITICAL + 1)
    root = logging.getLogger()
    level = root.level
    root.addHandler(kept)
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)

    def begin() -> None:
        handler = _LogFile(path, encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        kept.setTarget(handler)
        kept.flush()

    try:
        yield begin
    except BaseException as error:
        log.error("stopped: %s", error)
        raise
    finally:
        logging.captureWarnings(False)
        root.setLevel(level)
        root.removeHandler(kept)
        if isinstance(kept.target, logging.Handler):
            kept.target.close()
        kept.close()
