"""The reward `reward_model`: scores of a sequence-classification checkpoint, ours or anybody's, in a plugin's process.

    - {use: reward_model, args: {path: runs/rm/merged/model}}

It is a plugin like any other (deadline, batches, error policy, `processes`). It stands here because it needs torch,
which the package `rewards` does not know; `align.plugins.REWARDS` is how its name finds it. Its processes compute with
the threads and GPUs of their reward actor: `placement: {rewards: {threads: 4, gpus: 1}}`.

A conversation is rendered by the checkpoint's chat template exactly as a stage of kind reward_model does, with the
tools and template arguments of its row, so that the token that is scored is the one that was trained. Without a
template, a language model with one score reads prompt, completion and EOS, which was trained (here as in TRL and
OpenRLHF); of any other classifier prompt and completion are the two texts of its input. A checkpoint that sees is shown
the pictures of prompts (see reward_pictures.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from align.errors import UserError
from align.hub import resolve_model_folder
from rewards.api import Context, Sample, reward

if TYPE_CHECKING:
    import torch

    from align.actors.reward_pictures import Seeing
    from align.data.tokenizer import ChatTokenizer

_CLASSIFIER = "ForSequenceClassification"
_PASS_TOKENS = 8192  # of a padded batch


def _check(path: str, revision: str | None = None, label: str | None = None) -> None:
    try:
        folder = resolve_model_folder(path, revision, weights=False)
    except UserError as error:
        raise ValueError(str(error)) from error
    column_of(folder, label)


def column_of(folder: Path, label: str | None) -> int:
    """Which of a checkpoint's outputs is the score. ValueError where it scores no sequences, or `label` is wrong."""
    file = folder / "config.json"
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder} is an adapter; merge it into its base first (`kind: merge`, or `align merge`)")
    if not file.is_file():
        raise ValueError(f"{folder} has no config.json: it is no model folder")
    config = json.loads(file.read_text(encoding="utf-8"))
    names = [str(name) for name in config.get("architectures") or ()]
    if not any(name.endswith(_CLASSIFIER) for name in names):
        raise ValueError(f"{folder} is a {', '.join(names) or 'model without architecture'}, not a *{_CLASSIFIER}")
    labels = {int(k): str(v) for k, v in (config.get("id2label") or {0: "LABEL_0", 1: "LABEL_1"}).items()}
    if label is None:
        if len(labels) != 1:
            known = ", ".join(labels.values())
            raise ValueError(f"{folder} has {len(labels)} labels; choose one with `label`: {known}")
        return 0
    found = [number for number, name in labels.items() if name == label]
    if not found:
        raise ValueError(f"{folder} has no label {label!r}; it has: {', '.join(labels.values())}")
    return found[0]


