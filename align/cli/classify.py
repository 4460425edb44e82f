"""`align classify`: what a classifier or reward model says of a file.

Log-probabilities of every label for every row, by the forward that training uses. Of one label a row, they are of a
softmax over the labels; of several, each label's own (log sigmoid); of a regression and of a reward model the scores
are the answer. Where rows have labels, they are compared.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from align.check.memory.sizes import read_config
from align.check.scratch import scratch
from align.cli.arguments import columns_of
from align.data.carried import carried
from align.data.media.library import Library
from align.data.media.opening import takes_media
from align.data.prepare import prepare
from align.errors import ModelError, UserError
from align.hub import resolve_model_folder
from align.losses.classify import derived, log_probs, measures
from align.model.adapter_config import OWN_BASE, read_adapter_config, scores
from align.protocols.trees import Tree
from align.recipe.inputs import DataSource, Media
from align.recipe.labels import Labels
from align.recipe.parts import Packing
from align.recipe.trained_on import require_base
from align.stages.files import write_text
from align.stages.manifest import require_artefact
from align.stages.stage_start import adapter_in

if TYPE_CHECKING:
    from align.train.trainer import PolicyTrainer


@dataclass(frozen=True)
class Classifier:
    """base, adapter: folders; labels: of the head, wherever it lies."""

    base: Path
    adapter: Path | None
    labels: Labels


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a classifier or reward model, or its adapter: folder or hub id")
    parser.add_argument("data", metavar="DATA", help="as a recipe's `data.path`: a file, a folder, file.py:function")
    parser.add_argument("--out", required=True, metavar="FILE", help="new .jsonl: a line for each row, in order")
    parser.add_argument("--base", metavar="MODEL", help="of an adapter, where its folder names another place")
    parser.add_argument("--columns", default="", metavar="text=review,label=stars", help="our columns to the data's")
    parser.add_argument("--format", metavar="NAME", help="the data's layout, where several fit")
    parser.add_argument("--limit", type=int, metavar="N", help="read so many rows")
    parser.add_argument("--max-length", type=int, metavar="N", help="in tokens (default: the model's positions)")
    parser.add_argument(
        "--too-long", default="error", choices=("error", "right", "left", "drop"), help="what becomes of longer rows"
    )
    parser.add_argument("--on-bad-row", default="error", choices=("error", "skip"), help="rows that cannot be used")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="computed at once; changes no result")
    parser.add_argument("--chat-template", metavar="NAME", help="as `model.chat_template` of the stage that trained it")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--trust-remote-code", action="store_true", help="run model code from the folder")


def run(arguments: argparse.Namespace) -> int:
    """Write the answers, and print what they are worth where rows have labels. Raises UserError, DataError."""
    out = Path(arguments.out)
    if out.exists():
        raise UserError("the file exists", where=out, remedy="remove it, or choose another name")
    found = find(arguments.model, arguments.base)
    config = read_config(found.base)
    with scratch() as store, ExitStack() as stack:
        library = None
        if takes_media(config):
            library = Library(Media(), found.base, store, trust_remote_code=arguments.trust_remote_code)
            stack.callback(library.close)
        trees, lines = _read(arguments, found, config, library)
        print("\n".join(lines), flush=True)
        trainer = open_trainer(arguments, found)
        said = np.stack([rows[0] for rows in trainer.scores(trees)])
    rows = [json.dumps(answer, ensure_ascii=False) for answer in answers(said, trees, found.labels)]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, "\n".join(rows) + "\n")
    print(f"{out}: {len(trees)} rows; {found.labels.words}")
    for name, value in compare(said, trees, found.labels).items():
        print(f"  {name} {value:.4f}")
    return 0


def find(model: str, base: str | None) -> Classifier:
    """The folders of a classifier or reward model. Raises ModelError for a model without score head."""
    folder = resolve_model_folder(model)
    require_artefact(folder)
    adapter = folder if (folder / "adapter_config.json").is_file() else None
    if adapter is not None:
        config = read_adapter_config(adapter)
        own = adapter / OWN_BASE
        named = str(own) if own.is_dir() else base or config.get("base_model_name_or_path")
        if not named:
            raise ModelError("the adapter names no base", where=adapter, remedy="give it as --base")
        folder = resolve_model_folder(str(named))
        require_artefact(folder)
    from align.model.score_head import adapter_labels, folder_labels  # torch: only once the folders are there

    labels = adapter_labels(adapter) if adapter is not None and scores(config) else folder_labels(folder)
    if labels is None:
        raise ModelError(
            "the model has no score head: it writes, and does not classify",
            where=adapter or folder,
            remedy="give what a stage of kind classify or reward_model made",
        )
    if labels.problem is None and len(labels.names) > 1:  # as transformers' pipelines take it
        labels = Labels(labels.names, "single_label")
    return Classifier(folder, adapter, labels)


def _read(
    arguments: argparse.Namespace, found: Classifier, config: Mapping[str, Any], library: Library | None
) -> tuple[list[Tree], list[str]]:
    """The rows as trees, and the data report's lines."""
    positions = config.get("text_config", config).get("max_position_embeddings")
    source = DataSource(
        path=arguments.data,
        columns=columns_of(arguments.columns, "text=review"),
        format=arguments.format,
        limit=arguments.limit,
        max_length=arguments.max_length or positions,
        too_long=arguments.too_long,
        on_bad_row=arguments.on_bad_row,
    )
    chat = carried(found.base, found.adapter, chat_template=arguments.chat_template)
    tokenizer = chat.tokenizer
    prepared = prepare((source,), "labelled", tokenizer, seed=0, media=library, labels=found.labels, unlabelled=True)
    notes = [] if found.adapter is None else require_base(found.base, found.adapter, anyway=True)
    return prepared.items, [*prepared.report.summary, *(f"note: {note}" for note in (*chat.notes, *notes))]


