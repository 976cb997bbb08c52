"""The target site: it owns its images, consumes its stream, merges and predicts."""
