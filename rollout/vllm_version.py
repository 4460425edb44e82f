"""The vLLM that is installed: whether it has what is called here, how it is imported, the names of its arguments.

It is imported lazily (that takes seconds), and by few files: this one, `rollout.vllm_start`, `rollout.vllm` and
`rollout.vllm_media`.

What vLLM must offer, in the words of version 0.32 (`CALLS` is the same list for `missing_calls`, which a test runs):

* `vllm.LLM`: apply_model, collective_rpc, reset_prefix_cache (reset_running_requests), reset_mm_cache,
  get_tokenizer; llm_engine, model_config;
* `vllm.SamplingParams`: n (child i of n samples with seed + i), temperature, max_tokens, seed, stop, stop_token_ids,
  logprobs, prompt_logprobs, detokenize, skip_special_tokens, spaces_between_special_tokens, output_kind;
* `vllm.engine.arg_utils.EngineArgs`: the names in `rollout.vllm_start.engine_arguments`;
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
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from align.errors import SetupError
from align.packages import quick_imports
from rollout.vllm_facts import ARGUMENTS_FILE

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
    "kv_cache_memory_bytes block_size max_num_seqs enable_chunked_prefill limit_mm_per_prompt mm_processor_kwargs "
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
    """What the installed vLLM lacks of `calls`, one readable line each; empty where it fits."""
    import_vllm()
    missing = []
    for target, names in calls.items():
        module_name, _, path = target.partition(":")
        found: Any
        try:
            with quick_imports():
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


def require_vllm() -> None:
    """Raise SetupError unless the installed vLLM can be imported and has every call of `CALLS`."""
    lacks = missing_calls()
    if lacks:
        raise SetupError(
            f"the installed vLLM does not fit: {'; '.join(lacks)}",
            where="rollout.name",
            remedy="install the vLLM that pyproject.toml names, or set rollout.name=transformers",
        )


def write_engine_arguments(path: Path = ARGUMENTS_FILE) -> None:
    """Write the names of vLLM's engine arguments, by which `align check` validates `rollout.engine` without vLLM."""
    import_vllm()
    import vllm
    from vllm.engine.arg_utils import EngineArgs

    names = sorted(name for name in inspect.signature(EngineArgs).parameters if not name.startswith("_"))
    path.write_text(json.dumps({"vllm": vllm.__version__, "arguments": names}, indent=1) + "\n", encoding="utf-8")


def import_vllm() -> None:
    try:
        with quick_imports(), environment(), without_warnings():
            import vllm
            import vllm.v1.sample.sampler  # noqa: F401  (where dynamo's decorator stands)
    except ImportError as error:
        raise SetupError(
            f"vllm cannot be imported: {error}",
            where="rollout.name",
            remedy="`align doctor` says what is wrong; rollout.name=transformers generates without vLLM",
        ) from error


@contextmanager
def environment(threads: int = 1) -> Iterator[None]:
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


@contextmanager
def without_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
