"""`python -m ual` is `ual`."""

from ual.cli.main import main

main()
