"""What may leave a site, who signed it, and what it may be."""
