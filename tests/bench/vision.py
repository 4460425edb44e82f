"""What the comparisons with images share: the model, its pictures, real questions about them, and padded batches of our
own engine.

The model is a Qwen2.5-VL whose language part has the shape of the text benches (`work.BENCH`, with Qwen2.5's biases).
Its tower is in proportion to it what Qwen2.5-VL-7B's is to its own language model. There an image token costs the tower
2.5G multiply-adds (four patches through 32 blocks, and the merger) and the language model 6.5G, a ratio of 0.39; here
5.0M and 13.8M, 0.36, and in both the tower is a third as wide. All blocks but the last attend within windows of 112
pixels, as all but one in eight do there. LoRA is on the language model
(`LANGUAGE`) and the tower is frozen, or on both (`BOTH`).

Images are processed before anything is timed: ours lie in the media store, from which every update reads them, and
TRL's batches are made by its own collator in advance (what that takes is measured apart).
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from align.mediastore import TOKENS, tensors_path
from align.protocols.trees import Medium, Segment, Tree
from tests.bench import work

LANGUAGE = r"model\.language_model\..*_proj"
BOTH = r"model\.(language_model|visual\.blocks)\..*(proj|qkv)"
TARGETS = {"frozen": LANGUAGE, "trained": BOTH}
MARKS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
PATCH, MERGE = 14, 2
SIDE = PATCH * MERGE  # pixels, of what becomes one token
WINDOW = 112  # pixels


@dataclass(frozen=True)
class Tower:
    """A vision transformer in Qwen2.5-VL's layout: gated feed-forward blocks, window attention in all but the last."""

    hidden: int
    intermediate: int
    layers: int
    heads: int

    def forward_flop(self, tokens: int, out: int) -> float:
        """Of one image that becomes `tokens` merged tokens of width `out`, matrix products only. Windows count as
        full."""
        patches, h = tokens * MERGE**2, self.hidden
        blocks = self.layers * (4 * h * h + 3 * h * self.intermediate)
        embedding, merger = 3 * 2 * PATCH**2 * h, (MERGE**2 * h) * (MERGE**2 * h + out)
        window = min(patches, (WINDOW // PATCH) ** 2)
        pairs = patches * (patches + (self.layers - 1) * window)
        return 2.0 * (patches * (blocks + embedding) + tokens * merger) + 4.0 * pairs * h


TOWER = Tower(hidden=128, intermediate=344, layers=5, heads=4)
TOY_TOWER = Tower(hidden=32, intermediate=48, layers=2, heads=2)


# ------------------------------------------------------------------------------------------------------- model


def write_model(shape: work.Shape, tower: Tower, folder: Path, *, real: bool, dtype: str = "float32") -> Path:
    """Model with random weights, processor and tokenizer: with `real` one trained on text of the shared data, else one
    of bytes."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from align.model.load import quiet

    tokenizer = _write_tokenizer(shape, folder, real)
    ids = {mark: tokenizer.convert_tokens_to_ids(mark) for mark in MARKS}
    text = {
        "vocab_size": max(shape.vocabulary, len(tokenizer)),
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": shape.tied,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [shape.head_dim // 8, *[shape.head_dim * 3 // 16] * 2],
        },
    }
    vision = {
        "depth": tower.layers,
        "hidden_size": tower.hidden,
        "intermediate_size": tower.intermediate,
        "num_heads": tower.heads,
        "out_hidden_size": shape.hidden,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "window_size": WINDOW,
        "fullatt_block_indexes": [tower.layers - 1],
    }
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    marks = {name: ids[mark] for name, mark in zip(names, MARKS, strict=True)}
    config = AutoConfig.for_model(
        "qwen2_5_vl", text_config=text, vision_config=vision, tie_word_embeddings=shape.tied, **marks
    )
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForImageTextToText.from_config(config, dtype=getattr(torch, dtype)).save_pretrained(folder)
        _processor(tokenizer).save_pretrained(folder)
    return folder


def _write_tokenizer(shape: work.Shape, folder: Path, real: bool) -> Any:
    from tokenizers import AddedToken, Tokenizer
    from transformers import AutoTokenizer

    from align.data.scratch import train_tokenizer
    from align.recipe.inputs import TokenizerFromScratch
    from tests.tiny_models import write_byte_tokenizer

    if real:
        path = str(work.shared_data() / "text" / "preference_paired" / "lf_dpo_en_demo.json")
        size = shape.vocabulary - len(MARKS)
        train_tokenizer(TokenizerFromScratch.model_validate({"train_on": path, "vocab_size": size}), folder)
    else:
        write_byte_tokenizer(folder)
    file = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in MARKS])
    tokenizer.save(str(file))
    return AutoTokenizer.from_pretrained(folder)


def _processor(tokenizer: Any) -> Any:
    """With the limits of Qwen's own: from 4 to 1,280 tokens an image."""
    import transformers as hf

    size = {"shortest_edge": 4 * SIDE**2, "longest_edge": 1280 * SIDE**2}
    kwargs = {"patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": 2, "size": size}
    return hf.Qwen2_5_VLProcessor(
        image_processor=hf.Qwen2VLImageProcessor(**kwargs),
        tokenizer=tokenizer,
        video_processor=hf.Qwen2VLVideoProcessor(**kwargs),
        chat_template=tokenizer.chat_template,
    )


# ------------------------------------------------------------------------------------------------------- pictures


class Pictures:
    """A media store below `folder`, filled by the model's own processor."""

    def __init__(self, folder: Path):
        from transformers import AutoProcessor

        self.store = folder / "store"
        self.store.mkdir()
        self.processor = AutoProcessor.from_pretrained(folder)
        self.pad = self.processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        self._known: dict[str, Medium] = {}

    def add(self, key: str, picture: Any) -> Medium:
        """The medium of a PIL picture, processed and stored where `key` is new."""
        import torch
        from safetensors.torch import save_file

        if key not in self._known:
            found = self.processor.image_processor(images=[picture], return_tensors="pt")
            tensors = {name: found[name].contiguous() for name in ("pixel_values", "image_grid_thw")}
            patches = tensors["pixel_values"].shape[0]
            length = patches // MERGE**2
            save_file(tensors | {TOKENS: torch.full((length,), self.pad)}, tensors_path(self.store, key))
            self._known[key] = Medium("image", key, str(self.store), 0, length, patches)
        return self._known[key]

    def spell(self, text: str, media: Sequence[Medium]) -> tuple[np.ndarray, tuple[Medium, ...]]:
        """Token ids i64[n] of a text with a `PICTURE` for each medium, and the media where they stand in it."""
        parts = text.split("<|image_pad|>")
        assert len(parts) == len(media) + 1, "a mark for every picture"
        ids: list[int] = []
        placed = []
        for k, part in enumerate(parts):
            ids += self.processor.tokenizer(part, add_special_tokens=False)["input_ids"]
            if k < len(media):
                placed.append(replace(media[k], start=len(ids)))
                ids += [self.pad] * media[k].length
        return np.array(ids), tuple(placed)


# ------------------------------------------------------------------------------------------------------- real rows


@dataclass(frozen=True)
class Question:
    """images: paths; prompt and answer: text, with the marks of Qwen's template."""

    images: tuple[Path, ...]
    prompt: str
    answer: str


def questions(share: float, seed: int = 0) -> list[Question]:
    """Rows of easy_vqa and nlvr (one image, and two) in a random order.

    share: of the images of each. An image brings all its questions along, so that a part is to the whole as an epoch
    of fewer images: about ten questions an image in easy_vqa, one in nlvr.
    """
    folder = work.shared_data() / "multimodal"
    found = []
    for file in ("easy_vqa/vqa.jsonl", "nlvr/vqa.jsonl", "nlvr/two_image_vqa.jsonl"):
        path = folder / file
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        named = [tuple(row["images"]) if "images" in row else (row["image"],) for row in rows]
        distinct = list(dict.fromkeys(named))
        kept = set(distinct[: math.ceil(share * len(distinct))])
        found += [_question(path.parent, row, own) for row, own in zip(rows, named, strict=True) if own in kept]
    order = np.random.default_rng(seed).permutation(len(found))
    return [found[i] for i in order]


def _question(folder: Path, row: dict[str, Any], images: tuple[str, ...]) -> Question:
    asked = row["question"] if "question" in row else f"{row['sentence']}. True or false?"
    prompt = f"<|im_start|>user\n{PICTURE * len(images)}{asked}<|im_end|>\n<|im_start|>assistant\n"
    answer = row["answer"] if "answer" in row else row["label"]
    return Question(tuple(folder / name for name in images), prompt, f"{answer}<|im_end|>")


def as_trees(rows: Sequence[Question], pictures: Pictures) -> list[Tree]:
    """A trunk for every question; its answer and the end of its turn are scored."""
    trees = []
    for i, row in enumerate(rows):
        media = [pictures.add(f"{path.parents[1].name}-{path.stem}", opened(path)) for path in row.images]
        ids, placed = pictures.spell(row.prompt, media)
        answer, _ = pictures.spell(row.answer, ())
        mask = np.arange(len(ids) + len(answer)) >= len(ids)
        trees.append(Tree(i, Segment(np.concatenate([ids, answer]), mask, media=placed), origin=f"row {i}"))
    return trees


def opened(path: Path) -> Any:
    from PIL import Image

    return Image.open(path).convert("RGB")


# ------------------------------------------------------------------------------------------------------- sides


def forget_features(trainer: Any, megabytes: int) -> None:
    """An empty cache of features of this size, as a run begins with."""
    from align.model.media.features import MediaFeatures

    trainer.module.media = MediaFeatures(trainer.module.model, megabytes << 20)


def our_sides(
    trainer: Any, trees: Sequence[Tree], megabytes: int, *, frozen: bool, later: str
) -> dict[str, Callable[[], object]]:
    """Updates of our engine: "ours" begins with an empty cache of features; where the tower is frozen, the side that
    `later` names finds every picture in it, and "ours, no cache" has none."""

    def update(cache: int) -> None:
        forget_features(trainer, cache)
        trainer.step(trees, step=0, progress=0.0)

    def known() -> None:
        trainer.module.media = kept
        trainer.step(trees, step=0, progress=0.0)

    sides: dict[str, Callable[[], object]] = {"ours": lambda: update(megabytes)}
    if frozen:
        forget_features(trainer, megabytes)
        kept = trainer.module.media  # filled by the first update, which is not counted
        sides |= {later: known, "ours, no cache": lambda: update(0)}
    return sides


def padded_windows(trees: Sequence[Tree], batch: int, *, by_length: bool) -> list[list[Tree]]:
    """A row for every sequence, `batch` of them at a time: in the order given, or the longest together."""
    rows = [replace(tree, branches=(branch,)) for tree in trees for branch in tree.branches] or list(trees)
    if by_length:
        rows.sort(key=lambda tree: tree.tokens)
    return [rows[i : i + batch] for i in range(0, len(rows), batch)]


def _padded(trees: Sequence[Tree], batch: int, by_length: bool) -> list[Any]:
    from align.data.microbatches import Microbatch

    return [Microbatch(rows) for rows in padded_windows(trees, batch, by_length=by_length)]


class Padded:
    """Our trainer on padded batches: the same losses, optimizer, kernels and fused head; each sequence is a row padded
    to the longest of its batch, and runs with its prompt and its images through the model's own forward.
    """

    def __init__(self, folder: Path, loss: dict[str, Any], dtype: str, targets: str, reference: bool):
        self.trainer: Any = work.make_trainer(
            folder, loss, dtype=dtype, device="cpu", targets=targets, reference=reference
        )
        module: Any = self.trainer.module
        module.use("padded", "sdpa")
        module._inputs_of_rows = _pixels_of_rows

    def draw_adapter(self) -> None:
        work.draw_adapter(self.trainer.module)

    def update(self, trees: Sequence[Tree], setting: tuple[int, bool]) -> tuple[float, float]:
        """(loss, gradient norm). setting: rows of a batch, and whether rows of a length stand together."""
        from align.model import padded

        batch, by_length = setting
        self.trainer.packer.planned = functools.partial(_padded, batch=batch, by_length=by_length)
        usual, padded.MAX_PADDING = padded.MAX_PADDING, math.inf  # one block of rows, however long the longest
        try:
            found = self.trainer.step(trees, step=0, progress=0.0)
        finally:
            padded.MAX_PADDING = usual
        return found["loss/total"], found["optim/grad_norm"]


def _pixels_of_rows(batch: Any, types: np.ndarray, placed: Sequence[Any]) -> Callable[[Any, Any], dict[str, Any]]:
    """For a block of rows, its images as the model's own forward takes them: as often as they stand there."""
    import torch

    from align.mediastore import read_tensors
    from align.model.media.features import merged

    def inputs(batch: Any, block: Any) -> dict[str, Any]:
        if not placed:
            return {}
        within = [set(row[gap == 0].tolist()) for row, gap in zip(block.index, block.past, strict=True)]
        media = [p.medium for own in within for p, at in zip(placed, batch.media_at, strict=True) if at in own]
        rows = torch.as_tensor(types)[block.index].masked_fill(block.past > 0, 0)
        return {"mm_token_type_ids": rows, **merged([read_tensors(medium) for medium in media])}

    return inputs


# ------------------------------------------------------------------------------------------------------- counts


def flop(shape: work.Shape, tower: Tower, layout: work.Layout, images: Sequence[int], *, reference: bool) -> float:
    """Operations of one update. images: merged tokens of every image that the tower computes, as often as it computes
    it (a backward of a tower that learns counts like a forward)."""
    seen = sum(tower.forward_flop(tokens, shape.hidden) for tokens in images)
    return work.update_flop(shape, layout, reference=reference) + seen


def images_of(trees: Sequence[Tree], *, once: bool) -> list[int]:
    """Merged tokens of the images of every sequence, or of each different image once."""
    rows = [medium for tree in trees for _ in tree.sequences for medium in tree.media]
    return [medium.length for medium in ({m.key: m for m in rows}.values() if once else rows)]
