"""Memory of a stage's processes, part by part, without torch: what `align check` prints and `tests.bench.memory_plan`
measures.

Weights, adapters, gradients, moments and KV cache are counts times bytes. Activations are what the kernels of
`align.model` keep for backward, counted per token and block; what they use in passing is the largest block's share of
it. Python, torch and a CUDA context come beside (about 0.5 GB on a CPU, 0.5 to 1 GB on a GPU), and so do, while a model
is loaded, its weights in `model.dtype` in the host's memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from align.check.memory.sizes import BYTES, Sizes, Table, Tower, human
from align.model.tiles import FOLD_FROM, SLICE_ELEMENTS, TILE_ELEMENTS
from align.recipe.adapter import Adapter
from align.recipe.optimizers import OPTIMIZERS
from align.recipe.sharding import STRATEGIES, Held

GRADIENT_BYTES = 4
# of what comes and goes in an update, what glibc holds between it, without and with checkpointing (measured on three
# shapes: tests/bench/results). Gradients of whole weights, and what DoRA makes of each weight, lie among activations.
GAPS = {"lora": (0.65, 1.0), "full": (0.8, 1.2), "dora": (1.45, 2.2)}


@dataclass(frozen=True)
class Work:
    """How a stage computes. tokens, patches: of its largest microbatch. several: whether an update has more than one,
    so that gradients are there while the next is computed. second_copy: a frozen reference beside what is trained.
    head: whether logits are computed. strategy, ranks: by which what is held is spread, and over how many."""

    dtype: str
    tokens: int
    patches: int = 0
    several: bool = True
    second_copy: bool = False
    checkpointing: bool = False
    head: bool = True
    gpu: bool = False
    optimizer: str = "adamw"
    strategy: str = "replicated"
    ranks: int = 1

    def share(self, held: Held) -> float:
        """The part of it that one rank holds."""
        return 1 / self.ranks if held in STRATEGIES[self.strategy].spreads else 1.0


@dataclass(frozen=True)
class Estimate:
    """Bytes of one process, by part."""

    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {human(size)}" for name, size in self.parts.items() if size)
        return f"{human(self.total)} ({parts})"


def trainer(
    sizes: Sizes, adapter: Adapter, work: Work, *, table: Table | None = None, tower: Tower | None = None
) -> Estimate:
    """A trainer at the largest moment of an update. table: of a model that reads images, what is trained of it."""
    b = BYTES[work.dtype]
    trained, parts = _held(sizes, adapter, work, table)
    activations = work.tokens * _kept(sizes, adapter, work) * b
    if not work.several:
        # Gradients take the place of activations as backward goes down the blocks.
        heads = sizes.vocabulary * sizes.hidden if adapter.kind == "full" else 0
        activations = max(activations - GRADIENT_BYTES * max(0, trained - heads), 0)
    parts["activations"] = float(activations)
    if tower is not None:
        parts["activations of images"] = _images(tower, work, table)
    parts["logits"] = _head(sizes, adapter, work) if work.head else 0.0
    # The head is done when backward comes to the blocks, and both are when the optimizer steps.
    passing = max(0.0, _passing(sizes, adapter, work) - parts["logits"])
    parts["in passing"] = max(passing, _step(sizes, adapter, work) - parts["logits"] - parts["activations"])
    if not work.gpu:
        coming_and_going = ("activations", "activations of images", "logits", "in passing")
        gaps = GAPS.get(adapter.kind, GAPS["lora"])[work.checkpointing]
        parts["malloc's gaps"] = gaps * sum(parts.get(name, 0.0) for name in coming_and_going)
    return Estimate(parts)


def _held(sizes: Sizes, adapter: Adapter, work: Work, table: Table | None) -> tuple[int, dict[str, float]]:
    """Numbers that are trained, and bytes of what stays from update to update."""
    b = BYTES[work.dtype]
    if table is None:
        every, lora = sizes.parameters, 0 if adapter.kind == "full" else sizes.adapter_parameters(adapter)
        whole = sizes.parameters if adapter.kind == "full" else 0
    else:
        every = sum(row.parameters for row in table.values())
        lora = sum(row.trained for row in table.values() if row.mode == "lora")
        whole = sum(row.parameters for row in table.values() if row.mode == "full")
    trained = lora + whole
    if adapter.kind == "full":
        weights = every * 4.0
    else:
        packed = _packed(sizes, adapter, table)
        per_weight = adapter.quant.bytes_per_weight if adapter.quant else 0.0
        weights = (every - whole - packed) * b + packed * per_weight + whole * 4.0
    reference = _reference(sizes, adapter, b, every, whole) if work.second_copy else 0.0
    moments = OPTIMIZERS[work.optimizer].state_bytes + STRATEGIES[work.strategy].copy_bytes
    return trained, {
        "weights": weights * work.share("parameters"),
        "adapter": lora * 4.0 * work.share("parameters"),
        "gradients": trained * GRADIENT_BYTES * work.share("gradients"),
        "optimizer": trained * moments * work.share("moments"),
        "reference": float(reference),
    }


def _reference(sizes: Sizes, adapter: Adapter, b: int, every: int, whole: int) -> float:
    """A frozen copy of what is trained whole. Of a whole model, it computes as the policy does: what autocast rounds is
    kept rounded, and embeddings, norms and stacked experts are float32."""
    if adapter.kind != "full":
        return whole * 4.0
    experts = sum(sizes.linear[name][0] * sizes.linear[name][1] for name in ("gate_proj", "up_proj", "down_proj"))
    block = 2 * sizes.hidden + (experts if sizes.experts > 1 else 0)
    wide = sizes.vocabulary * sizes.hidden + sizes.layers * block + sizes.hidden
    return every * b + wide * (4.0 - b)


def _packed(sizes: Sizes, adapter: Adapter, table: Table | None) -> int:
    """Weights that are stored in four bits; a tower's are nearly all in linear layers."""
    found = sizes.layers * sizes.block_linear if "language" in adapter.quantised_parts else 0
    others = [row.parameters for part, row in (table or {}).items() if part != "language"]
    return found + (sum(others) if "vision" in adapter.quantised_parts else 0)


