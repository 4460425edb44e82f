"""What a machine has, against what pyproject.toml was verified with: a version that is off is a warning, no refusal."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
TOLD = (
    "torch",
    "transformers",
    "peft",
    "triton",
    "accelerate",
    "numpy",
    "trl",
    "liger-kernel",
    "pydantic",
    "bitsandbytes",
)


def wanted() -> dict[str, str]:
    """The requirement of each package that the project names, extras included."""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    found = (re.match(r"([\w.-]+)(.*)", line) for lines in lists for line in lines)
    return {match[1].lower().replace("_", "-"): match[2].strip() for match in found if match}


def installed(site: Path | None) -> dict[str, str]:
    """Versions by name; what was carried along (`site`) goes before what the machine has."""
    path = [*([str(site)] if site else []), *sys.path]
    found: dict[str, str] = {}
    for one in metadata.distributions(path=path):
        if one.metadata["Name"]:
            found.setdefault(one.metadata["Name"].lower().replace("_", "-"), one.version)
    return found


def warnings_of(have: dict[str, str], names: Iterable[str]) -> list[str]:
    """A line for each of `names` that is there in another version than the project was verified with."""
    from packaging.specifiers import SpecifierSet

    asked = wanted()
    return [
        f"{name} {have[name]}, verified with {asked[name]}"
        for name in names
        if name in have and asked.get(name) and not SpecifierSet(asked[name]).contains(have[name], prereleases=True)
    ]
