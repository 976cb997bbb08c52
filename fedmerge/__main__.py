"""`python -m fedmerge` is the console script `fedmerge`."""

from fedmerge.cli import app

app(prog_name="fedmerge")
