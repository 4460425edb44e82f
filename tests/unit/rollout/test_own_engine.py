"""An engine of one's own, `package.module:Class`: checked and planned by what it says of itself, started by name."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from align.cli.main import main
from align.errors import PluginError, RecipeError
from align.protocols.fleet import PromptItem, Sampling
from align.protocols.trainer import Publication
from align.recipe import engines
from align.recipe.adapter import Adapter
from align.recipe.engines import facts_of
from align.recipe.load import load_recipe
from align.recipe.parts import Rollout
from align.recipe.support import publish_mode
from align.simulate.measured import slots_of
from rollout.base import Engine, EngineSpec, generate, make_engine
from tests.unit.check.workshop import Workshop, open_workshop

ENGINE = '''
"""Samples every token of a small vocabulary alike, from each request's own seed."""

import numpy as np

from align.engines import EngineFacts
from align.protocols.fleet import Completion, Group


class Uniform:
    facts = EngineFacts(
        title="Uniform", options=("vocabulary", "slots"), in_flight=True, largest_rank=16,
        reserves="cache_bytes", reserved_on_cpu=3 << 20, slots=8, slots_option="slots", whole_batches=True,
    )

    def __init__(self, spec):
        self.size, self.version, self.waiting = int(spec.engine.get("vocabulary", 50)), None, []

    @property
    def running(self):
        return len(self.waiting)

    def add(self, requests):
        self.waiting += requests

    def step(self):
        done, self.waiting = self.waiting, []
        return [(r.ticket, Group(r.prompt, tuple(self.drawn(r, n) for n in range(r.group_size)))) for r in done]

    def drawn(self, request, number):
        count = request.sampling.max_tokens
        ids = np.random.default_rng([request.prompt.seed, number]).integers(0, self.size, count)
        logps = np.full(count, -np.log(self.size), np.float32)
        return Completion(ids, logps, np.full(count, self.version, np.int32), "", "length")

    def abandon(self, tickets):
        self.waiting = [r for r in self.waiting if r.ticket not in tickets]

    def accepts(self, publication):
        return True

    def publish(self, publication):
        self.version = publication.version
        return publication.digest

    def logps(self, token_ids, media=()):
        return [np.full(len(ids) - 1, -np.log(self.size), np.float32) for ids in token_ids]

    def close(self):
        self.waiting = []
