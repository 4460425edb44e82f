"""Plugins of packages that are installed: what a run depends on holds them as it holds a file beside the recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from align import losses
from align.check.validate import _shadowed
from align.data import cache
from align.errors import PluginError, RunFolderError
from align.plugin_modules import installed_hashes
from align.plugins import shadowed
from align.recipe.inputs import DataSource
from align.recipe.schema import Recipe
from align.stages.fingerprint import changes, fingerprint
from align.stages.runfolder import RunFolder

POINTS = "[align.rewards]\nacme_tidy = acme_align.scores.tidy:tidy\n[align.losses]\nacme_focal = acme_align.focal\n"
FILES = {
    "acme_align/__init__.py": "",
    "acme_align/scale.py": "SCALE = 1\n",
    "acme_align/scores/tidy.py": "from acme_align.scale import SCALE\n",
    "acme_align/focal.py": "",
    "acme_align-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: acme-align\nVersion: 1.0\n",
    "acme_align-1.0.dist-info/entry_points.txt": POINTS,
}


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def recipe(folder: Path, use: str, loss: str) -> Recipe:
    write(folder, {"rows.jsonl": '{"messages": []}\n'})
    data = str(folder / "rows.jsonl")
    stages: list[dict[str, Any]] = [
        {"id": "sft", "kind": "sft", "data": data, "steps": 4, "loss": {"name": loss}},
        {"id": "grpo", "kind": "online", "data": data, "steps": 4, "rewards": [{"use": use}]},
    ]
    return Recipe.model_validate(
        {"name": "run", "output": str(folder / "runs"), "model": {"path": str(folder / "model")}, "stages": stages}
    )


@pytest.mark.parametrize("place", ["beside/.venv/lib/python3.11/site-packages", "worked-on/src"])
@pytest.mark.parametrize(
    "use, loss", [("acme_tidy", "acme_focal"), ("acme_align.scores.tidy:tidy", "acme_align.focal:loss")]
)
def test_a_run_is_not_resumed_where_an_installed_plugin_or_its_package_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, use: str, loss: str
) -> None:
    site, beside = tmp_path / place, tmp_path / "beside"
    write(site, FILES)
    monkeypatch.syspath_prepend(str(site))
    r = recipe(beside, use, loss)

    def mark(stage: Any) -> dict[str, Any]:
        return fingerprint(r, stage, {use: "the reward's own file"}, beside)

    run = RunFolder.open(r, "name: run\n", resume=False, cwd=beside)
    for stage in r.stages:
        run.begin(stage.id, mark(stage), {"base": "b", "adapter": None})
    run.compare(r, mark)
    for name in ("acme_align/focal.py", "acme_align/scale.py", "acme_align/scores/tidy.py"):
        write(site, {name: FILES[name] + "# changed\n"})
        with pytest.raises(RunFolderError, match=rf"stage 'sft' ran with other .*installed\.{name}"):
            run.compare(r, mark)
        write(site, {name: FILES[name]})
    run.compare(r, mark)
    run.ended()


def test_the_same_package_installed_elsewhere_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for place in ("one", "two"):
        write(tmp_path / place, FILES)
        with monkeypatch.context() as here:
            here.syspath_prepend(str(tmp_path / place))
            found.append(installed_hashes(["acme_align.focal:loss"], tmp_path))
    assert found[0] == found[1]
    names = ("__init__.py", "focal.py", "scale.py", "scores/tidy.py")
    assert list(found[0]) == [f"acme_align/{name}" for name in names]


def test_a_library_on_pythonpath_that_a_plugin_imports_counts_and_a_released_one_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "lab", {"lab.py": "import deeper\n", "deeper/__init__.py": "", "unused.py": ""})
    monkeypatch.syspath_prepend(str(tmp_path / "lab"))
    write(tmp_path / "r", {"my.py": "import json, numpy, align, beside\nfrom lab import score\n", "beside.py": ""})
    assert list(installed_hashes(["my.py:f", "numeric"], tmp_path / "r")) == ["deeper/__init__.py", "lab.py"]


def test_a_run_of_a_version_that_hashed_no_packages_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "site", FILES)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    r = recipe(tmp_path, "acme_tidy", "acme_focal")
    new = fingerprint(r, r.stages[0], {}, tmp_path)
    assert new["installed"]
    assert changes({key: value for key, value in new.items() if key != "installed"}, new) == []


def test_rows_tokenised_by_a_layout_are_read_anew_where_its_package_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "site", FILES)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    source = DataSource(path=str(tmp_path / "rows.jsonl"), format="acme_align.focal:RIDDLES")
    key = cache.key("data", "tokenizer", "conversation", source, None)
    assert cache.key("data", "tokenizer", "conversation", source, None) == key
    write(tmp_path / "site", {"acme_align/scale.py": "SCALE = 2\n"})
    assert cache.key("data", "tokenizer", "conversation", source, None) != key


def test_a_run_is_not_resumed_where_a_file_that_its_generator_reads_changed(tmp_path: Path) -> None:
    write(tmp_path, {"raw.csv": "1\n", "made.py": "def rows():\n    yield from open('raw.csv')\n", "other.csv": "1\n"})
    r = recipe(tmp_path, "numeric", "sft")
    made = {"path": f"{tmp_path}/made.py:rows"}
    stage = r.stages[0].model_copy(update={"data": (DataSource(**made),)})
    before = fingerprint(r, stage, {}, tmp_path)
    write(tmp_path, {"other.csv": "2\n"})
    assert changes(before, fingerprint(r, stage, {}, tmp_path)) == []
    write(tmp_path, {"raw.csv": "2\n"})
    [said] = changes(before, fingerprint(r, stage, {}, tmp_path))
    assert said.startswith(f"read.{tmp_path}/raw.csv: ")


def test_a_name_of_ours_that_a_package_offers_too_is_ours_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = "[align.rewards]\nnumeric = acme_align.scores.tidy:tidy\n[align.losses]\nsft = acme_align.focal\n"
    write(tmp_path / "site", FILES | {"acme_align-1.0.dist-info/entry_points.txt": points})
    assert shadowed("sft", "align.losses", ("sft",)) is None
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    said = "numeric is ours; for that of acme-align write its module, acme_align.scores.tidy:tidy"
    assert shadowed("numeric", "align.rewards", ("numeric",)) == said
    assert shadowed("mine.py:numeric", "align.rewards", ("numeric",)) is None
    r = recipe(tmp_path, "numeric", "sft")
    assert all(fingerprint(r, stage, {"numeric": ""}, tmp_path)["installed"] == {} for stage in r.stages)
    assert _shadowed(r) == [said, said.replace("numeric", "sft").replace("scores.tidy:tidy", "focal")]


def test_a_loss_that_two_packages_offer_is_refused_with_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("acme_one", "acme_two"):
        points = f"[align.losses]\nacme_focal = {name}.focal\n"
        files = {"-1.0.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"}
        files |= {"-1.0.dist-info/entry_points.txt": points, "/focal.py": "", "/__init__.py": ""}
        write(tmp_path, {f"{name}{file}": text for file, text in files.items()})
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(PluginError, match=r"acme_one\.focal of acme_one and acme_two\.focal of acme_two"):
        losses.load("acme_focal")
