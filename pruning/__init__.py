"""Visual-token pruning methods, one file each.

Method modules import torch only inside functions, so that listing them needs no torch.
"""
