"""A loss of a user's that is not what a loss is: said by the check where it can be seen, by the step otherwise."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from align.data.packing import collate, global_counts
from align.errors import PluginError
from align.losses import Loss, configure
from align.losses.answers import require_gradient
from align.losses.base import HEAD, LossInputs
from align.types import HeadOutputs
from tests.unit.core.trees import conversation

TEXT = """
import torch
from align.losses.base import LossConfig, LossOutput, Metric, Needs

class Config(LossConfig):
    gamma: float = 2.0

def needs(config):
    return Needs(record="conversation")

def loss(inputs, config):
    total = -inputs.outputs.logps.sum()
    return LossOutput(total, {"loss/total": Metric(total.detach(), reduce="sum")})
"""
NEEDS, ANSWER = 'Needs(record="conversation")', "LossOutput(total, {"


def own(folder: Path, old: str = "", new: str = "", more: str = "") -> Loss:
    assert old in TEXT
    path = folder / "mine.py"
    path.write_text((TEXT.replace(old, new) if old else TEXT) + more)
    return configure(str(path), {})


def step(loss: Loss) -> torch.Tensor:
    tree = conversation(np.random.default_rng(0), 0)
    batch = collate([tree])
    outputs = HeadOutputs(logps=torch.full((len(batch.labels),), -0.5, requires_grad=True))
    return loss(LossInputs(outputs, batch, global_counts([tree]))).loss


def test_one_that_is_sound_gives_its_value(tmp_path: Path) -> None:
    assert step(own(tmp_path)).requires_grad


def test_every_output_of_the_head_may_be_asked_for() -> None:
    assert set(HEAD) == {field.name for field in fields(HeadOutputs)} - {"logps"}


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (NEEDS, 'Needs(record="sentence")', "`Needs.record` is 'sentence', which means nothing here"),
        (NEEDS, 'Needs(record="pair", nll="all")', "`Needs.nll` is 'all'"),
        (NEEDS, 'Needs(record="pair", scope="update")', "`Needs.scope` is 'update'"),
        (NEEDS, 'Needs(record="group", ratio="old")', "`Needs.ratio` is 'old'"),
        (NEEDS, 'Needs(record="group", head=("entropi",))', "`Needs.head` is 'entropi'"),
        (NEEDS, 'Needs(record="group", head="entropy")', "`Needs.head` is a tuple of names"),
        (NEEDS, 'Needs(record="pair", scope="batch")', "the loss has no `batch_stats"),
        (NEEDS, "None", "answered nothing"),
        (NEEDS, "Needs(record=config.gama)", "`needs` of the loss failed: AttributeError"),
        (NEEDS, "exit(0)", "`needs` of the loss failed: SystemExit: 0"),
        ("def needs(config)", "def needs()", "cannot be called with config"),
        ("def loss(inputs, config)", "def loss(inputs)", "cannot be called with inputs and config"),
        ("def loss", "async def loss", "is a plain function, and this is a function"),
        ("(LossConfig)", "", "is a class of its options"),
    ],
)
def test_what_the_check_can_see_it_says(tmp_path: Path, old: str, new: str, words: str) -> None:
    with pytest.raises(PluginError) as caught:
        own(tmp_path, old, new)
    assert words in caught.value.what and caught.value.where == str(tmp_path / "mine.py") and caught.value.remedy


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (ANSWER, "None and ({", "the loss answered nothing"),
        (ANSWER, "LossOutput(-inputs.outputs.logps, {", "`LossOutput.loss` is a Tensor of shape"),
        (ANSWER, "LossOutput(total.item(), {", "`LossOutput.loss` is a float"),
        (ANSWER, 'LossOutput(total, {"mine": 1.0, ', "the metric 'mine' is a float"),
        (ANSWER, 'LossOutput(total, {"mine": Metric(inputs.outputs.logps), ', "the metric 'mine' is a Tensor of shape"),
        (ANSWER, 'LossOutput(total, {"mine": Metric(total, reduce="avg"), ', "the metric 'mine' is joined by 'avg'"),
        (ANSWER, "LossOutput(inputs.reference_logps.sum(), {", "`loss` of the loss failed: AttributeError"),
    ],
)
def test_what_only_a_step_can_see_it_says(tmp_path: Path, old: str, new: str, words: str) -> None:
    loss = own(tmp_path, old, new)
    with pytest.raises(PluginError) as caught:
        step(loss)
    assert words in caught.value.what and caught.value.where == str(tmp_path / "mine.py") and caught.value.remedy
    if "failed" in words:
        assert caught.value.remedy == f"look at {tmp_path / 'mine.py'}:13"


def test_a_loss_without_gradient_teaches_nothing(tmp_path: Path) -> None:
    loss = own(tmp_path, ANSWER, "LossOutput(total.detach(), {")
    with pytest.raises(PluginError, match=r"mine\.py: the loss has no gradient"):
        require_gradient(step(loss), loss.name)
    with torch.no_grad():
        require_gradient(torch.zeros(()), loss.name)  # an evaluation has none


def test_want_of_memory_is_not_the_loss_s_fault(tmp_path: Path) -> None:
    loss = own(tmp_path, ANSWER, "torch.OutOfMemoryError and LossOutput(total, {")
    assert step(loss).requires_grad
    (tmp_path / "again").mkdir()
    loss = own(tmp_path / "again", "    total = ", '    raise torch.OutOfMemoryError("full")\n    total = ')
    with pytest.raises(torch.OutOfMemoryError):
        step(loss)


def test_remarks_of_one_line_are_one_remark(tmp_path: Path) -> None:
    assert own(tmp_path, more="def remarks(config): return 'careful'\n").remarks() == ("careful",)


def test_what_it_derives_keeps_the_total(tmp_path: Path) -> None:
    loss = own(tmp_path, more="def derived(metrics): return {}\n")
    with pytest.raises(PluginError, match="`derived` left out loss/total"):
        loss.derived({"loss/total": 1.0})
