"""A GGUF file as a folder of float32, by transformers' own reader.

python -m align.model.dequantised FILE FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch


def write(file: Path, folder: Path) -> None:
    """The dequantised model in float32, with tokenizer, template and generation settings."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = read.config
    config.__dict__.pop("quantization_config", None)  # dequantised: it would be looked for in the saved folder
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # one that was never quantised
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.tie_weights()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


def main() -> None:
    file, folder = sys.argv[1:]
    write(Path(file), Path(folder))


if __name__ == "__main__":
    main()
