"""Attention kernels against SDPA, and the head, feed-forward, norm and rotation in bfloat16 against float32."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from align.data.packing import collate
from align.model.attention import varlen
from align.model.attention.interface import packed_attention_forward
from align.model.attention.plan import AttentionPlan, plan_attention
from align.protocols.trees import Tree
from tests.bench import work
from tests.gpu.runner import Context
from tests.unit.core.test_attention import plain_varlen

BF16 = torch.bfloat16
LARGEST, NORM = 0.02, 0.01
"""Of outputs and gradients of attention in bfloat16: largest difference over the largest value, norm over norm."""
WORSE = 1.25
"""A fused part may be this much farther from float32 than the model's own code in bfloat16."""


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def milliseconds(run: Callable[[], object], device: str, repeats: int) -> float:
    run()
    synchronize(device)
    started = time.perf_counter()
    for _ in range(repeats):
        run()
    synchronize(device)
    return (time.perf_counter() - started) / repeats * 1e3


def errors(found: Sequence[Tensor], exact: Sequence[Tensor]) -> dict[str, float]:
    """The largest of all tensors: of the largest difference over the largest value, of the norms."""
    pairs = [(a.float().cpu(), b.float().cpu()) for a, b in zip(found, exact, strict=True)]
    return {
        "largest": max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in pairs),
        "norm": max(float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in pairs),
    }


# -------------------------------------------------------------------------------------------------------- attention


def rows(toy: bool) -> dict[str, list[Tree]]:
    """By name: pairs, groups and conversations whose segments end inside the kernels' blocks of 128 tokens."""
    few, long = (40, 120) if toy else (300, 2000)
    pairs = work.random_trees(2, few, few // 3, vocabulary=512)
    groups = work.random_trees(1, few + 1, few // 2 - 1, vocabulary=512, branches=8)
    alone = work.random_trees(1, long + 5, long // 3, vocabulary=512)
    return {"pairs and groups": [*pairs, *groups], "one long pair": alone}


def inputs(tokens: int, context: Context, dtype: torch.dtype) -> list[Tensor]:
    heads, kv, width = (4, 2, 32) if context.toy else (12, 2, 128)
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(1, h, tokens, width, generator=generator).to(BF16) for h in (heads, kv, kv)]
    return [x.to(context.device, dtype).requires_grad_() for x in made]


def outcome(plan: AttentionPlan, tensors: list[Tensor], window: int | None) -> list[Tensor]:
    """Output and gradients; of FlexAttention on a CPU, which has no backward, the output."""
    if plan.kernel == "flex" and plan.device.type == "cpu":
        given = [x.detach() for x in tensors]
        return [packed_attention_forward(torch.nn.Module(), *given, None, align_plan=plan, sliding_window=window)[0]]
    out, _ = packed_attention_forward(torch.nn.Module(), *tensors, None, align_plan=plan, sliding_window=window)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.device, out.dtype)
    return [out.detach(), *torch.autograd.grad(out, tensors, cotangent)]


def attention(context: Context) -> None:
    """sdpa, varlen and flex in bfloat16, and the tree kernel of CPUs in float32, against sdpa in float32 on the same
    values. Without a GPU flash attention is the plain computation of the same signature that the unit tests have."""
    if context.toy:
        varlen.varlen_attn = plain_varlen
    left_out = "flash attention itself, the backward of FlexAttention" if context.toy else None
    figures: dict[str, Any] = {"left_out": left_out, "errors": {}, "ms": {}, "checks": {}}
    for name, trees in rows(context.toy).items():
        for window in (None, 64):
            batch = collate(trees)
            plan = plan_attention(batch.to(context.device), "sdpa")
            tokens = plan.segments[-1][1]
            exact = outcome(plan, inputs(tokens, context, torch.float32), window)
            for kernel in ("sdpa", "varlen", "flex", "tree"):
                place = f"{kernel}, {name}, {tokens} tokens" + (f", window {window}" if window else "")
                found, ms = tried(kernel, batch, context, window)
                figures["errors"][place] = own = errors(found, exact[: len(found)])
                figures["ms"][place] = round(ms, 3)
                figures["checks"][place] = own["largest"] < LARGEST and own["norm"] < NORM
                print(f"  {place}: {own['largest']:.2g}, {own['norm']:.2g}; {ms:.2f} ms", flush=True)
                context.write(figures)


def tried(kernel: str, batch: Any, context: Context, window: int | None) -> tuple[list[Tensor], float]:
    """Output and gradients, and milliseconds of forward and backward."""
    on_cpu = kernel == "tree"
    device, dtype = ("cpu", torch.float32) if on_cpu else (context.device, BF16)
    plan = plan_attention(batch.to(device), "sdpa" if on_cpu else kernel)
    tensors = [x.detach().to(device, dtype).requires_grad_() for x in inputs(plan.segments[-1][1], context, dtype)]
    found = outcome(plan, tensors, window)
    return found, milliseconds(lambda: outcome(plan, tensors, window), device, 1 if on_cpu or context.toy else 5)


# ------------------------------------------------------------------------------------------------------------- parts


def parts(context: Context) -> None:
    """Each part three times: the model's own code in float32, in bfloat16, and ours in bfloat16, on the same values."""
    figures: dict[str, Any] = {"errors": {}, "ms": {}, "checks": {}}
    shape = work.TOY if context.toy else work.Shape(1536, 8960, 1, 12, 2, 128, 151_936, family="qwen2")
    makers = {"head": head, "feed-forward": feed_forward, "norm": norm, "rotation": rotation}
    for name, make in makers.items():
        own, ours, tensors = make(shape, 64 if context.toy else 4096, context.device)
        wide = [x.detach().float().requires_grad_() for x in tensors]
        exact = differentiated(own, wide)
        plain, fused = differentiated(own, tensors), differentiated(ours, tensors)
        figures["errors"][name] = {"own": errors(plain, exact), "ours": errors(fused, exact)}
        repeats = 1 if context.toy else 5
        figures["ms"][name] = {
            who: round(milliseconds(partial(differentiated, part, tensors), context.device, repeats), 3)
            for who, part in (("own", own), ("ours", ours))
        }
        mine, theirs = (figures["errors"][name][who]["norm"] for who in ("ours", "own"))
        figures["checks"][f"{name} is as near to float32 as the model's own"] = mine <= WORSE * theirs + 1e-4
        print(f"  {name}: ours {mine:.2g}, own {theirs:.2g}; ms {figures['ms'][name]}", flush=True)
        context.write(figures)


Part = Callable[[list[Tensor]], Tensor]


def differentiated(part: Part, tensors: list[Tensor]) -> list[Tensor]:
    """Output and gradients under a random cotangent."""
    out = part(tensors)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.device, out.dtype)
    return [out.detach(), *torch.autograd.grad(out, tensors, cotangent)]


