"""HTML pages: of a run, of a sweep, of a diagnosis."""
