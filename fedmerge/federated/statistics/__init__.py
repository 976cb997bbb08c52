"""Statistics that sites may upload beside weights: one file each."""
