"""What the grammar plans and this version does not build: understood, and refused with a way round."""

from __future__ import annotations

from typing import Any, NamedTuple

from align.recipe.document import Path_


class Later(NamedTuple):
    what: str
    remedy: str


_NOT_YET = "not offered by this version"
_VALUES: dict[tuple[str, Any], Later] = {
    ("format", "gguf"): Later(_NOT_YET, "use `format: safetensors` and convert the folder with llama.cpp"),
    ("schedule", "wsd"): Later(_NOT_YET, "use cosine, linear or constant"),
}
_KEYS: dict[tuple[str, str], Later] = {
    ("objectives", "kl"): Later(
        f"a KL inside the reward is {_NOT_YET}: the reference's log-probabilities are known in the trainer's update, "
        "when advantages are made already",
        "use `loss: {name: grpo, kl: ..., kl_estimator: w_k3}`, whose gradient is the reverse KL's, token by token",
    ),
    ("data", "truncate"): Later("it is called `too_long` now", "write `too_long: right` or `left`"),
    ("data", "overlong_prompts"): Later("it is called `too_long` now", "write `too_long: drop` for `filter`"),
    ("environment", "mcp"): Later(_NOT_YET, "write methods that call the server, in a class of `use`"),
    ("batch", "tokens"): Later(_NOT_YET, "`batch` counts examples; `packing.max_tokens` bounds memory"),
}


# optimizers by the names that TRL and others give those that are offered
_OPTIMIZERS = {
    "adam": "use adamw; its `weight_decay` is 0 unless given",
    "adamw_torch": "use adamw",
    "adamw_torch_fused": "use adamw",
    "adamw_bnb_8bit": "use adamw_8bit",
}


def later_value(path: Path_, value: Any) -> Later | None:
    if not path or not isinstance(value, str):
        return None
    if path[-2:] == ("optim", "name"):
        remedy = _OPTIMIZERS.get(value.lower(), "use adamw, or adamw_8bit, whose moments take a quarter of the memory")
        return Later(_NOT_YET, remedy)
    return _VALUES.get((str(path[-1]), value))


def later_key(path: Path_) -> Later | None:
    parents = [step for step in path if isinstance(step, str)]
    return _KEYS.get((parents[-2], parents[-1])) if len(parents) > 1 else None
