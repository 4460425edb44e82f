"""Studies of several objectives: weights on a grid, their runs, fronts of held-out scores, old rollouts scored anew."""
