"""The command line: the only reader of arguments and environment, and the only printer."""

import sys

try:
    import rich
    import typer
except ModuleNotFoundError as missing:  # the loss alone was installed
    sys.exit(f"`ual` needs {missing.name}: pip install 'ual-kernels[train]'")

__all__ = ["rich", "typer"]
