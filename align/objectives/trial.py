"""A user's combiner on made-up scores: what it would fail of at a stage's first step, it fails of in the check."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from align.objectives.check import Known
from align.objectives.combine import combine
from align.plugins import is_users
from align.recipe.objectives import Objectives


def try_combiner(config: Objectives, objectives: Mapping[str, Known], groups: int, group_size: int) -> None:
    """Two steps of that many groups, with every score present and in its range. It runs user code.

    Raises PluginError where the combiner fails, or gives what are no advantages.
    """
    if not is_users(config.combine):
        return
    drawn = np.random.default_rng(0).random((groups * group_size, len(objectives)))
    low = np.array([known.range[0] if known.range else 0.0 for known in objectives.values()])
    high = np.array([known.range[1] if known.range else 1.0 for known in objectives.values()])
    low, high = np.maximum(low, -_LARGE), np.minimum(high, _LARGE)  # a range may be open
    scores, ids = (low + (high - low) * drawn).astype(np.float32), np.repeat(np.arange(groups), group_size)
    state: dict[str, Any] = {}
    for step in range(2):
        kinds = [known.kind for known in objectives.values()]
        _, state, _ = combine(scores, ids, list(objectives), kinds, config, state, step)


_LARGE = 1e6
