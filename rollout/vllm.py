"""Every call into an `LLM` of vLLM that runs: requests, steps, weights, and the names of its parameters.

`rollout.vllm_version` lists what vLLM must offer; `rollout.vllm_engine` and `rollout.vllm_weights` call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from align.protocols.fleet import PromptItem, Sampling
from align.protocols.trees import Medium
from rollout.vllm_media import media_prompt
from rollout.vllm_version import without_warnings


def sampling_parameters(
    item: PromptItem,
    group_size: int,
    sampling: Sampling,
    end_ids: frozenset[int],
    special: frozenset[str] = frozenset(),
) -> Any:
    """vLLM's parameters for the G completions of one prompt; `end_ids` end a turn; `special`: the tokenizer's special
    tokens, which vLLM keeps in the text that it looks for stop strings in where one of these holds such a token."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        n=group_size,
        temperature=sampling.temperature,
        max_tokens=sampling.max_tokens,
        seed=item.seed,
        stop=list(sampling.stop),
        stop_token_ids=sorted(end_ids.union(sampling.stop_token_ids)),
        logprobs=0,  # of the sampled token alone
        detokenize=bool(sampling.stop),  # vLLM looks for stop strings in text
        skip_special_tokens=not any(token in text for text in sampling.stop for token in special),
        spaces_between_special_tokens=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def scoring_parameters(*, cached: bool = False) -> Any:
    """vLLM's parameters for the log-probabilities of a prompt's own tokens, which it computes without its prefix cache.
    cached: for the prompt alone, with it."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=1,
        temperature=0.0,
        prompt_logprobs=None if cached else 0,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def add_request(llm: Any, request_id: str, prompt: Any, parameters: Any, adapter: Any) -> None:
    """Give a request to the scheduler: it takes part in the next step. prompt: a `made_prompt`; adapter: an
    `adapter_request`, or None."""
    llm.llm_engine.add_request(request_id, prompt, parameters, lora_request=adapter)


def made_prompt(llm: Any, token_ids: np.ndarray, media: Sequence[Medium]) -> Any:
    """vLLM's input for token ids i64[n] and what stands in them; see `rollout.vllm_media.media_prompt`."""
    from vllm.inputs.engine import tokens_input

    return media_prompt(llm, token_ids, media) if media else tokens_input(prompt_token_ids=token_ids.tolist())


def step(llm: Any) -> list[Any]:
    """One step of the engine; vLLM's outputs of the requests that finished in it."""
    return [output for output in llm.llm_engine.step() if output.finished]


def block_size(llm: Any) -> int:
    """Tokens of a block of the key-value cache, the unit in which prompts share it."""
    return int(llm.llm_engine.vllm_config.cache_config.block_size)


def adapter_request(name: str, adapter_id: int, path: Path) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(lora_name=name, lora_int_id=adapter_id, lora_path=str(path))


def reload_weights(llm: Any, tensors: Iterable[tuple[str, Any]]) -> None:
    """Load whole parameters, named as in transformers' layout, into the running model, repacking as at the start."""
    with without_warnings():
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(tensors)})


def adapter_name_parser(model: Any) -> Callable[[str], tuple[str, bool]]:
    """Name of an adapter's tensor -> (the engine's module path, whether the tensor is lora_A)."""
    from vllm.lora.utils import parse_fine_tuned_lora_name

    mapper = _rename_mapper(model)
    return lambda name: parse_fine_tuned_lora_name(name, mapper)


def parameter_renamer(model: Any) -> Callable[[str], str]:
    """Name of a parameter in transformers -> in the engine, before modules are fused."""
    mapper = _rename_mapper(model)
    return (lambda name: name) if mapper is None else mapper.map_name


def tower_tensors(model: Any, names: Iterable[str]) -> frozenset[str]:
    """Those of an adapter's tensors that are not the language model's: of a tower of images, or of its projector."""
    if not hasattr(model, "get_mm_mapping"):
        return frozenset()
    parse, keys = adapter_name_parser(model), model.get_mm_mapping()
    prefixes = tuple(f"{prefix.rstrip('.')}." for prefix in (*keys.tower_model, *keys.connector))
    return frozenset(name for name in names if f"{parse(name)[0]}.".startswith(prefixes))


def _rename_mapper(model: Any) -> Any:
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    return None if mapper is None else mapper.get_rename_mapper()
