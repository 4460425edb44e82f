"""What a model computes by itself, before anything of it is exchanged: the probe's measure of every other computation.

Taken are the log-probabilities (or scores) of a few sequences alone, by transformers' own code and eager attention:
in float32, where the structure shows exactly, with a trace of what each module makes; and in the dtype that is trained,
whose own error against float32 says what is noise there. Only these numbers are kept.

Noise in float32 is measured too: the same sequence, its embeddings moved by one unit in the last place, twice in a
batch, so that every product is rounded otherwise. A bound is a multiple of it, and so fits weights of any size.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from align.errors import ModelError, UserError
from align.mediastore import read_tensors
from align.model.backbone import set_attention, text_backbone
from align.model.media.features import merged
from align.model.media.placeholders import type_ids
from align.model.probe.conditions import FAILURES, small_windows, woken_adapters
from align.model.probe.float32 import (
    NARROW,
    first_layers,
    head_of,
    head_rows,
    in_float32,
    kinds_of,
    widened,
)
from align.model.probe.loud import Loud, loud_values, sampled
from align.model.probe.rotary_lengths import lengths_of
from align.model.probe.rows import Alone, Picture, alone_batches, long_batch, two_tree_batch
from align.model.probe.trace import Trace, apart, parting, traced
from align.model.score_head import HEAD, has_score_head, score
from align.types import TokenBatch

log = logging.getLogger(__name__)

FACTOR = 32.0  # times the noise of float32
FLOOR = 2e-6  # of a module's output: what float32 may differ by where no noise was seen
REPEATS = 1e-3  # a module that differs by so much from call to call is no matter of rounding
CHANGED = 2  # tokens at the end of a sequence


class Long(NamedTuple):
    """Longer sequences, packed, and what the first layers alone make of each."""

    layers: int
    batch: TokenBatch
    plain: list[Alone]
    traces: list[Trace]
    values: Tensor


class Own:
    """Values f32[N] and traces of the untouched model, and what noise is.

    batch, plain: the sequences, packed and alone. values: in float32; low: in the trained dtype, or None where that is
    float32. bounds: by module, how far from the trace another computation may be.
    """

    def __init__(self, model: Any, temperature: float, autocast: torch.dtype | None):
        self.temperature, self.autocast = temperature, autocast
        self.picture = Picture(model)
        device = next(model.parameters()).device
        vocabulary = model.config.get_text_config().vocab_size
        self.batch, self.plain = two_tree_batch(vocabulary, device, model=model, prompt=self.picture.prompt)
        scored = [token for row in self.plain for token in row.tokens[row.trunk :]]
        self.rows = None if has_score_head(model) else head_rows(model, scored)
        self.streamed = True
        self.traces: list[Trace] = []
        self.values = torch.zeros(0)
        self.low: Tensor | None = None
        self.bounds: dict[str, float] = {}
        self.long: Long | None = None
        self.loud: Loud = {}
        self.samples: dict[str, Tensor] = {}

    @property
    def text_row(self) -> int:
        """The longest sequence without a picture."""
        return max((n for n, row in enumerate(self.plain) if not row.media), key=lambda n: len(self.plain[n].tokens))

    def branch(self, n: int) -> Tensor:
        """Places in the packed row of a branch's own tokens."""
        at = torch.cumsum(torch.tensor([0, *((self.batch.sequence_ids == k).sum() for k in range(len(self.plain)))]), 0)
        # the place before a branch's first scored token is its trunk's last, and the others follow one another
        last = int(self.batch.score_at[n])
        return torch.arange(last + 1 - int(at[n + 1] - at[n]), last + 1)

    def batches_alone(self) -> list[TokenBatch]:
        """Each sequence as a packed batch with nothing beside it."""
        return alone_batches(self.batch, self.plain)

    @contextmanager
    def conditions(self, model: Any) -> Iterator[None]:
        """What own values and those that are held against them are computed under."""
        training = model.training
        model.eval()
        try:
            with torch.no_grad(), small_windows(text_backbone(model)), woken_adapters(model), head_of(model, self.rows):
                yield
        finally:
            model.train(training)

    def labels(self, ids: Tensor) -> Tensor:
        """Tokens as outputs of the head that was cut."""
        if self.rows is None:
            return ids
        order = torch.argsort(self.rows)
        at = torch.searchsorted(self.rows[order], ids.contiguous()).clamp(max=len(order) - 1)
        return order[at]

    @contextmanager
    def wide(self, model: Any) -> Iterator[None]:
        """Compute in float32: by layers, or the whole model where one of its layers is more than called."""
        with in_float32(model) if self.streamed else widened(model):
            yield


