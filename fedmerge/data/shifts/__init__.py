"""Shifts of images: one file each."""
