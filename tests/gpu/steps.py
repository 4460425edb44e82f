"""What is run on a machine that is had for minutes, in order of worth."""

from __future__ import annotations

from typing import Any

from tests.gpu.runner import Step

OURS = ("pydantic", "peft")
PEER = (*OURS, "trl", "datasets", "accelerate")
LENGTHS = [1024, 4096, 16384]


def _update(loss: str, *, model: str = "1.5b", liger: bool = False, lengths: list[int] = LENGTHS, limit: int) -> Step:
    name = f"{loss}-{model}{'-liger' if liger else ''}"
    options: dict[str, Any] = {"loss": loss, "model": model, "lengths": lengths, "liger": liger}
    if liger:
        options["ours_of"] = f"{loss}-{model}"
    about = f"a {loss.upper()} update of a {model.upper()} shape against TRL{' with liger' if liger else ''}"
    needs = (*PEER, *(("liger_kernel", "triton") if liger else ()))
    return Step(name, about, "tests.gpu.updates:against_trl", limit, options, needs)


STEPS = (
    Step("attention", "varlen, flex and tree equal SDPA", "tests.gpu.kernels:attention", 90, needs=(*OURS, "pytest")),
    Step("parts", "head, feed-forward, norm, rotation: bf16 to float32", "tests.gpu.kernels:parts", 60, needs=OURS),
    _update("dpo", limit=120),
    _update("grpo", limit=150),
    _update("sft", limit=100),
    _update("dpo", liger=True, limit=80),
    _update("grpo", liger=True, limit=110),
    _update("sft", liger=True, limit=60),
    _update("dpo", model="7b", lengths=[4096], limit=120),
    Step("qlora-7b", "QLoRA of a 7B shape, its memory", "tests.gpu.updates:qlora", 90, needs=(*OURS, "bitsandbytes")),
    Step("profile", "where the slowest update's time goes", "tests.gpu.updates:profile", 60, needs=OURS),
    Step("tests", "tests/gpu under pytest", "tests.gpu.updates:own_tests", 300, needs=(*OURS, "pytest")),
)
TOY_LIMIT = 5.0
"""How many times longer a step may take as a toy on a few cores: most of it starts interpreters."""
