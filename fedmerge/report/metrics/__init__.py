"""Numbers of a report: accuracy, calibration, segments of a stream, intervals, cost."""