@reward(batch=64, timeout_s=600, retries=0, validate=_check)
def reward_model(
    samples: Sequence[Sample],
    ctx: Context,
    *,
    path: str,
    revision: str | None = None,
    label: str | None = None,
    max_length: int | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> list[float | Exception]:
    """What a sequence-classification checkpoint says of prompt and completion.

    Args:
        path, revision: a model folder or hub id with one label, whose output is the score as it stands.
        label: of a classifier with several, the one whose probability is the score.
        max_length: tokens; a longer sequence is a failure (default: the model's positions).
        dtype: of the weights; auto: as saved. device: auto: a GPU where there is one.
    """
    model: Any = _opened(path, revision, label, dtype, device)
    read = model.read(samples)
    limit = min(max_length or model.positions, model.positions)
    fitting = [ids for ids in read if len(ids) <= limit]
    found = iter(model.scores(fitting) if fitting else [])
    return [
        next(found) if len(ids) <= limit else ValueError(f"prompt and completion: {len(ids)} tokens, more than {limit}")
        for ids in read
    ]


@lru_cache(maxsize=1)
def _opened(path: str, revision: str | None, label: str | None, dtype: str, device: str) -> Opened | Seeing:
    """Loaded at the first call of a process, and kept."""
    import torch
    from transformers import AutoTokenizer

    from align.actors.reward_pictures import Seeing
    from align.data.media.opening import takes_media
    from align.data.tokenizer import load_tokenizer
    from align.model.scoring_class import scoring_class

    folder = resolve_model_folder(path, revision)
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if takes_media(json.loads((folder / "config.json").read_text(encoding="utf-8"))):
        return Seeing(folder, column_of(folder, label), dtype, chosen)
    model = scoring_class(folder).from_pretrained(folder, dtype=dtype, use_safetensors=True)
    model.eval().to(chosen)
    chat = load_tokenizer(folder)
    plain = chat.template is not None or _ends_in_eos(model, chat)
    pairs = None if plain else AutoTokenizer.from_pretrained(folder)
    return Opened(model, chat, pairs, column_of(folder, label), chosen)


def _ends_in_eos(model: Any, chat: ChatTokenizer) -> bool:
    """Whether it is a language model with one score, which stands on the EOS behind a completion: no classifier of
    labels, no regression, and no encoder, whose head reads another token."""
    config = model.config
    return hasattr(model, "score") and config.num_labels == 1 and not config.problem_type and chat.eos_id is not None


@dataclass(frozen=True, eq=False)
class Opened:
    """A classifier and its tokenizers. pairs: transformers' own, where two texts are its input."""

    model: Any
    chat: ChatTokenizer
    pairs: Any
    column: int
    device: str

    @property
    def positions(self) -> int:
        return int(getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30)

    def read(self, samples: Sequence[Sample]) -> list[list[int]]:
        """Token ids of prompts and completions."""
        return [self._ids(sample) for sample in samples]

    def _ids(self, sample: Sample) -> list[int]:
        from align.actors.reward_records import record_of
        from align.data.encode import encode
        from align.data.render import draft

        prompt = "\n\n".join(str(m["content"]) for m in sample.messages)
        if self.pairs is not None:
            given = (prompt, sample.completion) if prompt else (sample.completion,)
            return list(self.pairs(*given)["input_ids"])
        if any(isinstance(m["content"], list) for m in sample.messages):
            raise UserError(
                "a reward model that takes text alone is asked about a prompt with media",
                remedy="train one from a vision-language model, or judge such prompts with a reward of your own: "
                "`media` names the files that show them",
            )
        if self.chat.template is None and prompt:
            sample = replace(sample, messages=({"role": "text", "content": prompt},))
        [encoded] = encode([draft(record_of(sample), self.chat)], self.chat)
        if isinstance(encoded, Exception):
            raise encoded
        return [*encoded.trunk.ids.tolist(), *encoded.branches[0].ids.tolist()]

    def scores(self, ids: Sequence[Sequence[int]]) -> list[float]:
        """One number per sequence, computed in right-padded passes of sequences of like length."""
        import torch

        found = [0.0] * len(ids)
        with torch.inference_mode():
            for numbers in _passes(ids):
                for number, value in zip(numbers, self._pass([ids[n] for n in numbers]).tolist(), strict=True):
                    found[number] = value
        return found

    def _pass(self, ids: Sequence[Sequence[int]]) -> torch.Tensor:
        """f32[S] of S sequences."""
        import torch

        width = max(map(len, ids))
        pad = self.model.config.get_text_config().pad_token_id or 0
        tokens = torch.tensor([[*s, *[pad] * (width - len(s))] for s in ids], device=self.device)
        mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in ids], device=self.device)
        logits: torch.Tensor = self.model(input_ids=tokens, attention_mask=mask).logits.float()
        if logits.shape[1] == 1:
            return logits[:, 0]
        several = self.model.config.problem_type == "multi_label_classification"
        return (logits.sigmoid() if several else logits.softmax(-1))[:, self.column]


def _passes(ids: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Indices of sequences that are computed together, shortest first."""
    some: list[int] = []
    for number in sorted(range(len(ids)), key=lambda n: len(ids[n])):
        if some and len(ids[number]) * (len(some) + 1) > _PASS_TOKENS:
            yield some
            some = []
        some.append(number)
    if some:
        yield some
