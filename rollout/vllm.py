"""Every call into vLLM. This file and `rollout.vllm_media` are the only ones that import vllm (lazily: it takes
seconds); `rollout.vllm_engine` uses them.

What vLLM must offer, in the words of version 0.32 (`CALLS` is the same list for `missing_calls`, which a test runs):

* `vllm.LLM`: apply_model, collective_rpc, reset_prefix_cache (reset_running_requests), reset_mm_cache,
  get_tokenizer; llm_engine, model_config;
* `vllm.SamplingParams`: n (child i of n samples with seed + i), temperature, max_tokens, seed, stop, stop_token_ids,
  logprobs, prompt_logprobs, detokenize, skip_special_tokens, spaces_between_special_tokens, output_kind;
* `vllm.engine.arg_utils.EngineArgs`: the names in `_arguments`;
* `vllm.v1.engine.llm_engine.LLMEngine`: add_request (request_id, prompt, params, lora_request), step,
  abort_request, add_lora, remove_lora, list_loras, set_weight_version, reset_encoder_cache; its
  vllm_config.cache_config.block_size;
* `vllm.inputs.engine`: tokens_input (prompt_token_ids), mm_input (prompt_token_ids, mm_kwargs, mm_hashes,
  mm_placeholders), the last one made of `vllm.multimodal.inputs.PlaceholderRange` (offset, length, is_embed);
* what processes media (`rollout.vllm_media`): `vllm.renderers.base.BaseRenderer` (get_mm_processor,
  mm_processor_cache), `vllm.multimodal.processing`: BaseMultiModalProcessor (_cached_apply_hf_processor) and
  ProcessorInputs (prompt, mm_data_items, mm_uuid_items, cache);
* `vllm.RequestOutput`: request_id (the one given to add_request), finished, outputs, prompt_logprobs,
  num_cached_tokens;
* `vllm.outputs.CompletionOutput`: token_ids, logprobs, finish_reason, stop_reason, weight_versions (spans of tokens
  with the label that set_weight_version gave when they were sampled);
* `vllm.lora.request.LoRARequest`: lora_name, lora_int_id, lora_path. The prefix cache is keyed by name and path, the
  worker's cache by id: all of them are unique to a publication here, or old weights would be served under a new name;
* `vllm.lora.utils.parse_fine_tuned_lora_name`: how a module of the adapter is called in the engine;
* `vllm.config.lora.MaxLoRARanks`: the ranks it has kernels for;
* `vllm.v1.worker.gpu_worker.Worker`: reload_weights(weights_iterator=...), which repacks what it loads;
* `vllm.distributed.parallel_state.cleanup_dist_env_and_memory`;
* the inside of its modules, in `rollout.vllm_held`.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import numpy as np

from align.errors import SetupError, Unsupported
from align.mediastore import VIEW_SUFFIX
from align.protocols import Medium, PromptItem, Sampling
from rollout.base import EngineSpec, start_error
from rollout.vllm_facts import ARGUMENTS_FILE, CPU_KV_CACHE_BYTES, MAX_SEQUENCES
from rollout.vllm_media import media_prompt, pixel_arguments

ENVIRONMENT: Mapping[str, str] = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process: no second process to die or to wait for
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # actors share the cores; pinned threads of two of them would collide
    "VLLM_NO_USAGE_STATS": "1",
}
QUIET: Mapping[str, str] = {"VLLM_LOGGING_LEVEL": "ERROR"}

CALLS: Mapping[str, str] = {
    "vllm:LLM": "apply_model collective_rpc reset_prefix_cache reset_mm_cache get_tokenizer",
    "vllm:LLM.reset_prefix_cache": "reset_running_requests",
    "vllm.outputs:CompletionOutput": "token_ids logprobs finish_reason stop_reason weight_versions",
    "vllm:RequestOutput": "request_id finished outputs prompt_logprobs num_cached_tokens",
    "vllm:SamplingParams": "n temperature max_tokens seed stop stop_token_ids logprobs prompt_logprobs detokenize "
    "skip_special_tokens spaces_between_special_tokens output_kind",
    "vllm.engine.arg_utils:EngineArgs": "model dtype seed max_model_len trust_remote_code logprobs_mode "
    "generation_config enable_lora max_loras max_lora_rank disable_log_stats use_tqdm_on_load enforce_eager "
    "kv_cache_memory_bytes max_num_seqs enable_chunked_prefill limit_mm_per_prompt mm_processor_kwargs "
    "mm_device_do_normalize enable_tower_connector_lora",
    "vllm.v1.engine.llm_engine:LLMEngine": "add_request step abort_request add_lora remove_lora list_loras "
    "set_weight_version reset_encoder_cache",
    "vllm.v1.engine.llm_engine:LLMEngine.add_request": "request_id prompt params lora_request",
    "vllm.inputs.engine:tokens_input": "prompt_token_ids",
    "vllm.inputs.engine:mm_input": "prompt_token_ids mm_kwargs mm_hashes mm_placeholders",
    "vllm.multimodal.inputs:PlaceholderRange": "offset length is_embed",
    "vllm.multimodal.processing.processor:BaseMultiModalProcessor": "_cached_apply_hf_processor",
    "vllm.multimodal.processing.inputs:ProcessorInputs": "prompt mm_data_items mm_uuid_items cache",
    "vllm.renderers.base:BaseRenderer": "get_mm_processor mm_processor_cache",
    "vllm.lora.request:LoRARequest": "lora_name lora_int_id lora_path",
    "vllm.lora.utils:parse_fine_tuned_lora_name": "name weights_mapper",
    "vllm.config.lora:MaxLoRARanks": "",
    "vllm.v1.worker.gpu_worker:Worker": "reload_weights",
    "vllm.distributed.parallel_state:cleanup_dist_env_and_memory": "",
}
"""What is called -> the attributes or parameters that it must have."""


def missing_calls(calls: Mapping[str, str] = CALLS) -> list[str]:
    """What the installed vLLM lacks of `calls`, one readable line each; empty where this file fits it."""
    _import_vllm()
    missing = []
    for target, names in calls.items():
        module_name, _, path = target.partition(":")
        found: Any
        try:
            found = importlib.import_module(module_name)
            for part in path.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError) as error:
            missing.append(f"{target} is gone ({error})")
            continue
        have = set(dir(found))
        if callable(found):
            have |= set(inspect.signature(found).parameters)
        missing += [f"{target} has no {name!r}" for name in names.split() if name not in have]
    return missing


def write_engine_arguments(path: Path = ARGUMENTS_FILE) -> None:
    """Write the names of vLLM's engine arguments, by which `align check` validates `rollout.engine` without vLLM."""
    _import_vllm()
    import vllm
    from vllm.engine.arg_utils import EngineArgs

    names = sorted(name for name in inspect.signature(EngineArgs).parameters if not name.startswith("_"))
    path.write_text(json.dumps({"vllm": vllm.__version__, "arguments": names}, indent=1) + "\n", encoding="utf-8")


