"""Studies of several objectives: weights on a grid, their runs, fronts of held-out scores, old rollouts scored anew.

In the order of reading:

    grid.py, sweep.py, children.py: weight vectors, a run for each, several at once
    runs.py, front.py: run folders as studies read them, and their front
    rescore.py: old rollouts under other weights
"""
