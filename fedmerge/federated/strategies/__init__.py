"""Federated strategies with rounds: one file each."""
