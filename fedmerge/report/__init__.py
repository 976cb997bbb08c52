"""What a run has shown: records, metrics, comparisons, plots, the page."""
