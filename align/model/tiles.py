"""Sizes in which the kernels of `align.model` compute, without torch: `align.check.memory` counts with them too."""

TILE_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 27}
"""Of logits, by device (`align.model.head`)."""
SLICE_ELEMENTS = 1 << 21
"""Of one inner activation of a feed-forward on a CPU (`align.model.fused.mlp`)."""
FOLD_FROM = 4
"""Rows (out + in) / (out in) from which an adapter is folded into its weight (`align.model.fused.lora`): thin products
over many rows are as slow as their memory."""
