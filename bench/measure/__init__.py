"""Measurement of rows side by side: a worker process for each row, timed in rounds."""
