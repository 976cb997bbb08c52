"""Merging, in pure torch: usable as a library, without Flower and Ray."""

from fedmerge.merge.method import load

__all__ = ["load"]
