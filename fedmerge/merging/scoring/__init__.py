"""What predictions say about an expert: entropy, divergence, agreement between views, clusters."""