def measure(model: Any, *, temperature: float = 1.0, autocast: torch.dtype | None = None) -> Own:
    """Own values of `model` as it is. autocast: dtype to compute in, where that is not its weights'.

    Raises ModelError where its own forward fails, is random outside training, or looks ahead.
    """
    own = Own(model, temperature, autocast)
    text = model.config.get_text_config()
    implementation = text._attn_implementation
    with own.conditions(model):
        set_attention(model, "eager")
        try:
            try:
                _in_float32(own, model)
            except FAILURES as error:
                if isinstance(error, UserError):
                    raise
                own.streamed = False
                _in_float32(own, model)
            narrow = autocast is not None or any(p.dtype in NARROW for p in model.parameters())
            own.low = torch.cat([values(own, model, [row]) for row in own.plain]) if narrow else None
        except FAILURES as error:
            if isinstance(error, UserError):
                raise
            raise ModelError(
                f"{type(model).__name__}'s own forward fails in transformers: {type(error).__name__}: {error}",
                remedy="choose a model that this version of transformers can compute",
            ) from error
        finally:
            set_attention(model, implementation)
    return own


def _in_float32(own: Own, model: Any) -> None:
    backbone, prefix = text_backbone(model), backbone_path(model)
    own.traces, found = [], []
    with own.wide(model):
        autocast, own.autocast = own.autocast, None
        try:
            for number, row in enumerate(own.plain):
                with ExitStack() as stack:
                    trace = stack.enter_context(traced(backbone, 1, len(row.tokens), prefix))
                    if number == own.text_row:
                        own.samples = stack.enter_context(sampled(backbone, prefix))
                    found.append(values(own, model, [row]))
                own.traces.append(trace)
            own.values = torch.cat(found)
            _noise(own, model, found)
            own.long = _long(own, model)
        finally:
            own.autocast = autocast
    own.loud = loud_values(own.samples, text_backbone(model), backbone_path(model))


def _long(own: Own, model: Any) -> Long | None:
    """Values of sequences of some hundred tokens on a short model: layers that compress or cut what they have seen
    treat so few as `own.plain` as if they did not. None where the model has no list of layers, or fewer positions."""
    backbone, prefix = text_backbone(model), backbone_path(model)
    layers = kinds_of(backbone)
    longer = long_batch(model) if layers else None
    if longer is None:
        return None
    batch, plain = longer
    traces: list[Trace] = []
    found = []
    try:
        with first_layers(backbone, layers):
            for row in plain:
                if (lengths := lengths_of(backbone, prefix)) is not None:
                    lengths.forget()
                with traced(backbone, 1, len(row.tokens), prefix) as trace:
                    found.append(values(own, model, [row]))
                traces.append(trace)
    except FAILURES as error:
        log.debug("%s cannot be computed with %d layers: %s", type(model).__name__, layers, error)
        return None
    return Long(layers, batch, plain, traces, torch.cat(found))


def _noise(own: Own, model: Any, found: list[Tensor]) -> None:
    """Bounds, from one sequence in a batch with itself; its second copy ends otherwise, and nothing before may move."""
    backbone, prefix = text_backbone(model), backbone_path(model)
    number = own.text_row
    row = own.plain[number]
    ends = [(token + 1) % max(2, model.config.get_text_config().vocab_size) for token in row.tokens[-CHANGED:]]
    other = row._replace(tokens=[*row.tokens[:-CHANGED], *ends])
    with _moved(model), traced(backbone, 2, len(row.tokens), prefix) as both:
        again = values(own, model, [row, other], alike=True)
    first: Trace = {name: _row(record, 0) for name, record in both.items()}
    noise = {name: apart(r.made[0], own.traces[number][name].made[0]) for name, r in first.items()}
    if max(noise.values(), default=0.0) > REPEATS:
        _require_same(own, model)
    most = max(noise.values(), default=0.0)
    names = {name for trace in own.traces for name in trace}
    own.bounds = {name: max(FLOOR, FACTOR * noise.get(name, most)) for name in names}
    moved = (again[: len(found[number])] - found[number]).abs().max().item()
    own.bounds[""] = FACTOR * max(moved, 4 * torch.finfo(torch.float32).eps * (1.0 + own.values.abs().max().item()))
    before = torch.arange(len(row.tokens) - CHANGED)
    second: Trace = {name: _row(record, 1) for name, record in both.items()}
    ahead = parting([(second, first, before, before, before)], own.bounds, None)
    if ahead is not None:
        how = f"what {ahead.path} makes of a token changes with the tokens after it, by {ahead.distance:.2g} of it"
        raise _looks_ahead(model, how)
    if not has_score_head(model):  # modules of other lengths than the row (prefixes of their own) were not compared
        steady = len(row.tokens) - CHANGED - row.trunk
        one, two = again.split(len(found[number]))
        change = (one[:steady] - two[:steady]).abs().max().item()
        if not change <= own.bounds[""]:
            raise _looks_ahead(model, f"log-probabilities change with the tokens after them, by {change:.2g}")


