"""`align check` and batches: what a loss does without, and weights that it does not take."""

from __future__ import annotations

import json
from typing import Any

import pytest

from align.errors import UserError
from tests.unit.check.test_check import plan_of
from tests.unit.check.workshop import Workshop

KTO = (
    "  - {id: kto, kind: preference, from: sft, adapter: {rank: 4}, data: kto.jsonl, loss: {name: kto},"
    " batch: {sequences: 3}, epochs: 2}\n"
)


def add(shop: Workshop, rows: list[dict[str, Any]], stage: str, name: str = "kto.jsonl") -> None:
    shop.write(name, "".join(json.dumps(row) + "\n" for row in rows))
    shop.write("recipe.yaml", shop.recipe.read_text() + stage)


def judged(prompts: list[str]) -> list[dict[str, Any]]:
    return [{"prompt": p, "completion": f"answer {n}", "label": n % 2 == 0} for n, p in enumerate(prompts)]


def lines_of(shop: Workshop, *overrides: str) -> str:
    return "\n".join(plan_of(shop, *overrides).stages[-1].lines)


def test_batches_without_an_estimate_of_the_kl_are_counted(workshop: Workshop) -> None:
    add(workshop, judged([f"question {n}?" for n in range(7)]), KTO)
    assert "note: 2 of 6 batches have rows of one prompt alone" in lines_of(workshop)  # one row ends each epoch
    assert "note: 14 of 14 batches" in lines_of(workshop, "stages.kto.batch.sequences=1")
    assert "batches have" not in lines_of(workshop, "stages.kto.batch.sequences=7")
    assert "batches have" not in lines_of(workshop, "stages.kto.loss.variant=apo_zero_unpaired")


def test_rows_of_one_prompt_make_no_batch_with_an_estimate(workshop: Workshop) -> None:
    add(workshop, judged(["one question?"] * 6), KTO)
    assert "note: 4 of 4 batches have rows of one prompt alone" in lines_of(workshop)


@pytest.mark.parametrize("variant", ["aot", "sigmoid"])
def test_weights_are_refused_where_a_loss_sorts_its_batch(workshop: Workshop, variant: str) -> None:
    rows = [{"prompt": f"q{n}", "chosen": "yes", "rejected": "no", "weight": 1 + n} for n in range(4)]
    loss = f"{{name: dpo, variant: {variant}}}"
    stage = f"  - {{id: w, kind: preference, from: sft, data: w.jsonl, loss: {loss}}}\n"
    add(workshop, rows, stage, "w.jsonl")
    if variant == "sigmoid":
        assert "weights: 3 rows have another weight than 1: 2 to 4" in lines_of(workshop)
        return
    with pytest.raises(UserError, match=r"w\.jsonl:2: the row has weight 2.*variant aot"):
        plan_of(workshop)
