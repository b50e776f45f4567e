"""Progress of a run: bars on a terminal, and the log file."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from logging.handlers import MemoryHandler
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import (
    Progress as Bars,
)

log = logging.getLogger(__name__)


class Progress:
    """Progress bars on a console, or nowhere."""

    def __init__(self, console: Console | None) -> None:
        self.bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console or Console(quiet=True),
        )

    def __enter__(self) -> "Progress":
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def task(self, what: str, total: int | None) -> Callable[[int], None]:
        """Add a bar; return the function that advances it."""
        task = self.bars.add_task(what, total=total)

        def advance(done: int) -> None:  # shares of several processes are rounded up
            done += int(self.bars.tasks[task].completed)
            self.bars.update(task, completed=done if total is None else min(done, total))

        return advance

    def say(self, line: str) -> None:
        self.bars.console.print(line, highlight=False)


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
        handler = logging.FileHandler(path, encoding="utf-8")
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
