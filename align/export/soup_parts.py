"""What adapters of one soup must share beside their shapes: the base's weights, tokenizer and chat template."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from align.errors import ModelError
from align.recipe.chat_files import GENERATION, TEMPLATE, carries_tokenizer, copy_tokenizer
from align.recipe.trained_on import TRAINED_ON, kept_digest, require_base


def one_digest(folders: Sequence[Path], base: Path | None, anyway: bool) -> None:
    """Raise ModelError where the adapters were trained on weights that differ, or on others than the base has. By the
    digests that they keep: of names, a `base` that is given has the last word."""
    known = {folder: digest for folder in folders if (digest := kept_digest(folder)) is not None}
    for folder in known if base is not None else ():
        assert base is not None
        require_base(base, folder, anyway=anyway)
    if len(set(known.values())) > 1 and not anyway:
        first, *others = known
        odd = next(folder for folder in others if known[folder] != known[first])
        raise ModelError(
            f"{first} and {odd} were trained on bases whose weights differ",
            where=TRAINED_ON,
            remedy="the weights of one mean nothing on the other; --other-base, if you know that they go together",
        )


def one_chat(folders: Sequence[Path]) -> None:
    """Raise ModelError where the adapters carry tokenizers or templates that differ: a soup has one."""
    carried = [folder for folder in folders if carries_tokenizer(folder)]
    for folder in carried[1:]:
        for name in ("tokenizer.json", TEMPLATE):
            one, other = carried[0] / name, folder / name
            if one.is_file() != other.is_file() or (one.is_file() and one.read_bytes() != other.read_bytes()):
                raise ModelError(
                    f"{carried[0]} and {folder} were trained with another {name}",
                    where=folder / name,
                    remedy="train them with one tokenizer and template; or, if it makes no difference to you, copy one "
                    "of them over the other",
                )


def carry(folders: Sequence[Path], target: Path) -> None:
    """Tokenizer, template, ends of turns and the base's digest of the first adapter that has them, for the soup."""
    source = next((folder for folder in folders if carries_tokenizer(folder)), folders[0])
    copy_tokenizer(source, target)
    for name in (GENERATION, TRAINED_ON):
        if (source / name).is_file():
            shutil.copy2(source / name, target / name)
