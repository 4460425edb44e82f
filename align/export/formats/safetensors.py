"""A plain folder in transformers' layout: the source's own files, its weights in safetensors and one dtype."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from align.export.checkpoint import Checkpoint, open_checkpoint, rewrite, verify
from align.export.formats import Proof, Written
from align.export.load_proof import LoadCheck, make_request, prove_loading
from align.model.folders import copy_all_but_weights
from align.model.load import resolve_dtype
from align.model.weights import edit_config


@dataclass(frozen=True)
class Plan:
    """The stored model, and the dtype that it is written in."""

    source: Checkpoint
    dtype: torch.dtype


def plan(folder: Path, dtype: str) -> Plan:
    source = open_checkpoint(folder)
    return Plan(source, source.dtype if dtype == "auto" else resolve_dtype(dtype, "cpu"))


def write(plan: Plan, target: Path) -> Written:
    size = rewrite(plan.source, target, plan.dtype, {})
    files = copy_all_but_weights(plan.source.folder, target)
    edit_config(target / "config.json", plan.dtype)
    count = verify(plan.source, target, plan.dtype, {})
    return Written(count, size, tuple(sorted({*files, *plan.source.files.values()})))


def prove(plan: Plan, target: Path, proof: Proof) -> tuple[LoadCheck, ...]:
    """It is loaded in plain transformers and in engines."""
    request = make_request(target, plan.dtype, proof.seed, proof.trust_remote_code)
    return prove_loading(plan.source.folder, target, plan.dtype, request, proof.time_limit_s, proof.engines)
