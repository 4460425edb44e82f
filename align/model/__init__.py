"""Models of transformers, computed over packed trees.

In the order of reading:

    load.py, weights.py, folders.py, shards.py: in from a folder, out as named tensors, to disk
    scratch.py, scratch_vision.py, measure.py, parts.py: models made new, and the parts of one
    adapters.py, adapter_config.py, lora_targets.py, fresh.py, quantised.py, bitsandbytes_import.py: LoRA, its
        folders, four bits
    policy_module.py: backbone and head: forward(TokenBatch) -> HeadOutputs
    head.py, logits.py, output_embedding.py, tiles.py, last_layer.py: log-probabilities without logits
    score_head.py, scoring_class.py: a score head in place of it
    attention.py, attention_sdpa.py, attention_tree.py, attention_softmax.py, attention_varlen.py, attention_flex.py:
        attention over them, a kernel a file
    fused.py, fused_mlp.py, fused_norm.py, fused_qkv.py, fused_rotary.py, forms.py: fewer passes over memory, where
        they are known
    media.py, media_support.py, places.py, spelled.py, prompt_inputs.py: images in a row
    probe.py, probe_rows.py, probe_own.py, probe_conditions.py, probe_trace.py, probe_float32.py, probe_loud.py,
        probe_exchange.py, probe_verdict.py: is a packed forward the model's own? and what if not
    unshared.py, rotary_lengths.py, dropout.py: models that cannot be packed, or not at any length
    generate.py, generate_facts.py, reading.py: the transformers engine
"""
