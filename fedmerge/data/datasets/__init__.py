"""Data sets that sites may have: one file each."""
