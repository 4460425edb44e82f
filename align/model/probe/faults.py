"""What is wrong with a way to compute a model, if anything: its structure in float32, its precision in the trained
dtype, and whether rows of some hundred tokens can be computed at all."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from align.model.attention.interface import witnessed
from align.model.backbone import text_backbone
from align.model.padded import sequences_of
from align.model.policy_module import PolicyModule
from align.model.probe.conditions import FAILURES
from align.model.probe.float32 import first_layers, layers_of
from align.model.probe.loud import Loud, loud_parting, loud_values
from align.model.probe.own import Own, backbone_path, unit_scores
from align.model.probe.rows import LONG_TOKENS, Alone, long_batch
from align.model.probe.trace import Parting, Trace, parting, traced
from align.model.score_head import has_score_head
from align.types import TokenBatch

LOW_FACTOR = 8.0  # times the own forward's error in the trained dtype; routers and sinks make it heavy-tailed
LONGER = 4.0  # times the bounds of short sequences
KERNEL_BOUND = 8.0  # units in the last place of a kernel's dtype, of the attention it computes


class Fault(NamedTuple):
    """What is wrong with a computation, and the module where it shows."""

    reason: str
    path: str | None = None


def _loud_now(module: PolicyModule, own: Own) -> Loud:
    return loud_values(own.samples, text_backbone(module.model), backbone_path(module.model))


def structure(module: PolicyModule, own: Own) -> Fault | None:
    """In float32: every module of a packed row, the values that come out of it, and what modules make of loud inputs.

    A limit that acts on loud inputs alone shows in no row of the probe: whoever lost it, the layout is refused. They
    come last, since a row names the module at fault more closely.
    """
    fault = _rows(module, own)
    if fault is None and (loud := loud_parting(_loud_now(module, own), own.loud)) is not None:
        return Fault(f"{loud} on large activations", loud.path)
    return fault


def _rows(module: PolicyModule, own: Own) -> Fault | None:
    if own.low is not None and module.layout == "shared":
        module.use("shared", "sdpa")  # other kernels compute in half precision; they are held against this one there
    autocast, module.autocast = module.autocast, None
    try:
        with own.wide(module.model):
            if module.layout == "shared":
                return _packed(module, own) or _longer(module, own)
            return _row_by_row(module, own) or _off(_found(module, own, own.batch), own) or _longer(module, own)
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:
        return Fault(_raised(module.model, error))
    finally:
        module.autocast = autocast


def _raised(model: nn.Module, error: BaseException) -> str:
    """An exception in one line, with the module in whose forward it was raised."""
    words = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    paths = {id(module): path for path, module in model.named_modules() if path}
    frame, where = error.__traceback__, None
    while frame is not None:
        where = paths.get(id(frame.tb_frame.f_locals.get("self")), where)
        frame = frame.tb_next
    return words if where is None else f"{where} ({type(model.get_submodule(where)).__name__}) fails: {words}"


def _packed(module: PolicyModule, own: Own) -> Fault | None:
    tokens = int(own.batch.token_ids.shape[0])
    backbone, prefix = text_backbone(module.model), backbone_path(module.model)
    with traced(backbone, 1, tokens, prefix) as trace:
        found = _found(module, own, own.batch)
    pairs = _pairs(module, trace, own.traces, own.batch, own.plain)
    part = parting(pairs, own.bounds, _last_layer(module.model))
    if part is None:
        off = _off(found, own)
        return off and Fault(
            f"its layers agree, and what makes logits or scores of their output does not: {off.reason}"
        )
    if _sees_neighbours(module, own, trace, part):
        return Fault(f"{part}: it carries a state from one sequence to the next, or sees its neighbours", part.path)
    return Fault(str(part), part.path)


def _pairs(module: PolicyModule, trace: Trace, traces: list[Trace], batch: TokenBatch, plain: list[Alone]) -> Any:
    """For `parting`: each sequence of a packed row beside itself alone."""
    scores = has_score_head(module.model)
    pairs = []
    for theirs, at, row in zip(traces, sequences_of(batch), plain, strict=True):
        every = torch.arange(len(at))
        pairs.append((trace, theirs, at, every, every[-1:] if scores else every[row.trunk - 1 : -1]))
    return pairs


def _longer(module: PolicyModule, own: Own) -> Fault | None:
    """Sequences of some hundred tokens, on a few layers."""
    if own.long is None:
        return None
    long, bounds = own.long, {name: LONGER * bound for name, bound in own.bounds.items()}
    backbone, prefix, last = text_backbone(module.model), backbone_path(module.model), _last_layer(module.model)
    with first_layers(backbone, long.layers), traced(backbone, 1, len(long.batch.token_ids), prefix) as trace:
        found = _found(module, own, long.batch)
    part = parting(_pairs(module, trace, long.traces, long.batch, long.plain), bounds, last)
    largest = (found - long.values).abs().max().item()
    if part is not None:
        return Fault(f"{part}, in sequences of {max(len(row.tokens) for row in long.plain)} tokens", part.path)
    if largest <= bounds[""]:
        return None
    return Fault(f"largest difference {largest:.3g} in longer sequences, where {bounds['']:.1g} is noise")


def long_rows_fail(module: PolicyModule) -> Fault | None:
    """An error in rows of some hundred tokens, in the trained dtype, outside training too: what computes in chunks, as
    recurrences do, has code that no short row reaches. Packed rows are held against the model's own at that length."""
    model, longer = module.model, long_batch(module.model)
    if longer is None:
        return None
    try:
        module(longer[0], want=("scores",) if has_score_head(model) else ())
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:
        return Fault(f"in rows of {LONG_TOKENS} tokens {_raised(model, error)}")
    return None


