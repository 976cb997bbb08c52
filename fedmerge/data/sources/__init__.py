"""Data sources: one data set a file."""
