"""The expert pool on disk."""
