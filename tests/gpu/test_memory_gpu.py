"""Memory savers on a GPU: a 7B shape in four bits fits nine gigabytes, and the plan knows it.

python -m pytest tests/gpu
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from align.model import adapters
from align.model.fused.exchange import fuse
from align.model.load import load_model
from align.model.quantised import quantise, quantised_layers
from align.recipe.adapter import Quant
from tests.bench import common, memory_plan
from tests.unit.model.tiny import LLAMA, logits, lora, write_tiny

pytest.importorskip("bitsandbytes")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here"),
]
TOKENS = 2048


def test_qlora_of_a_7b_shape_takes_at_most_nine_gigabytes_and_as_much_as_planned(tmp_path: Path) -> None:
    config, case = memory_plan.gpu_config(), memory_plan.CASES["qlora, checkpointing"]
    common.apart(memory_plan.write_model, tmp_path, config, True)
    got = common.apart(memory_plan.measured, str(tmp_path), case, TOKENS, config["vocab_size"], True)
    assert got["allocated"] <= memory_plan.GPU_GOAL_GB * 1e9
    planned = memory_plan.planned(config, case, TOKENS, True).total
    assert planned == pytest.approx(got["allocated"], rel=memory_plan.LIMIT)


@pytest.mark.parametrize("quant", [Quant(), Quant(type="fp4", double=False)], ids=["nf4", "fp4"])
def test_a_base_packed_on_a_gpu_is_the_one_packed_on_a_cpu(quant: Quant, tmp_path: Path) -> None:
    """A merge packs again where it runs: what comes of it must be what was trained elsewhere."""
    base = write_tiny(tmp_path / "base", LLAMA)
    models = [load_model(base, dtype=torch.float32) for _ in range(2)]
    for model, device in zip(models, ("cpu", "cuda"), strict=True):
        quantise(model, quant, ("language",), dtype=torch.float32, device=device)
    for one, other in zip(*(quantised_layers(model).values() for model in models), strict=True):
        torch.testing.assert_close(one.packed.dense(), other.packed.dense().cpu(), atol=1e-6, rtol=1e-4)


def test_fused_products_on_packed_weights_are_pefts_own_in_bfloat16(tmp_path: Path) -> None:
    base = write_tiny(tmp_path / "base", LLAMA)
    model = load_model(base, dtype=torch.bfloat16)
    quantise(model, Quant(), ("language",), dtype=torch.bfloat16, device="cuda")
    peft = adapters.attach(model.to("cuda"), lora(), None, seed=0)
    with torch.no_grad():
        for _, layer in adapters.lora_layers(peft):
            layer.lora_B["default"].weight.normal_(std=0.2, generator=torch.Generator("cuda").manual_seed(0))
    plain = logits(peft)
    assert fuse(model)["Linear"] == 14
    torch.testing.assert_close(logits(peft), plain, atol=0.1, rtol=0.1)
