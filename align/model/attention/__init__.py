"""Packed, shared-prefix attention: a trunk attends to itself, a branch to its trunk and itself.

In the order of reading:

    plan.py: who sees whom in a row
    interface.py: what transformers calls, and which kernel computes it
    sdpa.py, tree.py, softmax.py, varlen.py, flex.py: the kernels
"""
