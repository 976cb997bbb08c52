"""`python -m fedmerge` is the console script `fedmerge`."""

from fedmerge.cli.main import app

app(prog_name="fedmerge")
