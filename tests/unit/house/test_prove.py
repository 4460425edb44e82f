"""The runner of the long proofs, and the entries that they leave."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from align.recipe.load import load_recipe
from tests.prove import __main__ as prove
from tests.prove import entry, prove_broken_lines, prove_study


@pytest.fixture
def proofs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with two proofs, of which the first fails."""
    folder = tmp_path / "tests" / "prove"
    folder.mkdir(parents=True)
    (folder / "prove_false.py").write_text("raise SystemExit(1)\n")
    (folder / "prove_true.py").write_text("print('it is so')\n")
    monkeypatch.setattr(prove, "FOLDER", folder)
    monkeypatch.setattr(prove, "CHECKOUT", tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)  # another checkout's proofs would be found there first
    return folder


def test_a_failed_proof_keeps_no_other_from_running_and_fails_the_whole(
    proofs: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert prove.main([]) == 1
    printed = capfd.readouterr().out
    assert "it is so" in printed
    assert printed.splitlines()[-1] == "1 proved, 1 failed: false"


def test_a_name_chooses_and_an_unknown_one_lists_the_choices(proofs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert prove.main(["true"]) == 0
    assert prove.main(["maybe"]) == 2
    assert "no proof called maybe; there are: false, true" in capfd.readouterr().err


def test_a_folder_without_proofs_is_an_error(proofs: Path) -> None:
    for path in proofs.iterdir():
        path.unlink()
    assert prove.main([]) == 2


def test_an_entry_says_what_was_measured_with_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entry, "RESULTS", tmp_path / "results")
    options = {"claim": "two is even", "command": ["python", "-m", "x"], "proved": True, "seconds": 1.25}
    first = entry.record("even", figures={"remainder": 0}, **options)
    second = entry.record("even", figures={"remainder": 0}, **options)
    assert second.stem == f"{first.stem}-2"
    written = json.loads(first.read_text())
    assert (written["figures"], written["proved"], written["command"]) == ({"remainder": 0}, True, "python -m x")
    assert written["versions"]["torch"].startswith("2.")
    assert written["hardware"]["cores"] >= 1


def test_every_trained_front_of_the_study_has_the_same_budget(tmp_path: Path) -> None:
    recipe = load_recipe(prove_study.write_recipe(tmp_path, seed=30, steps=45))
    sft, *runs, exam = recipe.stages
    assert [stage.id for stage in runs] == [f"{name}-{n}" for name in prove_study.TRAINED for n in range(4)]
    assert exam.of == tuple(stage.id for stage in runs) and {stage.from_ for stage in runs} == {sft.id}
    budgets = {stage.model_dump_json(exclude={"id", "rewards", "objectives"}) for stage in runs}
    assert len(budgets) == 1, "steps, groups, sampling and optimizer"
    assert not {reward.use for reward in exam.rewards} & {reward.use for stage in runs for reward in stage.rewards}


def test_a_broken_line_is_one_change_that_its_tests_see_and_is_taken_back(tmp_path: Path) -> None:
    condition = "    if a > 1 and not a == 3:\n        raise ValueError(a + 1)\n"
    source = f"def larger(a: int = 0) -> bool:\n{condition}    return a < 2\n"
    (tmp_path / "one.py").write_text(source)
    found = prove_broken_lines.breaks(tmp_path, "one.py")
    seen: list[str] = []
    for one in found:
        prove_broken_lines.tried(
            tmp_path, one, (), lambda tree, path, tests: seen.append((tree / "one.py").read_text())
        )
        compile(seen[-1], "one.py", "exec")
    assert len(set(seen)) == len(found) == 11 and source not in seen
    assert source == (tmp_path / "one.py").read_text()
    assert all("ValueError(a + 1)" in text for text in seen), "what an error says is left alone"
    assert all((prove_broken_lines.CHECKOUT / room).is_dir() for room in prove_broken_lines.ROOMS)


def test_a_broken_line_is_looked_for_in_the_tests_of_its_name_first_and_slow_ones_count(tmp_path: Path) -> None:
    (tmp_path / "align").mkdir()
    (tmp_path / "align" / "ranks.py").write_text("BROKEN = True\n")
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "test_a.py").write_text("def test_nothing():\n    pass\n")
    (tests / "test_ranks.py").write_text("import pytest\n\n@pytest.mark.slow\ndef test_slow():\n    assert 0\n")
    (tests / "test_z.py").write_text("from align import ranks\n\ndef test_other():\n    assert not ranks.BROKEN\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow\ntimeout = 60\n")
    nearest = prove_broken_lines.nearest_first(tmp_path, "align/ranks.py", ("tests",))
    assert [Path(file).stem for file in nearest] == ["test_ranks", "test_z", "test_a"]
    failed = prove_broken_lines.first_failure(tmp_path, "align/ranks.py", ("tests",))
    assert failed == "FAILED tests/test_z.py::test_other"
    (tests / "test_z.py").unlink()
    failed = prove_broken_lines.first_failure(tmp_path, "align/ranks.py", ("tests",))
    assert failed == "FAILED tests/test_ranks.py::test_slow"
