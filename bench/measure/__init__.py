"""Measure rows side by side: a worker process for each, timed in rounds."""
