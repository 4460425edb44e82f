"""A new loss, engine, format, ... touches no more files than the table of `tests.seams` says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import seams

BY_NAME = {kind.name: kind for kind in seams.KINDS}


@pytest.mark.parametrize("name", BY_NAME)
def test_no_more_files_than_before_name_the_things_of_a_kind(name: str) -> None:
    found, limit = seams.count(BY_NAME[name]), seams.LIMITS[name]
    assert found.to_run <= limit[0] and found.complete <= limit[1], (found.tables, found.questions)


@pytest.mark.parametrize(
    ("kind", "text", "counted"),
    [
        ("loss", "x = loss.name == 'grpo'\n", (1, 2)),
        ("loss", "def f(x):\n    match x:\n        case 'kto':\n            pass\n", (1, 2)),
        ("loss", "x = name in ('grpo', 'other')\n", (1, 2)),
        ("loss", "from align.losses.grpo import loss\n", (2, 2)),
        ("loss", "from align.losses import grpo\n", (2, 2)),
        ("loss", "TABLE = {'grpo': 1, 'dpo': 2}\n", (2, 2)),
        ("combiner", "x: Literal['decoupled']\n", (2, 2)),
        ("loss", "raise ValueError('use dpo or grpo')\nx = {'grpo': 1}\nsay('kto')\n", (1, 1)),
        ("engine", "x = rollout.name == 'vllm'\n", (1, 2)),
        ("engine", "x = package == 'vllm'\n", (1, 1)),
        ("stage kind", "x = stage.kind not in ('merge', 'export')\n", (3, 3)),
        ("stage kind", "from align.recipe.stages import Stage\n", (2, 2)),
        ("stage kind", "from align.recipe.stages import OnlineStage, Stage\n", (3, 3)),
        ("verb", "verbs.add_parser('merge', help='')\n", (2, 2)),
    ],
)
def test_a_place_that_names_one_is_counted(tmp_path: Path, kind: str, text: str, counted: tuple[int, int]) -> None:
    (tmp_path / "align").mkdir()
    (tmp_path / "align" / "place.py").write_text(text)
    found = seams.count(BY_NAME[kind], tmp_path)
    assert (found.to_run, found.complete) == counted


def test_its_own_file_is_not(tmp_path: Path) -> None:
    (tmp_path / "align" / "losses").mkdir(parents=True)
    (tmp_path / "align" / "losses" / "grpo.py").write_text("x = name == 'grpo'\n")
    assert seams.count(BY_NAME["loss"], tmp_path).complete == 1
    (tmp_path / "align" / "losses" / "dpo.py").write_text("x = name == 'grpo'\n")
    seams._sites.cache_clear()
    assert seams.count(BY_NAME["loss"], tmp_path).complete == 2


def test_the_script_says_what_is_worse(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert seams.main([]) == 0 and "WORSE" not in capsys.readouterr().out
    monkeypatch.setattr(seams, "LIMITS", {**seams.LIMITS, "engine": (0, 0)})
    assert seams.main(["engine"]) == 1
    said = capsys.readouterr().out
    assert "WORSE" in said and "align/engines.py:" in said
