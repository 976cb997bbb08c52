"""The console script `fedmerge` and its verbs."""
