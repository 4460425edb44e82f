"""The tokenised rows on disk: used where they are what was written, made again and said where not."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from align.data import cache as store
from align.data.prepare import prepare
from align.data.tokenizer import ChatTokenizer
from tests.unit.data.build import source, turns, write_jsonl

GOOD = {"messages": turns("q", "a")}


def made(tmp_path: Path, tokenizer: ChatTokenizer) -> list[list[int]]:
    path = tmp_path / "data.jsonl"
    if not path.exists():
        write_jsonl(path, [GOOD] * 3)
    found = prepare((source(path),), "conversation", tokenizer, seed=0, cache=tmp_path / "cache")
    return [tree.trunk.token_ids.tolist() for tree in found.items]


def arrays(entry: Path) -> dict[str, np.ndarray]:
    with np.load(entry, allow_pickle=False) as data:
        return {name: data[name] for name in data.files}


def another_token(entry: Path) -> None:
    """A whole file of the right form, in which one token is another."""
    found = arrays(entry)
    found["ids"][5] += 1
    with entry.open("wb") as out:
        np.savez(out, **found)


def without_digest(entry: Path) -> None:
    found = {name: array for name, array in arrays(entry).items() if name != "digest"}
    with entry.open("wb") as out:
        np.savez(out, **found)


def flipped(entry: Path) -> None:
    content = bytearray(entry.read_bytes())
    content[content.index(arrays(entry)["ids"].tobytes()) + 8] ^= 4
    entry.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        another_token,
        without_digest,
        flipped,
        lambda entry: entry.write_bytes(b""),
        lambda entry: entry.write_bytes(b"PK\x03\x04" + os.urandom(200)),
        lambda entry: (entry.unlink(), entry.mkdir()),
    ],
    ids=["token", "no digest", "bit", "empty", "garbage", "folder"],
)
def test_cached_rows_that_are_not_what_was_written_are_made_again_and_said(
    tmp_path: Path, tokenizer: ChatTokenizer, caplog: pytest.LogCaptureFixture, damage
) -> None:
    rows = made(tmp_path, tokenizer)
    [entry] = (tmp_path / "cache").iterdir()
    damage(entry)
    assert made(tmp_path, tokenizer) == rows
    assert f"the tokenised rows in {entry} are damaged" in caplog.text
    if entry.is_file():
        caplog.clear()
        assert made(tmp_path, tokenizer) == rows and not caplog.text, "what was made again is used"


def test_another_entrys_rows_under_this_name_are_not_taken(
    tmp_path: Path, tokenizer: ChatTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    rows = made(tmp_path, tokenizer)
    [entry] = (tmp_path / "cache").iterdir()
    write_jsonl(tmp_path / "data.jsonl", [GOOD] * 2)
    assert len(made(tmp_path, tokenizer)) == 2
    [other] = [path for path in (tmp_path / "cache").iterdir() if path != entry]
    os.replace(other, entry)
    write_jsonl(tmp_path / "data.jsonl", [GOOD] * 3)
    assert made(tmp_path, tokenizer) == rows and "its digest differs" in caplog.text


def test_rows_that_cannot_be_kept_are_trained_on_all_the_same(
    tmp_path: Path, tokenizer: ChatTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file has the folder's place")
    assert len(made(tmp_path, tokenizer)) == 3
    assert "are not kept" in caplog.text


def test_the_digest_covers_every_array(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    made(tmp_path, tokenizer)
    [entry] = (tmp_path / "cache").iterdir()
    for name in sorted(arrays(entry)):
        found = arrays(entry)
        found[name] = np.concatenate([found[name], found[name][:1]]) if found[name].size else np.ones(1, np.int8)
        with (tmp_path / entry.name).open("wb") as out:
            np.savez(out, **found)
        assert store.load(tmp_path / entry.name, "conversation") is None, name
