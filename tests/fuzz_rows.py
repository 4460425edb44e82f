"""Rows and files as nobody should write them, and everybody does: any JSON in any place of every layout, files that are
cut off, mis-encoded or mixed. Deterministic: a seed gives the same rows."""

from __future__ import annotations

import copy
import gzip
import io
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from align.data.formats import LAYOUTS, fields_of
from align.data.prepare import prepare
from align.data.tokenizer import ChatTokenizer
from align.errors import AlignError
from align.recipe.inputs import DataSource
from align.recipe.labels import Labels

USER, ANSWER, BAD = (
    {"role": role, "content": text}
    for role, text in (("user", "what is it?"), ("assistant", "a fox"), ("assistant", "a dog"))
)
CALL = {
    "role": "assistant", "content": None,
    "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "add", "arguments": "{\"a\": 1}"}}],
}  # fmt: skip
TOOL = {"role": "tool", "tool_call_id": "c1", "name": "add", "content": "2"}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
PARTS = {"role": "user", "content": [{"type": "text", "text": "look "}, {"type": "image"}]}
HUMAN, GPT = {"from": "human", "value": "what is it?"}, {"from": "gpt", "value": "a fox"}
GOOD: dict[str, list[dict[str, Any]]] = {
    "conversation": [
        {"messages": [{"role": "system", "content": "be kind"}, USER, ANSWER], "tools": [], "weight": 1.0},
        {"messages": [USER, CALL, TOOL, ANSWER], "tools": TOOLS},
        {"prompt": "what is it? ", "completion": "a fox", "system": None},
        {"prompt": [USER], "completion": [ANSWER]},
        {"text": "what is it? a fox", "images": None},
        {"conversations": [HUMAN, GPT], "system": "be kind", "tools": "[]"},
        {"instruction": "what is it?", "input": "", "output": "a fox", "history": [["a", "b"]], "system": ""},
        {"query": "what is it?", "response": "a fox", "history": [["a", "b"]], "system": "be kind"},
    ],
    "pair": [
        {"prompt": "what is it?", "chosen": " a fox", "rejected": " a dog", "margin": 0.5, "weight": 2},
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [BAD]},
        {"chosen": "what is it? a fox", "rejected": "what is it? a dog"},
        {"chosen": [USER, ANSWER], "rejected": [USER, BAD]},
        {"conversations": [HUMAN], "chosen": GPT, "rejected": {"from": "gpt", "value": "a dog"}},
        {"instruction": "what is it?", "chosen": "a fox", "rejected": "a dog"},
        {"messages": [USER, ANSWER], "rejected_response": "a dog"},
        {"messages": [USER, ANSWER], "rejected_messages": [USER, BAD]},
        {"query": "what is it?", "response": "a fox", "rejected_response": "a dog"},
    ],
    "unpaired": [
        {"prompt": "what is it?", "completion": " a fox", "label": True},
        {"conversations": [HUMAN, GPT], "kto_tag": False},
        {"messages": [USER, ANSWER], "label": True},
        {"instruction": "what is it?", "output": "a fox", "kto_tag": True},
        {"query": "what is it?", "response": "a fox", "label": False},
    ],
    "prompt": [
        {"prompt": "what is it?", "answer": 42},
        {"prompt": [USER], "completion": [ANSWER]},
        {"messages": [USER], "answer": "a fox", "extra": {"deep": [1, None]}},
        {"conversations": [HUMAN]},
        {"instruction": "what is it?", "output": "a fox"},
        {"query": "what is it?"},
    ],
    "labelled": [
        {"text": "what is it?", "text_pair": "a fox", "label": "yes"},
        {"messages": [USER, ANSWER], "label": 1},
        {"conversations": [HUMAN, GPT], "labels": "no"},
        {"instruction": "what is it?", "label": False},
        {"query": "what is it?", "label": "yes"},
    ],
}  # fmt: skip
LABELS = (Labels(("no", "yes"), "single_label"), Labels(("a", "b", "c"), "multi_label"), Labels(("x",), "regression"))
TEXTS = (
    "", " ", "x", "true", "null", "007", "1e5", "NaN", "²", "<image>", "<video><image>", "a\x00b", "\x1b[2J",
    "\u2028\r\n\t", "\ud83d", "ok \udc80", "😊é\u0301", "<|im_start|>", "<|im_end|>", "<|im_", "{{ x }}", "{% for",
    "[]", "[{\"role\":1}]", "{\"a\":", "data:image/png;base64,AAAA", "/etc/passwd", "../x.png",
    "http://127.0.0.1/x.png", "x" * 5000, "assistant", "user", "system", "tool", "human", "gpt", "function_call",
    "observation", "2024-01-01", "9" * 400,
)  # fmt: skip
NUMBERS = (0, 1, -1, 2, 0.5, -0.0, 1e308, 1e-320, float("inf"), float("-inf"), float("nan"), 2**31, 2**63, 10**400)
KEYS = (
    *sorted(fields_of(LAYOUTS)), "role", "content", "from", "value", "type", "text", "url", "image_url", "function",
    "arguments", "name", "parameters", "tool_calls", "weight", "train", "loss", "reasoning_content", "", "id",
)  # fmt: skip


