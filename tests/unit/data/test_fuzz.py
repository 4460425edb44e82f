"""The readers under fire, in short: `python -m tests.prove fuzz` is the long form."""

from __future__ import annotations

from pathlib import Path

from tests.fuzz_rows import fuzz
from tests.unit.data.build import UNMARKED_CHATML, with_template


def test_whatever_rows_and_files_hold_the_answer_is_a_row_error_or_names_the_file(tmp_path: Path, folder: Path) -> None:
    tokenizers = [with_template(folder, template) for template in (UNMARKED_CHATML, "chatml", "qwen3")]
    found = fuzz(14, 600, tokenizers, tmp_path)
    assert found.wrong == []
    assert found.refused > 150 and found.kept > 250, "both good and bad rows were read"
