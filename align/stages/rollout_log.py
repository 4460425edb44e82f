"""Completions on disk: one Parquet file per interval of turns, closed and renamed before the checkpoint that covers it.

A Parquet file is unreadable until it is closed, so rows wait in memory and a file appears whole. Intervals end at
fixed turns and at checkpoints: a resumed run rewrites exactly the files that an undisturbed one has.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from align.protocols import Group, ScoreTable
from align.stages.files import sync_folder

INTERVAL = 10  # turns per file where no checkpoint ends it earlier


class RolloutLog:
    """Writer of `folder/step-000010.parquet`, named by the last turn inside.

    Columns: step, group_id, sample, origin, prompt, completion, token_ids, one float column `objective/<name>` each
    (null where missing), advantage (null where not trained on), trained, finish, version (of the first token),
    mean_logp (of the sampler).
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._rows: list[dict[str, Any]] = []
        self._last = 0

    def cut_back(self, step: int) -> None:
        """Remove files with turns after `step`, and what a kill left unfinished."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.iterdir():
            if path.name.startswith(".writing-") or int(path.stem.removeprefix("step-")) > step:
                path.unlink()

    def add(
        self,
        step: int,
        groups: Sequence[Group],
        prompts: Sequence[str],
        table: ScoreTable,
        advantages: np.ndarray,
        trained: np.ndarray,
    ) -> None:
        """Rows of turn `step`: the groups it trained on, and those that were replaced meanwhile; `prompts` are their
        prompts as text. Closes the file at an interval's end."""
        row = 0
        for group, prompt in zip(groups, prompts, strict=True):
            for sample, completion in enumerate(group.completions):
                scores = {
                    f"objective/{name}": _known(table.scores[row, column])
                    for column, name in enumerate(table.objectives)
                }
                self._rows.append(
                    {
                        "step": step,
                        "group_id": group.prompt.group_id,
                        "sample": sample,
                        "origin": group.prompt.origin,
                        "prompt": prompt,
                        "completion": completion.text,
                        "token_ids": np.asarray(completion.token_ids, dtype=np.int32),
                        **scores,
                        "advantage": _known(advantages[row]),
                        "trained": bool(trained[row]),
                        "finish": completion.finish,
                        "version": int(completion.versions[0]) if len(completion.versions) else None,
                        "mean_logp": float(np.mean(completion.logps)) if len(completion.logps) else None,
                    }
                )
                row += 1
        self._last = step
        if step % INTERVAL == 0:
            self.close_file()

    def close_file(self) -> None:
        """Write the waiting rows, if any, as one file that is whole when it has its name."""
        if not self._rows:
            return
        import pyarrow
        import pyarrow.parquet

        target = self.folder / f"step-{self._last:06d}.parquet"
        aside = target.with_name(f".writing-{target.name}")
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(self._rows), aside, compression="zstd")
        with aside.open("rb") as handle:
            os.fsync(handle.fileno())
        os.replace(aside, target)
        sync_folder(self.folder)
        self._rows = []


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
