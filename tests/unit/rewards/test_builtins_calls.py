"""Function calls and JSON: how completions write them, what is right and wrong, and 400 real questions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rewards import PluginError, Sample
from rewards.builtins._calls import parse_calls
from rewards.builtins.function_call import function_call
from rewards.builtins.json_schema import json_schema
from rewards.find import load
from rewards.plugin import PluginSpec

FUNCTION = {
    "name": "geo.area",
    "parameters": {
        "type": "dict",
        "properties": {
            "base": {"type": "integer"},
            "height": {"type": "float"},
            "unit": {"type": "string"},
            "points": {"type": "array", "items": {"type": "integer"}},
            "options": {"type": "dict"},
        },
        "required": ["base", "height"],
    },
}
POSSIBLE = {
    "base": [10],
    "height": [5.0],
    "unit": ["square units", "sq.units", ""],
    "points": [[1, 2], ""],
    "options": [{"round": [True], "mode": ["up", ""]}, ""],
}
ROW = {"function": [FUNCTION], "ground_truth": [{"geo.area": POSSIBLE}]}


def score(text: str, row: dict[str, Any] = ROW, **args: Any) -> tuple[Any, str]:
    result = function_call([Sample(text, row=row)], **args)[0]
    return result.values, result.info.get("wrong", "")


def call(**arguments: Any) -> str:
    return json.dumps({"name": "geo.area", "arguments": {"base": 10, "height": 5, **arguments}})


@pytest.mark.parametrize(
    "text",
    [
        call(),
        f"[{call()}]",
        f"I will call it.\n<tool_call>\n{call()}\n</tool_call>",
        f"```json\n{call()}\n```",
        "geo.area(base=10, height=5.0)",
        " [geo.area(base=10, height=5)]\n",
        "```python\ngeo.area(base=10, height=5)\n```",
        json.dumps({"type": "function", "function": {"name": "geo.area", "arguments": '{"base": 10, "height": 5}'}}),
        call(unit="Square-Units"),
        call(points=[1, 2]),
        call(options={"round": True}),
        call(options={"round": True, "mode": "UP"}),
    ],
)
def test_a_right_call_in_any_form(text: str) -> None:
    assert score(text) == (1.0, "")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("The area is 25.", "neither JSON nor a Python call"),
        ("", "neither JSON nor a Python call"),
        ("[]", "an empty list"),
        ("geo.area(10, 5)", "arguments without a name"),
        ("geo.area(base=x, height=5)", "no literal"),
        ("area(base=10, height=5)", "calls area, not geo.area"),
        ("geo.area(base=10)", "lacks height"),
        (call(base=11), "base of geo.area is 11"),
        (call(base=10.0), "not of type integer"),
        (call(base=True), "not of type integer"),
        (call(height="5"), "not of type float"),
        (call(unit="metres"), "unit of geo.area is 'metres'"),
        (call(points=[1, "2"]), "points of geo.area"),
        (call(points=[2, 1]), "points of geo.area"),
        (call(options={"mode": "up"}), "options of geo.area"),
        (call(options={"round": 1}), "options of geo.area"),
        (call(colour="red"), "has no colour"),
        (f"[{call()}, {call()}]", "2 calls; 1 needed"),
        ('{"name": "geo.area", "arguments": "{"}', "are no JSON"),
        ("f(" * 5000, "neither JSON nor a Python call"),
        ("[" * 30_000, "no call"),
    ],
)
def test_a_wrong_call_scores_0_and_says_why(text: str, problem: str) -> None:
    value, why = score(text)
    assert value == 0.0
    assert problem in why


def test_several_calls_in_any_order_and_plain_gold_calls() -> None:
    gold = [
        {"name": "f", "arguments": {"x": {"list": [1, 2]}}},
        {"function": {"name": "f", "arguments": '{"x": 2}'}},
    ]
    row = {"answer": json.dumps(gold)}
    assert score('[f(x=2), f(x={"list": [1, 2]})]', row, functions=None)[0] == 1.0
    assert score('[f(x=2), f(x={"list": 1})]', row, functions=None)[0] == 0.0
    assert score("[f(x=2), f(x=2)]", row, functions=None)[0] == 0.0
    assert parse_calls("<tool_call>f(x=1)</tool_call>\n<tool_call>g(y='a')</tool_call>") == [
        ("f", {"x": 1}),
        ("g", {"y": "a"}),
    ]


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        ({"function": [FUNCTION]}, KeyError, "ground_truth"),
        ({"ground_truth": ROW["ground_truth"]}, KeyError, "'function'; it has: ground_truth"),
        ({**ROW, "ground_truth": [{"geo.volume": {}}]}, ValueError, "calls 'geo.volume'; described are: geo.area"),
        ({**ROW, "ground_truth": [{"geo.area": {"base": 10}}]}, ValueError, "values of 'base' are 10"),
        ({**ROW, "ground_truth": []}, ValueError, "empty list"),
        ({**ROW, "ground_truth": "{"}, ValueError, "is no JSON"),
        ({**ROW, "function": [{"description": "?"}]}, ValueError, "with a name"),
    ],
)
def test_a_row_that_cannot_be_compared_with_is_an_error(row: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        score(call(), row)


# -------------------------------------------------------------------------------------------------------------- JSON

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name"],
    "additionalProperties": False,
}


def test_json_of_a_schema_scores_1_and_says_what_is_wrong_otherwise() -> None:
    texts = [
        '{"name": "Ada", "age": 36}',
        '```json\n{"name": "Ada"}\n```',
        '{"age": 36}',
        '{"name": "Ada", "age": -1}',
        'Here: {"name": "Ada"}',
        '{"name": "Ada", "age": NaN}',
        "[" * 100_000,
    ]
    scores = json_schema([Sample(t) for t in texts], schema=PERSON)
    assert [s.values for s in scores] == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert scores[2].info == {"wrong": "$: 'name' is a required property"}
    assert scores[3].info["wrong"].startswith("$.age: -1 is less than")
    assert scores[4].info["wrong"].startswith("no JSON")


def test_the_schema_may_stand_in_the_row() -> None:
    rows = [{"schema": PERSON}, {"schema": json.dumps({"type": "array"})}]
    scores = json_schema([Sample('{"name": "Ada"}', row=row) for row in rows], column="schema")
    assert [s.values for s in scores] == [1.0, 0.0]
    with pytest.raises(KeyError, match="'schema'; it has: none"):
        json_schema([Sample("{}")], column="schema")
    with pytest.raises(ValueError, match="no JSON Schema"):
        json_schema([Sample("{}", row={"schema": {"type": "dict"}})], column="schema")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({}, "give `schema`"),
        ({"schema": {"type": "dict"}}, "no JSON Schema: 'dict' is not valid"),
        ({"schema": {"$ref": "https://example.com/schema"}}, "refers to 'https://example.com/schema'"),
    ],
)
def test_a_schema_that_is_none_or_needs_the_network_is_refused(args: dict[str, Any], message: str) -> None:
    with pytest.raises(PluginError, match=message):
        load(PluginSpec("json_schema", args=args), ".")


# --------------------------------------------------------------------------------------------------------- real rows


ODD = ("simple_python_307",)  # its possible answers give true for an argument that its function calls a string


def bfcl(folder: Path) -> list[dict[str, Any]]:
    read = [
        [json.loads(line) for line in (folder / "text/tools" / name).open(encoding="utf-8")]
        for name in ("bfcl_simple_python.json", "bfcl_simple_python_answers.json")
    ]
    answers = {row["id"]: row["ground_truth"] for row in read[1]}
    return [{**row, "ground_truth": answers[row["id"]]} for row in read[0]]


@pytest.mark.realdata
def test_the_gold_calls_of_all_400_questions_score_best(shared_data: Path) -> None:
    rows = bfcl(shared_data)
    gold = function_call.__reward__.gold  # type: ignore[attr-defined]
    texts = [gold(row) for row in rows]
    assert len(rows) == 400
    best = function_call([Sample(t, row=row) for t, row in zip(texts, rows, strict=True)])
    assert [(row["id"], s.info) for row, s in zip(rows, best, strict=True) if s.values != 1.0] == []
    python = [as_python(t) for t in texts]
    assert all(s.values == 1.0 for s in function_call([Sample(t, row=r) for t, r in zip(python, rows, strict=True)]))
    for spoil in (another_value, without_arguments, one_more, lambda t: t + texts[0]):
        worse = function_call([Sample(spoil(t), row=row) for t, row in zip(texts, rows, strict=True)])
        assert sum(s.values for s in worse) == 0  # type: ignore[misc]


def as_python(text: str) -> str:
    calls = json.loads(text)
    return ", ".join(f"{c['name']}({', '.join(f'{k}={v!r}' for k, v in c['arguments'].items())})" for c in calls)


def another_value(text: str) -> str:
    calls = json.loads(text)
    first = next(iter(calls[0]["arguments"]))
    calls[0]["arguments"][first] = {"no": "such value"}
    return json.dumps(calls)


def without_arguments(text: str) -> str:
    return json.dumps([{**call, "arguments": {}} for call in json.loads(text)])


def one_more(text: str) -> str:
    calls = json.loads(text)
    calls[0]["arguments"]["no_such_argument"] = 1
    return json.dumps(calls)


@pytest.mark.realdata
def test_the_arguments_of_real_calls_fit_the_schemas_of_their_functions(shared_data: Path) -> None:
    gold = function_call.__reward__.gold  # type: ignore[attr-defined]
    samples, wrong = [], []
    rows = [row for row in bfcl(shared_data) if row["id"] not in ODD]
    for row in rows:
        schema = as_schema(row["function"][0]["parameters"])
        arguments = json.loads(gold(row))[0]["arguments"]
        samples.append(Sample(json.dumps(arguments), row={"schema": schema}))
        wrong.append(Sample(json.dumps({}), row={"schema": schema}))
    best = json_schema(samples, column="schema")
    assert [(row["id"], s.info) for row, s in zip(rows, best, strict=True) if s.values != 1.0] == []
    assert all(s.values == 0.0 for s in json_schema(wrong, column="schema"))


def as_schema(described: Any) -> Any:
    """BFCL writes Python's types where JSON Schema has its own."""
    if isinstance(described, list):
        return [as_schema(d) for d in described]
    if not isinstance(described, dict):
        return described
    own = {"dict": "object", "float": "number", "tuple": "array"}
    kept = {k: v for k, v in described.items() if k in ("type", "properties", "required", "items", "enum")}
    if isinstance(kept.get("type"), str):
        kept["type"] = own.get(kept["type"], kept["type"])
        if kept["type"] == "any":
            del kept["type"]
    return {k: {n: as_schema(p) for n, p in v.items()} if k == "properties" else as_schema(v) for k, v in kept.items()}