def drawn(*shapes: tuple[int, ...], device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device, BF16).requires_grad_() for shape in shapes]


def head(shape: work.Shape, tokens: int, device: str) -> tuple[Part, Part, list[Tensor]]:
    from align.model.head import fused_head

    scored = tokens // 4
    [hidden] = drawn((scored, shape.hidden), device=device)
    [weight] = drawn((shape.vocabulary, shape.hidden), device=device)
    weight = weight.detach().mul_(0.02)
    labels = torch.randint(0, shape.vocabulary, (scored,), generator=torch.Generator().manual_seed(2)).to(device)

    def own(x: list[Tensor]) -> Tensor:
        logits = torch.nn.functional.linear(x[0], weight.to(x[0].dtype)).float()
        return logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]

    return own, lambda x: fused_head(x[0], weight, labels).logps, [hidden]


def layer(shape: work.Shape, device: str) -> tuple[Any, Any]:
    """A layer of Qwen2 in bfloat16 with LoRA, B not zero; and the same with its parts exchanged."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from align.model import adapters
    from align.model.fused.exchange import fuse
    from align.recipe.adapter import Adapter

    config = AutoConfig.for_model(
        "qwen2",
        vocab_size=512,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=1,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=BF16)
    adapters.attach(model, Adapter(rank=16, alpha=32), None, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    fused = copy.deepcopy(model)
    exchanged = fuse(fused)
    assert exchanged["Qwen2MLP"] == 1 and exchanged["Qwen2RMSNorm"] == 3, exchanged.lines()
    return model.model.layers[0], fused.model.layers[0]


def called(module: Any) -> Part:
    """A module, in the dtype of its input."""
    by_dtype: dict[torch.dtype, Any] = {}

    def run(x: list[Tensor]) -> Tensor:
        dtype = x[0].dtype
        if dtype not in by_dtype:
            by_dtype[dtype] = module if dtype == BF16 else copy.deepcopy(module).to(dtype)
        found: Tensor = by_dtype[dtype](x[0])
        return found

    return run


def feed_forward(shape: work.Shape, tokens: int, device: str) -> tuple[Part, Part, list[Tensor]]:
    own, fused = layer(shape, device)
    return called(own.mlp), called(fused.mlp), drawn((1, tokens, shape.hidden), device=device)


def norm(shape: work.Shape, tokens: int, device: str) -> tuple[Part, Part, list[Tensor]]:
    own, fused = layer(shape, device)
    return (
        called(own.input_layernorm), called(fused.input_layernorm), drawn((1, tokens, shape.hidden), device=device)
    )  # fmt: skip


def rotation(shape: work.Shape, tokens: int, device: str) -> tuple[Part, Part, list[Tensor]]:
    from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

    from align.model.fused.rotary import rotate

    angles = torch.arange(tokens)[:, None] * 1e4 ** (-torch.arange(0, shape.head_dim, 2) / shape.head_dim)
    waves = [wave(torch.cat([angles, angles], -1))[None].to(device) for wave in (torch.cos, torch.sin)]

    def part(rotating: Callable[..., tuple[Tensor, Tensor]]) -> Part:
        def run(x: list[Tensor]) -> Tensor:
            return torch.cat(rotating(*x, *(wave.to(x[0].dtype) for wave in waves)), 1)

        return run

    shapes = [(1, heads, tokens, shape.head_dim) for heads in (shape.heads, shape.kv_heads)]
    return part(apply_rotary_pos_emb), part(rotate), drawn(*shapes, device=device)
