"""From a table of scores to advantages: `combine`. numpy only, float64 inside, float32 out.

In the order of reading:

    combine.py, combiners.py, groups.py: scores to advantages, ways to combine, statistics of ragged groups
    gates.py, metrics.py, check.py: what counts where, what a step looked like, names that do not fit
    users.py, trial.py: a combiner of the user's: its answers looked at, and tried before a stage begins
    view.py, running.py: weights that follow a utility: what they see, means and deviations
    lagrangian.py, chebyshev.py, hypervolume.py, pareto.py: limits, a point to come near, a volume; fronts
"""

from align.objectives.combine import before_whitening, combine
from align.objectives.groups import Grouped

__all__ = ["Grouped", "before_whitening", "combine"]
