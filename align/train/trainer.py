"""The policy trainer as a plain class: pack, forward, loss, backward, update, publish, save.

No Ray here: `align.actors.policy` wraps this class in an actor, tests use it directly, and a reference actor is the
same class without an optimizer.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from align.data.packing import global_counts, mark_nll
from align.errors import NonFiniteError
from align.losses import Losses
from align.losses.answers import require_gradient
from align.losses.base import LossInputs, Metric, Needs, Prepass
from align.model.dropout import switch_off_own_dropout
from align.model.parts import trained_parts
from align.model.policy_module import PolicyModule
from align.model.probe.choose import probe
from align.protocols.trainer import Publication
from align.protocols.trees import Counts, Tree
from align.train import policy
from align.train.memory import keep_freed_memory
from align.train.metrics import MetricSums, join_terms
from align.train.numerics import numerics
from align.train.optim import lr_multiplier, make_optimizer, set_rates
from align.train.packer import Packer, work_of
from align.train.prepass import run_prepass, within
from align.train.ranks import Ranks, random_stream
from align.train.signal import Signal
from align.train.sizes import described_sizes
from align.train.spec import TrainerSpec
from align.train.state import load_state, random_state, save_state
from align.train.strategy import make_strategy, trainable
from align.types import HeadOutputs, TokenBatch

log = logging.getLogger(__name__)

MAX_BAD_STEPS = 3


class PolicyTrainer:
    """See `align.protocols.trainer.Trainer`, whose methods these are, synchronous.

    reference: log-probabilities f32[N] of a batch under a reference of its own, where `spec.reference` is "path".
    ranks: the processes that train this policy together. Each is given every call with the same arguments, answers
    the same, and ends with the same weights; files are written by rank 0.
    """

    def __init__(
        self,
        spec: TrainerSpec,
        reference: Callable[[TokenBatch], Tensor] | None = None,
        ranks: Ranks | None = None,
    ):
        self.spec, self.ranks = spec, ranks or Ranks()
        if spec.threads:
            torch.set_num_threads(spec.threads)
        torch.manual_seed(spec.seed)
        self.losses = Losses.of(spec.losses)
        self.policy = policy.load(spec)
        self.device = self.policy.device
        if self.device.type == "cpu":
            keep_freed_memory()
        self.module: PolicyModule = self.policy.module
        if not {"conversation", "labelled"}.issuperset(self.losses.records):
            # Losses on ratios start at a ratio of 1 only without it; likelihoods alone may have it.
            switch_off_own_dropout(self.module)
        self.probe_difference = probe(self.module)
        self.packer = Packer(
            self.module,
            self.losses,
            self.ranks,
            self.device,
            max_tokens=spec.max_tokens,
            max_patches=spec.max_patches,
        )
        self._external_reference = reference
        self._bad_steps = 0
        trained = trainable(self.module)
        self.parameters, self.shapes = list(trained.values()), {name: p.shape for name, p in trained.items()}
        self.ranks.broadcast(self.parameters)
        random_stream(spec.seed, self.ranks.rank)
        self._sizes = described_sizes(spec, self.module, self.module.model)
        # last: from here on this rank may hold its part of the parameters only
        make = self._make_optimizer if spec.trainable else None
        self.strategy = make_strategy(spec.sharding, self.module, make, self.ranks, spec.optim.max_grad_norm)
        self.optimizer = self.strategy.optimizer

    def _make_optimizer(self) -> torch.optim.Optimizer:
        return make_optimizer(trained_parts(self.module.model), self.spec.optim, self.spec.rates)

    def describe(self) -> dict[str, Any]:
        """Sizes and dtypes, for the run folder and the screen."""
        return {
            **self._sizes,
            "dtype": str(next(self.module.parameters()).dtype).removeprefix("torch."),
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "ranks": self.ranks.size,
            "strategy": self.strategy.name,
            **self.forward(),
            "packing_probe": self.probe_difference,
        }

    def forward(self) -> dict[str, Any]:
        """See `align.protocols.trainer.Trainer.forward`."""
        verdict = self.module.verdict
        assert verdict is not None
        return {
            "layout": self.module.layout,
            "attention": self.module.attention,
            "words": verdict.words,
            "slower": list(verdict.why),
            "notes": [*verdict.notes, *self.policy.notes],
        }

    # ------------------------------------------------------------------------------------------ forward and update

    def step(self, trees: Sequence[Tree], *, step: int, progress: float) -> dict[str, float]:
        """One optimizer update over all `trees`. A non-finite loss or gradient leaves the weights as they were, and so
        does an update without signal (train/idle: see `align.train.signal`)."""
        assert self.optimizer is not None, "this trainer was made without an optimizer"
        started, said = time.perf_counter(), self.ranks.traffic()
        self.module.train()
        trees = self._marked(trees)
        sums, seen, signal = MetricSums(), self.policy.patches(), Signal(trees)
        batches = self.packer.microbatches(trees)
        counts = global_counts(trees)
        stats = self._batch_stats(trees)
        with self.strategy.update():
            for n, (batch, counted) in enumerate(batches):
                loss = self._loss(batch, counts, sums if counted else MetricSums(), stats, signal)
                self.strategy.backward(loss if counted else 0.0 * loss, last=n == len(batches) - 1)
        sums.add(work_of(batches))
        if self.module.media is not None:
            sums.add({"tokens/patches": Metric(torch.tensor(float(self.policy.patches() - seen)), reduce="sum")})
        metrics = self._metrics(sums)
        idle = not signal.carried(self.ranks.objects)
        middle = min(progress + 0.5 / self.spec.total_updates, 1.0)
        optim = self.spec.optim
        rates = set_rates(self.optimizer, lr_multiplier(optim.schedule or "cosine", optim.warmup or 0.0, middle))
        finite = math.isfinite(metrics["loss/total"])
        norm = self.strategy.step(wanted=finite and not idle)
        if finite and math.isfinite(norm):
            self._bad_steps = 0
        else:
            self._refuse_update(step, trees, norm, metrics["loss/total"])
        seconds = time.perf_counter() - started
        return {
            **metrics,
            **rates,
            "optim/grad_norm": norm,
            "optim/skipped": float(self._bad_steps > 0),
            "train/idle": float(idle),
            "time/train": seconds,
            **self.ranks.since(said),
            "tokens/scored": float(counts.tokens),
        }

    def _marked(self, trees: Sequence[Tree]) -> list[Tree]:
        """Trees with the NLL tokens that the losses ask for."""
        nll = self.losses.nll
        return list(trees) if nll == "none" else [mark_nll(tree, nll) for tree in trees]

    def _batch_stats(self, trees: Sequence[Tree]) -> list[dict[str, Tensor]]:
        """What each loss of scope "batch" makes of a pass over the update, or over trees of its own, before any
        gradient."""
        stats: list[dict[str, Tensor]] = []
        for loss in self.losses:
            if loss.needs.scope != "batch":
                stats.append({})
                continue
            seen = loss.seen_before(trees)
            if seen is not trees:
                assert self.spec.reference != "cached", "values of one tree are not those of another"
                config = self.module.model.config.get_text_config()
                seen = within(seen, getattr(config, "max_position_embeddings", None))
            stats.append(loss.batch_stats(self._prepass(seen, loss.needs) if seen else None))
        return stats

    def _prepass(self, trees: Sequence[Tree], needs: Needs) -> Prepass:
        return run_prepass(
            self.packer.microbatches(trees),
            partial(self._quiet, self.module, want=needs.head),
            self._reference_logps if needs.reference else lambda batch: None,
            self.ranks.gather,
        )

    def _loss(
        self,
        batch: TokenBatch,
        counts: Counts,
        sums: MetricSums,
        stats: Sequence[dict[str, Tensor]],
        signal: Signal | None = None,
    ) -> Tensor:
        """This microbatch's share of the global loss, with gradient; its metrics are added to `sums`."""
        reference = self._reference_logps(batch)
        outputs = self.strategy.forward(batch, self.losses.head)
        if signal is not None:
            signal.watch(outputs, batch)
        total = outputs.logps.new_zeros(())
        metrics: dict[str, Metric] = {}
        # Where the trees carry none, this update is the first of its batch: its own forward is the policy at the start.
        start = outputs.logps.detach() if batch.proximal_logps is None else batch.proximal_logps
        for loss, own in zip(self.losses, stats, strict=True):
            proximal = start if loss.needs.ratio == "proximal" else None
            result = loss(LossInputs(outputs, batch, counts, reference, proximal, own))
            total = total + loss.weight * result.loss
            join_terms(metrics, result.metrics, loss.name if len(self.losses) > 1 else "total")
        require_gradient(total, " + ".join(loss.name for loss in self.losses))
        sums.add(metrics | {"loss/total": Metric(total.detach(), reduce="sum")})
        return total

    def _reference_logps(self, batch: TokenBatch) -> Tensor | None:
        if not self.losses.needs_reference:
            return None
        if batch.reference_logps is not None:
            return batch.reference_logps
        assert self.spec.reference != "cached", "the trees of this stage carry their reference log-probabilities"
        if self._external_reference is not None:
            return self._external_reference(batch).to(self.device)
        with self.policy.reference() as module:
            return self._quiet(module, batch).logps

    @torch.no_grad()
    def _quiet(self, module: PolicyModule, batch: TokenBatch, want: Sequence[str] = ()) -> HeadOutputs:
        """The forward without gradient and without dropout; the module's mode is put back."""
        was_training = module.training
        module.eval()
        try:
            outputs: HeadOutputs = self.strategy.forward(batch, want) if module is self.module else module(batch, want)
        finally:
            module.train(was_training)
        return outputs

    def _refuse_update(self, step: int, trees: Sequence[Tree], norm: float, loss: float) -> None:
        self._bad_steps += 1
        where = ", ".join(tree.origin or f"tree {tree.id}" for tree in trees[:8])
        message = f"step {step}: loss {loss}, gradient norm {norm}: no update; samples: {where} ({len(trees)} in all)"
        log.warning(message)
        if self._bad_steps >= MAX_BAD_STEPS:
            raise NonFiniteError(
                f"{self._bad_steps} steps in a row were not finite; the last: {message}",
                remedy="lower optim.lr, check these rows, or train in float32",
            )

    @torch.no_grad()
    def evaluate(self, trees: Sequence[Tree]) -> dict[str, float]:
        """Loss metrics of `trees` as one batch, without gradient and without dropout."""
        self.module.eval()
        trees = self._marked(trees)
        sums, counts = MetricSums(), global_counts(trees)
        stats = self._batch_stats(trees)
        for batch, counted in self.packer.microbatches(trees):
            self._loss(batch, counts, sums if counted else MetricSums(), stats)
        return self._metrics(sums)

    def _metrics(self, sums: MetricSums) -> dict[str, float]:
        """Joined over ranks, with what a loss derives of them; a label's own are called after it."""
        metrics = sums.result(self.ranks.objects)
        for loss in self.losses:
            metrics = loss.derived(metrics)
        return self.spec.labels.called(metrics) if self.spec.labels else metrics

    def logps(self, trees: Sequence[Tree]) -> list[list[np.ndarray]]:
        """See `align.protocols.trainer.Trainer.logps`."""

        def of(batch: TokenBatch) -> list[np.ndarray]:
            logps = self._quiet(self.module, batch).logps.float().cpu().numpy()
            row = batch.rows_of_tokens.cpu().numpy()
            return [logps[row == r] for r in range(batch.rows)]

        return self.packer.by_sequence(trees, of)

    def scores(self, trees: Sequence[Tree]) -> list[list[np.ndarray]]:
        """Per tree, per sequence: f32[K], what the score head says. Computed without dropout."""

        def of(batch: TokenBatch) -> list[np.ndarray]:
            scores = self._quiet(self.module, batch, want=("scores",)).scores
            assert scores is not None, "the model has no score head"
            return list(scores.float().cpu().numpy())

        return self.packer.by_sequence(trees, of)

    def numerics(self) -> dict[str, Any]:
        return numerics(self.spec, self.device)

    def batch_logps(self, batch: TokenBatch) -> Tensor:
        """f32[N] on the CPU for a packed batch: what a reference actor answers."""
        return self._quiet(self.module, batch.to(self.device)).logps.cpu()

    # ------------------------------------------------------------------------------------------ weights and state

    def publish(self, folder: Path, version: int) -> Publication:
        published = self.policy.publish(Path(folder), version, self.strategy.shards)
        answer: Publication = self.ranks.objects(published)[0]
        return answer

    def save(self, folder: Path) -> None:
        assert self.optimizer is not None, "a reference has no state to save"
        folder = Path(folder)
        self.strategy.require_equal()
        random = self.ranks.objects(random_state())
        self.write_model(folder / self.policy.artefact)
        save_state(folder, self.strategy, {"bad_steps": self._bad_steps}, random)
        self.ranks.barrier()

    def restore(self, folder: Path) -> None:
        assert self.optimizer is not None, "a reference has no state to restore"
        numbers = load_state(Path(folder), self.strategy, self.shapes, self.ranks.rank)
        self._bad_steps = int(numbers["bad_steps"])

    def write_model(self, folder: Path) -> None:
        self.policy.write(Path(folder), self.strategy.shards)
        self.ranks.barrier()

    def close(self) -> None:
        """Nothing outlives the process."""
        self.strategy.close()
