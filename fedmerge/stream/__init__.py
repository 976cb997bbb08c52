"""The target's unlabeled, non-i.i.d. stream of batches."""
