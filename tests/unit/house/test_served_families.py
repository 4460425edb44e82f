"""What rollout/README.md says that vLLM serves of each vision-language family is what the engine's facts say, and what
the last run of `tests.prove vllm_families` found."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from align.engines import ENGINES
from align.model.media.placeholders import BOTH_WAYS
from rollout.vllm_facts import FACTS
from tests.guides import ROOT, first_cells, section
from tests.tiny_vlms import FAMILIES

GUIDE = "rollout/README.md"
ADAPTERS = {"of every part": "tower", "of the language model": "language", "none": "none"}
"""How the table's last column begins, and what of a family's LoRA the engine then serves."""


def letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def table() -> dict[str, tuple[str, str]]:
    """{"qwen25vl": (cell "on a CPU", cell "adapters")} of every family in a row."""
    rows = [line.strip("| ").split(" | ") for line in section(GUIDE, "Prompts with images").splitlines() if "|" in line]
    head, _, *body = rows
    assert head == ["family", "on a CPU", "adapters"]
    return {letters(name): (cpu, adapters) for names, cpu, adapters in body for name in names.split(", ")}


def proved() -> dict[str, dict[str, dict[str, object]]]:
    newest: Path = max((ROOT / "tests/prove/results").glob("*-vllm-families*.json"))
    families: dict[str, dict[str, dict[str, object]]] = json.loads(newest.read_text())["figures"]["families"]
    return families


def test_the_table_names_every_family_that_the_proof_takes_and_no_other() -> None:
    assert set(table()) == {letters(family) for family in FAMILIES}
    assert set(proved()) == set(FAMILIES)
    assert {*FACTS.without_adapters, *FACTS.language_adapters, *BOTH_WAYS} <= set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_familys_row_says_what_the_facts_say_and_what_was_found(family: str) -> None:
    cpu, adapters = table()[letters(family)]
    served = next(ways for words, ways in ADAPTERS.items() if re.match(words + r"\b", adapters))
    by_facts = "none" if family in FACTS.without_adapters else "language"
    by_facts = "tower" if family not in (*FACTS.without_adapters, *FACTS.language_adapters) else by_facts
    assert served == by_facts
    runs = {way for way, found in proved()[family].items() if "gap" in found}
    if family in BOTH_WAYS:
        assert cpu.startswith("no: ") and not runs
    else:
        ways = {"tower": {"language", "tower"}, "language": {"language"}, "none": set()}
        assert cpu == "yes" and runs == {"base", "merged"} | ways[served]


def test_the_switch_for_towers_and_the_engines_are_called_in_the_guide_as_in_the_code() -> None:
    assert [f"{FACTS.tower_option}: true" in cell for _, cell in table().values()].count(True) == sum(
        cell.startswith("of every part") for _, cell in table().values()
    )
    assert set(first_cells(section(GUIDE, "Engines"))) - {"name"} == set(ENGINES)
