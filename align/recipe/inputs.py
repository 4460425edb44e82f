"""The recipe's inputs: where the policy starts, where rows come from, what becomes of media."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from align.recipe.strict import LargeInt, PositiveInt, Strict

SHUFFLE_BUFFER = 2048  # rows: tokenised in a second or two, and many times a batch


class TokenizerFromScratch(Strict):
    """A byte-level BPE trained on the text of `train_on`, with our ChatML template."""

    train_on: DataField
    vocab_size: Annotated[int, Field(ge=300)] = 512
    split_digits: bool = True


def _texts(value: Any) -> Any:
    return [value] if isinstance(value, str) else () if value is None else value


class Model(Strict):
    """Where the policy starts. Either `path` (hub id or local folder) or `config` + `tokenizer` (from scratch).

    end_of_turn: tokens that end a turn of the assistant, where the chat template does not show it. tokenizer_of: whose
    tokenizer and template count where `adapter` carries others than the base has; by default the adapter's, or neither
    where they do not go together. other_base: `adapter` belongs on this base, though it was trained on
    another."""

    path: str | None = None
    revision: str | None = None
    adapter: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attention: Literal["auto", "sdpa", "varlen", "flex"] = "auto"
    chat_template: str | None = None
    template_args: dict[str, Any] = Field(default_factory=dict)
    other_base: bool = False
    tokenizer_of: Literal["adapter", "base"] | None = None
    end_of_turn: Annotated[tuple[str, ...], BeforeValidator(_texts)] = ()
    trust_remote_code: bool = False
    gradient_checkpointing: bool = False
    config: dict[str, Any] | None = None
    tokenizer: TokenizerFromScratch | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> Model:
        if (self.path is None) == (self.config is None):
            raise ValueError("give either `path` (a hub id or a folder) or `config` with `tokenizer` (from scratch)")
        if (self.config is None) != (self.tokenizer is None):
            raise ValueError("`config` and `tokenizer` go together: both are needed to start from scratch")
        if self.config is not None and self.adapter is not None:
            raise ValueError("`adapter` needs `path`: a model from scratch has no adapter yet")
        return self


Exhausted = Literal["first", "all"]
Thinking = Literal["keep", "last", "none"]


class Mix(Strict):
    """How long an epoch of sources with weights is: until the first of them has given all its rows, or until all have
    (`align.data.mixing`). Without it, as long as all rows together."""

    exhausted: Exhausted


class DataSource(Strict):
    """One source of rows. `path`: file, folder, hub id, or `file.py:function` (a generator of rows, called with
    `options` in a child process). `columns` maps our field to theirs. `format`: the layout of its rows by name, or
    one's own, `file.py:name` (`align.data.formats`).

    too_long: what becomes of a row of more than `max_length` tokens: it is an error, it is left out, its beginning
    (left) or end (right) is cut off, or (of sft) it becomes several rows.
    thinking: which turns keep their thoughts (`align.data.thinking`); by default the chat template decides.
    stream: rows are read as they are trained on, never all at once, for files larger than memory
    (`align.data.streams`); shuffle_buffer: so many rows of it are read at a time and drawn in random order."""

    path: str
    columns: dict[str, str] = Field(default_factory=dict)
    format: str | None = None
    split: str | None = None
    limit: PositiveInt | None = None
    weight: Annotated[float, Field(gt=0)] | None = None
    max_length: PositiveInt | None = None
    too_long: Literal["error", "drop", "left", "right", "split"] = "error"
    on_bad_row: Literal["error", "skip"] = "error"
    thinking: Thinking | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    stream: bool = False
    shuffle_buffer: PositiveInt | None = None

    @model_validator(mode="after")
    def _longer_than_what(self) -> DataSource:
        if self.max_length is not None and self.max_length < 2 and self.too_long == "split":
            raise ValueError("`too_long: split` makes parts of `max_length` tokens, and needs two at least")
        return self

    @model_validator(mode="after")
    def _a_buffer_of_a_stream(self) -> DataSource:
        if self.shuffle_buffer is not None and not self.stream:
            raise ValueError("`shuffle_buffer` is of a stream (`stream: true`); other rows are shuffled as a whole")
        return self

    @property
    def rows_at_once(self) -> int:
        """Rows of a stream that are read at a time."""
        return self.shuffle_buffer or SHUFFLE_BUFFER


def _sources(value: Any) -> Any:
    items = value if isinstance(value, list) else [value]
    return [{"path": item} if isinstance(item, str) else item for item in items]


DataField = Annotated[tuple[DataSource, ...], BeforeValidator(_sources), Field(min_length=1)]


class Media(Strict):
    """Images, videos and sounds of the data: where they may come from, and what becomes of them.

    max_pixels, min_pixels: an image, and each frame of a video, is resized to at most and at least so many pixels, its
        aspect kept; None: what the model's processor allows.
    video_frames: how many frames are taken evenly from a video file; a list of frames longer than that is thinned.
    folders: where files may lie beside the data file's own folder, such as one images folder for several sets.
    hosts: names that http(s) addresses may have; none are fetched otherwise. Private addresses never are.
    max_source_pixels, max_bytes: of an image before it is resized, and of a file, an address or a data URI. timeout_s:
        for one download, and for the processing of one medium.
    workers: processes that decode; None: half the cores, at most 8. cache_gb: of processed media on disk, beyond which
        those used longest ago are removed.
    """

    max_pixels: PositiveInt | None = None
    min_pixels: PositiveInt | None = None
    video_frames: PositiveInt = 8
    folders: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    max_source_pixels: LargeInt = 100_000_000
    max_bytes: LargeInt = 256 * 1024 * 1024
    timeout_s: Annotated[float, Field(gt=0)] = 60.0
    workers: PositiveInt | None = None
    cache_gb: Annotated[float, Field(gt=0)] = 20.0

    @model_validator(mode="after")
    def _a_range(self) -> Media:
        if self.max_pixels is not None and self.min_pixels is not None and self.min_pixels > self.max_pixels:
            raise ValueError(f"no picture has at least {self.min_pixels} and at most {self.max_pixels} pixels")
        return self