def open_trainer(arguments: argparse.Namespace, found: Classifier) -> PolicyTrainer:
    """The model behind the trainer's forward, without optimizer."""
    import torch

    from align.train.spec import scoring_spec
    from align.train.trainer import PolicyTrainer

    gpu = arguments.device != "cpu" and torch.cuda.is_available()
    spec = scoring_spec(
        found.base,
        found.labels,
        dtype=arguments.dtype,
        device=arguments.device,
        gpu=gpu,
        packing=Packing(max_tokens=arguments.max_tokens or "auto"),
        adapter=found.adapter,
        adapter_config=adapter_in(found.adapter) if found.adapter else None,
        trust_remote_code=arguments.trust_remote_code,
    )
    return PolicyTrainer(spec)


# ------------------------------------------------------------------------------------------------- answers


def answers(said: np.ndarray, trees: Sequence[Tree], labels: Labels) -> Iterator[dict[str, Any]]:
    """One object per row of scores f32[n, K]: origin, the answer, log-probabilities (or scores) by label, and
    `expected`, the row's own label, where it has one."""
    every = log_probs(said, labels.problem)
    for number, (row, logps, tree) in enumerate(zip(said, every, trees, strict=True)):
        out: dict[str, Any] = {"row": number, "origin": tree.origin}
        if labels.problem == "single_label":
            out |= {"label": labels.names[int(row.argmax())], "log_probs": _by_name(labels, logps)}
        elif labels.problem == "multi_label":
            out |= {"labels": _chosen(labels, row > 0), "log_probs": _by_name(labels, logps)}
        else:
            out["scores"] = _by_name(labels, row)
        if tree.trunk.labelled:
            out["expected"] = _expected(tree, labels)
        yield out


def _by_name(labels: Labels, values: np.ndarray) -> dict[str, float]:
    return {name: round(float(value), 6) for name, value in zip(labels.names, values, strict=True)}


def _chosen(labels: Labels, there: Sequence[bool] | np.ndarray) -> list[str]:
    return [name for name, yes in zip(labels.names, there, strict=True) if yes]


def _expected(tree: Tree, labels: Labels) -> Any:
    values = np.array([tree.trunk.columns[name] for name in labels.columns])
    if labels.problem == "single_label":
        return labels.names[int(values[0])]
    return _chosen(labels, values > 0) if labels.problem == "multi_label" else _by_name(labels, values)


def compare(said: np.ndarray, trees: Sequence[Tree], labels: Labels) -> dict[str, float]:
    """Accuracy and F1, or errors and correlation, over the rows that have a label; of a label by its name."""
    import torch

    from align.train.metrics import MetricSums

    there = [number for number, tree in enumerate(trees) if tree.trunk.labelled]
    if not there:
        return {}
    columns = {
        f"sequence/{name}": torch.tensor([trees[n].trunk.columns[name] for n in there]) for name in labels.columns
    }
    sums = MetricSums()
    sums.add(measures(torch.as_tensor(said[there]), columns))
    return labels.called(derived(sums.result()))
