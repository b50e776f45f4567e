"""`python -m ual` is `ual`."""

from ual.cli import main

main()
