"""Fit a FitPrune recipe: attention statistics of samples, and the search over them."""
