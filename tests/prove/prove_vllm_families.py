"""Prompts with pictures in vLLM: in every family its log-probabilities are transformers' own, or it refuses to start.

    python -m tests.prove vllm_families

A tiny model of each family, in float32, samples completions of prompts with one, two and no pictures. For
the base, for LoRA on the language model, for LoRA on everything (vLLM's switch for towers on), and for the same merged
into whole weights, the largest difference to the model's own forward is at most 1e-4, or the engine says why it serves
that not. ALIGN_PROVE_FAMILIES names some of the families.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from align.errors import AlignError
from tests.prove.entry import record
from tests.tiny_vlms import FAMILIES
from tests.vllm_families import LANGUAGE, RANK, TOLERANCE, Family, largest_gap


def base(family: Family) -> float:
    with family.engine() as engine:
        return largest_gap(engine, family.model(), family.prompts(), family.as_it_is())


def language(family: Family) -> float:
    policy = family.policy(LANGUAGE)
    with family.engine(lora_rank=RANK) as engine:
        return largest_gap(engine, policy, family.prompts(), family.adapter(policy))


def tower(family: Family) -> float:
    policy = family.policy("all-linear")
    with family.engine(lora_rank=RANK, engine={"enable_tower_connector_lora": True}) as engine:
        return largest_gap(engine, policy, family.prompts(), family.adapter(policy))


def merged(family: Family) -> float:
    policy = family.policy("all-linear")
    with family.engine() as engine:
        return largest_gap(engine, policy, family.prompts(), family.weights(policy))


WAYS: dict[str, Callable[[Family], float]] = {"base": base, "language": language, "tower": tower, "merged": merged}


def examine(name: str, way: str) -> dict[str, Any]:
    """{"gap": float} where it runs, {"refused": the engine's words} where it does not."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return {"gap": WAYS[way](Family(name, Path(folder)))}
        except AlignError as error:
            said = " ".join(error.what.replace(folder, "").split())
            return {"refused": said if len(said) <= 300 else f"{said[:140]} ... {said[-140:]}"}


def main() -> int:
    start = time.monotonic()
    wanted = os.environ.get("ALIGN_PROVE_FAMILIES")
    names = wanted.split(",") if wanted else list(FAMILIES)
    figures: dict[str, Any] = {}
    for name in names:
        figures[name] = {way: examine(name, way) for way in WAYS}
        for way, found in figures[name].items():
            print(f"{name:16} {way:9} {found.get('gap', found.get('refused'))}", flush=True)
    gaps = [found["gap"] for ways in figures.values() for found in ways.values() if "gap" in found]
    proved = bool(gaps) and max(gaps) <= TOLERANCE
    path = record(
        "vllm-families",
        claim="on prompts with images vLLM's log-probabilities of sampled tokens are those of transformers' forward to "
        f"{TOLERANCE:g} in every family and way of publishing that it does not refuse",
        command="python -m tests.prove vllm_families",
        figures={"tolerance": TOLERANCE, "largest": max(gaps, default=None), "families": figures},
        proved=proved,
        seconds=time.monotonic() - start,
    )
    print(f"largest difference {max(gaps, default=float('nan')):.1e}; {path}")
    return 0 if proved else 1


if __name__ == "__main__":
    sys.exit(main())
