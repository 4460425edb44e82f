"""Models of transformers, computed over packed trees.

In the order of reading:

    load.py, weights.py, folders.py, shards.py: in from a folder, out as named tensors, to disk
    dequantised.py: a folder from a GGUF file
    scratch.py, scratch_vision.py, measure.py, parts.py: models made new, and the parts of one
    speed.py: what a CPU multiplies in each dtype
    adapters.py, adapter_fits.py, adapter_config.py, lora_targets.py, fresh.py, quantised.py, bitsandbytes_import.py:
        LoRA, its folders, four bits
    policy_module.py, backbone.py: backbone and head: forward(TokenBatch) -> HeadOutputs
    head.py, logits.py, output_embedding.py, tiles.py, last_layer.py: log-probabilities without logits
    score_head.py, scoring_class.py: a score head in place of it
    attention/: attention over them, a kernel a file
    fused/: fewer passes over memory, where they are known
    media/: images in a row
    probe/: is a packed forward the model's own? and what if not
    padded.py, dropout.py: models that cannot be packed, or not as they come
    generate/: the transformers engine
"""
