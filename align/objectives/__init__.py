"""From a table of scores to advantages: `combine`. numpy only, float64 inside, float32 out."""

from align.objectives.combine import before_whitening, combine
from align.objectives.groups import Grouped

__all__ = ["Grouped", "before_whitening", "combine"]