def _joint(adapter: Adapter, work: Work) -> bool:
    """Whether queries, keys and values come of one product (`align.model.fused.qkv`), and the adapter is folded in."""
    return adapter.kind in ("lora", "qlora") and work.dtype == "float32" and adapter.dropout == 0


def _block(sizes: Sizes, adapter: Adapter, work: Work) -> float:
    """Numbers of `work.dtype` that one block keeps for backward, per token.

    Both norms keep what they read, and the products what the norms made of it: four of the hidden width. Attention
    keeps rotated queries and keys, gathered values, and its output; where queries and keys are normalised, what they
    were before it too, which of a joint product is a view of all three. A CPU's attention computes in float32, and
    its output is kept in half precision beside. The feed-forward keeps gate and up.
    """
    d, q, k, i = sizes.hidden, sizes.queries, sizes.kv_width, sizes.intermediate
    widened = not work.gpu and work.dtype != "float32"
    kept = 4.0 * d + (5 * q + 4 * k if widened else 2 * q + 2 * k) + 2 * i
    if sizes.qk_norm:
        kept += q + k + (k if _joint(adapter, work) and not work.gpu else 0)
    if adapter.kind == "dora" or adapter.dropout:
        kept += _of_peft(sizes, adapter, work)
    return kept


def _of_peft(sizes: Sizes, adapter: Adapter, work: Work) -> float:
    """What peft's own layers keep in addition where the fused ones do not hold (DoRA, dropout): each product its input
    in float32 for A where the model is in half precision; after dropout its own; DoRA both results, which its
    magnitudes learn from; and the feed-forward each of its steps."""
    layers = sizes.linear.values()
    inputs, outputs = sum(rows for rows, _ in layers), sum(columns for _, columns in layers)
    kept = 2.0 * sizes.intermediate
    if work.dtype != "float32" or adapter.dropout:
        kept += inputs * 4 / BYTES[work.dtype]
    if adapter.dropout:
        kept += inputs / BYTES[work.dtype]  # the mask, a byte each
    if adapter.kind == "dora":
        kept += 2 * outputs
    return kept


