"""One file, one kind of statistic that a site may upload beside its weights."""
