"""Images: where they come from, how they are split, what a scanner does to them."""
