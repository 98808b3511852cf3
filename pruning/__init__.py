"""Visual-token pruning methods, one file for each.

Modules of methods import torch only inside functions, so that listing the methods needs no torch.
"""
