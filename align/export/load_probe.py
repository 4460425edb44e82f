"""What a child process does to prove that a folder loads: load it, compute log-probabilities, write them, go.

    python -m align.export.load_probe ENGINE FOLDER TOKENS OUT

ENGINE: "plain" (transformers, float32) or a rollout engine's name. TOKENS: JSON {"tokens": [[...]], "dtype",
"threads", "trust_remote_code", "image_seed" (null: no picture)}. OUT: JSON {"status": "loaded", "logps": [[...]],
"message" (what was left out), "noise" (of "plain": what computing in the dtype itself costs, nats a token)} or
{"status": "unavailable" | "failed", "message"}.

A process of its own, because engines cannot be unloaded without trace, may hang, and read the environment.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from align.errors import AlignError, SetupError, Unsupported
from align.protocols.trainer import Publication
from align.protocols.trees import Medium


def plain_logps(
    folder: Path,
    tokens: list[np.ndarray],
    trust_remote_code: bool = False,
    *,
    image_seed: int | None = None,
    dtype: str = "float32",
) -> list[np.ndarray]:
    """f32[n - 1] per sequence by plain transformers in `dtype`: log-probabilities of its tokens. f32[n * K] of a
    model that scores: of being preferred, up to each token, to a text of score 0.

    image_seed: one sequence more, with the picture of this seed as the folder's own processor makes it ready."""
    import torch

    from align.export.compare import log_probabilities
    from align.export.images import image_samples
    from align.model.load import load_model, resolve_dtype
    from align.model.score_head import load_score_model, scoring

    if scoring(folder):
        scorer = load_score_model(folder, dtype=torch.float32, seed=0, trust_remote_code=trust_remote_code)
        return [logps[:, 0].numpy() for logps in log_probabilities(scorer, tokens)]
    model = load_model(folder, dtype=resolve_dtype(dtype, "cpu"), trust_remote_code=trust_remote_code)
    pictures = [] if image_seed is None else image_samples(folder, image_seed, trust_remote_code)
    found = log_probabilities(model, [*tokens, *pictures])
    all_ids = [*map(torch.as_tensor, tokens), *(sample["input_ids"][0] for sample in pictures)]
    return [logps[:-1].gather(-1, ids[1:, None])[:, 0].numpy() for logps, ids in zip(found, all_ids, strict=True)]


def engine_logps(
    name: str, folder: Path, tokens: list[np.ndarray], request: dict[str, Any], *, picture: bool
) -> list[np.ndarray]:
    """f32[n - 1] per sequence by a rollout engine that serves the folder's own weights; `picture`: and one more, with
    the request's picture. Raises Unsupported where the engine shows the model no pictures."""
    from align.export.images import picture_prompt

    media: list[tuple[Medium, ...]] = [() for _ in tokens]
    with tempfile.TemporaryDirectory(prefix="align-picture-") as store:
        if picture:
            ids, medium = picture_prompt(folder, request["image_seed"], Path(store), request["trust_remote_code"])
            tokens, media = [*tokens, ids], [*media, (medium,)]
        return _engine_logps(name, folder, tokens, media, request)


def _engine_logps(
    name: str, folder: Path, tokens: list[np.ndarray], media: list[tuple[Medium, ...]], request: dict[str, Any]
) -> list[np.ndarray]:
    base = importlib.import_module("rollout.base")  # by name: export stands beside rollout and does not import it
    engine = base.make_engine(
        base.EngineSpec(
            name=name,
            folder=str(folder),
            dtype=request["dtype"],
            max_tokens=1,
            max_model_len=max(len(ids) for ids in tokens) + 1,
            threads=request["threads"],
            trust_remote_code=request["trust_remote_code"],
            media={"image": 1} if any(media) else {},
        )
    )
    try:
        engine.publish(Publication(version=0, kind="base", path=str(folder), digest=""))
        result: list[np.ndarray] = engine.logps(tokens, media) if any(media) else engine.logps(tokens)
    finally:
        engine.close()
    return result


def probe(name: str, folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    tokens = [np.array(ids, dtype=np.int64) for ids in request["tokens"]]
    try:
        if name == "plain":
            logps = plain_logps(folder, tokens, request["trust_remote_code"], image_seed=request.get("image_seed"))
            noise = _noise(folder, tokens, request, logps)
            return {"status": "loaded", "logps": [row.tolist() for row in logps], "message": "", "noise": noise}
        logps, message = _engine_answer(name, folder, tokens, request)
    except SetupError as error:
        return {"status": "unavailable", "message": str(error)}
    except (AlignError, ValueError, RuntimeError, OSError, KeyError) as error:
        return {"status": "failed", "message": f"{type(error).__name__}: {error}"}
    return {"status": "loaded", "logps": [row.tolist() for row in logps], "message": message}


def _noise(folder: Path, tokens: list[np.ndarray], request: dict[str, Any], exact: list[np.ndarray]) -> float:
    """Mean difference of log-probabilities that transformers' own forward in the folder's dtype makes: an engine that
    computes in it cannot be held to less."""
    from align.model.score_head import scoring

    if request["dtype"] == "float32" or scoring(folder):
        return 0.0
    found = plain_logps(folder, tokens, request["trust_remote_code"], dtype=request["dtype"])
    pairs = zip(found, exact[: len(found)], strict=True)
    return float(np.mean(np.abs(np.concatenate([one - other for one, other in pairs]))))


def _engine_answer(
    name: str, folder: Path, tokens: list[np.ndarray], request: dict[str, Any]
) -> tuple[list[np.ndarray], str]:
    """Log-probabilities by an engine, with the picture where it shows the model pictures; else of text, and why."""
    if request.get("image_seed") is None:
        return engine_logps(name, folder, tokens, request, picture=False), ""
    try:
        return engine_logps(name, folder, tokens, request, picture=True), ""
    except Unsupported as error:
        return engine_logps(name, folder, tokens, request, picture=False), f"on text alone: {error.what}"


def main(arguments: list[str]) -> int:
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: do not outlive an export that was killed
    name, folder, tokens, out = arguments
    answer = probe(name, Path(folder), json.loads(Path(tokens).read_text(encoding="utf-8")))
    Path(out).write_text(json.dumps(answer), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
