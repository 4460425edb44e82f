"""Completions on disk: one Parquet file per interval of turns, closed and renamed before the checkpoint that covers it.

A Parquet file is unreadable until it is closed, so rows wait in memory and a file appears whole. Intervals end at
fixed turns and at checkpoints: a resumed run rewrites exactly the files that an undisturbed one has.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from align.errors import RunFolderError
from align.mediastore import described
from align.oserrors import naming
from align.protocols.fleet import Completion, Group
from align.protocols.scorer import ScoreTable
from align.stages.files import sync_folder
from align.stages.manifest import require_rollouts

INTERVAL = 10  # turns per file where no checkpoint ends it earlier
KINDS = b"align.kinds"  # in a file's own metadata: {objective: "reward" or "cost"}, in the order of a score table
_SCORE = "objective/"
_NAME = re.compile(r"step-(\d+)\.parquet")


class RolloutLog:
    """Writer of `folder/step-000010.parquet`, named by the last turn inside.

    Columns: step, group_id, sample, origin, prompt, media (paths of what stands in the prompt, in
    order), completion, completion_raw (as it was generated, special tokens included, without those that end it; null
    where that is the same), token_ids, one float column `objective/<name>` each
    (null where missing), advantage (null where not trained on; before the prompt's own weight), trained, finish,
    version (of the first sampled token), mean_logp (of the sampler). Of episodes also sampled (per token, whether it
    was), forks (as JSON, token_ids and sampled of each sequence before the last; null where there is one), turns and
    state (as JSON), environment (its name, "" where the recipe gives it none), ended and environment_error (null where
    there was none). The metadata `KINDS` says which objectives are costs.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._kinds: dict[str, str] = {}
        self._rows: list[dict[str, Any]] = []
        self._last = 0

    def cut_back(self, step: int) -> None:
        """Remove files with turns after `step`, and what a kill left unfinished."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.iterdir():
            named = _NAME.fullmatch(path.name)  # whatever else lies there is not ours
            if path.name.startswith(".writing-") or (named and int(named[1]) > step):
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
        self._kinds = dict(zip(table.objectives, table.kinds, strict=True))
        for group, prompt in zip(groups, prompts, strict=True):
            for sample, completion in enumerate(group.completions):
                scores = {
                    f"{_SCORE}{name}": _known(table.scores[row, column]) for column, name in enumerate(table.objectives)
                }
                self._rows.append(
                    {
                        "step": step,
                        "group_id": group.prompt.group_id,
                        "sample": sample,
                        "origin": group.prompt.origin,
                        "prompt": prompt,
                        "media": [described(medium)["path"] for medium in group.prompt.media],
                        "completion": completion.text,
                        "completion_raw": completion.raw,
                        "token_ids": np.asarray(completion.token_ids, dtype=np.int32),
                        **scores,
                        "advantage": _known(advantages[row]),
                        "trained": bool(trained[row]),
                        "finish": completion.finish,
                        **_drawn(completion),
                        **_episode(completion),
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
        table = pyarrow.Table.from_pylist(self._rows).replace_schema_metadata({KINDS: json.dumps(self._kinds)})
        # a checksum on every page: a reader refuses one that is not what was written
        with naming(target):
            pyarrow.parquet.write_table(table, aside, compression="zstd", write_page_checksum=True)
            with aside.open("rb") as handle:
                os.fsync(handle.fileno())
        os.replace(aside, target)
        sync_folder(self.folder)
        self._rows = []


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _drawn(completion: Completion) -> dict[str, Any]:
    versions = completion.sampled_versions
    logps = completion.sampled_logps
    return {
        "version": int(versions[0]) if len(versions) else None,
        "mean_logp": float(np.mean(logps)) if len(logps) else None,
    }


def _episode(completion: Completion) -> dict[str, Any]:
    """The columns of an episode; none of an answer."""
    episode = completion.episode
    if episode is None:
        return {}
    return {
        "sampled": [] if completion.sampled is None else completion.sampled.tolist(),
        "forks": _forks(completion),
        "turns": json.dumps(episode.turns, ensure_ascii=False, default=str),
        "state": json.dumps(episode.state, ensure_ascii=False, default=str),
        "environment": episode.environment,
        "ended": episode.ended,
        "waited_seconds": episode.counts.get("waited_seconds"),
        "environment_error": episode.failure and f"{episode.failure.cause}: {episode.failure.message}",
    }


def _forks(completion: Completion) -> str | None:
    found = [{"token_ids": f.token_ids.tolist(), "sampled": f.sampled.tolist()} for f in completion.forks]
    return json.dumps(found) if found else None


@dataclass(frozen=True)
class Rollouts:
    """S completions of a stage in the order of its turns. scores: f64[S, R] with NaN where missing, of `names` and
    `kinds`; columns: every other column of the files as an array [S], `advantage` f64 with NaN for null."""

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    scores: np.ndarray
    columns: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return int(self.scores.shape[0])


def read_rollouts(folder: Path) -> Rollouts:
    """Every file of a rollouts folder. Raises RunFolderError where there is none, one is not what its stage wrote
    (`require_rollouts`), or files have other objectives."""
    import pyarrow
    import pyarrow.parquet

    files = sorted(folder.glob("step-*.parquet"))
    if not files:
        raise RunFolderError("there are no rollouts", where=folder, remedy="give a run that has sampled")
    require_rollouts(folder)
    tables = [read_table(file) for file in files]
    found: list[Any] = [(table.schema.metadata or {}).get(KINDS) for table in tables]
    for file, noted in zip(files, found, strict=True):
        if noted is None or noted != found[0]:
            what = "has no note of its objectives' kinds" if noted is None else f"has other objectives than {files[0]}"
            raise RunFolderError(what, where=file, remedy="repeat the stage: align run ... --from-stage ID")
    try:
        kinds: dict[str, str] = json.loads(found[0])
        # a file in which an objective has no value has a column without type
        table = pyarrow.concat_tables(tables, promote_options="permissive")
        scores = [_floats(table.column(f"{_SCORE}{name}")) for name in kinds]
        others = {name: table.column(name) for name in table.column_names if not name.startswith(_SCORE)}
        columns = {k: _floats(v) if k == "advantage" else v.to_numpy(zero_copy_only=False) for k, v in others.items()}
    except (pyarrow.ArrowException, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, error) from error
    return Rollouts(tuple(kinds), tuple(kinds.values()), np.stack(scores, axis=1), columns)


def read_table(file: Path, columns: Sequence[str] | None = None) -> Any:
    """A rollouts file as a pyarrow table, its pages compared with their checksums. Raises RunFolderError."""
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(
            file, columns=None if columns is None else list(columns), page_checksum_verification=True
        )
    except (pyarrow.ArrowException, OSError, KeyError, ValueError) as error:
        raise _damaged(file, error) from error


def _damaged(place: Path, error: Exception) -> RunFolderError:
    why = str(error).strip().partition("\n")[0] or type(error).__name__
    return RunFolderError(
        f"these rollouts cannot be read: {why}",
        where=place,
        remedy="restore them from a copy, or repeat the stage: align run ... --from-stage ID",
    )


def _floats(column: Any) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in column.to_pylist()], dtype=np.float64)
