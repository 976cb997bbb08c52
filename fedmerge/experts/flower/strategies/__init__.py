"""One federated competitor a file; the file's name is its name in YAML."""
