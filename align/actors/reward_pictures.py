"""A reward model that sees, in a plugin's process: the trainer's packed forward over prompts with pictures.

It reads each picture as the policy saw it, and resizes it by its own processor. What that makes of it lies in the
plugin's temporary folder, which goes with it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from align.actors.reward_records import record_of
from align.data.encode import encode
from align.data.media.library import Library
from align.data.records import MediaPart, RowError, Unpaired
from align.data.render import draft
from align.data.tokenizer import load_tokenizer
from align.errors import ModelError
from align.losses.classify import log_probs
from align.protocols.trees import Segment, Tree
from align.recipe.inputs import Media
from align.train.spec import scoring_spec
from align.train.trainer import PolicyTrainer
from rewards.api import Sample


class Seeing:
    """A vision-language model with a score head. column: which of its outputs is the score; dtype: of the weights, or
    "auto": as saved. Raises ModelError where it has no chat template or no processor."""

    def __init__(self, folder: Path, column: int, dtype: str, device: str):
        from align.model.score_head import folder_labels

        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.column, self._labels = column, folder_labels(folder)
        self.positions = int(config.get("text_config", config).get("max_position_embeddings") or 1 << 30)
        self._chat = load_tokenizer(folder)
        if self._chat.template is None:
            raise ModelError(
                "a reward model that sees has no chat template, which says where pictures stand",
                where=folder,
                remedy="copy chat_template.jinja of the model that it was made from beside its weights",
            )
        saved = str(config.get("dtype") or config.get("torch_dtype") or "float32")
        chosen = saved if dtype == "auto" else dtype
        self._trainer = PolicyTrainer(
            scoring_spec(folder, self._labels, dtype=chosen, device=device, gpu=device != "cpu")
        )
        # the engine names the files, not a row: they may lie anywhere
        settings = Media(folders=("/",), workers=1)
        self._library = Library(settings, folder, Path(tempfile.mkdtemp(prefix="media-")))

    def read(self, samples: Sequence[Sample]) -> list[Segment]:
        """Prompts and completions as trunks with their media. Raises RowError where one cannot be read."""
        records = [record_of(sample) for sample in samples]
        shown = self._library.show([(_parts(record), None) for record in records])
        drafts = []
        for record, own in zip(records, shown, strict=True):
            if isinstance(own, RowError):
                raise own
            drafts.append(draft(record, self._chat, own, self._library))
        return [_segment(encoded) for encoded in encode(drafts, self._chat)]

    def scores(self, read: Sequence[Segment]) -> list[float]:
        """One number per sequence: its output, or of several labels the probability of the one that is asked for."""
        rows = self._trainer.scores([Tree(number, segment) for number, segment in enumerate(read)])
        said = np.stack([sequences[0] for sequences in rows])
        if said.shape[1] == 1:
            return [float(value) for value in said[:, 0]]
        chances = np.exp(log_probs(said, self._labels.problem if self._labels else None))
        return [float(value) for value in chances[:, self.column]]


def _parts(record: Unpaired) -> list[MediaPart]:
    turns = () if isinstance(record.prompt, str) else record.prompt
    return [part for turn in turns for part in turn.media]


def _segment(encoded: Any) -> Segment:
    if isinstance(encoded, Exception):
        raise encoded
    completion = encoded.branches[0]
    ids = np.concatenate([encoded.trunk.ids, completion.ids])
    return Segment(ids, np.zeros(len(ids), dtype=bool), media=encoded.trunk.media)