'''
NAME = "uniform_engine:Uniform"


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    """A recipe that names the engine, which is installed beside nothing else."""
    shop = open_workshop(tmp_path / "shop")
    (tmp_path / "installed").mkdir()
    (tmp_path / "installed" / "uniform_engine.py").write_text(ENGINE)
    monkeypatch.chdir(shop.folder)
    monkeypatch.syspath_prepend(tmp_path / "installed")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "installed"), prepend=":")
    facts_of.cache_clear()
    shop.change("rollout: {max_tokens: 32}\n    steps", f'rollout: {{name: "{NAME}", max_tokens: 32}}\n    steps')
    return shop


def checked(capsys: pytest.CaptureFixture[str], status: int, *changes: str) -> str:
    assert main(["check", "recipe.yaml", *changes]) == status
    captured = capsys.readouterr()
    return captured.out + captured.err


def test_the_check_asks_an_engine_of_one_s_own_what_it_can_do(
    workshop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    said = checked(capsys, 0, "stages.exam.rollout.name=transformers")
    assert f"1 x {NAME}" in said and "KV cache, as reserved 3.0 MiB" in said
    said = checked(
        capsys, 2, "stages.exam.rollout.name=transformers",
        "stages.grpo.rollout.engine={vocabulry: 9}", "stages.dpo.adapter.rank=32",
    )  # fmt: skip
    assert "Uniform has no engine argument 'vocabulry'" in said and "did you mean vocabulary?" in said
    assert "serves adapters up to rank 16, not 32" in said


def test_an_engine_that_cannot_be_loaded_is_refused_where_the_recipe_names_it(
    workshop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    said = checked(capsys, 2, "stages.exam.rollout.name=transformers", "stages.grpo.rollout.name=uniform_engine:Nobody")
    assert "stages.grpo.rollout.name" in said
    assert "has no 'Nobody'" in said and "Uniform" in said
    with pytest.raises(RecipeError, match="did you mean `vllm`"):
        load_recipe(workshop.recipe, ["stages.grpo.rollout.name=vlm"])


def test_what_it_says_decides_publication_and_simulation(workshop: Workshop) -> None:
    own = Rollout(name=NAME, publish="in_flight")
    assert publish_mode(Adapter(kind="full"), own) == "weights"
    stage = load_recipe(workshop.recipe).stage("grpo")
    assert slots_of(stage) == 8
    assert slots_of(load_recipe(workshop.recipe, ["stages.grpo.rollout.engine={slots: 5}"]).stage("grpo")) == 5


def test_it_is_started_by_its_name_and_samples(workshop: Workshop) -> None:
    engine = make_engine(EngineSpec(name=NAME, folder="", engine={"vocabulary": 7}))
    engine.publish(Publication(version=3, kind="base", path="", digest=""))
    prompts = [PromptItem(n, np.array([1, 2]), seed=n) for n in range(2)]
    groups = generate(engine, prompts, 3, Sampling(max_tokens=5))
    for group in groups:
        for completion in group.completions:
            assert completion.token_ids.shape == (5,) and completion.token_ids.max() < 7
            assert completion.logps == pytest.approx(np.full(5, -np.log(7)), rel=1e-6)
    assert engine.logps([np.arange(4)])[0].shape == (3,)


MEMBERS = "".join(f"    def {member}(self, *given): ...\n" for member in engines.MEMBERS)


def test_the_members_that_are_looked_for_are_those_of_the_interface() -> None:
    own = {name for name, value in vars(Engine).items() if callable(value) and not name.startswith("_")}
    assert own == set(engines.MEMBERS)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("class Mine:\n    def step(self): ...\n", "this has no add and no abandon"),
        ("def Mine(): ...\n", "an engine is made of an EngineSpec, and nothing else"),
        (f"class Mine:\n    def __init__(self, spec, more): ...\n{MEMBERS}", "an engine is made of an EngineSpec"),
        (
            f"class Mine:\n    def __init__(self, spec): ...\n    facts = EngineFacts(slots='ten')\n{MEMBERS}",
            "`facts.slots`",
        ),
        (
            f"class Mine:\n    def __init__(self, spec): ...\n    facts = EngineFacts(options='slots')\n{MEMBERS}",
            "`facts.options`",
        ),
        (
            f"class Mine:\n    def __init__(self, spec): ...\n    facts = EngineFacts(refused=['top_p'])\n{MEMBERS}",
            "`facts.refused`",
        ),
    ],
)
def test_what_would_fail_when_the_stage_begins_fails_in_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, words: str
) -> None:
    name = f"engine_{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    (tmp_path / f"{name}.py").write_text("from align.engines import EngineFacts\n\n" + text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PluginError) as caught:
        engines.described(f"{name}:Mine")
    assert words in caught.value.what and caught.value.remedy


def test_a_class_beyond_its_methods_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plain_engine.py").write_text(f"class Mine:\n    def __init__(self, spec): ...\n{MEMBERS}")
    monkeypatch.syspath_prepend(tmp_path)
    assert engines.described("plain_engine:Mine")["title"] == "plain_engine:Mine"


def test_a_file_is_no_engine(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    """The check would find it beside the recipe, and the engine's process would not."""
    workshop.write("mine.py", "class Mine: ...\n")
    workshop.change(NAME, "mine.py:Mine")
    assert main(["check", "recipe.yaml"]) == 2
    assert "an engine is named package.module:Class, and 'mine.py' is a file" in capsys.readouterr().err


def test_an_engine_that_is_not_there_is_one_problem(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    workshop.change(NAME, "nowhere:Mine")
    assert main(["check", "recipe.yaml"]) == 2
    said = capsys.readouterr().err
    assert "problems" not in said and "recipe.yaml:40: the engine nowhere:Mine: importing it failed" in said
    assert "PYTHONPATH" in said
