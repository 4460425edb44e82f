"""What is known of vLLM before it is imported.

Families whose adapters it does not serve were found by running each (`tests.prove.prove_vllm_families`). One that is
not named here is for the engine to judge.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from align.engines import EngineFacts

CPU_KV_CACHE_BYTES = 1 << 30  # of its engines on a CPU, unless `rollout.engine.kv_cache_memory_bytes` says other
CPU_BLOCK = 32
"""Tokens of a block of the key-value cache on a CPU. Completions of one prompt share its whole blocks; vLLM's own 128
is longer than many prompts, which each of a group then computes again."""
MAX_SEQUENCES = 256  # its own default on a GPU, ours on a CPU
TOWER_OPTION = "enable_tower_connector_lora"  # vllm.config.lora: without it LoRA on towers and connectors is ignored
ARGUMENTS_FILE = Path(__file__).with_name("engine_args.json")
"""Names of vLLM's EngineArgs fields, written by `rollout.vllm_version.write_engine_arguments`."""

_OURS = "set it in the recipe instead"
_DISTRIBUTION = "it changes what is sampled without changing the log-probabilities the trainer compares with"
_ONE_DEVICE = "an engine's weights are compared bit by bit after each publish, which needs them whole in one process"
REFUSED: Mapping[str, str] = {
    "model": f"model.path; {_OURS}",
    "tokenizer": f"the model's own tokenizer is used; {_OURS}",
    "skip_tokenizer_init": "completions are decoded where they are sampled",
    "dtype": f"rollout.dtype; {_OURS}",
    "seed": f"seed; {_OURS}",
    "max_model_len": f"rollout.max_model_len; {_OURS}",
    "trust_remote_code": f"model.trust_remote_code; {_OURS}",
    "logprobs_mode": "log-probabilities must be those of the distribution that was sampled from",
    "enable_lora": "follows from the stage's adapter",
    "max_loras": "follows from the stage's adapter",
    "max_cpu_loras": "follows from the stage's adapter",
    "max_lora_rank": f"adapter.rank; {_OURS}",
    "lora_dtype": "adapters are held in rollout.dtype",
    "language_model_only": "follows from the prompts",
    "generation_config": _DISTRIBUTION,
    "override_generation_config": _DISTRIBUTION,
    "logits_processors": _DISTRIBUTION,
    "watermark_config": _DISTRIBUTION,
    "diffusion_config": _DISTRIBUTION,
    "default_mm_loras": _DISTRIBUTION,
    "speculative_config": _DISTRIBUTION,
    "spec_method": _DISTRIBUTION,
    "spec_model": _DISTRIBUTION,
    "spec_tokens": _DISTRIBUTION,
    "tensor_parallel_size": _ONE_DEVICE,
    "pipeline_parallel_size": _ONE_DEVICE,
    "prefill_context_parallel_size": _ONE_DEVICE,
    "decode_context_parallel_size": _ONE_DEVICE,
    "nnodes": _ONE_DEVICE,
    "data_parallel_size": "use rollout.workers",
    "distributed_executor_backend": _ONE_DEVICE,
}

FACTS = EngineFacts(
    engine="rollout.vllm_engine:VllmEngine",
    title="vLLM",
    options=tuple(json.loads(ARGUMENTS_FILE.read_text(encoding="utf-8"))["arguments"]),
    refused=REFUSED,
    package="vllm",
    extra="align-rl[gpu]",
    in_flight=True,
    slow_adapters_on_cpu=True,
    largest_rank=512,  # vllm.config.lora.MaxLoRARanks
    tower_option=TOWER_OPTION,
    without_adapters=("llava_onevision",),
    language_adapters=("internvl", "gemma3"),  # its tower has other modules than transformers'
    reserves="kv_cache_memory_bytes",
    reserved_on_cpu=CPU_KV_CACHE_BYTES,
    share="gpu_memory_utilization",
    slots=MAX_SEQUENCES,
    slots_option="max_num_seqs",
    loads_exports=True,
)
