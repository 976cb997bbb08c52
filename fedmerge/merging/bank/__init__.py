"""K experts as one matrix, and where its rows are: in memory, on disk, or in shards."""
