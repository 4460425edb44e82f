"""The attention kernels on a GPU: each against the definition, and all against each other through a whole model.

python -m pytest tests/gpu
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from align.data.packing import collate
from align.model.attention.interface import KERNELS, packed_attention_forward
from align.model.attention.plan import plan_attention
from align.model.policy_module import PolicyModule
from align.model.probe.choose import probe
from align.protocols.trees import Segment, Tree
from tests.unit.core.families import FAMILIES, STATEFUL, make_family, mrope_positions
from tests.unit.core.test_attention import dense, visible
from tests.unit.core.test_families import trees
from tests.unit.core.trees import segment

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(),
        reason="no NVIDIA GPU here: flash attention and compiled FlexAttention have no CPU kernel",
    ),
]

BF16 = torch.bfloat16


def long_trees() -> list[Tree]:
    """Segments around and beyond the blocks of 128 tokens of the kernels; the row is no multiple of 128."""
    rng = np.random.default_rng(5)
    sizes = [(300, (130, 1, 77)), (40, (128, 256)), (1, (5, 700)), (257, ())]
    return [
        Tree(
            i, Segment(rng.integers(0, 97, n), np.arange(n) > 0), tuple(segment(rng, b, scored=True) for b in branches)
        )
        for i, (n, branches) in enumerate(sizes)
    ]


CASES: list[tuple[str, dict[str, Any]]] = [
    *((kernel, {"sliding_window": window}) for kernel in KERNELS for window in (None, 1, 64, 200)),
    *((kernel, {"softcap": 5.0, "sliding_window": window}) for kernel in ("sdpa", "flex") for window in (None, 64)),
    *((kernel, {"s_aux": True, "sliding_window": window}) for kernel in ("sdpa", "flex") for window in (None, 64)),
]


@pytest.mark.parametrize("width", [64, 80])
@pytest.mark.parametrize(("kernel", "options"), CASES)
def test_a_kernel_is_as_near_to_the_float32_definition_as_bfloat16_allows(
    kernel: str, options: dict[str, Any], width: int
) -> None:
    plan = plan_attention(collate(long_trees()).to("cuda"), kernel)
    tokens = plan.segments[-1][1]
    generator = torch.Generator("cuda").manual_seed(0)
    inputs = [
        torch.randn(1, heads, tokens, width, device="cuda", dtype=BF16, generator=generator).requires_grad_()
        for heads in (8, 2, 2)
    ]
    if "s_aux" in options:
        options = options | {"s_aux": torch.linspace(-2, 2, 8, device="cuda").requires_grad_()}
        inputs.append(options["s_aux"])
    cotangent = torch.randn(1, tokens, 8, width, device="cuda", generator=generator)

    def gradients(out: torch.Tensor) -> list[torch.Tensor]:
        return [out.detach().float(), *(g.float() for g in torch.autograd.grad((out * cotangent).sum(), inputs))]

    mask = torch.tensor(visible(plan.segments, options["sliding_window"]), device="cuda")
    q, k, v = (x.float() for x in inputs[:3])
    wanted = gradients(dense(q, k, v, mask, 0.1, options.get("softcap"), options.get("s_aux")))
    out, _ = packed_attention_forward(torch.nn.Module(), *inputs[:3], None, scaling=0.1, align_plan=plan, **options)
    for found, expected in zip(gradients(out), wanted, strict=True):
        assert (found - expected).abs().max() / expected.abs().max() < 0.02
        assert (found - expected).norm() / expected.norm() < 0.01


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in STATEFUL])
def test_models_agree_under_every_kernel(family: str) -> None:
    """Gradients of all parameters, in bfloat16, against the sdpa path in float32."""
    batch = collate(trees(), *([mrope_positions] if family == "qwen2_5_vl" else [])).to("cuda")
    model = make_family(family).to("cuda")
    kernels = [k for k in KERNELS if k != "varlen" or family not in ("gemma2", "gpt_oss", "deepseek_v3")]

    def run(module: PolicyModule, kernel: str) -> tuple[torch.Tensor, torch.Tensor]:
        module.use("shared", kernel)
        module.zero_grad()
        logps = module(batch).logps
        logps.square().mean().backward()
        return logps.detach(), torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])

    values, grads = run(PolicyModule(model), "sdpa")
    for kernel in kernels:
        found, found_grads = run(PolicyModule(model, autocast=BF16), kernel)
        assert (found - values).abs().mean() < 0.05, kernel
        assert torch.cosine_similarity(found_grads, grads, dim=0) > 0.99, kernel


@pytest.mark.parametrize(
    ("family", "attention"),
    [("qwen3", "varlen"), ("gemma3_text", "varlen"), ("gemma2", "flex"), ("gpt_oss", "flex"), ("qwen2_5_vl", "varlen")],
)
def test_auto_takes_flash_attention_and_flex_where_flash_has_not_what_the_model_needs(
    family: str, attention: str
) -> None:
    module = PolicyModule(make_family(family).to("cuda", BF16))
    probe(module)
    assert (module.layout, module.attention) == ("shared", attention)


def test_memory_grows_with_the_tokens_and_not_with_their_square() -> None:
    """A row of 32,768 tokens: a T x T mask alone would be a gigabyte, scores of 8 heads sixteen."""
    rng = np.random.default_rng(0)
    some = [Tree(i, segment(rng, 1024, scored=False), (segment(rng, 1024, scored=True),)) for i in range(16)]
    batch = collate(some).to("cuda")
    inputs = [torch.randn(1, h, 32768, 64, device="cuda", dtype=BF16, requires_grad=True) for h in (8, 2, 2)]
    for kernel in KERNELS:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out, _ = packed_attention_forward(torch.nn.Module(), *inputs, None, align_plan=plan_attention(batch, kernel))
        out.float().square().mean().backward()
        assert torch.cuda.max_memory_allocated() - before < 1 << 30, kernel
        for x in inputs:
            x.grad = None
