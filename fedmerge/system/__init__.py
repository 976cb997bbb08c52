"""The machine below: YAML, files, child processes, and no way out to the network."""
