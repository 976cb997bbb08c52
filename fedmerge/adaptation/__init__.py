"""The target site: owns its images, consumes the stream, merges, predicts."""
