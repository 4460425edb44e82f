"""Backbone and fused head as one module: forward(TokenBatch) -> HeadOutputs.

One module, because sharding strategies gather parameters around a module's forward, and the head's recompute in the
backward pass must gather again. The transformers model stays whole inside it, so that peft, saving and merging see
the layout they know.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from align.errors import ModelError
from align.model import padded
from align.model.attention.interface import NAME
from align.model.attention.plan import AttentionPlan, plan_attention
from align.model.backbone import set_attention, takes_media, text_backbone
from align.model.head import LogitTransform, fused_head
from align.model.last_layer import LastLayer
from align.model.logits import logit_transform
from align.model.media.features import MediaFeatures, Placed
from align.model.media.placeholders import BOTH_WAYS, inside_media, runs, slots_of, type_ids
from align.model.media.sampled_placeholders import words_for_marks
from align.model.output_embedding import output_of
from align.model.score_head import has_score_head, score
from align.types import HeadOutputs, TokenBatch

if TYPE_CHECKING:
    from align.model.probe.own import Own
    from align.model.probe.rotary_lengths import RotaryLengths
    from align.model.probe.verdict import Verdict

MEDIA_CACHE = 1 << 30
_OTHER_MODEL = "choose another model, one whose attention goes through transformers' AttentionInterface"


class PolicyModule(nn.Module):
    """A causal language model whose forward runs over packed trees and never makes logits.

    Args:
        model: a transformers causal LM; peft layers may have been injected into it.
        temperature: log-probabilities are those of softmax(logits / temperature); 1.0 except for online stages.
        autocast: compute dtype for float32 master weights (full fine-tuning in bfloat16), or None.
        attention: the recipe's word; which kernel and layout it comes to is for `align.model.probe` to find.
        media_cache: bytes of features of images to keep, where tower and projector are frozen.

    layout: "shared" (packed trees, a trunk stands once), "padded" (a sequence a row, by the model's own attention) or
    "alone" (as that, and never two rows at once).
    attention: the kernel of the packed layout, or transformers' name of the model's own.
    untouched: what `align.model.probe.own.measure` took of the model before anything was exchanged, for the probe.
    verdict: what the probe found. lengths: where rotary frequencies depend on a row's length, how long a row may be.
    """

    def __init__(
        self,
        model: Any,
        *,
        temperature: float = 1.0,
        autocast: torch.dtype | None = None,
        attention: str = "auto",
        media_cache: int = MEDIA_CACHE,
    ):
        super().__init__()
        self.model = model
        self.autocast = autocast
        self.transform = logit_transform(model, temperature)
        model.config.use_cache = False
        model.config.get_text_config().output_router_logits = False  # losses of a mixture's router are off
        self.last_layer = LastLayer(text_backbone(model))
        self.media = MediaFeatures(model, media_cache) if takes_media(model) else None
        self.head = OutputHead(model)
        self.wanted_attention = attention
        self.untouched: Own | None = None
        self.verdict: Verdict | None = None
        self.lengths: RotaryLengths | None = None
        self.use("shared", "sdpa")

    def use(self, layout: Literal["shared", "padded", "alone"], attention: str) -> None:
        """Compute in this layout from now on."""
        self.layout, self.attention = layout, attention
        set_attention(self.model, NAME if layout == "shared" else attention)

    def trains_with_attention_dropout(self) -> bool:
        """Whether a layer drops attention weights in training: a probability that its config brought along."""
        found = (getattr(m, name, 0) for m in self.model.modules() for name in ("attention_dropout", "attn_dropout"))
        chances = (one.p if isinstance(one, nn.Dropout) else one for one in found)
        return any(isinstance(chance, float) and chance > 0 for chance in chances)

    def follow(self, other: PolicyModule) -> None:
        """Compute as `other` does: a reference in its policy's layout."""
        if (self.layout, self.attention) != (other.layout, other.attention):
            self.use(other.layout, other.attention)
        if other.lengths is not None and self.lengths is None:
            self.lengths = other.lengths.of(self.model)

    def forward(self, batch: TokenBatch, want: Collection[str] = ()) -> HeadOutputs:
        """HeadOutputs with logps f32[N], and of entropy and log_sum_sq f32[N] those named in `want`. A model with a
        score head gives scores f32[S, K] where they are wanted, and nothing else."""
        device = batch.token_ids.device
        context = nullcontext() if self.autocast is None else torch.autocast(device.type, dtype=self.autocast)
        scores = has_score_head(self.model)
        with context, self._words_for_marks(batch) as plain:
            idle = None
            if batch.idle_media and self.media is not None:  # towers first, as where there are media
                idle = self.media.nothing(batch.idle_media, device)
            hidden = self._hidden(plain, *_asked(batch, scores))
            hidden = hidden if idle is None else hidden + idle.to(hidden.dtype)
        if scores:
            wanted = score(self.model, hidden) if "scores" in want else None
            return HeadOutputs(logps=hidden.new_zeros(0, dtype=torch.float32), scores=wanted)
        logps, entropy, log_sum_sq = self.head(hidden, batch.labels, self.transform, want, self.autocast)
        return HeadOutputs(logps=logps, entropy=entropy, log_sum_sq=log_sum_sq)

    @contextmanager
    def _words_for_marks(self, batch: TokenBatch) -> Iterator[TokenBatch]:
        """The batch to compute with: see `align.model.media.sampled_placeholders`."""
        if not batch.media:
            yield batch
            return
        inside = inside_media(batch.token_ids.shape[0], batch.media, batch.media_at)
        with words_for_marks(self.model, batch.token_ids, inside.to(batch.token_ids.device)) as ids:
            yield replace(batch, token_ids=ids)

    def _checkpoints(self) -> bool:
        return self.training and bool(getattr(self.model, "is_gradient_checkpointing", False))

    def _hidden(self, batch: TokenBatch, at: Tensor, owners: Tensor) -> Tensor:
        """Hidden states [K, D] of the tokens at places `at` i64[K] of the packed row, for the sequences `owners`."""
        # with idle media as with media, so that all ranks run the same modules
        seeing = batch.media or (batch.idle_media and self.media is not None)
        backbone = self.model.base_model if seeing else text_backbone(self.model)
        types, placed = self._placed(batch)
        beyond = self.lengths is not None and self.lengths.reached_by(batch)
        if self.lengths is not None:  # one that grew with the batch before does not always shrink by itself
            self.lengths.forget()
        if self.layout == "padded" and not beyond:
            return padded.hidden_states(backbone, batch, at, self._inputs_of_rows(batch, types, placed))
        if self.layout != "shared" or beyond:
            inputs = self._inputs_of_rows(batch, types, placed)
            return padded.hidden_states(backbone, batch, at, self._one_by_one(inputs), one_by_one=owners)
        if self.model.config.get_text_config()._attn_implementation != NAME:
            raise ModelError(f"{type(self.model).__name__} lets no attention be registered for it", remedy=_OTHER_MODEL)
        both_ways = self.model.config.model_type in BOTH_WAYS
        plan = plan_attention(batch, self.attention, runs(types, batch.media, batch.media_at) if both_ways else ())
        media = (
            {"mm_encoder_outputs": self.media.outputs(placed, batch.token_ids.device)} if self.media and placed else {}
        )
        # checkpointing runs layers again in backward, long after this block
        trimmed = nullcontext() if self._checkpoints() else self.last_layer.reading(at, batch.token_ids.shape[0])
        try:
            with trimmed:
                out = backbone(
                    input_ids=batch.token_ids[None],
                    position_ids=batch.position_ids[..., None, :],
                    use_cache=False,
                    align_plan=plan,
                    **media,
                )
        except TypeError as error:
            if "unexpected keyword argument" not in str(error):
                raise
            raise ModelError(
                f"{type(self.model).__name__} cannot be run over packed trees: {error}", remedy=_OTHER_MODEL
            ) from error
        hidden: Tensor = out.last_hidden_state.squeeze(0)
        return hidden.index_select(0, at)

    def _one_by_one(self, inputs: padded.Inputs) -> padded.Inputs:
        """The same, for blocks of one row: each has its own frequencies, and in the packed layout a plan."""

        def of(batch: TokenBatch, block: padded.Block) -> dict[str, Any]:
            if self.lengths is not None:
                self.lengths.forget()
            found = inputs(batch, block)
            if self.layout == "shared":
                segment = [(0, block.index.shape[1], 0, 0)]
                found["align_plan"] = AttentionPlan(segment, batch.token_ids.device, self.attention)
            return found

        return of

    def _placed(self, batch: TokenBatch) -> tuple[np.ndarray, list[Placed]]:
        """Types of the row's tokens i64[T] (`align.model.media.placeholders.type_ids`), its media with their slots."""
        if batch.media and self.media is None:
            raise ModelError(f"{type(self.model).__name__} takes no images", remedy="choose a vision-language model")
        if not batch.media:
            return np.zeros(0, dtype=np.int64), []
        types = type_ids(self.model.config, batch.token_ids.cpu().numpy(), batch.media, batch.media_at)
        slots = slots_of(types, batch.media, batch.media_at)
        return types, [Placed(medium, n) for medium, n in zip(batch.media, slots, strict=True)]

    def _inputs_of_rows(self, batch: TokenBatch, types: np.ndarray, placed: list[Placed]) -> padded.Inputs:
        """For a block of rows, what the backbone takes for it: its media, row by row, and the types of its tokens. A
        medium is computed once for all rows and blocks."""
        media = self.media
        if media is None or not placed:
            return lambda batch, block: {}
        features = media.features(placed, batch.token_ids.device)
        known = inspect.signature(self.model.base_model.forward).parameters

        def inputs(batch: TokenBatch, block: padded.Block) -> dict[str, Any]:
            within = [set(row[gap == 0].tolist()) for row, gap in zip(block.index, block.past, strict=True)]
            in_rows = [p for own in within for p, at in zip(placed, batch.media_at, strict=True) if at in own]
            rows = torch.as_tensor(types)[block.index].masked_fill(block.past > 0, 0).to(batch.token_ids.device)
            found: dict[str, Any] = {n: rows for n in ("token_type_ids", "mm_token_type_ids") if n in known}
            return found | ({"mm_encoder_outputs": media.laid(in_rows, features)} if in_rows else {})

        return inputs


class OutputHead(nn.Module):
    """`fused_head` with a model's output embedding. A module, without parameters of its own, so that a strategy that
    spreads parameters can gather around it what it reads."""

    def __init__(self, model: Any):
        super().__init__()
        self._model = (model,)  # in a tuple: it is not part of this module

    def reads(self) -> list[nn.Parameter]:
        """The parameters that are read outside the forward of the modules that hold them."""
        [model] = self._model
        head = None if has_score_head(model) else model.get_output_embeddings()
        return [] if head is None else list(head.parameters())

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor,
        transform: LogitTransform,
        want: Collection[str],
        autocast: torch.dtype | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """hidden [N, D], labels i64[N] -> log-probabilities f32[N], and what `fused_head` adds of `want`."""
        rows, weight, bias = output_of(self._model[0], hidden, autocast)
        out = fused_head(rows, weight, labels, bias=bias, transform=transform, want=want)
        return out.logps, out.entropy, out.log_sum_sq


def _asked(batch: TokenBatch, scores: bool) -> tuple[Tensor, Tensor]:
    """Places of the tokens whose hidden states are read, and the row that each is read in."""
    if not scores:
        return batch.predict_at, batch.rows_of_tokens
    return batch.score_at, torch.arange(len(batch.score_at), device=batch.score_at.device)
