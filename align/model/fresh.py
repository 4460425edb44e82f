"""What an adapter begins with.

Fresh weights depend on the seed and the module's name alone, not on the state of any global generator, nor on the
order of modules: lora_A ~ U(-1/sqrt(in), 1/sqrt(in)) as peft draws it (Kaiming uniform with a = sqrt(5)), lora_B = 0,
and DoRA's magnitudes the lengths of the rows of the weight in float32. peft rounds these to the dtype of the weight:
in half precision such an adapter would not begin as its base.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from torch import nn

from align.errors import ModelError
from align.model.quantised import dense, linear_weight
from align.model.weights import lora_layers

DEFAULT = "default"


def draw(peft: Any, seed: int) -> None:
    """Give the adapter "default" its first weights."""
    for path, layer in lora_layers(peft):
        key = hashlib.blake2b(f"{seed}|{path}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
        lora_a, lora_b = layer.lora_A[DEFAULT].weight, layer.lora_B[DEFAULT].weight
        drawn = torch.empty(lora_a.shape, dtype=torch.float32)
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
        with torch.no_grad():
            lora_a.copy_(drawn)
            lora_b.zero_()
            if DEFAULT in layer.lora_magnitude_vector and isinstance(base := layer.get_base_layer(), nn.Linear):
                weight = dense(linear_weight(base)).to(lora_a.dtype)
                layer.lora_magnitude_vector[DEFAULT].weight.data = torch.linalg.norm(weight, dim=1)


def refuse_empty_rows(peft: Any, name: str) -> None:
    """Raise ModelError where DoRA was put on a weight with rows of zeros: their magnitude over their length is 0 / 0,
    in peft's forward as in ours."""
    for path, layer in lora_layers(peft, name):
        if name not in layer.lora_magnitude_vector:
            continue
        magnitudes = layer.lora_magnitude_vector[name].weight
        empty = int((~torch.isfinite(magnitudes) | (magnitudes == 0)).sum())
        if empty:
            raise ModelError(
                f"DoRA on {path!r}: {empty} of the {len(magnitudes)} rows of its weight are zero, as that of a padding "
                "token or of what was pruned is, and a row's magnitude over its length is no number there",
                where="adapter.targets",
                remedy="take the module out of adapter.targets (or into adapter.exclude), or use kind: lora",
            )
