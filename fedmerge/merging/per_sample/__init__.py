"""A merge for every image: exact forwards with coefficients of its own for each sample."""
