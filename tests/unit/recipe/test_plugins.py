"""Plugins by name, by dotted path and by file; and described by a child that may do what it likes."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import psutil
import pytest

from align.errors import PluginError
from align.plugins import asked_in_child, describe_in_child, resolve


def find(name: str, folder: Path | None = None) -> object:
    return resolve(name, group="align.losses", package="align.losses", hidden=("base",), folder=folder)


def test_ours_are_found_by_their_bare_name() -> None:
    import align.losses.sft

    assert find("sft") is align.losses.sft


def test_an_unknown_name_is_answered_with_the_choices() -> None:
    with pytest.raises(PluginError) as caught:
        find("sftt")
    said = str(caught.value)
    assert "no loss named 'sftt'" in said and "did you mean 'sft'?" in said and "dpo" in said and "base" not in said


def test_a_file_is_found_beside_the_recipe_and_may_import_its_siblings(tmp_path: Path) -> None:
    (tmp_path / "plugin_sibling.py").write_text("VALUE = 5\n")
    (tmp_path / "mine.py").write_text("from plugin_sibling import VALUE\nclass Holder:\n    value = VALUE\n")
    assert find("mine.py:Holder.value", tmp_path) == 5
    assert find("plugin_sibling:VALUE", tmp_path) == 5
    assert find("mine.py", tmp_path).Holder.value == 5  # type: ignore[attr-defined]


def test_a_users_rewards_py_neither_hides_nor_becomes_our_package(tmp_path: Path) -> None:
    import rewards

    (tmp_path / "rewards.py").write_text("def mine(samples):\n    return []\n")
    assert find("rewards.py:mine", tmp_path).__name__ == "mine"  # type: ignore[attr-defined]
    assert sys.modules["rewards"] is rewards


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("gone.py:f", None, "there is no file"),
        ("here.py:g", "def f(): ...\n", "names there: f"),
        ("here.py:f", "raise RuntimeError('at import')\n", "RuntimeError: at import"),
        ("here.py:f", "import sys\nsys.exit(3)\n", "SystemExit: 3"),
        ("no.such.module:f", None, "No module named"),
    ],
)
def test_what_cannot_be_loaded_says_why(tmp_path: Path, name: str, content: str | None, says: str) -> None:
    if content is not None:
        (tmp_path / "here.py").write_text(content)
    with pytest.raises(PluginError, match=says):
        find(name, tmp_path)


def describe(path: Path, limit_s: float = 30.0) -> object:
    return describe_in_child("rewards.describe", [f"{path}:f"], name="mine", limit_s=limit_s)


def test_a_plugin_is_described_without_being_imported_here(tmp_path: Path) -> None:
    path = tmp_path / "described.py"
    path.write_text("print('hello from the plugin')\ndef f(samples):\n    return [0.0]\n")
    answer = describe(path)
    assert isinstance(answer, dict) and answer["name"] == "f" and len(answer["sha256"]) == 64
    assert not any("described" in name for name in sys.modules)


def test_a_plugin_that_hangs_is_killed_with_what_it_started(tmp_path: Path) -> None:
    path, pids = tmp_path / "hangs.py", tmp_path / "pids"
    path.write_text(
        "import os, subprocess, time\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        f"open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}')\n"
        "time.sleep(60)\n"
    )
    started = time.monotonic()
    with pytest.raises(PluginError, match="did not load within 2 s"):
        describe(path, limit_s=2.0)
    assert time.monotonic() - started < 20
    deadline = time.monotonic() + 10  # a kill is sent at once and takes effect when the kernel gets to it
    while alive(pids.read_text().split()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pids.read_text().split())


def alive(pids: list[str]) -> list[str]:
    return [pid for pid in pids if psutil.pid_exists(int(pid)) and psutil.Process(int(pid)).status() != "zombie"]


@pytest.mark.parametrize("code", ["import os\nos._exit(4)\n", "import ctypes\nctypes.string_at(0)\n"])
def test_a_plugin_that_dies_is_a_message(tmp_path: Path, code: str) -> None:
    path = tmp_path / "dies.py"
    path.write_text(code)
    with pytest.raises(PluginError, match=r"ended with status -?\d+ while it was loaded"):
        describe(path)


@pytest.mark.parametrize(
    ("content", "remedy"),
    [
        ("x = 1\nraise RuntimeError('at import')\n", "look at {path}:2"),
        ("def (:\n", "look at {path}:1"),
        ("\nimport nowhere_at_all\n", "install 'nowhere_at_all', or put it beside the plugin (imported at {path}:2)"),
    ],
)
def test_where_to_look_is_a_line_of_the_plugin(tmp_path: Path, content: str, remedy: str) -> None:
    path = tmp_path / "here.py"
    path.write_text(content)
    with pytest.raises(PluginError) as caught:
        find("here.py:f", tmp_path)
    assert caught.value.remedy == remedy.format(path=path)
    with pytest.raises(PluginError) as caught:
        describe(path)
    assert caught.value.remedy == remedy.format(path=path)


def test_a_thread_keeps_no_reward_from_being_described_and_is_refused_where_it_would_keep_the_check(
    tmp_path: Path,
) -> None:
    path = tmp_path / "threads.py"
    path.write_text(
        "import threading, time\n"
        "threading.Thread(target=time.sleep, args=(60,), name='watch').start()\n"
        "def f(samples):\n    return [0.0]\n"
        "MINE = f\n"
    )
    assert isinstance(describe(path, limit_s=20.0), dict)
    with pytest.raises(PluginError, match="importing it started the thread 'watch'"):
        asked_in_child("align.objectives.combiners:described", f"{path}:MINE", 20.0)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("async def f(samples):\n    yield 1\n", "an `async def` that yields cannot be awaited"),
        (
            "from rewards import reward\ndef mine():\n    raise KeyError('a')\n"
            "@reward(validate=mine)\ndef f(samples):\n    return [0.0]\n",
            "`validate` of f failed: KeyError: 'a'",
        ),
    ],
)
def test_a_reward_that_would_fail_at_every_call_is_refused(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "refused.py"
    path.write_text(content)
    with pytest.raises(PluginError) as caught:
        describe(path)
    assert words in caught.value.what


def test_two_siblings_of_one_name_are_not_taken_for_one(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text("from twin_of_plugins import VALUE\n")
        (tmp_path / folder / "twin_of_plugins.py").write_text(f"VALUE = {folder!r}\n")
    assert find("mine.py:VALUE", tmp_path / "one") == "one"
    with pytest.raises(PluginError, match=r"it imports 'twin_of_plugins', which stands beside it, and .*one/twin_of"):
        find("mine.py:VALUE", tmp_path / "two")
    assert find("mine.py:VALUE", tmp_path / "one") == "one"
