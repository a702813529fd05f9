"""`python -m veneer` is the command `veneer`."""

from veneer.cli.main import run

run()
