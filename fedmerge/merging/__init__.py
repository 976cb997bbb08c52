"""Merging of experts, in pure torch: no Flower, no Ray, no files of a run."""
