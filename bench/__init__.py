"""Bench: bundles measured side by side, with latency, memory, energy and accuracy in one report.

`lineup` decides which rows there are, `measure/` times them, and `report/` shows them. `sweep` first makes
every combination of methods, ratios and precisions.
"""