def _row_by_row(module: PolicyModule, own: Own) -> Fault | None:
    """The sequences one after another, each in a batch of its own: what differs then is no matter of layout."""
    backbone, prefix = text_backbone(module.model), backbone_path(module.model)
    found = []
    for theirs, one in zip(own.traces, own.batches_alone(), strict=True):
        tokens = int(one.token_ids.shape[0])
        with traced(backbone, 1, tokens, prefix) as trace:
            found.append(_found(module, own, one))
        every = torch.arange(tokens)
        part = parting([(trace, theirs, every, every, every)], own.bounds, None)
        if part is not None:
            return Fault(str(part), part.path)
    return _head(torch.cat(found), own)


def _head(found: Tensor, own: Own) -> Fault | None:
    """Values where every layer agrees."""
    off = _off(found, own)
    return off and Fault(f"its layers agree, what makes logits or scores of their output does not: {off.reason}")


def _found(module: PolicyModule, own: Own, batch: TokenBatch) -> Tensor:
    scores = has_score_head(module.model)
    outputs = module(replace(batch, labels=own.labels(batch.labels)), want=("scores",) if scores else ())
    return unit_scores(module.model, outputs.scores) if scores else outputs.logps.float()


def _off(found: Tensor, own: Own) -> Fault | None:
    largest = (found - own.values).abs().max().item()
    if largest <= own.bounds[""]:
        return None
    if not math.isfinite(largest):
        return Fault("values that are not finite")
    return Fault(f"largest difference {largest:.3g} in float32, where {own.bounds['']:.1g} is noise")


def precision(module: PolicyModule, own: Own) -> Fault | None:
    """In the trained dtype: the error against float32, in units of the own forward's; and each attention by itself."""
    assert own.low is not None
    if not bool(own.low.isfinite().all()):
        return Fault(f"the model's own forward is not finite in {_dtype(module)}")
    worst: list[float] = []
    kernel = module.attention if module.layout == "shared" and module.attention != "sdpa" else None
    try:
        with nullcontext() if kernel is None else witnessed(worst.append):
            _, own_error, error = errors(module, own)
    except torch.OutOfMemoryError:
        raise
    except FAILURES as failure:
        return Fault(_raised(module.model, failure))
    if worst and not max(worst) <= KERNEL_BOUND:
        return Fault(
            f"the kernel is {max(worst):.3g} units in the last place away from float32, more than {KERNEL_BOUND:g}"
        )
    least = torch.finfo(_dtype(module)).eps * own.values.abs().mean().item()
    bound = LOW_FACTOR * max(own_error, least)
    if error <= bound:
        return None
    return Fault(f"mean error {error:.3g} against float32, where the model's own forward has {own_error:.3g}")


def errors(module: PolicyModule, own: Own) -> tuple[float, float, float]:
    """In the trained dtype: largest difference from the own forward, and mean errors of that and this to float32."""
    found = _found(module, own, own.batch)
    low = own.values if own.low is None else own.low
    error = (found - own.values).abs().mean().item()
    return (
        (found - low).abs().max().item(),
        (low - own.values).abs().mean().item(),
        error if error == error else math.inf,
    )


def _dtype(module: PolicyModule) -> torch.dtype:
    return module.autocast or next(p.dtype for p in module.model.parameters() if p.is_floating_point())


def _sees_neighbours(module: PolicyModule, own: Own, trace: Trace, part: Parting) -> bool:
    """Whether what the module makes of the last sequence changes with the sequences before it in the row."""
    places = sequences_of(own.batch)
    kept, others = places[-1], torch.cat([own.branch(n) for n in range(len(places) - 1)])
    ids = own.batch.token_ids.clone()
    vocabulary = module.model.config.get_text_config().vocab_size
    ids[others] = (ids[others] + 1) % vocabulary
    with traced(text_backbone(module.model), 1, len(ids), backbone_path(module.model)) as changed:
        _found(module, own, replace(own.batch, token_ids=ids))
    every = torch.arange(len(kept))
    names = [name for name in changed if name.partition("#")[0] == part.path and name in trace]
    return any(
        parting([({name: changed[name]}, {name: trace[name]}, kept, kept, every)], own.bounds, None) for name in names
    )


def _last_layer(model: Any) -> str | None:
    backbone = text_backbone(model)
    layers = getattr(backbone, "layers", None)  # as `LastLayer` finds it: Gemma 3n has lists behind its layers
    paths = [f"layers.{len(layers) - 1}"] if isinstance(layers, nn.ModuleList) and len(layers) else []
    paths = paths or list(layers_of(backbone))
    return f"{backbone_path(model)}{paths[-1]}" if paths else None
