"""Tools described from signatures and docstrings, and calls checked and converted against them."""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NewType, NotRequired, TypedDict

import pytest

from rewards import PluginError
from rewards.environments.arguments import check_arguments, converted
from rewards.environments.schemas import schema_of, tool_schema


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Place(TypedDict):
    city: str
    street: NotRequired[str]


@dataclasses.dataclass
class Point:
    x: int
    y: float = 0.0


Metres = NewType("Metres", float)


def hinted(hint: Any, default: Any = dataclasses.MISSING) -> Any:
    """A function with one parameter `x` of that type."""

    def tool(x: Any) -> None: ...

    tool.__annotations__ = {"x": hint}
    if default is not dataclasses.MISSING:
        tool.__defaults__ = (default,)
    return tool


@pytest.mark.parametrize(
    ("hint", "schema"),
    [
        (str, {"type": "string"}),
        (int, {"type": "integer"}),
        (float, {"type": "number"}),
        (bool, {"type": "boolean"}),
        (Any, {}),
        (int | None, {"type": ["integer", "null"]}),
        (int | str, {"type": ["integer", "string"]}),
        (list[int] | None, {"type": ["array", "null"], "items": {"type": "integer"}}),
        (list[int] | dict[str, int], {"anyOf": [{"type": "array", "items": {"type": "integer"}},
                                                {"type": "object", "additionalProperties": {"type": "integer"}}]}),
        (Literal["a", "b"], {"type": "string", "enum": ["a", "b"]}),
        (Literal["a", 1], {"type": ["string", "integer"], "enum": ["a", 1]}),
        (Literal["a"] | None, {"type": ["string", "null"], "enum": ["a", None]}),
        (Colour, {"type": "string", "enum": ["red", "blue"]}),
        (list, {"type": "array"}),
        (Sequence[str], {"type": "array", "items": {"type": "string"}}),
        (set[int], {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}),
        (tuple[int, str], {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}],
                           "minItems": 2, "maxItems": 2}),
        (tuple[int, ...], {"type": "array", "items": {"type": "integer"}}),
        (dict[str, Any], {"type": "object"}),
        (Place, {"type": "object", "properties": {"city": {"type": "string"}, "street": {"type": "string"}},
                 "required": ["city"], "additionalProperties": False}),
        (Point, {"type": "object", "properties": {"x": {"type": "integer"}, "y": {"type": "number"}},
                 "required": ["x"], "additionalProperties": False}),
        (Metres, {"type": "number"}),
        (Annotated[int, "how many"], {"type": "integer", "description": "how many"}),
    ],
    ids=str,
)  # fmt: skip
def test_types_as_json_schemas(hint: Any, schema: dict[str, Any]) -> None:
    assert schema_of(hint) == schema


def google(city: str, days: int = 3, units: Literal["C", "F"] = "C") -> str:
    """The weather
    of a city.

    It may be wrong.

    Args:
        city (str): its name,
            in English: as on maps
        days: how many days
        units (Literal["C", "F"], optional): which degrees

    Returns:
        str: the forecast

    Note:
        days: nothing
    """
    return city


def sphinx(city: str, days: int = 3, units: Literal["C", "F"] = "C") -> str:
    """The weather of a city.

    It may be wrong.

    :param str city: its name,
        in English: as on maps
    :param days: how many days
    :param units: which degrees
    :returns: the forecast
    """
    return city


def numpy_style(city: str, days: int = 3, units: Literal["C", "F"] = "C") -> str:
    """The weather of a city.

    It may be wrong.

    Parameters
    ----------
    city : str
        its name,
        in English: as on maps
    days : int, optional
        how many days
    units
        which degrees

    Returns
    -------
    str
        the forecast
    """
    return city


@pytest.mark.parametrize("function", [google, sphinx, numpy_style])
def test_three_ways_of_docstrings(function: Any) -> None:
    assert tool_schema(function, "weather", "env.py") == {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city.\n\nIt may be wrong.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "its name, in English: as on maps"},
                    "days": {"type": "integer", "description": "how many days", "default": 3},
                    "units": {"type": "string", "enum": ["C", "F"], "description": "which degrees", "default": "C"},
                },
                "required": ["city"],
            },
        },
    }


