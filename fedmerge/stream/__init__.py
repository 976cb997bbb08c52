"""The target's unlabelled, non-i.i.d. stream of batches."""
