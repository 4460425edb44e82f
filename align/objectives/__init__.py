"""From a table of scores to advantages: `combine`. numpy only, float64 inside, float32 out."""

from align.objectives.combine import combine

__all__ = ["combine"]
