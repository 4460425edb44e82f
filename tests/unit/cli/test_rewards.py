"""`align rewards list` and `align rewards try`: what they print, and when they say no."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from align.cli.main import main
from align.protocols.fleet import Completion, Group, PromptItem
from align.protocols.scorer import ScoreTable
from align.protocols.trees import Medium
from align.stages.rollout_log import RolloutLog
from rewards.find import builtin_names

PLUGINS = """
import time
from rewards import Objective, Score, reward

def answer(row, *, column="answer"):
    return str(row[column]) if column in row else None

@reward(gold=answer)
def right(samples, *, column: str = "answer"):
    return [float(str(s.row[column]) in s.completion) for s in samples]

@reward(gold=answer)
def longest(samples):
    return [float(len(s.completion)) for s in samples]

@reward(gold=answer)
def constant(samples):
    return [1.0 for s in samples]

@reward(gold=answer, objectives={"wrong": Objective(kind="cost", range=(0, 1))})
def distance(samples):
    return [float(s.completion != str(s.row["answer"])) for s in samples]

@reward(gold=lambda row: 5)
def odd(samples):
    return [1.0 for s in samples]

@reward(retries=0)
def picky(samples):
    if any(s.completion.startswith("five") for s in samples):
        raise ValueError("five is not my number")
    return [Score(float(len(s.messages)), info={"said": s.completion}) for s in samples]

@reward(retries=0)
def red(samples):
    from PIL import Image
    found = []
    for s in samples:
        [medium], [turn] = s.media, s.messages
        assert turn["content"][0] == medium and medium["type"] == "image", (turn, medium)
        with Image.open(medium["path"]) as picture:
            found.append(float(picture.convert("RGB").getpixel((0, 0))[0]))
    return found

def of_trl(prompts, completions, answer, **kwargs):
    return [float(c[0]["content"] == str(a)) for c, a in zip(completions, answer)]
