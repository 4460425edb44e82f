"""The versions that the engine of transformers is sent: loaded, compared with the trainer's, and served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from align.errors import AlignError, EngineError, Unsupported
from align.model import adapters
from align.model.load import load_model
from align.protocols.trainer import Publication


class TransformersWeights:
    """A model in `dtype` on `device`, and what was published to it.

    model: what computes, the adapter that serves included. version: None before the first, and after whole weights
    that failed.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, device: str, trust_remote_code: bool):
        self.folder, self.dtype, self.device, self.trust_remote_code = folder, dtype, device, trust_remote_code
        self.version: int | None = None
        self.model: Any = self._load()
        self._peft: Any = None
        self._adapter: str | None = None  # the one that serves
        self._loaded = 0  # adapters so far; each gets a name of its own
        self._base_intact = True

    def _load(self) -> Any:
        return load_model(self.folder, dtype=self.dtype, trust_remote_code=self.trust_remote_code, device=self.device)

    def publish(self, publication: Publication) -> str:
        """Load a version and return the digest of what is held. For kind "base" the publication's own is returned.

        An adapter is loaded beside the one that serves, compared, and only then takes over. Whole weights replace the
        model's own: there a failure leaves the engine without a version.
        """
        if publication.kind != "weights" and not self._base_intact:
            raise EngineError(
                f"the engine cannot load version {publication.version} ({publication.kind}): its base weights were "
                "replaced by an earlier version"
            )
        if publication.kind == "base":
            self._serve(None, publication.version)
            return publication.digest
        load = self._load_adapter if publication.kind == "adapter" else self._load_weights
        try:
            return load(publication)
        except (AlignError, OSError, SafetensorError) as error:
            if isinstance(error, EngineError):
                raise
            raise EngineError(
                f"version {publication.version} cannot be loaded: {error}", where=publication.path
            ) from error

    def _load_adapter(self, publication: Publication) -> str:
        self._loaded += 1
        name = f"adapter{self._loaded}"
        try:
            if self._peft is None:
                self._peft = adapters.load_frozen(self.model, Path(publication.path), name, use="generate")
            else:
                adapters.add_frozen(self._peft, Path(publication.path), name)
            digest = adapters.digest(self._peft, self.dtype, name)
            self._require_equal(digest, publication)
        except BaseException:
            self._forget(name)
            raise
        self._serve(name, publication.version)
        return digest

    def _forget(self, name: str) -> None:
        """Take back an adapter that was loaded in part or in vain; what served before serves on."""
        if self._adapter is None:
            self.model, self._peft = self._load(), None
        elif name in self._peft.peft_config:
            self._peft.delete_adapter(name)

    def _load_weights(self, publication: Publication) -> str:
        if self._peft is not None:
            raise EngineError("whole weights were published to an engine that holds an adapter")
        self.version, self._base_intact = None, False
        sent = {
            k: v for file in sorted(Path(publication.path).glob("*.safetensors")) for k, v in load_file(file).items()
        }
        held = dict(adapters.full_state(self.model))
        if sent.keys() != held.keys():
            odd = sorted(sent.keys() ^ held.keys())
            raise EngineError(f"{len(odd)} weights were sent but are not held, or the reverse: {', '.join(odd[:4])}")
        own = {tensor.data_ptr() for tensor in self.model.state_dict().values()}
        if not all(tensor.data_ptr() in own for tensor in held.values()):  # renamed is no matter: fused is
            raise Unsupported(
                f"{type(self.model).__name__} holds its weights in another form than its checkpoint",
                where="rollout.name",
                remedy="use rollout.name=vllm",
            )
        with torch.no_grad():
            for name, tensor in sent.items():
                held[name].copy_(tensor)
        digest = adapters.weights_digest(self.model, self.dtype)
        self._require_equal(digest, publication)
        self._serve(None, publication.version)
        return digest

    def _serve(self, name: str | None, version: int) -> None:
        """Compute with adapter `name` (None: the model's own weights) from now on, and forget the one before."""
        if self._adapter is not None and name is None:
            self.model, self._peft = self._peft.unload(), None
        elif name is not None:
            self._peft.set_adapter(name)
            self._peft.requires_grad_(False)
            if self._adapter is not None:
                self._peft.delete_adapter(self._adapter)
        self._adapter, self.version = name, version

    def _require_equal(self, digest: str, publication: Publication) -> None:
        if digest != publication.digest:
            raise EngineError(
                f"the engine holds other weights than version {publication.version} was published with "
                f"(digest {digest[:12]}, the trainer's is {publication.digest[:12]})",
                where=publication.path,
            )

    def close(self) -> None:
        """Free the model."""
        self.model = self._peft = self._adapter = self.version = None
