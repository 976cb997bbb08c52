"""Corruptions of single images: one file each."""