def _kept(sizes: Sizes, adapter: Adapter, work: Work) -> float:
    """Numbers of `work.dtype` that are kept for backward, per token; those of the last norm included."""
    return sizes.layers * (sizes.hidden if work.checkpointing else _block(sizes, adapter, work)) + 2 * sizes.hidden


def _images(tower: Tower, work: Work, table: Table | None) -> float:
    """A tower that is not trained keeps nothing; one block's activations at a time."""
    b = BYTES[work.dtype]
    block = (12 * tower.hidden + 4 * tower.intermediate) * b
    trained = table is not None and "vision" in table and table["vision"].trained > 0
    kept = block + tower.hidden * b * tower.layers if work.checkpointing else block * tower.layers
    return float(work.patches * (kept if trained else block))


def _head(sizes: Sizes, adapter: Adapter, work: Work) -> float:
    """Two tiles of logits in float32, and the direction of each row's gradient beside what it is computed from."""
    tile = 4 * min(TILE_ELEMENTS["cuda" if work.gpu else "cpu"], work.tokens * sizes.vocabulary)
    rows = 2 * work.tokens * sizes.hidden * BYTES[work.dtype]
    second = 4.0 * sizes.vocabulary * sizes.hidden if adapter.kind == "full" and sizes.tied else 0.0
    return 2.0 * tile + rows + second  # tied: the head's gradient and the embedding's, until they are added


def _passing(sizes: Sizes, adapter: Adapter, work: Work) -> float:
    """What one block's backward uses and gives back: what it keeps where that was not kept, gradients of it, weights
    unpacked or with the adapter folded in, and under autocast all weights in half precision."""
    again = work.tokens * _block(sizes, adapter, work) * BYTES[work.dtype] if work.checkpointing else 0.0
    b, wide = BYTES[work.dtype], sizes.queries + 2 * sizes.kv_width
    gradients = work.tokens * (3 * sizes.hidden + 2 * wide) * b
    rows = work.tokens * sizes.intermediate
    inner = 4 * (rows * b if work.gpu else min(SLICE_ELEMENTS, rows) * 4)
    feed_forward = 3 * sizes.hidden * sizes.intermediate
    products = float(feed_forward * b if adapter.quant else 0)
    if _joint(adapter, work) and work.tokens * (sizes.hidden + sizes.intermediate) >= FOLD_FROM * feed_forward / 3:
        products += feed_forward * 4
    if adapter.kind == "dora":
        products += 4 * feed_forward / 3 * 4
    cast = sizes.layers * sizes.block_linear * b if adapter.kind == "full" and work.dtype != "float32" else 0
    return again + gradients + inner + products + cast


def _step(sizes: Sizes, adapter: Adapter, work: Work) -> float:
    """What a step of the optimizer takes for the largest tensor: on a CPU, bitsandbytes' unpacks its moments."""
    copies = 0.0 if work.gpu else OPTIMIZERS[work.optimizer].step_copies
    feed_forward = sizes.hidden * sizes.intermediate
    whole = max(sizes.vocabulary * sizes.hidden, feed_forward)
    largest = whole if adapter.kind == "full" else adapter.rank * max(sizes.hidden, sizes.intermediate)
    return copies * 4.0 * largest


def engine(sizes: Sizes, dtype: str, *, sequences: int, length: int, reserved: float | None = None) -> Estimate:
    """An engine whose `sequences` completions all reach `length` tokens, prompt included; or one that takes so many
    bytes for them whatever comes (`reserved`)."""
    needed = float(sequences * length * sizes.kv_bytes(dtype))
    name = f"KV cache of {sequences} x {length} tokens" if reserved is None else "KV cache, as reserved"
    return Estimate({"weights": float(sizes.parameters * BYTES[dtype]), name: needed if reserved is None else reserved})
