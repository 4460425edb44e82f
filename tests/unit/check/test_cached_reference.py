"""`reference: cached` in `align check`: planned where it can be, refused with the remedy where it cannot."""

from __future__ import annotations

import json

import pytest

from align.check.machine import Machine
from align.check.plan import Plan
from align.check.validate import validate
from align.cli.main import main
from align.errors import UserError
from align.recipe.load import load_document
from tests.unit.check.workshop import Workshop

MACHINE = Machine(cores=8, gpus=0, memory=16 << 30)
CACHED = "stages.dpo.reference=cached"


def plan_of(shop: Workshop, *overrides: str) -> Plan:
    recipe, document = load_document(shop.recipe, overrides)
    return validate(recipe, shop.folder, document=document, machine=MACHINE)


def test_it_is_planned_and_a_full_fine_tune_needs_no_second_copy(
    workshop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    full = "stages.dpo.adapter={kind: full}"
    assert main(["check", "recipe.yaml", CACHED, full]) == 0
    out = capsys.readouterr().out
    assert "reference: cached: computed once" in out and "a frozen second copy" not in out
    cached, start = (plan_of(workshop, *more, full).stages[1].memory["trainer"] for more in ((CACHED,), ()))
    assert cached.parts["reference"] == 0 < start.parts["reference"]
    assert start.total - cached.total == start.parts["reference"]


def test_online_stages_are_refused_because_their_completions_are_new(workshop: Workshop) -> None:
    with pytest.raises(UserError) as caught:
        plan_of(workshop, "stages.grpo.reference=cached", "stages.grpo.loss={name: grpo, kl: 0.1}")
    said = str(caught.value)
    assert "samples new completions at every step" in said and "write `reference: start`" in said
    assert "grpo.reference" in said


def test_a_loss_that_mixes_rows_of_a_batch_is_refused_and_its_variant_without_is_not(workshop: Workshop) -> None:
    rows = [{"prompt": f"{n}?", "completion": "yes", "label": n % 2 == 0} for n in range(8)]
    (workshop.folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    batch = "stages.dpo.batch={sequences: 4}"
    with pytest.raises(UserError) as caught:
        plan_of(workshop, CACHED, batch, "stages.dpo.loss={name: kto}")
    said = str(caught.value)
    assert "'kto' also compares sequences that are made of several rows" in said and "write `reference: start`" in said
    plan_of(workshop, CACHED, batch, "stages.dpo.loss={name: kto, variant: apo_zero_unpaired}")


def test_a_loss_without_a_reference_has_nothing_to_cache(workshop: Workshop) -> None:
    with pytest.raises(UserError, match="compares with none"):
        plan_of(workshop, CACHED, "stages.dpo.loss=simpo")


def test_the_key_of_trl_is_answered(workshop: Workshop) -> None:
    with pytest.raises(UserError, match=r"`precompute_ref_log_probs` is `reference: cached`"):
        plan_of(workshop, "stages.dpo.precompute_ref_log_probs=true")
