"""Merging methods: one paper a file."""
