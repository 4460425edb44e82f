"""An `LLM` of vLLM started and stopped: its arguments, what it can serve, what its start changes in this process."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, get_args

import numpy as np

from align.errors import Unsupported
from align.mediastore import VIEW_SUFFIX
from rollout.base import EngineSpec, start_error
from rollout.vllm_facts import CPU_BLOCK, CPU_KV_CACHE_BYTES, MAX_SEQUENCES
from rollout.vllm_media import pixel_arguments
from rollout.vllm_version import environment, import_vllm, without_warnings


def start(spec: EngineSpec, max_rank: int) -> Any:
    """Start an `LLM` for adapters of up to `max_rank` (0: none) and give this process back what its start changes: the
    random states and `torch.set_num_threads`.

    Raises:
        EngineError: it did not start; see `start_error`. Unsupported: an option that vLLM cannot honour on this device.
    """
    import torch
    from vllm import LLM

    set_num_threads = torch.set_num_threads
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    set_num_threads(spec.threads)
    try:
        with environment(spec.threads), without_warnings():
            llm = LLM(**engine_arguments(spec, max_rank))
    except (ValueError, RuntimeError, OSError, ImportError, MemoryError) as error:
        if "does not support LoRA" in str(error):
            raise Unsupported(
                f"vLLM serves no adapters on this model ({error})",
                where="rollout.weights",
                remedy="set rollout.weights=merged",
            ) from error
        raise start_error(error, spec.folder) from error
    finally:
        torch.set_num_threads = set_num_threads
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
    set_num_threads(spec.threads)
    _check_prefix(llm, spec)
    return llm


def engine_arguments(spec: EngineSpec, max_rank: int) -> dict[str, Any]:
    from vllm.platforms import current_platform

    arguments: dict[str, Any] = {
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    if current_platform.is_cpu():
        # Compiling takes longer than most CPU runs save by it; with a given cache size vLLM skips its profiling run.
        arguments |= {
            "enforce_eager": True,
            "kv_cache_memory_bytes": CPU_KV_CACHE_BYTES,
            "block_size": CPU_BLOCK,
            "max_num_seqs": MAX_SEQUENCES,
            "enable_chunked_prefill": False,
        }
        for name in ("enable_chunked_prefill", "long_prefill_token_threshold"):
            if spec.engine.get(name):
                # a prompt's first part samples a token, discards it and rewinds the generator: CPU ones cannot
                raise Unsupported(
                    f"vLLM on CPU cannot compute a prompt in parts when each request has its seed ({name})",
                    where=f"rollout.engine.{name}",
                    remedy="remove it; a larger max_num_batched_tokens admits longer prompts",
                )
    arguments |= spec.engine
    arguments |= {
        "model": spec.folder,
        "dtype": spec.dtype,
        "seed": spec.seed % 2**32,  # of vLLM's own draws; every request brings its seed
        "trust_remote_code": spec.trust_remote_code,
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",  # the model's own sampling defaults must not touch the distribution
    }
    if spec.max_model_len is not None:
        arguments["max_model_len"] = spec.max_model_len
    if spec.media:
        most = {**dict.fromkeys(VIEW_SUFFIX, 0), "image": 1, **spec.media}  # a picture probes
        arguments.setdefault("limit_mm_per_prompt", most)
        arguments.setdefault("mm_device_do_normalize", False)  # pixels as the trainer has them, bit for bit
    own = pixel_arguments(Path(spec.folder), spec.pixels) if spec.pixels else {}
    if own:
        arguments["mm_processor_kwargs"] = own | (arguments.get("mm_processor_kwargs") or {})
    if max_rank:
        arguments |= {"enable_lora": True, "max_lora_rank": max_rank, "max_loras": adapter_slots(spec)}
    return arguments


def accepted_rank(rank: int) -> int:
    """The smallest rank that vLLM has kernels for and that holds `rank`; 0 stays 0.

    Raises:
        Unsupported: no kernel is large enough.
    """
    import_vllm()
    from vllm.config.lora import MaxLoRARanks

    accepted = [r for r in sorted(get_args(MaxLoRARanks)) if r >= rank]
    if not accepted:
        raise Unsupported(
            f"vLLM serves adapters up to rank {max(get_args(MaxLoRARanks))}, not {rank}",
            where="adapter.rank",
            remedy="lower adapter.rank, or set rollout.weights=merged",
        )
    return accepted[0] if rank else 0


def adapter_slots(spec: EngineSpec) -> int:
    """Adapters held at once: those in use, and a new one beside them until it is checked. vLLM would evict the oldest
    of more, and read its file again when a request of it runs on."""
    return spec.versions + 1


def _check_prefix(llm: Any, spec: EngineSpec) -> None:
    """Refuse what vLLM would compute otherwise than the trainer, without a word: on CPU its attention has no tokens
    that see each other both ways, as those of an image do in Gemma 3."""
    from vllm.platforms import current_platform

    if spec.media and current_platform.is_cpu() and llm.model_config.is_mm_prefix_lm:
        stop(llm)
        raise Unsupported(
            "this model's image tokens see each other both ways, which vLLM's attention on CPU cannot do",
            where="rollout.name",
            remedy="set rollout.name=transformers, or run on a GPU",
        )


def stop(llm: Any) -> None:
    """Shut an `LLM` down and free its memory and process groups, so that another can start in this process."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()
