"""`ual-bench`, which lives in the source tree beside the suites it reports on, and not in the wheel."""

import importlib
import sys
from pathlib import Path


def main() -> None:
    """The command.

    Raises:
        SystemExit: always; with what to do where the source tree is not here.
    """
    root = Path(__file__).resolve().parents[1]
    if not (root / "benchmarks" / "cli.py").is_file():
        sys.exit(
            "ual-bench: the benchmark suite comes with the source tree, not with the installed package; "
            "clone the repository, and run `make bench` there"
        )
    sys.path.insert(0, str(root))
    importlib.import_module("benchmarks.cli").app(prog_name="ual-bench")
