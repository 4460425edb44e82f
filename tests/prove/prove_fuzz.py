"""Any JSON in any place of every layout, files cut off, mis-encoded and mixed: nothing but errors of ours, each with
its place; rows that are good are kept beside them.

    python -m tests.prove fuzz

ALIGN_FUZZ_ROWS: how many changed rows (20,000); ALIGN_FUZZ_SEED: another sequence of them.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path

from align.data.scratch import train_tokenizer
from align.recipe.inputs import TokenizerFromScratch
from tests.fuzz_rows import fuzz
from tests.prove.entry import conclude
from tests.unit.data.build import UNMARKED_CHATML, with_template

ROWS = int(os.environ.get("ALIGN_FUZZ_ROWS", "20000"))
SEED = int(os.environ.get("ALIGN_FUZZ_SEED", "0"))


def main() -> int:
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as aside:
        folder = Path(aside)
        text = folder / "text.jsonl"
        text.write_text("".join(json.dumps({"text": f"what is it? a fox, {n} dogs."}) + "\n" for n in range(200)))
        train_tokenizer(TokenizerFromScratch(train_on=str(text), vocab_size=400), folder / "tokenizer")
        templates = (UNMARKED_CHATML, "chatml", "qwen3")
        found = fuzz(SEED, ROWS, [with_template(folder / "tokenizer", t) for t in templates], folder)
    for line in found.wrong[:50]:
        print(line)
    figures = {
        "fuzz": {
            "seed": SEED,
            "rows_changed": found.rows,
            "files": found.files,
            "rows_kept": found.kept,
            "rows_refused": found.refused,
            "files_refused": found.errors,
            "wrong": found.wrong[:20],
            "checks": {
                "nothing_but_our_errors": not found.wrong,
                "enough_rows": found.rows >= ROWS,
                "good_rows_kept": found.kept > found.rows // 4,
            },
        }
    }
    claim = "Whatever rows and files hold, readers answer with errors of ours that name file and line"
    return conclude("fuzz", claim=claim, command="python -m tests.prove fuzz", figures=figures, begun=begun)


if __name__ == "__main__":
    sys.exit(main())
