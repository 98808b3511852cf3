"""What a model costs.

`flops` counts work by formula. `comparison` measures bundles side by side and `sweep` every combination of
methods, ratios and precisions; `report` is what they find, which `table` and `page` show.
"""
