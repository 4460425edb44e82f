"""`align check` on environments: what an episode is, and what is refused with its place and what to do."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from align.check.facts import DataFacts
from align.check.memory.stage import Load
from align.cli.main import main
from align.episodes.describe import describe
from align.recipe.capabilities import SamplingStage
from align.recipe.environment import Environment
from align.recipe.load import load_recipe
from tests.unit.check.workshop import Workshop, open_workshop
from tests.unit.episodes.stage import CALCULATOR

STAGE = """\
  - id: grpo
    kind: online
    from: dpo
    data: {path: sft.jsonl}
    batch: {groups: 2, group_size: 4}
    rewards:
      - numeric
      - {use: "judge.py:brevity", timeout_s: 5}
    objectives: {weights: {numeric: 1.0, brevity: 0.5}}
    rollout: {max_tokens: 32}
"""
OURS = """\
  - id: grpo
    kind: online
    from: dpo
    data: {path: sft.jsonl}
    batch: {groups: 2, group_size: 4}
    environment: {use: "world.py:Calculator", max_turns: 3, max_tokens: 64, max_observation_tokens: 16}
    rollout: {max_tokens: 32}
"""


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    shop = open_workshop(tmp_path / "shop")
    shop.write("world.py", CALCULATOR)
    shop.change(STAGE, OURS)
    shop.change("max_position_embeddings: 256", "max_position_embeddings: 2048")
    monkeypatch.chdir(shop.folder)
    return shop


def checked(capsys: pytest.CaptureFixture[str], status: int, *changes: str) -> str:
    code = main(["check", "recipe.yaml", *changes])
    captured = capsys.readouterr()
    assert code == status, captured.out + captured.err
    return captured.out + captured.err


def test_the_check_says_what_an_episode_is(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    said = checked(capsys, 0)
    assert "environment calculator: tools add, calls read as hermes, turns of its own (respond), a reward" in said
    assert "at most 3 turns of 32 tokens, 64 in all, answers of at most 16" in said
    small = "{use: world.py:Calculator, max_turns: 3, max_tokens: 64, max_observation_tokens: 16}"
    said = checked(capsys, 0, f"stages.exam.environment={small}", "stages.exam.rewards=[]")
    assert said.count("environment calculator") == 2


def test_an_episode_fits_the_model_and_its_memory_is_counted_whole(
    workshop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    said = checked(capsys, 0, "stages.grpo.environment.history=template")
    assert "another sequence (`episode/forks`), of which it may have 3" in said
    said = checked(capsys, 2, "stages.grpo.environment.max_observation_tokens=512")
    assert "an episode may need 2,366 tokens" in said and "`max_position_embeddings` (2,048)" in said
    assert "lower `environment.max_observation_tokens`" in said
    said = checked(capsys, 2, "stages.grpo.rollout.max_model_len=400")
    assert "more than rollout.max_model_len (400)" in said and "raise `rollout.max_model_len`" in said
    long = [{"messages": [{"role": "user", "content": "1 + 2? " * 400}], "answer": "3"}]
    workshop.write("long.jsonl", long)
    said = checked(capsys, 2, "stages.grpo.eval={data: long.jsonl}")
    assert "an episode may need" in said and "more than the model's `max_position_embeddings` (2,048)" in said
    stage = next(stage for stage in load_recipe(workshop.recipe).stages if stage.id == "grpo")
    assert isinstance(stage, SamplingStage) and stage.sampled_tokens == 64 + (16 + 64) + 2 * (16 + 64 + 7 * 16)
    load = Load.of(stage, DataFacts(longest=100, openings=[100]))
    assert load.length == load.longest == 100 + 528 and load.tokens == 2 * 100 + 8 * 528
    anew = stage.model_copy(update={"environment": (stage.environment[0].model_copy(update={"history": "template"}),)})
    trained = (32 + 80) + (64 + 80 + 192) + 528
    load = Load.of(anew, DataFacts(longest=100, openings=[100]))
    assert load.length == 100 + 528 and load.longest == 100 + trained and load.tokens == 2 * 100 + 8 * trained


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("stages.grpo.environment.use=world.py:Calculater", ["has no 'Calculater'", "Calculator"]),
        ("stages.grpo.environment.use=nowhere.py:Calculator", ["there is no file", "nowhere.py"]),
        ("stages.grpo.environment.use=judge.py:brevity", ["an environment is a class", "this is a function", "tools"]),
        ("stages.grpo.environment={tools: [judge.py:brevity]}", ["samples"]),
        ("stages.grpo.environment={}", ["give `use: file.py:Class`, or `tools"]),
        ("stages.grpo.environment={use: world.py:Calculator, max_turns: 0}", ["max_turns", "greater than 0"]),
        ("stages.grpo.environment.max_media=2", ["max_media: 2", "takes text alone", "vision-language"]),
        ("stages.grpo.environment.max_turnz=3", ["max_turnz", "max_turns"]),
        ("stages.grpo.environment.args={size: 3}", ["has no argument 'size'"]),
        ("stages.grpo.environment.parser=hermez", ["hermez", "hermes"]),
        ("stages.grpo.environment.history=templates", ["expected append or template", "did you mean"]),
        (
            "stages.grpo.rewards=[{use: judge.py:brevity, as: calculator}]",
            ["both give an objective 'calculator'", "as:"],
        ),
        ("stages.grpo.objectives={weights: {calculater: 1}}", ["calculater", "calculator"]),
    ],
)
def test_what_cannot_be_is_refused_with_what_to_do(
    workshop: Workshop, capsys: pytest.CaptureFixture[str], change: str, words: list[str]
) -> None:
    said = checked(capsys, 2, change)
    assert all(word in said for word in words), said
    assert "recipe.yaml:" in said or "override `" in said, said


def test_episodes_that_nobody_scores_are_refused(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    workshop.write("world.py", CALCULATOR.replace("def reward(self)", "def _reward(self)"))
    said = checked(capsys, 2)
    assert "nothing scores the episodes" in said and "sample.turns" in said


def test_rows_that_name_other_tools_and_plain_prompts_are_refused(
    workshop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    other = {"type": "function", "function": {"name": "search", "parameters": {"type": "object", "properties": {}}}}
    messages = [{"role": "user", "content": "1 + 2?"}]
    workshop.write("asked.jsonl", [{"messages": messages, "tools": [other], "answer": "3"}] * 2)
    said = checked(capsys, 2, "stages.grpo.data=asked.jsonl")
    assert "names a tool 'search'" in said and "add" in said
    workshop.write("plain.jsonl", [{"prompt": "1 + 2 ="}, {"prompt": "3 + 4 ="}])
    assert "a prompt of plain text has no turns" in checked(capsys, 2, "stages.grpo.data=plain.jsonl")
    as_text = "stages.grpo.environment.tools_in=prompt"
    assert "names a tool 'search'" in checked(capsys, 2, "stages.grpo.data=asked.jsonl", as_text)
    schema = json.loads(json.dumps(asyncio.run(describe(Environment(use="world.py:Calculator"), workshop.folder))))[
        "tools"
    ]
    workshop.write("same.jsonl", [{"messages": messages, "tools": schema, "answer": "3"}] * 2)
    checked(capsys, 0, "stages.grpo.data=same.jsonl")
    changed = {**schema[0], "function": {**schema[0]["function"], "description": "Multiply."}}
    workshop.write("same.jsonl", [{"messages": messages, "tools": [changed], "answer": "3"}] * 2)
    assert "the row's description of the tool 'add' is not" in checked(capsys, 2, "stages.grpo.data=same.jsonl")
    workshop.write("world.py", CALCULATOR.replace("def add(", "def _add("))
    said = checked(capsys, 2, "stages.grpo.data=asked.jsonl")
    assert "the stage's environment has no tools" in said
    assert "a prompt of plain text" in checked(capsys, 2, "stages.grpo.data=plain.jsonl"), "a game has turns, too"


def test_a_template_without_tools_is_refused_and_takes_them_as_text(
    workshop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    template = workshop.write("plain.jinja", plain)
    said = checked(capsys, 2, f"model.chat_template={template}")
    assert "chat template" in said and "tools_in: prompt" in said
    assert "calls read as hermes" in checked(
        capsys, 0, f"model.chat_template={template}", "stages.grpo.environment.tools_in=prompt"
    )


def test_each_of_several_environments_is_said_and_a_row_must_choose(
    workshop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    small = "use: world.py:Calculator, max_tokens: 64, max_observation_tokens: 16"
    twice = f"[{{{small}, as: one, max_turns: 2}}, {{{small}, as: two}}]"
    rows = [
        {"messages": [{"role": "user", "content": "1 + 2?"}], "answer": "3", "environment": name}
        for name in ("one", "two")
    ]
    workshop.write("chosen.jsonl", rows)
    both = (f"stages.grpo.environment={twice}", "stages.grpo.data={path: chosen.jsonl}")
    said = checked(capsys, 0, *both)
    assert "environment one: tools add" in said and "environment two: tools add" in said
    assert "at most 2 turns of 32" in said and "at most 8 turns of 32" in said
    said = checked(capsys, 2, *both, "stages.grpo.rollout.max_model_len=600")
    assert "an episode of two may need" in said
    said = checked(capsys, 2, both[0])
    assert "the row chooses none of the stage's environments" in said and "'one', 'two'" in said
    workshop.write("chosen.jsonl", [{**rows[0], "environment": "three"}])
    assert "is 'three', and the stage has 'one', 'two'" in checked(capsys, 2, *both)
    unnamed = twice.replace(", as: two", "")
    said = checked(capsys, 2, f"stages.grpo.environment={unnamed}")
    assert "of several environments each has a name" in said and "as: NAME" in said
    for number in (1, 2):
        source = CALCULATOR.replace("import environment", "import Objective, environment")
        source = source.replace("@environment", f"@environment(objectives={{'right': Objective(range=(0, {number}))}})")
        workshop.write(f"world{number}.py", source.replace("return float(", "return dict(right="))
    others = twice.replace("world.py", "world1.py", 1).replace("world.py", "world2.py", 1)
    said = checked(capsys, 2, f"stages.grpo.environment={others}", both[1])
    assert "two environments give an objective 'right', of other kinds or ranges" in said


def test_tools_that_the_prompt_describes_are_counted(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    def longest(*changes: str) -> int:
        return int(
            checked(capsys, 0, *changes).partition("the longest is ")[2].partition(" tokens")[0].replace(",", "")
        )

    by_template, as_text = longest(), longest("stages.grpo.environment.tools_in=prompt")
    assert as_text > by_template - 200, "schemas and instructions are text of every prompt"
    bare = longest("stages.grpo.environment={use: world.py:Calculator, max_turns: 1, max_tokens: 1, tools_in: prompt,"
                   " max_observation_tokens: 1}", "stages.grpo.rollout.max_tokens=1")  # fmt: skip
    assert bare > 300, "of bytes"


def test_echo_wants_an_environment_and_a_loss_beside_it(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    both = "stages.grpo.loss=[{name: grpo}, {name: echo, weight: 0.05}]"
    checked(capsys, 0, both)
    assert "alone learns from no score" in checked(capsys, 2, "stages.grpo.loss=echo")
    workshop.change(OURS, STAGE)
    assert "learns what an environment answers, and the stage has none" in checked(capsys, 2, both)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("stages.grpo.environment.parser=mistral", "writes calls as hermes reads them, and mistral does not"),
        (
            "stages.grpo.environment={use: world.py:Calculator, tools_in: prompt, parser: glm}",
            "asks for calls as hermes",
        ),
        ("stages.grpo.environment.as='a b/c'", "letters, digits, `_`, `-` and `.` alone"),
        ("stages.grpo.environment.as='..'", "one of the first three at its beginning"),
        ("stages.grpo.rewards=[{use: judge.py:brevity, as: 'a b/c'}]", "letters, digits, `_`, `-` and `.` alone"),
        ("stages.grpo.environment.on_kill={right: 0}", "there is no objective 'right'"),
        ("stages.grpo.environment.signature=trl", "decorated with @environment"),
        ("stages.grpo.environment.python=/no/python", "/no/python cannot be run: No such file or directory"),
    ],
)
def test_options_that_would_have_no_effect_or_a_wrong_one_are_refused(
    workshop: Workshop, capsys: pytest.CaptureFixture[str], change: str, why: str
) -> None:
    assert why in checked(capsys, 2, change)


def test_what_cannot_score_and_what_cannot_call_is_said(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    workshop.write("world.py", CALCULATOR.replace("def reward(self)", "def _reward(self)"))
    small = "max_turns: 3, max_tokens: 64, max_observation_tokens: 16"
    said = checked(
        capsys, 2, f"stages.exam.environment={{use: world.py:Calculator, {small}}}", "stages.exam.rewards=[]"
    )
    assert said.count("nothing scores the episodes") == 2, "an exam of nothing is none"
    workshop.write("tools.py", 'def add(a: int, b: int) -> str:\n    """Add."""\n    return str(a + b)\n')
    said = checked(capsys, 2, f"stages.grpo.environment={{tools: tools.py:add, {small}}}")
    assert "plain functions score nothing" in said and "add `rewards: [...]`" in said and "def reward" not in said
    workshop.write("world.py", CALCULATOR.replace("def add(", "def _add("))
    assert "calculator has no tools" in checked(capsys, 2, "stages.grpo.environment.parser=hermes")


@pytest.mark.parametrize(("source", "why"), [("import os\nos._exit(7)\n", "must not end the process, by os._exit")])
def test_a_file_that_ends_its_process_is_said_to(
    workshop: Workshop, capsys: pytest.CaptureFixture[str], source: str, why: str
) -> None:
    workshop.write("world.py", source)
    assert why in checked(capsys, 2)
