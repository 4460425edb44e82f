"""What makes a stage impossible for its model, its data or the machine; each refusal names place and remedy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from align.check.facts import DataFacts
from align.check.inputs import ModelFacts
from align.check.machine import Machine
from align.check.memory.sizes import FEED_FORWARD, Sizes, max_positions
from align.errors import DataError, ModelError, PlacementError, RecipeError, Unsupported
from align.recipe.adapter import Adapter
from align.recipe.capabilities import FolderStage, JudgingStage, SamplingStage, StageBase, TrainStage
from align.recipe.environment import Environment
from align.recipe.labels import Labels
from align.recipe.parts import Rollout
from align.recipe.schema import Recipe
from align.recipe.support import publish_mode
from align.recipe.trained_on import quantisation_words


@dataclass(frozen=True)
class StageChecks:
    """sizes: of the model; None where its architecture is no plain decoder, and what needs them is not checked."""

    recipe: Recipe
    machine: Machine
    model: ModelFacts
    sizes: Sizes | None

    def experts(self, adapter: Adapter) -> list[str]:
        """Stacked experts are no linear layers: most weights of such a model stay as they are, which the lines say.
        Raises Unsupported where they were to be packed."""
        if adapter.kind == "full" or self.sizes is None or self.sizes.experts <= 1:
            return []
        if adapter.quant is not None:
            raise Unsupported(
                f"four bits are for linear layers; this model's {self.sizes.experts} experts a block are stacked in "
                "tensors of their own",
                where="adapter.kind",
                remedy="use `kind: lora` with `model.dtype: bfloat16`",
            )
        share = (
            100 * sum(a * b for n, (a, b) in self.sizes.linear.items() if n in FEED_FORWARD) / self.sizes.block_linear
        )
        return [
            f"note: no LoRA on this model's {self.sizes.experts} experts a block, {share:.0f} % of a block's weights: "
            "they are stacked in tensors, not linear layers; `adapter: {kind: full}` trains them"
        ]

    def quantised(self, stage: TrainStage | JudgingStage | FolderStage, adapter: Adapter | None) -> None:
        """What a base whose weights are stored quantised cannot be used for: nothing there is left to write."""
        packed = self.model.config.get("quantization_config")
        if not packed:
            return
        words, start = quantisation_words(packed), "start from the unquantised model"
        if adapter is None:
            raise Unsupported(
                f"the base is quantised ({words}), and a stage of kind {stage.kind} needs whole weights: the adapter "
                "cannot be merged into those that it was trained on",
                where="model.path",
                remedy=f"leave the stage out and serve the adapter on this base; or {start} with `adapter: "
                "{kind: qlora}`, which packs it in four bits here and can be merged",
            )
        if adapter.kind == "full" or adapter.mixed:
            raise Unsupported(
                f"the base is quantised ({words}), and whole weights are trained", where="adapter.kind", remedy=start
            )
        if adapter.quant is not None:
            raise Unsupported(
                f"the base is quantised ({words}) already, and `adapter.quant` would pack it again",
                where="adapter.quant",
                remedy=f"use `adapter: {{kind: lora}}` on it, or {start}",
            )
        if isinstance(stage, SamplingStage) and publish_mode(adapter, stage.rollout) == "weights":
            raise Unsupported(
                f"the base is quantised ({words}), and whole weights would be sent to engines",
                where="rollout.weights",
                remedy=f"leave `rollout.weights` out, or {start}",
            )

    def attention(self) -> None:
        """Kernels of a GPU need one, and flash attention half precision."""
        model = self.recipe.model
        if model.attention in ("varlen", "flex") and not self.machine.gpus:
            raise PlacementError(
                f"`model.attention: {model.attention}` needs an NVIDIA GPU, and this machine has none",
                where="model.attention",
                remedy="use auto, which is sdpa here",
            )
        if model.attention == "varlen" and model.dtype == "float32":
            raise RecipeError(
                "`model.attention: varlen` computes in half precision, and `model.dtype` is float32",
                where="model.attention",
                remedy="set `model.dtype: bfloat16`, or use auto",
            )

    def length(self, stage: StageBase, rollout: Rollout, facts: DataFacts) -> None:
        """Prompt and completion, or a whole episode, must fit the engine, which fits the model."""
        needed = facts.sampled(stage)
        limit, key = rollout.max_model_len, "rollout.max_model_len"
        positions = max_positions(self.model.config)
        if positions is not None and (limit is None or limit > positions):
            if limit is not None:
                raise RecipeError(
                    f"`{key}: {limit}` is more than the model's {positions} positions",
                    where=key,
                    remedy=f"at most {positions}",
                )
            limit, key = positions, "the model's `max_position_embeddings`"
        if limit is not None and needed > limit:
            raises = "" if limit == positions else "raise `rollout.max_model_len`, "
            if stage.worlds:
                raise _too_long(stage.worlds, rollout.max_tokens, facts.openings, f"{key} ({limit:,})", raises)
            raise RecipeError(
                f"the longest prompt ({facts.longest} tokens) and `rollout.max_tokens: {rollout.max_tokens}` need "
                f"{needed} tokens, more than {key} ({limit})",
                where="rollout.max_tokens",
                remedy=f"lower `rollout.max_tokens`, {raises}or set `max_length` and `too_long: drop` on the data",
            )

    def positions(self, facts: DataFacts) -> None:
        positions = max_positions(self.model.config)
        lengths = facts.report.lengths if facts.report else None
        if positions is not None and lengths is not None and lengths.size and int(lengths.max()) > positions:
            raise DataError(
                f"{int((lengths > positions).sum())} rows are longer than the model's {positions} positions "
                f"(the longest has {int(lengths.max())} tokens)",
                where="data",
                remedy=f"set `max_length: {positions}` with `too_long: right` or `drop`",
            )

    def head(self, stage: TrainStage) -> None:
        """A model that scores is where a stage may start that trains such a head: of the same labels."""
        names = [str(name) for name in self.model.config.get("architectures") or ()]
        if not any(name.endswith("ForSequenceClassification") for name in names):
            return
        wanted = stage.score_head
        if wanted is None:
            raise ModelError(
                f"the model is a {names[0]}: it scores, and has no language model head",
                where="model.path",
                remedy="give a causal language model; only a stage of kind reward_model or classify starts from one "
                "that scores",
            )
        has = Labels.from_config(self.model.config)
        if not wanted.agrees_with(has):
            raise ModelError(
                f"the model is a {has.words}, and the stage trains a {wanted.words}",
                where="model.path",
                remedy="name the model's own labels in their order, or start from a causal language model",
            )

    def padding(self) -> None:
        """Users of a model that scores pad, and find the end of a sequence by the padding token."""
        if self.model.tokenizer.pad_id is None:
            raise ModelError(
                "the tokenizer has no padding token, by which users of a model that scores find the end of a sequence",
                where="model",
                remedy="set `pad_token` in tokenizer_config.json to a token that ends no completion",
            )


def _too_long(
    worlds: Sequence[Environment], turn: int, openings: Sequence[int], limit: str, raises: str
) -> RecipeError:
    """Of the environment whose episodes are the longest. turn: tokens of one; openings: see `DataFacts`; limit: what
    they do not fit, in words."""
    prompt, world = max(zip(openings, worlds, strict=True), key=lambda one: one[0] + one[1].context_tokens(turn))
    of = f" of {world.name}" if len(worlds) > 1 else ""
    return RecipeError(
        f"an episode{of} may need {prompt + world.context_tokens(turn):,} tokens, more than {limit}: a prompt of "
        f"{prompt}, {world.max_turns} turns of {turn} (at most {world.max_tokens:,} in all), and "
        f"{world.answer_tokens} between two turns ({world.max_observation_tokens} of answers, and what is written "
        f"around up to {world.max_calls}); {world.reset_tokens} are kept for `reset`",
        where="environment",
        remedy=f"{raises}lower `environment.max_observation_tokens`, `max_calls`, `max_turns` or `max_tokens`, or "
        "`rollout.max_tokens`",
    )