@contextmanager
def _environment(threads: int = 1) -> Iterator[None]:
    """The environment variables that vLLM reads while it is imported and started; those of before are put back.

    On CPU dynamo is off: vLLM compiles one small function of its sampler, which costs the first batch 10 s.
    """
    import torch

    wanted = {**ENVIRONMENT, "OMP_NUM_THREADS": str(threads)}  # unset, vLLM falls back to one thread
    wanted |= {name: os.environ.get(name, value) for name, value in QUIET.items()}
    if not torch.accelerator.is_available():
        wanted["TORCHDYNAMO_DISABLE"] = "1"
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _import_vllm() -> None:
    try:
        with _environment(), _without_warnings():
            import vllm
            import vllm.v1.sample.sampler  # noqa: F401  (where dynamo's decorator stands)
    except ImportError as error:
        raise SetupError(
            f"vllm cannot be imported: {error}",
            where="rollout.name",
            remedy="`align doctor` says what is wrong; rollout.name=transformers generates without vLLM",
        ) from error


def require_vllm() -> None:
    """Raise SetupError unless the installed vLLM can be imported and has every call of this file."""
    lacks = missing_calls()
    if lacks:
        raise SetupError(
            f"the installed vLLM does not fit: {'; '.join(lacks)}",
            where="rollout.name",
            remedy="install the vLLM that pyproject.toml names, or set rollout.name=transformers",
        )


def accepted_rank(rank: int) -> int:
    """The smallest rank that vLLM has kernels for and that holds `rank`; 0 stays 0.

    Raises:
        Unsupported: no kernel is large enough.
    """
    _import_vllm()
    from vllm.config.lora import MaxLoRARanks

    accepted = [r for r in sorted(get_args(MaxLoRARanks)) if r >= rank]
    if not accepted:
        raise Unsupported(
            f"vLLM serves adapters up to rank {max(get_args(MaxLoRARanks))}, not {rank}",
            where="adapter.rank",
            remedy="lower adapter.rank, or set rollout.weights=merged",
        )
    return accepted[0] if rank else 0


def _arguments(spec: EngineSpec, max_rank: int) -> dict[str, Any]:
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


def adapter_slots(spec: EngineSpec) -> int:
    """Adapters held at once: those in use, and a new one beside them until it is checked. vLLM would evict the oldest
    of more, and read its file again when a request of it runs on."""
    return spec.versions + 1


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
        with _environment(spec.threads), _without_warnings():
            llm = LLM(**_arguments(spec, max_rank))
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


@contextmanager
def _without_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def stop(llm: Any) -> None:
    """Shut an `LLM` down and free its memory and process groups, so that another can start in this process."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()


# ------------------------------------------------------------------------------------------------ using


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
    with _without_warnings():
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
