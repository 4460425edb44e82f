"""What the grammar plans and this version does not build: understood, and refused with a way round."""

from __future__ import annotations

from typing import Any, NamedTuple

from align.recipe.document import Path_


class Later(NamedTuple):
    what: str
    remedy: str


_NOT_YET = "not offered by this version"
_OPTIMIZERS = ("adafactor", "adam_mini", "apollo", "badam", "galore", "lion", "lomo", "muon", "schedule_free", "sgd")
_VALUES: dict[tuple[str, Any], Later] = {
    ("format", "gguf"): Later(_NOT_YET, "use `format: safetensors` and convert the folder with llama.cpp"),
    ("schedule", "wsd"): Later(_NOT_YET, "use cosine, linear or constant"),
    **{("name", optimizer): Later(_NOT_YET, "use `optim: {name: adamw}`") for optimizer in _OPTIMIZERS},
}
_KEYS: dict[tuple[str, str], Later] = {
    ("objectives", "kl"): Later(
        f"a KL inside the reward is {_NOT_YET}: the reference's log-probabilities are known in the trainer's update, "
        "when advantages are made already",
        "use `loss: {name: grpo, kl: ..., kl_estimator: w_k3}`, whose gradient is the reverse KL's, token by token",
    ),
    ("batch", "tokens"): Later(_NOT_YET, "`batch` counts examples; `packing.max_tokens` bounds memory"),
}


def later_value(path: Path_, value: Any) -> Later | None:
    if not path or not isinstance(value, str):
        return None
    return _VALUES.get((str(path[-1]), value))


def later_key(path: Path_) -> Later | None:
    parents = [step for step in path if isinstance(step, str)]
    return _KEYS.get((parents[-2], parents[-1])) if len(parents) > 1 else None
