"""Every name in transformers' mapping of causal language models: what the trainer computes is what the model computes,
or the trainer refuses it and says why.

    python -m tests.prove architectures

A tiny model of each name, matrices scaled so that attention is sharp and logits are wide, is written to a folder and
loaded as a stage loads it: LoRA and all weights, float32 and bfloat16. Log-probabilities of packed trees, one of them
beyond the model's sliding window, are held against transformers' own eager forward of each sequence alone; gradients of
all weights too. A line says

    right     shared prompts, packed
    padded    a sequence a row, trunks repeated: slower, the same values
    refused   by a ModelError, with its words
    no decoder  transformers' own forward looks ahead, wants other inputs than tokens, or cannot be made of them
    WRONG     anything else: other values, other gradients, an error that is not ours

bfloat16 is held against the float32 truth: at most TWICE as far from it, on average, as the model's own eager forward.
ALIGN_PROVE_NAMES=llama;olmo2 examines some of the names.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from align.data.packing import collate
from align.errors import AlignError
from align.model.load import quiet
from align.protocols.trees import Segment, Tree
from align.recipe.adapter import Adapter
from align.recipe.inputs import Model
from align.recipe.parts import LossTerm, Optim
from align.train.spec import TrainerSpec
from align.train.trainer import PolicyTrainer
from tests.architectures import VARIANTS, VOCABULARY, make
from tests.prove.entry import record

TOLERANCE = 2e-3  # of log-probabilities in float32, and of gradients relative to the largest
TWICE = 2.0
SHAPES = ((20, (30, 1, 12)), (5, (3, 9)), (1, (25, 2)), (40, (25,)))  # tokens of trunks and branches
LIMIT_S = 240


def trees() -> list[Tree]:
    rng = np.random.default_rng(5)

    def text(size: int, scored: bool) -> Segment:
        return Segment(rng.integers(3, VOCABULARY, size), np.full(size, scored))

    return [Tree(n, text(t, False), tuple(text(b, True) for b in bs)) for n, (t, bs) in enumerate(SHAPES)]


def rows() -> list[tuple[np.ndarray, int]]:
    """Ids and trunk's length of each sequence."""
    return [(np.concatenate([t.trunk.token_ids, b.token_ids]), len(t.trunk)) for t in trees() for b in t.branches]


def alone(model: Any) -> Tensor:
    """Log-probabilities f32[N] of the branches' tokens under the model's own forward of each sequence."""
    found = []
    for ids, trunk in rows():
        row = torch.tensor(ids)[None]
        logits = model(input_ids=row, use_cache=False).logits[0, :-1].float()
        found.append(torch.log_softmax(logits, -1).gather(-1, row[0, 1:, None])[trunk - 1 :, 0])
    return torch.cat(found)


