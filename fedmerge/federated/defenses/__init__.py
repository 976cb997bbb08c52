"""Defenses of the server: one file each."""