def test_what_chat_templates_get_elsewhere_says_the_same() -> None:
    from transformers.utils import get_json_schema

    def tool(city: str, days: int, warm: bool, sizes: list[float]) -> str:
        """Look at the weather.

        Args:
            city: its name
            days: how many
            warm: whether
            sizes: of what
        """
        return city

    theirs = get_json_schema(tool)
    theirs["function"].pop("return", None)
    assert tool_schema(tool, "tool", "env.py") == theirs


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def f(x): ...", "has no annotation"),
        ("def f(*x: int): ...", "takes any number"),
        ("def f(**x: int): ...", "takes any number"),
        ("def f(x: int, /): ...", "has no name to call it by"),
        ("def f(x: object): ...", "cannot be written as JSON"),
        ("def f(x: dict[int, str]): ...", "text as keys"),
        ("def f(x: Unknown): ...", "cannot be read"),
    ],
)
def test_what_cannot_be_a_tool_says_its_place_and_a_way_out(source: str, said: str) -> None:
    space: dict[str, Any] = {}
    exec(f"from __future__ import annotations\n{source}", space)
    with pytest.raises(PluginError, match=said) as caught:
        tool_schema(space["f"], "f", "env.py:Env.f")
    assert caught.value.where == "env.py:Env.f" and caught.value.remedy


@pytest.mark.parametrize(
    ("hint", "value", "said"),
    [
        (int, 3, None), (int, 3.0, None), (float, 3, None), (str, "3", None), (bool, True, None),
        (int, "3", 'must be integer, not "3"'), (int, 3.5, "not 3.5"), (int, True, "not true"),
        (float, "1", 'not "1"'), (float, False, "not false"), (str, 3, "must be string, not 3"), (bool, 1, "not 1"),
        (str, None, "not null"), (int | None, None, None), (int | str, "a", None),
        (int | str, 1.5, "integer or string"),
        (Colour, "red", None), (Colour, "green", 'must be one of "red", "blue", not "green"'),
        (Literal[1, 2], True, "one of 1, 2"), (list[int], [1, 2.0], None), (list[int], [1, "a"], r"`x\[1\]` must be"),
        (list[int], 1, "must be array"), (tuple[int, str], [1], "must have 2 items, not 1"),
        (dict[str, int], {"a": "b"}, r"`x\.a` must be integer"), (Place, {"city": "Rome"}, None),
        (Place, {"street": "a"}, r"`x\.city` is missing \(string\)"),
        (Place, {"city": "a", "zip": 1}, "no argument `x.zip`"),
        (Point, {"x": 1}, None), (list[int] | dict[str, int], "a", "array or object"), (Any, [{}], None),
        (str, 5 * "very long " * 20, None), (int, "very long " * 20, r"very long .*\.\.\.$"),
    ],
    ids=str,
)  # fmt: skip
def test_arguments_are_checked_as_json_schema_has_it(hint: Any, value: Any, said: str | None) -> None:
    schema = tool_schema(hinted(hint), "tool", "env.py")
    found = check_arguments(schema, {"x": value})
    assert (found is None) if said is None else re.search(said, found or ""), found


def test_names_of_arguments_are_checked() -> None:
    schema = tool_schema(google, "weather", "env.py")
    assert check_arguments(schema, {"city": "Rome"}) is None
    assert check_arguments(schema, {}) == "the argument `city` is missing (string)"
    assert check_arguments(schema, {"city": "a", "town": 1}) == (
        "there is no argument `town`; there are: city, days, units"
    )
    assert check_arguments(schema, ["Rome"]) == 'the arguments must be an object, not ["Rome"]'


@pytest.mark.parametrize(
    ("hint", "value", "wanted"),
    [
        (int, 3.0, 3), (float, 3, 3.0), (Colour, "red", Colour.RED), (tuple[int, str], [1.0, "a"], (1, "a")),
        (set[int], [1, 1], {1}), (Point, {"x": 1.0, "y": 2}, Point(1, 2.0)), (list[Colour], ["blue"], [Colour.BLUE]),
        (dict[str, Point], {"a": {"x": 1}}, {"a": Point(1)}), (Point | None, None, None),
        (Point | None, {"x": 1}, Point(1)),
        (float | int, 3, 3), (int | str, "3", "3"), (Place, {"city": "a"}, {"city": "a"}), (Metres, 3, 3.0),
        (Literal["a"], "a", "a"), (Any, [1], [1]), (tuple[int, ...], [1, 2], (1, 2)),
    ],
    ids=str,
)  # fmt: skip
def test_arguments_become_what_the_annotations_name(hint: Any, value: Any, wanted: Any) -> None:
    found = converted(hinted(hint), {"x": value})["x"]
    assert found == wanted and type(found) is type(wanted)