def _looks_ahead(model: Any, how: str) -> ModelError:
    return ModelError(
        f"{type(model).__name__} looks beyond the causal prefix: {how}", remedy="choose a causal language model"
    )


def _row(record: Any, n: int) -> Any:
    return record._replace(given=None if record.given is None else record.given[n : n + 1], made=record.made[n : n + 1])


def _require_same(own: Own, model: Any) -> None:
    """Raise ModelError where the same sequence alone gives other values than it did before."""
    number = own.text_row
    row = own.plain[number]
    with traced(text_backbone(model), 1, len(row.tokens), backbone_path(model)) as again:
        values(own, model, [row])
    places = torch.arange(len(row.tokens))
    bounds = dict.fromkeys(again, REPEATS)
    changed = parting([(again, own.traces[number], places, places, places)], bounds, None)
    if changed is not None:
        raise ModelError(
            f"{type(model).__name__} gives other values each time it is asked the same: the forward of {changed.path} "
            "is random outside training, for instance by dropout that is left on, or remembers what it was asked",
            remedy="set the model's dropout to 0 in its config.json",
        )


@contextmanager
def _moved(model: Any) -> Iterator[None]:
    """Embeddings are off by one unit in the last place of float32, up or down."""

    def move(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        signs = (torch.randint(0, 2, out.shape[1:], generator=generator) * 2 - 1).to(out.device)
        return out * (1 + torch.finfo(torch.float32).eps * signs)

    handle = model.get_input_embeddings().register_forward_hook(move)
    try:
        yield
    finally:
        handle.remove()


def backbone_path(model: Any) -> str:
    """Path of the text backbone in the model, with a dot behind."""
    backbone = text_backbone(model)
    path = next(name for name, module in model.named_modules() if module is backbone)
    return f"{path}." if path else ""


# ------------------------------------------------------------------------------------------------- the own forward


def values(own: Own, model: Any, rows: list[Alone], *, alike: bool = False) -> Tensor:
    """Under the model's own forward: scores f32[S * K] of the last tokens, as `unit_scores`, or log-probabilities
    f32[N] of the branches' tokens. Rows are of one length."""
    device = next(model.parameters()).device
    ids = torch.tensor([row.tokens for row in rows], device=device)
    kwargs = _own_media(model, rows, ids)
    context = nullcontext() if own.autocast is None else torch.autocast(device.type, dtype=own.autocast)
    if has_score_head(model):
        with context:
            backbone = model.base_model if any(row.media for row in rows) else text_backbone(model)
            hidden = backbone(input_ids=ids, use_cache=False, **kwargs).last_hidden_state
        return unit_scores(model, score(model, hidden[:, -1]))
    with context:
        logits = model(input_ids=ids, use_cache=False, **kwargs).logits[:, :-1].float()
    log_p = torch.log_softmax(logits / own.temperature, dim=-1)
    log_p = log_p.gather(-1, own.labels(ids[:, 1:])[..., None])[..., 0]
    return torch.cat([one[row.trunk - 1 :] for one, row in zip(log_p, rows, strict=True)])


def _own_media(model: Any, rows: list[Alone], ids: Tensor) -> dict[str, Tensor]:
    """What the model's own forward takes for the media in rows of ids i64[B, L], as a processor would return it."""
    media = [medium for row in rows for medium in row.media]
    if not media:
        return {}
    known = inspect.signature(model.base_model.forward).parameters
    at = [[medium.start for medium in row.media] for row in rows]
    types = [type_ids(model.config, one, row.media, a) for one, row, a in zip(ids.cpu().numpy(), rows, at, strict=True)]
    tensors = merged([read_tensors(medium) for medium in media])
    tensors |= dict.fromkeys(("token_type_ids", "mm_token_type_ids"), torch.as_tensor(np.stack(types)))
    return {name: tensor.to(ids.device) for name, tensor in tensors.items() if name in known}


def unit_scores(model: Any, scores: Tensor | None) -> Tensor:
    """f32[S * K]: scores in units of the head's length, so that a small fresh head hides no difference."""
    assert scores is not None
    weight = next(getattr(model, HEAD).parameters())
    return (scores / weight.norm().clamp(min=1e-12)).flatten().float()