"""

ROWS: list[dict[str, Any]] = [
    {"prompt": [{"role": "user", "content": "2+2?"}], "answer": 4, "said": "4"},
    {"prompt": [{"role": "user", "content": "2+3?"}], "answer": 5, "said": "five, I would say"},
    {"prompt": [{"role": "user", "content": "2+4?"}], "answer": 6, "said": ["6", "7"]},
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine.py").write_text(PLUGINS)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def attempt(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    status = main(["rewards", *words])
    said = capsys.readouterr()
    return status, said.out + said.err


def on_rows(capsys: pytest.CaptureFixture[str], name: str, *more: str) -> tuple[int, str]:
    return attempt(capsys, "try", f"mine.py:{name}", "--data", "rows.jsonl", "--completion", "said", *more)


def test_list_names_every_reward_with_what_it_gives_and_takes(capsys: pytest.CaptureFixture[str]) -> None:
    status, said = attempt(capsys, "list")
    assert status == 0 and "does not load" not in said
    assert set(builtin_names()) <= set(said.splitlines())
    assert "gives: reward in [0, 1]" in said and "pattern (needed)" in said and "tolerance=0.0" in said


def test_list_shows_installed_plugins_and_those_that_do_not_load(tmp_path: Path) -> None:
    (tmp_path / "theirs.py").write_text('def kind(samples):\n    """Is it kind?"""\n    return []\n')
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[align.rewards]\nkind = theirs:kind\ngone = theirs:gone\n")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); from align.cli.main import main; main(['rewards', 'list'])"
    root = str(Path(__file__).parents[3])
    environment = {"PYTHONPATH": f"{root}:{tmp_path}", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert "kind  (installed: " in done.stdout and "Is it kind?" in done.stdout
    assert "gone\n    does not load: importing it failed" in done.stdout


def test_try_prints_scores_texts_and_time_and_proves_the_gold(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, said = on_rows(capsys, "right")
    assert status == 0, said
    assert "right on 4 completions of 3 rows, column 'said'" in said
    assert 'rows.jsonl:1: right 1\n    scored: "4"' in said
    assert "right (reward): mean 0.5, std 0.5, from 0 to 1, missing 0" in said
    assert "samples/s" in said and "p95" in said and "errors: none" in said
    assert "gold: best on 3 of 3 rows with a gold answer; above 8 other answers, equal to 0" in said


def test_try_says_no_where_another_answer_beats_the_gold(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, said = on_rows(capsys, "longest")
    assert status == 1
    assert "gold: best on 2 of 3 rows" in said
    assert 'rows.jsonl:2: longest 1, worse than 17 of "five, I would say"' in said


def test_try_says_no_where_the_gold_is_only_as_good_as_all_others(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, said = on_rows(capsys, "constant")
    assert status == 1 and "does not tell them apart" in said


def test_a_cost_is_best_where_it_is_least(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, said = on_rows(capsys, "distance")
    assert status == 0 and "wrong (cost): mean 0.5" in said and "best on 3 of 3" in said


def test_gold_receives_the_arguments_that_it_names(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, said = on_rows(capsys, "right", "--args", "column=said")
    assert status == 0 and "best on 3 of 3" in said
    status, said = on_rows(capsys, "odd")
    assert status == 1 and "gold failed: gold TypeError: gold gave a int" in said


def test_failures_are_shown_with_their_row_and_text(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, said = on_rows(capsys, "picky")
    assert status == 0, "one of four may fail"
    assert "errors: 1 of 4 samples failed" in said
    assert "rows.jsonl:2: raised: ValueError: five is not my number" in said
    assert "picky (reward): mean 1" in said, "each prompt has one message"
    assert 'info: {"said": "4"}' in said


def test_a_failed_call_is_told_once_in_the_summary_and_not_in_lines_of_a_log(
    here: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    _, said = on_rows(capsys, "picky")
    assert "failed calls: " in said and not [r for r in caplog.records if r.name == "rewards.execution"]


def test_too_many_failures_are_an_exit_code(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "rows.jsonl").write_text("".join(json.dumps({**row, "said": "five"}) + "\n" for row in ROWS))
    status, said = on_rows(capsys, "picky")
    assert status == 1 and "errors: 3 of 3 samples failed" in said and "no score, missing 3" in said


def test_functions_for_trl_are_tried_too(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, said = on_rows(capsys, "of_trl", "--signature", "trl")
    assert status == 0 and "of_trl (reward): mean 0.5" in said


def test_what_is_scored_is_not_taken_for_the_reference(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": [{"role": "user", "content": "2+2?"}], "completion": "5", "answer": "4"}]
    (here / "rows.jsonl").write_text(json.dumps(rows[0]))
    _, said = attempt(capsys, "try", "exact", "--data", "rows.jsonl", "--completion", "completion")
    assert "exact 0" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["exact", "--data", "gone.jsonl", "--completion", "said"], "there is no such file"),
        (["exact", "--data", "rows.jsonl", "--completion", "text"], "the row has no column 'text'"),
        (["exact", "--data", "rows.jsonl", "--completion", "answer"], "which is no text"),
        (["nothing", "--data", "rows.jsonl", "--completion", "said"], "there is no reward called 'nothing'"),
        (["regex", "--data", "rows.jsonl", "--completion", "said"], "regex needs the argument 'pattern'"),
        (["exact", "--data", "rows.jsonl", "--completion", "said", "--args", "column"], "is no key=value"),
    ],
)
def test_what_cannot_be_tried_is_refused_with_its_reason(
    here: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    status, said = attempt(capsys, "try", *words)
    assert status == 2 and message in said


def rollouts(here: Path, origin: str, media: tuple[Medium, ...] = (), name: str = "rollouts") -> Path:
    message = {"role": "user", "content": "2+2?"}
    prompt = PromptItem(70, np.arange(3), 0, (message,), {}, origin, media)

    def said(text: str, finish: Any, raw: str | None = None) -> Completion:
        ids = np.arange(4, dtype=np.int64)
        return Completion(ids, np.zeros(4, np.float32), np.full(4, 2, np.int32), text, finish, raw)

    group = Group(prompt, (said("it is 4", "eos", "it is <answer>4</answer>"), said("it is", "length")))
    table = ScoreTable(("right",), np.zeros((2, 1), np.float32), ("reward",))
    log = RolloutLog(here / name)
    log.cut_back(0)
    log.add(1, [group], ["user: 2+2?"], table, np.zeros(2, np.float32), np.ones(2, bool))
    log.close_file()
    return here / name


def test_a_runs_rollouts_are_tried_with_the_rows_they_came_from(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = rollouts(here, f"{here}/rows.jsonl:1")
    status, said = attempt(capsys, "try", "mine.py:right", "--data", str(folder), "--completion", "completion")
    assert status == 0 and "above 1 other answers, equal to 1" in said
    assert "(step 1, group 70, sample 0): right 1" in said and "(step 1, group 70, sample 1): right 0" in said


def test_rollouts_are_tried_with_their_special_tokens_or_without(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = rollouts(here, f"{here}/rows.jsonl:1")
    words = ["try", "regex", "--data", str(folder), "--completion", "completion", "--args", "pattern=<answer>4"]
    status, said = attempt(capsys, *words)
    assert status == 0 and "sample 0): regex 0" in said
    assert "note: 1 texts were scored without their special tokens; --text raw" in said
    status, said = attempt(capsys, *words, "--text", "raw")
    assert status == 0 and 'sample 0): regex 1\n    scored: "it is <answer>4</answer>"' in said and "note" not in said


def test_failed_calls_are_told_and_the_scope_may_be_chosen(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{**ROWS[0], "said": ["five", "4", "4"]}, ROWS[1] | {"said": ["5", "5", "6"]}]
    (here / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, said = on_rows(capsys, "picky")
    assert status == 0 and "failed calls: 3 of 5" in said and "3 x raised: ValueError: five is not my number" in said
    assert "errors: 1 of 6 samples failed" in said
    status, said = on_rows(capsys, "picky", "--scope", "batch")
    assert status == 0, "one group may fail"
    assert "errors: 3 of 6 samples failed" in said and "failed calls: 2 of 3" in said


def test_an_answer_that_is_scored_is_said_to_be_missing_as_the_reference(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, more in (("plain", {}), ("tried", {"said": "it is 4"})):
        rows = [{"instruction": "?", "input": "", "output": answer, **more} for answer in ("4", "5")]
        (here / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, said = attempt(capsys, "try", "numeric", "--data", "plain.jsonl", "--completion", "output")
    assert status == 1 and "column 'output' is these rows' answer" in said and "row['reference_answer']" in said
    status, said = attempt(capsys, "try", "numeric", "--data", "tried.jsonl", "--completion", "said")
    assert status == 0 and "these rows' answer" not in said and "tried.jsonl:1: numeric 1" in said, said


def test_rollouts_whose_data_are_gone_are_tried_without_rows(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = rollouts(here, "/gone/rows.jsonl:1")
    status, said = attempt(
        capsys, "try", "length", "--data", str(folder), "--completion", "completion", "--args", "target=4"
    )
    assert status == 0 and "/gone/rows.jsonl is not there" in said and "length 1" in said


def seen(here: Path) -> Path:
    """Rows with a picture each: a file, and a data URI."""
    paths = []
    for number, name in enumerate(("a.png", "b.png")):
        paths.append(here / name)
        Image.new("RGB", (8, 8), (40 + 60 * number, 0, 0)).save(paths[-1])
    uri = "data:image/png;base64," + base64.b64encode(paths[1].read_bytes()).decode()
    rows = [{"prompt": "<image>Red?", "image": image, "said": "yes"} for image in ("a.png", uri)]
    (here / "seen.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return here / "seen.jsonl"


def test_rewards_are_shown_the_pictures_of_rows(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = seen(here)
    words = ("try", "mine.py:red", "--data", rows.name, "--completion", "said")
    status, said = attempt(capsys, *words)
    assert status == 0 and "seen.jsonl:1: red 40" in said and "seen.jsonl:2: red 100" in said, said
    (here / "a.png").unlink()
    status, said = attempt(capsys, *words)
    assert status == 2 and "there is no file a.png" in said and "seen.jsonl:1" in said


@pytest.mark.parametrize(("there", "value"), [(True, 7), (False, 40)])
def test_rewards_are_shown_what_the_policy_saw_of_a_runs_pictures_while_it_is_there(
    here: Path, capsys: pytest.CaptureFixture[str], there: bool, value: int
) -> None:
    medium = Medium("image", "k", str(here / "store"), 0, 1, 4)
    if there:
        (here / "store").mkdir()
        Image.new("RGB", (8, 8), (7, 0, 0)).save(here / "store" / "k.png")
    folder = rollouts(here, f"{seen(here)}:1", (medium,))
    status, said = attempt(capsys, "try", "mine.py:red", "--data", str(folder), "--completion", "completion")
    assert status == 0 and f"sample 0): red {value}" in said, said


def test_the_verb_brings_no_torch_ray_or_vllm(here: Path) -> None:
    code = (
        "import sys; from align.cli.main import main\n"
        "assert main(['rewards', 'list']) == 0\n"
        "assert main(['rewards', 'try', 'mine.py:right', '--data', 'rows.jsonl', '--completion', 'said']) == 0\n"
        "heavy = {'torch', 'ray', 'vllm', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], cwd=here, check=True, capture_output=True)


def test_rollouts_of_a_run_are_read_by_the_columns_of_its_recipe(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rows were read without the recipe's mapping: no gold, no reference answer, and no way to say it."""
    rows = [{"frage": f"{n}+{n}?", "antwort": str(2 * n)} for n in (2, 3)]
    (here / "fragen.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = here / "runs" / "faq"
    folder = rollouts(run / "exam", f"{here}/fragen.jsonl:1", name="rollouts/sft")
    recipe = f"""
name: faq
output: {here}/runs
model: {{path: owner/name}}
stages:
  - {{id: sft, kind: sft, data: {{path: {here}/fragen.jsonl, columns: {{query: frage, response: antwort}}}}}}
  - id: exam
    kind: evaluate
    of: [sft]
    rewards: [numeric]
    data: {{path: {here}/fragen.jsonl, columns: {{query: frage, response: antwort}}}}
"""
    words = ["try", "numeric", "--completion", "completion", "--data"]
    status, said = attempt(capsys, *words, str(folder), "--columns", "query=frage", "response=antwort")
    assert status == 0 and "numeric 1" in said and "gold: best on 1 of 1" in said, "rollouts that stand alone"
    (run / "recipe.yaml").write_text(recipe)
    (run / "run.json").write_text("{}")
    status, said = attempt(capsys, *words, str(folder))
    assert status == 0 and "numeric 1" in said and "gold: best on 1 of 1" in said, said


def test_rollouts_of_an_evaluation_are_those_of_its_only_model_or_one_is_asked_for(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rollouts(here, f"{here}/rows.jsonl:1", name="rollouts/sft")
    words = ["try", "mine.py:right", "--data", "rollouts", "--completion", "completion"]
    status, said = attempt(capsys, *words)
    assert status == 0 and "(step 1, group 70, sample 0): right 1" in said
    rollouts(here, f"{here}/rows.jsonl:1", name="rollouts/grpo")
    status, said = attempt(capsys, *words)
    assert status == 2 and "several models" in said and "rollouts/grpo, rollouts/sft" in said
