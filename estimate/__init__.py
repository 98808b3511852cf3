"""Estimates of what a model costs on a device, without running it: FLOPs, latency and memory by formula."""
