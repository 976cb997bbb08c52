"""Federated strategies with rounds: one file each."""

from fedmerge.system.offline import silence

silence()
