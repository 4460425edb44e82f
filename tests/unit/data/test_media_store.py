"""The store's bound and leases, and the processes that fill it."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from align.data.media.library import Library
from align.data.media.shelf import Shelf
from align.data.records import MediaPart, RowError
from align.mediastore import tensors_path
from align.recipe.inputs import Media
from tests.unit.data.media_world import InProcess, MakeVlm, data_uri, picture, png

NOW = 2_000_000_000.0


def put(folder: Path, key: str, used: float, size: int = 1000) -> None:
    for suffix in (".safetensors", ".png"):
        path = folder / f"{key}{suffix}"
        path.write_bytes(b"x" * (size // 2))
        os.utime(path, (used, used))


def kept(folder: Path) -> set[str]:
    return {path.name.partition(".")[0] for path in folder.iterdir() if path.is_file()}


def test_what_was_used_longest_ago_goes_first_and_both_files_of_it(tmp_path: Path) -> None:
    for age, key in enumerate("abcd"):
        put(tmp_path, key, NOW - age)
    assert Shelf(tmp_path).prune(2500, NOW) == 4
    assert kept(tmp_path) == {"a", "b"}


def test_what_a_live_run_holds_stays_and_what_a_dead_one_held_does_not(tmp_path: Path) -> None:
    for age, key in enumerate("abcd"):
        put(tmp_path, key, NOW - age)
    mine, other = Shelf(tmp_path), Shelf(tmp_path)
    mine.hold(["d"])
    other.hold(["c"])
    (tmp_path / "leases" / "1-dead").write_text("b\n")
    mine.prune(0, NOW)
    assert kept(tmp_path) == {"c", "d"} and not (tmp_path / "leases" / "1-dead").exists()
    other.close()
    mine.prune(0, NOW)
    assert kept(tmp_path) == {"d"}
    mine.close()


def test_the_lease_of_a_killed_run_goes_with_the_next_one(tmp_path: Path) -> None:
    (tmp_path / "leases").mkdir()
    (tmp_path / "leases" / "1-dead").write_text("a\n")
    shelf = Shelf(tmp_path)
    shelf.hold(["b"])
    [lease] = (tmp_path / "leases").iterdir()
    assert lease.read_text() == "b\n"
    shelf.close()
    assert not list((tmp_path / "leases").iterdir())


def test_files_that_a_killed_process_left_unfinished_go_after_a_day(tmp_path: Path) -> None:
    for name, age in ((".a.17", 2 * 86400), (".b.18", 60)):
        (tmp_path / name).write_bytes(b"x")
        os.utime(tmp_path / name, (NOW - age, NOW - age))
    Shelf(tmp_path).prune(1e9, NOW)
    assert {path.name for path in tmp_path.iterdir()} == {".b.18"}


def test_damaged_files_count_as_absent(tmp_path: Path) -> None:
    put(tmp_path, "a", NOW)
    assert Shelf(tmp_path).facts("a") is None and Shelf(tmp_path).facts("none") is None


# ------------------------------------------------------------------------------------------------- processes


@pytest.fixture(scope="module")
def library(vlm: MakeVlm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Library]:
    """With one real child process, for it takes seconds to start."""
    made = Library(Media(workers=1, max_source_pixels=10_000), vlm("qwen2_5_vl"), tmp_path_factory.mktemp("store"))
    yield made
    made.close()


def show(library: Library, *sources: Any, folder: Path | None = None) -> list[Any]:
    return library.show([([MediaPart("image", source)], folder) for source in sources])


def children() -> list[psutil.Process]:
    return [c for c in psutil.Process().children() if "align.data.media.worker" in " ".join(c.cmdline())]


@pytest.mark.slow
def test_a_child_process_decodes_and_a_broken_picture_costs_its_row_alone(library: Library, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    found = show(library, "a.png", png()[:99], data_uri(png(picture(seed=1))), png(picture(200, 200)), folder=tmp_path)
    assert isinstance(found[1], RowError) and "truncated or damaged" in str(found[1])
    assert isinstance(found[3], RowError) and "more than `media.max_source_pixels`" in str(found[3])
    [[one], [other]] = [found[0], found[2]]
    assert tensors_path(library.store, one.key).is_file() and one.key != other.key
    assert one.files == ((str(tmp_path / "a.png"), one.files[0][1]),)
    assert len(children()) == 1


@pytest.mark.slow
def test_a_child_that_hangs_costs_one_row_and_is_replaced_until_the_library_closes(library: Library) -> None:
    show(library, png(picture(seed=2)))
    [child] = children()
    child.suspend()
    library._pool._children[0].timeout_s, before = 1.0, library._pool._children[0].timeout_s
    started = time.monotonic()
    [late] = show(library, png(picture(seed=3)))
    assert "was not processed within 1 s (`media.timeout_s`)" in str(late) and time.monotonic() - started < 20
    library._pool._children[0].timeout_s = before
    [[again]] = show(library, png(picture(seed=4)))
    assert again.kind == "image" and len(children()) == 1, "it lives on behind the call that started it"
    library.close()
    assert not children()


@pytest.mark.parametrize("change", ["processor_config.json", "patch_size", "max_pixels"])
def test_whatever_changes_a_mediums_tensors_changes_the_stores_key(vlm: MakeVlm, tmp_path: Path, change: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(vlm("qwen2_5_vl"), folder)

    def key(**media: Any) -> str:
        library = Library(Media(**media), folder, tmp_path / "store", pool=InProcess(folder))
        return library.fingerprint

    before = key()
    assert key() == before
    if change == "max_pixels":
        assert key(max_pixels=64 * 64) != before
        return
    path = folder / ("config.json" if change == "patch_size" else change)
    settings = json.loads(path.read_text())
    (settings["vision_config"] if change == "patch_size" else settings).update(
        {"patch_size": 7} if change == "patch_size" else {"image_mean": [0.1, 0.2, 0.3]}
    )
    path.write_text(json.dumps(settings))
    assert key() != before
