"""The recipe's `adapter:`: what of a model is trained, and how."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field, model_validator

from align.recipe.strict import PositiveInt, Strict

Part = Literal["vision", "projector", "language"]
PARTS: tuple[Part, ...] = ("vision", "projector", "language")
Mode = Literal["frozen", "lora", "full"]


class PartTune(Strict):
    """How one part of a model is trained. lr, weight_decay: in place of the stage's `optim`, under its schedule."""

    mode: Mode
    lr: Annotated[float, Field(gt=0)] | None = None
    weight_decay: Annotated[float, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _rates_of_what_is_trained(self) -> PartTune:
        if self.mode == "frozen" and (self.lr is not None or self.weight_decay is not None):
            raise ValueError("a frozen part has no `lr` and no `weight_decay`: leave them out, or choose lora or full")
        return self


class Rate(NamedTuple):
    """Of one part of a model, every value filled in."""

    lr: float
    weight_decay: float


def _part(value: Any) -> Any:
    return {"mode": value} if isinstance(value, str) else value


PartField = Annotated[PartTune | None, BeforeValidator(_part)]


class Tune(Strict):
    """Modes of the parts of a model that reads images; None is the default (`Adapter.modes`)."""

    vision: PartField = None
    projector: PartField = None
    language: PartField = None


class Quant(Strict):
    """Four-bit storage of frozen weights (QLoRA, 2305.14314): NF4 or FP4, a scale for each `blocksize` weights, and
    with `double` those scales in eight bits."""

    type: Literal["nf4", "fp4"] = "nf4"
    double: bool = True
    blocksize: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = 64

    @property
    def bytes_per_weight(self) -> float:
        """Half a byte, its share of a float32 scale or of an eight-bit one whose own scale 256 share."""
        scale = 1 + 4 / 256 if self.double else 4
        return 0.5 + scale / self.blocksize


class Adapter(Strict):
    """kind: LoRA on frozen weights, on weights in four bits (qlora), with magnitudes (dora, 2402.09353), or no adapter
    (full). rslora: scale alpha / sqrt(rank) in place of alpha / rank (2312.03732). quant: of qlora; DoRA on weights in
    four bits is `{kind: dora, quant: {}}`."""

    kind: Literal["lora", "qlora", "dora", "full"] = "lora"
    rank: PositiveInt = 16
    alpha: Annotated[float, Field(gt=0)] = 32.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: str | tuple[str, ...] = "all-linear"
    exclude: tuple[str, ...] = ()
    tune: Tune = Tune()
    rslora: bool = False
    quant: Quant | None = None

    @model_validator(mode="before")
    @classmethod
    def _qlora_is_quantised(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("kind") == "qlora" and given.get("quant") is None:
            return {**given, "quant": Quant()}
        return given

    @model_validator(mode="after")
    def _options_of_their_kinds(self) -> Adapter:
        if self.quant is not None and self.kind not in ("qlora", "dora"):
            raise ValueError(f"`quant` with `kind: {self.kind}`: write `kind: qlora`, or `kind: dora` for DoRA on it")
        if self.rslora and self.kind == "full":
            raise ValueError("`rslora` scales an adapter, and `kind: full` makes none: leave it out")
        return self

    @property
    def quantised_parts(self) -> tuple[Part, ...]:
        """Parts whose linear layers are stored in four bits: the language model, and a tower that takes LoRA."""
        if self.quant is None:
            return ()
        return tuple(part for part, mode in self.modes.items() if mode == "lora" or part == "language")

    @property
    def modes(self) -> dict[Part, Mode]:
        """How each part is trained. What `tune` leaves out: towers and projector are frozen, the language model is
        trained as `kind` says."""
        language: Mode = "full" if self.kind == "full" else "lora"
        defaults: dict[Part, Mode] = {"vision": "frozen", "projector": "frozen", "language": language}
        return {part: own.mode if (own := getattr(self.tune, part)) else defaults[part] for part in PARTS}

    def parts(self, mode: Mode) -> tuple[Part, ...]:
        """The parts that are trained so."""
        return tuple(part for part, own in self.modes.items() if own == mode)

    @property
    def mixed(self) -> bool:
        """Whether LoRA on some parts stands beside others that are trained whole."""
        return self.kind != "full" and bool(self.parts("full"))
