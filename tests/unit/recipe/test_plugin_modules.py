"""Which Python files a plugin is made of: a resumed run compares every one of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from align.plugin_modules import module_hashes, modules_of, plugin_file


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / (name.replace("__", "/").replace("//", "/__init__") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def names(use: str, folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in modules_of(use, folder)]


def test_modules_beside_a_plugin_are_found_through_each_other(tmp_path: Path) -> None:
    folder = write(
        tmp_path,
        my="import math, json\nimport helper\n\ndef f(samples):\n    from late import number\n    return number",
        helper="import deeper",
        deeper="import helper\nimport importlib\nplug = importlib.import_module('named')",
        late="number = 1",
        named="",
        unused="",
    )
    assert names("my.py:f", folder) == ["deeper.py", "helper.py", "late.py", "my.py", "named.py"]
    assert names("my.py", folder) == names("my:f", folder)


def test_a_package_counts_with_all_its_files(tmp_path: Path) -> None:
    write(tmp_path / "judges", rules="LIMIT = 3")
    (tmp_path / "judges" / "deep").mkdir()
    (tmp_path / "judges" / "deep" / "words.py").write_text("import top")
    write(tmp_path, my="from judges import rules", top="", judge="from . import nothing")
    assert names("my.py:f", tmp_path) == ["judges/deep/words.py", "judges/rules.py", "my.py", "top.py"]
    (tmp_path / "judges" / "main.py").write_text("from .rules import LIMIT")
    assert names("judges.main:f", tmp_path) == ["judges/deep/words.py", "judges/main.py", "judges/rules.py", "top.py"]


def test_what_is_installed_is_no_part_of_it(tmp_path: Path) -> None:
    folder = write(tmp_path, my="import numpy, rewards, json\nfrom align import errors", numpy="", rewards="", json="")
    assert names("my.py:f", folder) == ["my.py"]
    assert modules_of("exact_match", folder) == [] and modules_of("numpy:sum", folder / "nowhere") == []


@pytest.mark.parametrize("text", ["def f(:", "\x00", "import " + "a." * 3000 + "b", "(" * 3000])
def test_a_file_that_is_no_python_is_a_file_all_the_same(tmp_path: Path, text: str) -> None:
    folder = write(tmp_path, my="import helper", helper=text)
    assert names("my.py:f", folder) == ["helper.py", "my.py"]


def test_the_file_of_a_plugin_is_looked_for_from_the_recipes_folder(tmp_path: Path) -> None:
    write(tmp_path / "r", my="")
    assert plugin_file("my.py:f", tmp_path / "r") == tmp_path / "r" / "my.py"
    assert plugin_file(f"{tmp_path}/r/my.py", Path("/nowhere")) == tmp_path / "r" / "my.py"
    assert plugin_file("gone.py:f", tmp_path) is None and plugin_file("hf/name", tmp_path) is None


def test_a_changed_helper_has_another_hash(tmp_path: Path) -> None:
    folder = write(tmp_path, my="import helper", helper="x = 1")
    before = module_hashes(["my.py:f", "exact_match"], folder)
    write(tmp_path, helper="x = 2")
    after = module_hashes(["my.py:f"], folder)
    assert [path for path in before if before[path] != after[path]] == [str(folder / "helper.py")]


@pytest.mark.parametrize(
    "text",
    [
        "import sys, os\nsys.path.insert(0, os.path.join(os.path.dirname(__file__), 'lib'))\nimport scoring\n",
        "import sys\nfrom pathlib import Path\nsys.path.append(str(Path(__file__).parent / 'lib'))\nimport scoring\n",
        "import sys, os\nsys.path.append(os.path.dirname(__file__) + '/lib')\ndef r(samples):\n    import scoring\n",
        "import site\nsite.addsitedir('lib')\nfrom scoring import weigh\n",
        "import runpy\nscoring = runpy.run_path('lib/scoring.py')\n",
        "exec(open('lib/scoring.py').read())\n",
        "from importlib.util import spec_from_file_location as spec\nspec('s', './lib/scoring.py')\n",
    ],
)
def test_a_module_in_a_folder_that_the_plugin_adds_or_opens_counts(tmp_path: Path, text: str) -> None:
    """Its own neighbours there do too; a folder that is not searched does not."""
    for folder in ("lib", "unused"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "terms.py").write_text("")
    (tmp_path / "lib" / "scoring.py").write_text("import terms\n" if "path." in text or "site" in text else "")
    (tmp_path / "mine.py").write_text(text)
    found = {path.relative_to(tmp_path).as_posix() for path in modules_of("mine.py:r", tmp_path)}
    beside = {"lib/terms.py"} if "path." in text or "site" in text else set()
    assert found == {"mine.py", "lib/scoring.py"} | beside


def test_a_module_above_the_plugins_folder_counts_where_the_plugin_searches_there(tmp_path: Path) -> None:
    (tmp_path / "rewards" / "deep").mkdir(parents=True)
    (tmp_path / "rewards" / "common.py").write_text("")
    text = "import sys, pathlib\nsys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))\nimport common\n"
    (tmp_path / "rewards" / "deep" / "mine.py").write_text(text)
    found = modules_of("rewards/deep/mine.py:r", tmp_path)
    assert tmp_path / "rewards" / "common.py" in found
