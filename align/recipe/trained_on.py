"""Which base an adapter was trained on: its name, and a digest of its weights that our own adapters keep.

An adapter fits every model of its base's shapes, and is right on one. The digest is of values taken from each weight,
rounded to bfloat16: it is the same whichever way the weights are divided into files, and for a copy that was cast.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from os.path import expanduser
from pathlib import Path
from typing import Any

import numpy as np

from align.errors import ModelError
from align.recipe.adapter_folder import QUANTISED
from align.recipe.chat_files import read_settings

TRAINED_ON = "trained_on.json"
SAMPLES = 16  # values of each weight
_FLOATS: dict[str, tuple[np.dtype[Any], int]] = {
    "F32": (np.dtype("<f4"), 4),
    "BF16": (np.dtype("<u2"), 2),
    "F16": (np.dtype("<f2"), 2),
    "F64": (np.dtype("<f8"), 8),
}


def weights_digest(folder: Path) -> str | None:
    """None where the folder has no safetensors."""
    found = hashlib.sha256()
    seen = False
    for name, values in sorted(_sampled(Path(folder))):
        seen = True
        found.update(name.encode() + b"\0" + values)
    return found.hexdigest() if seen else None


def _sampled(folder: Path) -> Iterator[tuple[str, bytes]]:
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header: Mapping[str, Any] = json.loads(stream.read(length))
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                begin, end = entry["data_offsets"]
                dtype, size = _FLOATS.get(entry["dtype"], (np.dtype("u1"), 1))
                count = (end - begin) // size
                values = []
                for at in np.linspace(0, max(count - 1, 0), min(SAMPLES, count)).astype(np.int64):
                    stream.seek(8 + length + begin + int(at) * size)
                    values.append(stream.read(size))
                raw = np.frombuffer(b"".join(values), dtype=dtype)
                yield f"{name}{entry['shape']}", _rounded(raw, entry["dtype"])


def _rounded(values: np.ndarray, dtype: str) -> bytes:
    """As bfloat16, to nearest even; integers as they are."""
    if dtype == "BF16" or dtype not in _FLOATS:
        return values.tobytes()
    bits = values.astype("<f4").view("<u4").astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)).astype("<u2").tobytes()


def write_trained_on(folder: Path, base: Path, name: str | None = None) -> None:
    """Keep in an adapter's folder what it was trained on. name: of the base, where that is not its path."""
    packed = quantisation(base)
    kept = {"base": name or str(base), "weights": weights_digest(base), "quantised": packed}
    if packed is not None:
        values = {"quant_method": "bitsandbytes", **packed}
        (folder / QUANTISED).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    (folder / TRAINED_ON).write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def kept_digest(adapter: Path) -> str | None:
    """Of the base that an adapter was trained on, where its folder keeps one."""
    found = read_settings(adapter / TRAINED_ON).get("weights")
    return found if isinstance(found, str) else None


def quantisation(folder: Path) -> dict[str, Any] | None:
    """config.json's quantization_config; None where the weights are in full precision."""
    found = read_settings(folder / "config.json")
    return found.get("quantization_config") or (found.get("text_config") or {}).get("quantization_config") or None


def quantisation_words(config: Mapping[str, Any]) -> str:
    """A quantization_config for a sentence: `bitsandbytes, 4 bits`."""
    method = str(config.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in config else "unknown"))
    if config.get("load_in_4bit") or config.get("_load_in_4bit"):
        bits: object = 4
    elif config.get("load_in_8bit") or config.get("_load_in_8bit"):
        bits = 8
    else:
        bits = config.get("bits") or config.get("w_bit")
    return f"{method}, {bits} bits" if bits else method


def require_base(base: Path, adapter: Path, *, anyway: bool = False, flag: str = "--other-base") -> list[str]:
    """Compare a model with the one that an adapter was trained on; notes where that cannot be known.

    anyway: the user says that it is right, and every difference is a note. flag: by which they say so. Raises
    ModelError where it is another.
    """
    kept, named = (
        read_settings(adapter / TRAINED_ON),
        str(read_settings(adapter / "adapter_config.json").get("base_model_name_or_path")),
    )
    said = _verdict(Path(base), kept, named)
    if said is None:
        return []
    what, certain = said
    if certain and not anyway:
        raise ModelError(
            what,
            where=adapter,
            remedy=f"give {kept.get('base') or named} as the base; {flag}, if you know that it belongs on this one",
        )
    return [what]


def _verdict(base: Path, kept: Mapping[str, Any], named: str) -> tuple[str, bool] | None:
    """(what is wrong, whether that is certain); None where it is the same model."""
    name = str(kept.get("base") or named)
    packed, ours = kept.get("quantised"), quantisation(base)
    digest = weights_digest(base)
    if digest is None:
        what = f"the adapter was trained on {name}; the weights of {base} are not here to be compared"
        return None if name == str(base) else (what, False)
    if kept.get("weights"):
        if kept["weights"] == digest:
            return None
        return _other(base, name, packed if ours is None else None, "its weights are others"), True
    if named in ("", "None"):
        return f"the adapter names no base: whether {base} is the one that it was trained on cannot be known", False
    there = Path(expanduser(named))
    if there.is_dir():
        if there.resolve() == base.resolve() or weights_digest(there) == digest:
            return None
        packed = quantisation(there)
        return _other(base, name, packed if ours is None else None, "its weights are others"), True
    own = _hub_name(base)
    if own is not None and own == named:
        return None
    if own is not None and named.count("/") == 1 and not named.startswith((".", "/", "~")):
        return _other(base, name, None, f"this one is called {own}"), True
    what = f"the adapter was trained on {named}; whether {base} is that model cannot be known"
    return what + (", and that name is of a quantised one" if _sounds_quantised(named) else ""), False


def _other(base: Path, name: str, packed: Mapping[str, Any] | None, why: str) -> str:
    if packed is not None:
        return (
            f"the adapter was trained on {name}, which is quantised ({quantisation_words(packed)}); {base} is not: "
            "with the adapter it is another model than the one that was trained"
        )
    return f"the adapter was trained on {name}, and {base} is another model: {why}"


def _hub_name(base: Path) -> str | None:
    """The hub's name of a folder: of a snapshot in its cache, or as its config.json says."""
    for part in base.parts:
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/")
    found = read_settings(base / "config.json").get("_name_or_path")
    return found if isinstance(found, str) and found.count("/") == 1 and not found.startswith((".", "/")) else None


def _sounds_quantised(name: str) -> bool:
    marks = ("bnb", "4bit", "8bit", "gptq", "awq", "int4", "int8", "fp8", "nf4")
    return any(word in name.lower() for word in marks)
