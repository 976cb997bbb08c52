"""Attacks of simulated hospitals, one kind a file; the file's name is its name in YAML."""
