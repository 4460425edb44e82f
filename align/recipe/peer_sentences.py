"""Words of other projects that are answered with a whole sentence (`align.recipe.peers`)."""

from __future__ import annotations

_ESTIMATOR = (
    "the advantage is chosen by `objectives` with `loss: {name: grpo}`: grpo is the default; rloo {baseline: "
    "leave_one_out, scale: none}; dr_grpo {scale: none}; reinforce_plus_plus {baseline: batch}; "
    "reinforce_plus_plus_baseline {scale: none, whiten: true}; gdpo {combine: decoupled}; maxrl {scale: mean}; gae, "
    "remax are not offered"
)
_PARALLEL = "parallelism is not offered by this version: `placement: {trainer: {strategy: zero3}}` spreads the weights"
_RESUME = "no key: `align run --resume` goes on with a run; to build on other weights, `from:` or `model.adapter`"
_SPLIT = "not offered: rows are not split off; name held-out ones, `eval: {data: ...}`"
_COLUMN = "names of columns stand in `data`: `data: {path: ..., columns: {ours: theirs}}`"
_CACHE = "not needed: tokenised rows are kept, and made again where data, template or code changed"
_PLUGIN = (
    "your own code is named where it is used: `loss: {name: file.py}`, `rewards: [{use: file.py:function}]`, "
    "`data: {path: ..., format: file.py:NAME}`"
)
SENTENCES = {  # their word -> the whole answer, where a key alone would mislead
    **dict.fromkeys(("resume_from_checkpoint", "auto_resume_from_checkpoints", "overwrite_output_dir"), _RESUME),
    **dict.fromkeys(("val_set_size", "val_size", "split_dataset_ratio"), _SPLIT),
    **dict.fromkeys(("input_key", "label_key", "prompt_key", "field_messages", "message_property_mappings"), _COLUMN),
    **dict.fromkeys(("plugins", "custom_register_path", "reward_model_plugin", "custom_cls"), _PLUGIN),
    "datasets": "`datasets` is `data` of a stage, a list of `{path: ..., format: ...}`",
    "micro_batch_size": "not needed: `batch` is global; memory is bounded by `packing.max_tokens`",
    "sample_packing": "not needed: batches are always packed, and packed sequences never see each other",
    **dict.fromkeys(("dataset_prepared_path", "overwrite_cache"), _CACHE),
    "rl": "`rl` is a stage: `kind: preference` or `kind: online`, with `loss: {name: ...}`",
    "weight": "weights of rewards stand beside them, `objectives: {weights: {name: 2.0}}`; of rows, in their column",
    "per_device_train_batch_size": "`batch` is global: `batch.sequences`, `batch.pairs` or `batch.groups`; "
    "memory is bounded by `packing.max_tokens`",
    "per_device_eval_batch_size": "not needed: evaluation is packed up to `packing.max_tokens`",
    "gradient_accumulation_steps": "`gradient_accumulation_steps` is not needed: `batch` is global",
    "micro_train_batch_size": "`micro_train_batch_size` is not needed: `packing.max_tokens` bounds memory",
    "ppo_micro_batch_size_per_gpu": "not needed: `packing.max_tokens` bounds memory",
    "ppo_mini_batch_size": "`ppo_mini_batch_size` is `batch.groups` divided by `minibatches` (1 by default: one update "
    "takes the whole `batch`)",
    "beta": "`beta` is `loss.beta` of a preference loss, and `loss.kl` of grpo",
    "loss_type": "`loss_type` is `loss.name` with `loss.variant` (preference); several are a list of "
    "losses with weights. For `loss: {name: grpo}`: "
    "grpo is {aggregation: sequence}; dapo and bnpo are {aggregation: token}, the default; "
    "dr_grpo is {aggregation: constant, constant_length: max_tokens}; "
    "gspo is {ratio: sequence, aggregation: sequence}; luspo is {ratio: sequence, aggregation: sequence_sum}; "
    "cispo is {surrogate: cispo}; sapo is {surrogate: sapo, aggregation: sequence}; vespo is {surrogate: vespo}",
    "epsilon_high": "`epsilon_high` is `loss.clip_high`; with cispo it is `loss.cispo_cap`, the largest weight itself",
    "delta": "`delta` is `loss.clip_delta`",
    "use_bias_correction_kl": "`use_bias_correction_kl: true` is `loss.kl_estimator: w_k3`, false is k3 (the default)",
    "vllm_importance_sampling_correction": "`vllm_importance_sampling_correction` is `loss.correction`, on by default "
    "(each token truncated at 2); `off` takes the ratio to the sampler itself",
    "vllm_importance_sampling_mode": "`vllm_importance_sampling_mode` is `loss.correction`: sequence_mask is "
    "{level: sequence, mode: mask}, token_truncate is {level: token, mode: truncate} (the default)",
    "rollout_importance_sampling_mode": "`rollout_importance_sampling_mode` is `loss.correction`: sequence_mask is "
    "{level: sequence, mode: mask}, token_truncate is {level: token, mode: truncate} (the default)",
    "rollout_is": "`rollout_is` is `loss.correction.level`: token (the default) or sequence; null is `correction: off`",
    "rollout_is_threshold": "`rollout_is_threshold: 2.0` is `loss.correction: {cap: 2.0}`; "
    '"0.5_5.0" is {mode: mask, floor: 0.5, cap: 5.0}',
    "rollout_rs": "`rollout_rs` is `loss.correction: {mode: mask}`: token_k1 with level token, seq_sum_k1 with level "
    "sequence; masked tokens stay in the denominators. The others are not offered by this version",
    "rollout_rs_threshold": "`rollout_rs_threshold` is `loss.correction.floor` and `cap`, with `mode: mask`",
    "rollout_is_batch_normalize": "not offered by this version: weights are used as they are",
    "bypass_mode": "`bypass_mode: true` is `loss.correction: off`: the ratio is to the sampler itself",
    "enable_vllm_is_correction": "`enable_vllm_is_correction` is `loss.correction`, on by default; `off` takes the "
    "ratio to the sampler itself",
    "vllm_is_truncated_threshold": "`vllm_is_truncated_threshold` is `loss.correction.floor` and `cap`",
    "vllm_is_correction_type": "`vllm_is_correction_type` is `loss.correction`: tis is {mode: truncate} (the default), "
    "icepop is {mode: mask}",
    "use_adaptive_entropy": "not offered by this version: `loss.entropy_bonus` is constant",
    "max_epochs": "`max_epochs` is `epochs`; over the same rollouts (PPO), `updates_per_batch` of an online stage",
    "steps_per_generation": "`steps_per_generation` over `gradient_accumulation_steps` is `minibatches`; "
    "`batch.groups` are all that is generated at once, and `staleness` says how far ahead",
    "reward_funcs": "`reward_funcs` is `rewards: [{use: ...}]`; a TRL function works with `signature: trl`",
    "external_plugins": "`external_plugins` is `rewards: [{use: file.py:function, signature: swift}]`",
    "remote_rm_url": "write a reward that calls the URL: `rewards: [{use: file.py:function}]`",
    "stopping_strategy": "`stopping_strategy: first_exhausted` is `mix: {exhausted: first}`, all_exhausted `all`; the "
    "sources have weights",
    "mix_strategy": "`mix_strategy: interleave_under` is weights of the sources and `mix: {exhausted: first}`, "
    "interleave_over with all; concat is sources without weights",
    "filter_overlong_prompts": "`filter_overlong_prompts: true` is `data.too_long: drop`",
    "mask_truncated_completions": "`mask_truncated_completions: true` is `rollout.truncated: mask` (the default), "
    "false is keep; penalise takes `rollout.truncated_penalty` off",
    "overlong_filter": "`overlong_filter` is `rollout.truncated: mask` (the default)",
    "use_vllm": "`use_vllm` is `rollout.name: vllm` (the default)",
    "vllm_mode": "not needed: `placement` says where engines run; they are always processes of their own",
    "sleep_level": "not needed: engines never share memory with the trainer",
    "move_model_batches": "not needed: the adapter alone travels to the engines",
    "colocate_all_models": "not needed: `placement` says where everything runs",
    "async_generate": "`async_generate: true` is `staleness: 1`",
    "async_train": "`async_train` is `staleness: 1`",
    "async_queue_size": "`async_queue_size` is `staleness`, in steps: `staleness` + 1 batches are on their way",
    "staleness_threshold": "`staleness_threshold` is `staleness`, a whole number of versions",
    "dynamic_sample": "`dynamic_sample: true` is `dynamic_sampling: {max_factor: 3}`",
    "max_resample_times": "`max_resample_times: 3` is `dynamic_sampling: {max_factor: 4}`",
    "filter_groups": "`filter_groups: {enable: true}` is `dynamic_sampling: {max_factor: 3}`",
    "max_num_gen_batches": "`max_num_gen_batches` is `dynamic_sampling.max_factor`",
    "dynamic_filtering": "`dynamic_filtering` is `dynamic_sampling: {max_factor: 3}`",
    "precompute_ref_log_probs": "`precompute_ref_log_probs` is `reference: cached`",
    "padding_free": "`padding_free` is not needed: batches are always packed, without padding",
    "packing": "`packing` is a map, {max_tokens: 16384}; batches are always packed",
    "neat_packing": "`neat_packing` is not needed: packed sequences never see each other",
    "assistant_only_loss": "`assistant_only_loss` is not needed: the loss is on assistant tokens only",
    "completion_only_loss": "`completion_only_loss` is not needed: the loss is on assistant tokens only",
    "train_on_prompt": "not offered: the loss is on assistant tokens only",
    "simpo_gamma": "`simpo_gamma` is `loss: {name: simpo, gamma: ...}`, the margin itself (not gamma/beta)",
    "gamma_beta_ratio": "`gamma_beta_ratio` is gamma/beta: multiply it by `beta` and write "
    "`loss: {name: simpo, beta: ..., gamma: ...}`, the margin itself",
    "cpo_alpha": "`cpo_alpha` is `loss.nll_weight` of cpo and simpo",
    "loss_weights": "`loss_weights` are the weights of a list: `loss: [{name: dpo, weight: 0.8}, "
    "{name: dpo, variant: bco_pair, weight: 0.2}, {name: sft}]`",
    "f_divergence_type": "`f_divergence_type` is `loss.divergence` of dpo: reverse_kl, forward_kl, js or alpha",
    "f_alpha_divergence_coef": "`f_alpha_divergence_coef` is 1 - `loss.divergence_alpha`: 0.5 is 0.5, 0.3 is 0.7; "
    "in the paper's alpha, which is ours, the forward KL lies towards 1",
    "use_weighting": "`use_weighting: true` is `loss: {name: dpo, weighting: wpo}`",
    "reference_free": "`reference_free: true` is a loss without a reference: `loss: {name: simpo}` or `{name: cpo}`",
    "sync_ref_model": "not offered by this version: the reference stays what `reference` names",
    "ref_model_mixup_alpha": "not offered by this version: the reference stays what `reference` names",
    "ref_model_sync_steps": "not offered by this version: the reference stays what `reference` names",
    "pref_ftx": "`pref_ftx` is a second loss: `loss: [{name: dpo}, {name: sft, weight: ...}]`",
    "pref_bco_weight": "`pref_bco_weight` is a second loss: "
    "`loss: [{name: dpo}, {name: dpo, variant: bco_pair, weight: ...}]`",
    "nll_loss_coef": "`nll_loss_coef` is a second loss: `loss: [{name: dpo}, {name: sft, weight: ...}]`",
    "rpo_alpha": "`rpo_alpha` is a second loss: `loss: [{name: dpo}, {name: sft, weight: ...}]`",
    "desirable_weight": "`desirable_weight` is `loss: {name: kto, desirable_weight: ...}`",
    "undesirable_weight": "`undesirable_weight` is `loss: {name: kto, undesirable_weight: ...}`",
    "use_kl_loss": "`use_kl_loss` is `loss.kl` above 0",
    "use_kl_in_reward": "not offered by this version: `loss.kl` with `kl_estimator: w_k3` has the reverse KL's "
    "gradient, token by token",
    "kl_loss_type": "`kl_loss_type` is `loss.kl_estimator`: low_var_kl is k3, mse is k2; kl (k1) is refused as a loss",
    "rlhf_type": "`rlhf_type` is a stage: `kind: preference` or `kind: online`, with `loss: {name: ...}`",
    "stage": "`stage` is one entry of the list `stages`, with `id` and `kind`",
    "do_train": "not needed: `align run` trains the stages of the recipe in order",
    "advantage_estimator": _ESTIMATOR,
    "adv_estimator": _ESTIMATOR,
    "vit_lr": "per-part learning rates are not offered by this version: the vision tower stays frozen",
    "aligner_lr": "per-part learning rates are not offered by this version: the projector stays frozen",
    "additional_target": "not offered: fully trained modules beside an adapter; use `adapter: {kind: full}`",
    "modules_to_save": "not offered: fully trained modules beside an adapter; use `adapter: {kind: full}`",
    "use_dora": "written `adapter: {kind: dora}`",
    "load_in_4bit": "written `adapter: {kind: qlora}`",
    "quant_method": "`quant_method: bnb` is `adapter: {kind: qlora}`; other methods are not offered",
    "quant_bits": "`quant_bits: 4` is `adapter: {kind: qlora}`; other numbers of bits are not offered",
    "quantization_bit": "`quantization_bit: 4` is `adapter: {kind: qlora}`; other numbers of bits are not offered",
    "merge_lora": "`merge_lora` is a stage: `{id: merged, kind: merge, from: ...}`",
    "deepspeed": "`deepspeed: zero2` is `placement: {trainer: {ranks: ..., strategy: zero2}}` (zero1 to zero3; with "
    "`strategy: {name: zero3, offload: {optimizer: cpu, parameters: cpu}}`)",
    "fsdp": "not offered by this version: `placement: {trainer: {ranks: ..., strategy: zero3}}` shards the same",
    "fsdp_config": "not offered by this version: `placement: {trainer: {ranks: ..., strategy: zero3}}` shards the same",
    "tensor_parallel": f"tensor {_PARALLEL}",
    "autotp_size": f"tensor {_PARALLEL}",
    "sequence_parallel_size": f"sequence {_PARALLEL}",
    "ulysses_sequence_parallel_size": f"sequence {_PARALLEL}",
    "context_parallel_size": f"sequence {_PARALLEL}",
    "pipeline_parallel": f"pipeline {_PARALLEL}",
    "pipeline_model_parallel_size": f"pipeline {_PARALLEL}",
    "use_galore": "not offered by this version: GaLore; use `adapter: {kind: lora}`, whose moments are small",
    "use_apollo": "not offered by this version: APOLLO; use `adapter: {kind: lora}`, whose moments are small",
    "use_badam": "not offered by this version: BAdam; use `adapter: {kind: lora}`, whose moments are small",
    "use_muon": "not offered by this version: Muon; use `optim: {name: adamw}`",
    "bf16": "`bf16: true` is `model.dtype: bfloat16`",
    "fp16": "not offered for training, for want of loss scaling: use `model.dtype: bfloat16`",
    "system": "`system` is a column (`data.columns.system`), or a system message in the rows",
    "columns": "`columns` stands in `data`: `data: {path: ..., columns: {prompt: question}}`",
    "dataset_dir": "not needed: `data.path` is relative to the recipe's file",
    "dataset_name": "`dataset_name` is `data.path`, a hub id",
    "nnodes": "not needed: `align run --address` joins a Ray cluster; `placement` says what goes where",
    "n_gpus_per_node": "`n_gpus_per_node` is `placement.<part>.gpus`",
    "tensor_model_parallel_size": "not offered by this version: an engine is one process; use `rollout.workers`",
    "actor_rollout_ref": "`actor_rollout_ref` is `model`, `rollout` and `reference`",
    "algorithm": "`algorithm` is `objectives` and `loss` of an online stage",
    "problem_type": "`problem_type` is `problem` of a classify stage: single_label, multi_label or regression",
    "task_type": "`task_type: seq_cls` is a stage, `kind: classify`; `task_type: reward_model` is `kind: reward_model`",
    "reward_model": "`reward_model` is a stage, `kind: reward_model`, where one is trained; rewards of an online stage "
    "are `rewards: [{use: ...}]`",
    "trainer": "`trainer` is the recipe itself: `name`, `output`, `report`, and `epochs` or `steps` of a stage",
    "logging_steps": "not needed: every step is logged",
    "top_p": "`top_p` is refused: it changes the sampling distribution and biases the importance ratio",
    "top_k": "`top_k` is refused: it changes the sampling distribution and biases the importance ratio",
    "min_p": "`min_p` is refused: it changes the sampling distribution and biases the importance ratio",
    "repetition_penalty": "`repetition_penalty` is refused: it changes the sampling distribution",
}