def own_model(folder: Path, dtype: torch.dtype, attention: str | None = "eager") -> Any:
    """attention: None for the one that transformers takes by itself."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention)
    model.config.use_cache = False
    return model.eval()


def looks_ahead(model: Any) -> bool:
    """Whether a later token, or how many there are, changes what is said of earlier ones."""
    row = torch.tensor(rows()[0][0])[None]
    whole = model(input_ids=row, use_cache=False).logits[0]
    short = model(input_ids=row[:, :-7], use_cache=False).logits[0]
    return bool((whole[:-7] - short).abs().max() > TOLERANCE * max(1.0, float(short.abs().max())))


def trainer(folder: Path, adapter: Adapter, dtype: str) -> PolicyTrainer:
    return PolicyTrainer(
        TrainerSpec(
            model=Model.model_validate({"path": str(folder), "dtype": dtype, "gradient_checkpointing": False}),
            base=str(folder),
            adapter_config=adapter,
            losses=(LossTerm.model_validate({"name": "grpo"}),),
            optim=Optim(lr=1e-3, schedule="constant"),
            total_updates=10,
            threads=1,
            device="cpu",
        )
    )


def logps(policy: PolicyTrainer) -> Tensor:
    return torch.cat([torch.as_tensor(one) for tree in policy.logps(trees()) for one in tree])


def gradient_gap(policy: PolicyTrainer, model: Any) -> float:
    """Largest difference between the trainer's gradients and those of the model's own forward, by a fixed random
    cotangent, relative to the largest."""
    policy.module.zero_grad()
    ours = policy.module.eval()(collate(trees(), policy.packer.positions)).logps
    cotangent = torch.randn(ours.numel(), generator=torch.Generator().manual_seed(0))
    (ours * cotangent).sum().backward()
    (alone(model) * cotangent).sum().backward()
    found = {name.removeprefix("model."): p.grad for name, p in policy.module.named_parameters()}
    own = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    largest = max(float(grad.abs().max()) for grad in own.values())
    gaps = [
        float((grad - found[name]).abs().max()) if found.get(name) is not None else float(grad.abs().max())
        for name, grad in own.items()
    ]
    return max(gaps) / max(largest, 1e-12)


def examine(name: str, folder: Path) -> dict[str, Any]:
    """One line of the table: {"verdict", "why"?, figures}."""
    try:
        make(name).save_pretrained(folder)
        model = own_model(folder, torch.float32)
        with torch.no_grad():
            truth = alone(model)
            ahead = looks_ahead(model)
    except Exception as error:  # noqa: BLE001 - whatever transformers says: it makes no language model of these tokens
        return {"verdict": "no decoder", "why": short(error)}
    if ahead:
        return refused_anyway(folder)
    if not torch.isfinite(truth).all():
        return {"verdict": "no decoder", "why": "its own forward is not finite at these weights"}
    figures: dict[str, Any] = {}
    try:
        policy = trainer(folder, Adapter(kind="full"), "float32")
        figures |= {"layout": policy.module.layout, "attention": policy.module.attention}
        found, attention = logps(policy), "eager"
        if float((found - truth).abs().max()) > TOLERANCE:  # transformers may be of two minds, as of Falcon with ALiBi
            with torch.no_grad():
                eager, truth, attention = truth, alone(own_model(folder, torch.float32, None)), None
            figures["eager_apart"] = float((eager - truth).abs().max())
        figures["difference"] = float((found - truth).abs().max())
        # loaded anew: frequencies of dynamic rotary embeddings depend on what was computed before
        figures["gradients"] = gradient_gap(policy, own_model(folder, torch.float32, attention))
        figures |= examine_lora(folder, truth, attention)
    except AlignError as error:
        return {"verdict": "refused", "why": short(error), **figures}
    except Exception as error:  # noqa: BLE001 - an error that is not ours is what this looks for
        return {"verdict": "WRONG", "why": short(error), **figures}
    return {"verdict": verdict(figures), **figures}


def refused_anyway(folder: Path) -> dict[str, Any]:
    """The line of a model whose own forward looks ahead: nothing to train, and the trainer must say so."""
    try:
        trainer(folder, Adapter(kind="full"), "float32")
    except AlignError as error:
        return {"verdict": "no decoder", "why": f"its own forward looks ahead; {short(error)}"}
    return {"verdict": "WRONG", "why": "its own forward looks ahead, and the trainer takes it"}


def examine_lora(folder: Path, truth: Tensor, attention: str | None) -> dict[str, Any]:
    """The trainer with LoRA; that LoRA alone is refused, as where peft cannot adapt a model, is said."""
    try:
        policy = trainer(folder, Adapter(rank=4, alpha=8), "float32")
    except AlignError as error:
        return {"lora_refused": short(error)}
    figures: dict[str, Any] = {"lora": float((logps(policy) - truth).abs().max())}
    policy.step(trees(), step=0, progress=0.0)
    policy = trainer(folder, Adapter(rank=4, alpha=8), "bfloat16")
    figures["layout_bfloat16"], apart = policy.module.layout, float((logps(policy) - truth).abs().mean())
    try:
        with torch.no_grad():
            noise = float((alone(own_model(folder, torch.bfloat16, attention)) - truth).abs().mean())
    except Exception as error:  # noqa: BLE001 - as xlstm's inference: there is nothing to hold the trainer against
        return {**figures, "bfloat16_apart": apart, "bfloat16_own": short(error)}
    return {**figures, "bfloat16": apart / max(noise, 1e-6)}


def verdict(figures: dict[str, Any]) -> str:
    exact = all(figures.get(name, 0.0) <= TOLERANCE for name in ("difference", "gradients", "lora"))
    if not exact or figures.get("bfloat16", 0.0) > TWICE:
        return "WRONG"
    layouts = {figures["layout"], figures.get("layout_bfloat16", figures["layout"])}
    return "right" if layouts == {"shared"} else "padded"


def short(error: Exception) -> str:
    text = " ".join(str(error.what if isinstance(error, AlignError) else error).split())
    return f"{type(error).__name__}: {text}"[:400]


def _child(name: str, answer: Connection) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="align-arch-") as folder, quiet():
        answer.send(examine(name, Path(folder) / "model"))


def examined(name: str) -> dict[str, Any]:
    """`examine` in a process of its own: a crash or a hang is a line of the table too."""
    here, there = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_child, args=(name, there))
    process.start()
    there.close()
    try:
        if here.poll(LIMIT_S):
            return dict(here.recv())
        process.kill()
        return {"verdict": "WRONG", "why": f"no answer in {LIMIT_S} s"}
    except EOFError:
        process.join()
        return {"verdict": "WRONG", "why": f"its process ended with {process.exitcode}"}
    finally:
        process.join(10.0)  # it takes its folder away
        process.kill()
        process.join()


def main() -> int:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # threads do not survive a fork
    begun = time.monotonic()
    wanted = os.environ.get("ALIGN_PROVE_NAMES")
    names = wanted.split(";") if wanted else [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS]
    table: dict[str, dict[str, Any]] = {}
    for name in names:
        table[name] = examined(name)
        figures = " ".join(f"{k} {v:.1e}" for k, v in table[name].items() if isinstance(v, float))
        said = next((f"{k}: {table[name][k]}" for k in ("why", "lora_refused", "bfloat16_own") if k in table[name]), "")
        print(f"{name:24} {table[name]['verdict']:10} {figures} {said}", flush=True)
    counts = Counter(line["verdict"] for line in table.values())
    path = record(
        "architectures",
        claim="of every name in transformers' causal mapping the trainer's log-probabilities and gradients are the "
        "model's own, or it is refused",
        command="python -m tests.prove architectures",
        figures={"tolerance": TOLERANCE, "counts": dict(counts), "names": table},
        proved=not counts["WRONG"],
        seconds=time.monotonic() - begun,
    )
    print(f"{dict(counts)}; {path}")
    return 1 if counts["WRONG"] else 0


if __name__ == "__main__":
    sys.exit(main())
