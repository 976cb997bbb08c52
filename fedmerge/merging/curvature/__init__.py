"""Fisher information, Gram matrices and Kronecker factors of a model on images."""
