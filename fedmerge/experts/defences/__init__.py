"""Defences that need no labels, one kind a file; the file's name is its name in YAML."""
