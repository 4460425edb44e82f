"""A Qwen3 small enough to start in seconds and shaped so that vLLM's CPU attention takes it (head size 32)."""

from __future__ import annotations

from pathlib import Path

VOCABULARY = 512
END_ID = 2


def write_tiny_qwen3(
    folder: Path, *, layers: int = 2, hidden: int = 64, seed: int = 0, dtype: str = "float32", spread: float = 0.1
) -> Path:
    """Write model and tokenizer in transformers layout. `spread` is the weights' standard deviation: large enough that
    the model's next-token distribution is far from uniform."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=max(1, hidden // 64),
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=spread,
        bos_token_id=None,
        eos_token_id=END_ID,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        Qwen3ForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
    write_byte_tokenizer(folder)
    return folder


def write_byte_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer without merges, padded with unused words up to `VOCABULARY`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    words += [f"unused{i}" for i in range(VOCABULARY - len(words))]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.save_pretrained(folder)
