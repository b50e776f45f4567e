"""Files that are whole or absent: written aside, then renamed over the old one; and where caches lie."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def aside(target: Path) -> Iterator[Path]:
    """Yield a scratch path beside `target`; on a clean exit it replaces `target`, on any other it is gone.

    The folder is made if need be. Two processes have scratch paths of their own; the last rename wins.

    Raises:
        OSError: the folder cannot be written, or the disk is full; the old file stands.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        yield scratch
        scratch.replace(target)
    finally:
        if scratch.parent.is_dir():
            scratch.unlink(missing_ok=True)


def cache_folder(environment: Mapping[str, str]) -> Path:
    """Return the user's folder for what can be made again, by the XDG base directory specification."""
    return Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ual"
