"""From the name in a recipe to a plugin: what is found, what is said where nothing is, and which code it is made of."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from rewards.api import PluginError
from rewards.find import load
from rewards.plugin import PluginSpec

SCORES = "def tidy(samples):\n    return [1.0 for _ in samples]\n"


def package(site: Path, name: str, points: str, **modules: str) -> None:
    """An installed package with entry points."""
    info = site / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[align.rewards]\n{points}")
    (site / name).mkdir()
    for module, text in ({"__init__": ""} | modules).items():
        (site / name / f"{module}.py").write_text(text)


def refused(use: str, folder: Path) -> PluginError:
    with pytest.raises(PluginError) as error:
        load(PluginSpec(use), folder)
    return error.value


def test_a_file_without_a_function_is_answered_with_the_functions_in_it(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(SCORES)
    said = refused("mine.py", tmp_path)
    assert "names a whole file" in said.what and said.remedy == "write mine.py:NAME; functions there: tidy"


def test_a_misspelt_name_is_answered_with_the_nearest(tmp_path: Path) -> None:
    assert str(refused("numerc", tmp_path).remedy).startswith("did you mean 'numeric'? ours: ")


def test_two_packages_that_offer_one_name_are_both_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, "acme_one", "acme_tidy = acme_one.scores:tidy\n", scores=SCORES)
    package(tmp_path, "acme_two", "acme_tidy = acme_two.scores:tidy\n", scores=SCORES)
    monkeypatch.syspath_prepend(str(tmp_path))
    said = refused("acme_tidy", tmp_path)
    assert "acme_one.scores:tidy of acme_one" in said.what and "acme_two.scores:tidy of acme_two" in said.what
    assert load(PluginSpec("acme_one.scores:tidy"), tmp_path).name == "tidy"


def test_an_entry_point_that_names_nothing_is_told_with_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package(tmp_path, "acme_gone", "acme_gone = acme_gone.nowhere:f\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    said = refused("acme_gone", tmp_path)
    assert said.where == "acme_gone, the entry point acme_gone.nowhere:f of acme_gone"
    assert said.remedy == "install 'acme_gone.nowhere', or put it beside the plugin"


def test_what_ends_the_process_is_told_with_the_users_own_line(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        "import argparse\nparser = argparse.ArgumentParser()\nparser.add_argument('--x', required=True)\n"
        "parser.parse_args([])\n" + SCORES
    )
    said = refused("script.py:tidy", tmp_path)
    assert "SystemExit: 2" in said.what and f"(at {tmp_path}/script.py:4)" in str(said.remedy)


def test_a_line_of_a_library_is_not_named_in_place_of_the_users(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import json\nWORDS = json.loads('{')\n" + SCORES)
    assert refused("mine.py:tidy", tmp_path).remedy == f"look at {tmp_path}/mine.py:2"


def test_modules_of_an_installed_plugins_own_package_are_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key of kept scores is made of them: an upgraded package must not be given the old ones."""
    site = tmp_path / "lib" / "site-packages"
    package(site, "acme_kept", "", scores="from acme_kept.scale import SCALE\n" + SCORES, scale="SCALE = 1\n")
    (site / "acme_kept" / "deep").mkdir()
    (site / "acme_kept" / "deep" / "more.py").write_text("from acme_kept.scores import tidy\n")
    monkeypatch.syspath_prepend(str(site))
    for use in ("acme_kept.scores:tidy", "acme_kept.deep.more:tidy"):
        found = load(PluginSpec(use), tmp_path)
        assert found.source == str(site / "acme_kept" / "scores.py") and "acme_kept.scale" in found.modules
    before = found.modules
    (site / "acme_kept" / "scale.py").write_text("SCALE = 2\n")
    assert load(PluginSpec("acme_kept.scores:tidy"), tmp_path).modules["acme_kept.scale"] != before["acme_kept.scale"]
    for name in [name for name in sys.modules if name.startswith("acme_kept")]:
        del sys.modules[name]
    importlib.invalidate_caches()


@pytest.mark.parametrize("name", ["part", "made.scored", "made"])
def test_a_partial_a_method_or_an_object_is_made_of_the_file_that_wrote_it(tmp_path: Path, name: str) -> None:
    """Not of functools: its hash does not change with the user's file, and kept scores would be taken for new ones."""
    (tmp_path / "mine.py").write_text(
        "from functools import partial\n"
        "def scored(samples, *, k):\n    return [k for _ in samples]\n"
        "part = partial(scored, k=2.0)\n"
        "class Made:\n"
        "    def scored(self, samples):\n        return [1.0 for _ in samples]\n"
        "    __call__ = scored\n"
        "made = Made()\n"
    )
    found = load(PluginSpec(f"mine.py:{name}", options={"cache": True}), tmp_path)
    assert found.source == str(tmp_path / "mine.py") and found.sha256 is not None
