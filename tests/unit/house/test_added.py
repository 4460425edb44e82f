"""One real thing of several kinds, added as a user adds it: a file beside the recipe, and a line that names it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from align.cli.main import main
from align.data import cache
from align.data.prepare import prepare
from align.data.tokenizer import load_tokenizer
from align.objectives import combine
from align.recipe.inputs import DataSource
from align.recipe.load import load_recipe
from align.recipe.objectives import Objectives
from align.stages.fingerprint import fingerprint
from tests.unit.check.workshop import Workshop, open_workshop

LAYOUT = '''
from align.data.formats.base import Layout, text_of
from align.data.records import Conversation, Message, Prompt, RowError, assistant


def _asked(row):
    """A riddle with its hints, each on a line of its own."""
    hints = row["hints"]
    if not isinstance(hints, list):
        raise RowError("`hints` must be a list")
    return (Message("user", "\\n".join([text_of(row, "riddle"), *hints])),)


def _conversation(row):
    return Conversation((), _asked(row) + assistant(text_of(row, "solution")))


RIDDLES = [
    Layout("riddles", ("riddles",), "conversation", frozenset({"riddle", "hints", "solution"}), _conversation),
    Layout("riddles", ("riddles",), "prompt", frozenset({"riddle", "hints"}), lambda row: Prompt(_asked(row), "")),
]
'''
ROWS = [{"riddle": f"What is {n} and {n}?", "hints": ["Add them.", "Count."], "solution": str(2 * n)} for n in range(8)]

COMBINER = '''
"""The worst objective alone decides: maximin over objectives that are each centred in their group."""

import numpy as np

from align.objectives.groups import centre


class Maximin:
    reads = ("reference_point",)
    whiten = False

    def __call__(self, rewards, groups, weights, sigma, config):
        centred = centre(rewards, groups, config.baseline) / sigma
        return np.where(weights > 0, centred, np.inf).min(axis=1)


maximin = Maximin()
'''

LOSS = '''
"""Focal likelihood (1708.02002): tokens that the model already gives are weighed down, (1 - p)^gamma."""

from align.losses.base import LossConfig, LossInputs, LossOutput, Needs


class Config(LossConfig):
    gamma: float = 2.0


def needs(config):
    return Needs(record="conversation", nll="chosen")


def loss(inputs, config):
    from align.losses.reduce import share_of_loss

    logps, mask = inputs.outputs.logps, inputs.batch.nll_mask
    terms = -((1.0 - logps.exp()) ** config.gamma) * logps
    total = (terms * mask).sum() / max(inputs.counts.nll_tokens, 1)
    return LossOutput(total, {"loss/total": share_of_loss(total)})
'''


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    monkeypatch.chdir(tmp_path)
    return open_workshop(tmp_path)


def checked(capsys: pytest.CaptureFixture[str], status: int) -> str:
    assert main(["check", "recipe.yaml"]) == status
    captured = capsys.readouterr()
    return captured.out + captured.err


# ------------------------------------------------------------------------------------------------- data formats


def with_layout(workshop: Workshop) -> None:
    workshop.write("layouts.py", LAYOUT)
    workshop.write("riddles.jsonl", ROWS)
    source = '{path: riddles.jsonl, format: "layouts.py:RIDDLES"}'
    workshop.change(
        "    data: sft.jsonl\n    batch: {sequences: 4}\n", f"    data: {source}\n    batch: {{sequences: 4}}\n"
    )


def test_a_layout_of_one_s_own_is_checked_and_read(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    with_layout(workshop)
    assert "riddles" in checked(capsys, 0)
    recipe = load_recipe(workshop.recipe)
    [source] = recipe.stage("sft").data
    assert source.format == f"{workshop.folder}/layouts.py:RIDDLES"
    known = fingerprint(recipe, recipe.stage("sft"), {}, workshop.folder)
    assert [Path(name).name for name in known["modules"]] == ["layouts.py"]


def test_what_a_layout_says_is_what_is_tokenised_and_another_layout_is_read_anew(
    workshop: Workshop, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from align.data.scratch import train_tokenizer
    from align.recipe.inputs import TokenizerFromScratch

    with_layout(workshop)
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TokenizerFromScratch.model_validate({"train_on": str(workshop.folder / "sft.jsonl")}), folder)
    tokenizer = load_tokenizer(folder)
    source = DataSource(path=str(workshop.folder / "riddles.jsonl"), format=f"{workshop.folder}/layouts.py:RIDDLES")
    for kind in ("conversation", "prompt"):
        found = prepare((source,), kind, tokenizer, seed=0, cache=workshop.folder / "cache")
        assert found.report.sources[0].layout == "riddles" and found.report.sources[0].kept == len(ROWS)
        ids = found.items[1].trunk.token_ids if kind == "conversation" else found.items[1].token_ids
        assert "What is 1 and 1?\nAdd them.\nCount." in tokenizer.decode(ids, skip_special_tokens=False)
    key = cache.key("data", "tokenizer", "conversation", source, None)
    workshop.write("layouts.py", LAYOUT + "\n# another\n")
    assert cache.key("data", "tokenizer", "conversation", source, None) != key


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("RIDDLES = 3\n", "a format is a Layout, a list of them, or a function of a row; this is int"),
        ("import nowhere_at_all\n", "importing it failed: ModuleNotFoundError"),
        ("raise SystemExit(3)\n", "importing it failed: SystemExit"),
    ],
)
def test_a_file_that_is_no_layout_is_refused_at_its_line(
    workshop: Workshop, capsys: pytest.CaptureFixture[str], text: str, words: str
) -> None:
    with_layout(workshop)
    workshop.write("layouts.py", text)
    said = checked(capsys, 2)
    assert words in said and "layouts.py:RIDDLES" in said


def test_a_layout_that_reads_another_kind_than_it_says_loses_its_rows_by_name(
    workshop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    with_layout(workshop)
    workshop.write("layouts.py", LAYOUT.replace("return Conversation((), ", "return Prompt("))
    said = checked(capsys, 2)
    assert "riddles.jsonl" in said and "the layout riddles is of a conversation, and read a Prompt" in said


# ------------------------------------------------------------------------------------------------- combiners


def test_a_combiner_of_one_s_own_makes_the_advantages_of_a_mix(tmp_path: Path) -> None:
    (tmp_path / "worst.py").write_text(COMBINER)
    config = Objectives.model_validate({"combine": f"{tmp_path}/worst.py:maximin", "scale": "none"})
    scores = np.array([[1, 0], [0, 1], [1, 1], [0, 0]], np.float32)
    names, kinds = ("right", "short"), ("reward", "reward")
    found, state, metrics = combine(scores, np.zeros(4, np.int64), names, kinds, config, {}, 0)
    assert found.tolist() == [-0.5, -0.5, 0.5, -0.5] and state == {}
    assert metrics["objective/right/mean"] == 0.5
    one = config.model_copy(update={"weights": {"short": 0.0}})
    weighted, *_ = combine(scores, np.zeros(4, np.int64), names, kinds, one, {}, 0)
    assert weighted.tolist() == [0.5, -0.5, 0.5, -0.5]


def test_a_combiner_of_one_s_own_is_checked_with_its_options(
    workshop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    workshop.write("worst.py", COMBINER)
    given = "{weights: {numeric: 1.0, brevity: 0.5}}"
    own = '{combine: "worst.py:maximin", weights: {numeric: 1.0}}'
    workshop.change(given, own)
    assert "worst.py:maximin by weight" in checked(capsys, 0)
    recipe = load_recipe(workshop.recipe)
    stage = recipe.stage("grpo")
    known = fingerprint(recipe, stage, {reward.use: "" for reward in stage.rewards}, workshop.folder)
    assert "worst.py" in [Path(name).name for name in known["modules"]]
    workshop.change(own, own[:-1] + ", mu: 0.5, reference_point: {numeric: 0.0}}")
    said = checked(capsys, 2)
    assert "`mu` has no effect" in said and "reference_point" not in said.replace("`reads` (reference_point)", "")


def test_what_is_no_combiner_is_refused(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    workshop.write("worst.py", "maximin = 3\n")
    workshop.change("{weights: {numeric: 1.0, brevity: 0.5}}", '{combine: "worst.py:maximin"}')
    said = checked(capsys, 2)
    assert "a combiner is a function of" in said and "this is a int" in said
    with pytest.raises(ValueError, match="did you mean 'decoupled'"):
        Objectives.model_validate({"combine": "decupled"})


# ------------------------------------------------------------------------------------------------- losses


def test_a_loss_of_one_s_own_is_checked_and_trains(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    from align.recipe.adapter import Adapter
    from align.recipe.inputs import Model
    from align.recipe.parts import LossTerm, Optim
    from align.train.spec import TrainerSpec
    from align.train.trainer import PolicyTrainer
    from tests.unit.core.families import make_family
    from tests.unit.core.trees import conversation

    workshop.write("focal.py", LOSS)
    workshop.change(
        "    batch: {sequences: 4}\n", "    batch: {sequences: 4}\n    loss: {name: focal.py, gamma: 1.5}\n"
    )
    assert "focal.py" in checked(capsys, 0)
    make_family("qwen3").save_pretrained(workshop.folder / "model")
    trees = [conversation(np.random.default_rng(n), n) for n in range(3)]

    def trained(name: str, **options: float) -> tuple[float, PolicyTrainer]:
        spec = TrainerSpec(
            model=Model(path=str(workshop.folder / "model"), dtype="float32"),
            base=str(workshop.folder / "model"),
            adapter_config=Adapter(kind="full"),
            losses=(LossTerm.model_validate({"name": name, **options}),),
            optim=Optim(lr=1e-2, schedule="constant", warmup=0.0),
            total_updates=4,
        )
        trainer = PolicyTrainer(spec)
        return trainer.step(trees, step=0, progress=0.0)["loss/total"], trainer

    own = str(workshop.folder / "focal.py")
    assert trained(own, gamma=0.0)[0] == pytest.approx(trained("sft")[0], rel=1e-6)  # the plain likelihood
    first, trainer = trained(own, gamma=1.5)
    assert first < trained("sft")[0]
    assert trainer.step(trees, step=1, progress=0.3)["loss/total"] < first
    assert torch.isfinite(torch.tensor(first))