def any_json(rng: random.Random, depth: int = 0) -> Any:
    """Any value that JSON (as Python writes it) can hold; seldom nested beyond use."""
    kind = rng.randrange(12 if depth < 4 else 7)
    if kind < 3:
        return rng.choice(TEXTS)
    if kind < 5:
        return rng.choice(NUMBERS)
    if kind < 7:
        return rng.choice((None, True, False))
    if kind == 11 and rng.random() < 0.1:
        return _nested(rng.choice((50, 99, 101, 400)), rng.random() < 0.5)
    if kind < 9:
        return [any_json(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {rng.choice(KEYS): any_json(rng, depth + 1) for _ in range(rng.randrange(4))}


def _nested(depth: int, as_map: bool) -> Any:
    value: Any = "x"
    for _ in range(depth):
        value = {"content": value} if as_map else [value]
    return value


def mutated(rng: random.Random, row: dict[str, Any]) -> Any:
    """A good row with one to three places changed: another value, gone, twice, or one more column."""
    row = copy.deepcopy(row)
    for _ in range(rng.randint(1, 3)):
        parent, key = rng.choice(list(_places(row)))
        how = rng.randrange(5)
        if how == 0 and isinstance(parent, dict):
            del parent[key]
        elif how == 1 and isinstance(parent, list):
            parent.insert(rng.randint(0, len(parent)), any_json(rng))
        elif how == 2:
            row[rng.choice(KEYS)] = any_json(rng)
        elif how == 3 and isinstance(parent, dict):
            parent[rng.choice(KEYS)] = any_json(rng)
        else:
            parent[key] = any_json(rng)
        if not row:
            break
    return row if rng.random() < 0.98 else any_json(rng)


def _places(value: Any) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(items):
        yield value, key
        if isinstance(inner, dict | list) and inner:
            yield from _places(inner)


# ------------------------------------------------------------------------------------------------- files


def as_bytes(rng: random.Random, rows: Sequence[Any], suffix: str) -> bytes:
    """Rows in a kind of file; of a CSV or Parquet file, what of them it can hold."""
    if suffix == ".jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    if suffix == ".json":
        return json.dumps(list(rows), indent=rng.choice((None, 1))).encode()
    flat = [{k: _cell(v) for k, v in row.items()} for row in rows if isinstance(row, dict)]
    if suffix == ".parquet":
        names = sorted({str(name) for row in flat for name in row})
        columns = {n: [None if row.get(n) is None else row[n] for row in flat] for n in names}
        out = io.BytesIO()
        pq.write_table(pa.table({n: pa.array(c, pa.string()) for n, c in columns.items()}), out)
        return out.getvalue()
    names = list(dict.fromkeys(name for row in flat for name in row)) or ["a"]
    cells = [names, *([row.get(name, "") for name in names] for row in flat)]
    return "\n".join(",".join('"' + cell.replace('"', '""') + '"' for cell in line) for line in cells).encode()


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text.encode("utf-8", errors="replace").decode()


def damaged(rng: random.Random, data: bytes) -> bytes:
    """A file that something happened to."""
    how = rng.randrange(9)
    at = rng.randrange(len(data) + 1)
    if how == 0:
        return data[:at]
    if how == 1:
        return data[:at] + bytes(rng.randrange(256) for _ in range(rng.randint(1, 4))) + data[at + 1 :]
    if how == 2:
        return data.decode("utf-8", errors="replace").encode("latin-1", errors="replace")[:at] + b"\xe9" + data[at:]
    if how == 3:
        return data.decode("utf-8", errors="replace").encode(rng.choice(("utf-16", "utf-16-le", "utf-32", "utf-8-sig")))
    if how == 4:
        return data.replace(b"\n", rng.choice((b"\r\n", b"\r", b"\n\n", b"\x00\n")))
    if how == 5:
        return data[:at] + rng.choice((b"\x00", b'"', b"{", b"]", b"\xff\xfe", b"\xed\xa0\xbd", b"\x1a")) + data[at:]
    if how == 6:
        return data + data[:at]
    if how == 7:
        return b"\n\n" + data + b"]\n<html>"
    return data[at:]


# ------------------------------------------------------------------------------------------------- the test


@dataclass
class Found:
    """What a fuzz went through. wrong: what is no answer (an exception of Python's, a place that is missing)."""

    files: int = 0
    rows: int = 0
    refused: int = 0
    kept: int = 0
    errors: int = 0
    wrong: list[str] = field(default_factory=list)


def fuzz(seed: int, rows: int, tokenizers: Sequence[ChatTokenizer], folder: Path) -> Found:
    """Write and read files until `rows` changed rows were in them. Good rows beside them must be kept where the file
    is whole, and every refusal must name file and line."""
    rng, found = random.Random(seed), Found()
    while found.rows < rows:
        kind = rng.choice(sorted(GOOD))
        base = rng.choice(GOOD[kind])
        bad = [mutated(rng, base) for _ in range(6)]
        mixed = [(row, False) for row in bad] + [(base, True)] * 7
        rng.shuffle(mixed)
        suffix = rng.choice((".jsonl", ".jsonl", ".jsonl", ".json", ".csv", ".parquet"))
        data = as_bytes(rng, [row for row, _ in mixed], suffix)
        whole = rng.random() < 0.7
        data = data if whole else damaged(rng, data)
        zipped = rng.random() < 0.1
        if zipped:
            data = gzip.compress(data)
            data = data if whole else data[: rng.randrange(len(data))]
        path = folder / f"f{found.files}{suffix}{'.gz' if zipped else ''}"
        path.write_bytes(data)
        sure = whole and suffix == ".jsonl" and not base.get("tools")  # not every template has a place for tools
        good = [n for n, (_, is_good) in enumerate(mixed) if is_good] if sure else []
        _read(path, kind, rng, tokenizers, good, found)
        path.unlink()
        found.files += 1
        found.rows += len(bad)
    return found


def _read(
    path: Path, kind: str, rng: random.Random, tokenizers: Sequence[ChatTokenizer], good: Sequence[int], found: Found
) -> None:
    limit = rng.choice((None, None, 40, 8))
    cut = {} if kind == "prompt" or limit is None else {"too_long": rng.choice(("error", "right", "left", "drop"))}
    source = DataSource(path=str(path), on_bad_row="skip", max_length=limit, **cut)
    labels = rng.choice(LABELS) if kind == "labelled" else None
    try:
        report = prepare((source,), kind, rng.choice(tokenizers), seed=0, labels=labels).report.sources[0]  # type: ignore[arg-type]
    except AlignError as e:
        found.errors += 1
        if str(path) not in str(e.where):
            found.wrong.append(f"{path.name}: an error that names no file: {e}")
        elif good and limit is None and kind != "labelled":
            found.wrong.append(f"{path.name}: good rows beside bad ones were lost: {str(e)[:300]}")
        return
    except Exception as e:  # noqa: BLE001  what the fuzz is for
        found.wrong.append(f"{path.name}: {type(e).__name__}: {str(e)[:200]}")
        return
    found.kept += report.kept
    found.refused += len(report.refused)
    for refusal in report.refused:
        if "nothing foresaw" in refusal.reason or not refusal.origin.startswith(str(path)):
            found.wrong.append(f"{refusal.origin}: {refusal.reason}")
        if limit is None and kind != "labelled" and refusal.origin in {f"{path}:{n + 1}" for n in good}:
            found.wrong.append(f"{refusal.origin}: a good row was refused: {refusal.reason}")
