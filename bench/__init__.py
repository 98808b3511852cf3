"""Measure bundles side by side: latency, memory, energy and accuracy, in one report.

`lineup` says which rows there are, `measure/` times them, `report/` shows them; `sweep` makes every
combination of methods, ratios and precisions first.
"""
