"""What `align.data.prepare` asks: the media of many rows in, and for each its facts and tokens, or why the row is
refused. Equal media are processed once, here and in every run that shares the store.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from align import mediastore
from align.data.media.pool import Pool
from align.data.media.shelf import Shelf
from align.data.media.shown import Shown
from align.data.media.sources import Allowed, Finder, Located
from align.data.media.web import Web
from align.data.records import MediaPart, RowError
from align.recipe.inputs import Media

_PROCESSOR_FILES = (*mediastore.PROCESSOR_FILES, "video_preprocessor_config.json", "tokenizer.json")


class Library:
    """Media for one model. folder: the model's, with its processor; store: where processed media lie. Close it: until
    then its media stay in the store, and its processes run."""

    def __init__(
        self,
        settings: Media,
        folder: Path,
        store: Path,
        *,
        trust_remote_code: bool = False,
        web: Web | None = None,
        pool: Pool | None = None,
    ):
        self.settings, self.folder, self.store = settings, folder, store
        self.web = web or Web(store, settings.hosts, max_bytes=settings.max_bytes, timeout_s=settings.timeout_s)
        allowed = Allowed(tuple(Path(f) for f in settings.folders), settings.max_bytes, self.web.fetch)
        self.finder = Finder(allowed)
        self.shelf = Shelf(store)
        workers = settings.workers or max(1, min(8, (os.cpu_count() or 2) // 2))
        self._pool = pool or Pool(folder, workers, settings.timeout_s, trust_remote_code)
        self._known: dict[str, Shown | RowError] = {}
        self.processed = 0

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides tensors and tokens beside a medium's own bytes."""
        s = self.settings
        limits = [s.max_pixels, s.min_pixels, s.video_frames, s.max_source_pixels]
        h = hashlib.sha256(json.dumps([limits, *(version(name) for name in ("transformers", "pillow"))]).encode())
        for name in _PROCESSOR_FILES:
            path = self.folder / name
            h.update(f"|{name}|".encode() + (path.read_bytes() if path.is_file() else b""))
        config = self.folder / "config.json"
        vision = json.loads(config.read_bytes()).get("vision_config") if config.is_file() else None
        h.update(str((vision or {}).get("patch_size")).encode())
        for source in (*sorted(Path(__file__).parent.rglob("*.py")), Path(mediastore.__file__)):
            h.update(source.read_bytes())
        return h.hexdigest()

    @cached_property
    def _described(self) -> dict[str, Any]:
        """`Processor.describe`, kept in the store. Raises ModelError where the model folder has no processor."""
        path = self.store / f"{self.fingerprint}.processor"
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = self._pool.describe()
            self.store.mkdir(parents=True, exist_ok=True)
            aside = path.with_name(f".{path.name}.{os.getpid()}")
            aside.write_text(json.dumps(found), encoding="utf-8")
            aside.replace(path)
        return found

    @property
    def placeholders(self) -> dict[str, str]:
        """By kind, the token that the model's template writes for one medium; kinds that it does not take are missing.

        Raises ModelError where the model folder has no processor."""
        return dict(self._described["placeholders"])

    @property
    def reserved(self) -> tuple[str, ...]:
        """Tokens that the model takes for media: no text may hold them."""
        return tuple(self._described["reserved"])

    def show(self, rows: Sequence[tuple[Sequence[MediaPart], Path | None]]) -> list[list[Shown] | RowError]:
        """The media of many rows, (parts, folder of the data file) each; a row whose media cannot be shown is its
        RowError. Raises ModelError where the model folder has no processor."""
        located: list[list[tuple[str, Located]] | RowError] = []
        for parts, folder in rows:
            try:
                located.append([self._locate(part, folder) for part in parts])
            except RowError as error:
                located.append(error)
        wanted = {key: medium for row in located if not isinstance(row, RowError) for key, medium in row}
        self.shelf.hold(wanted)
        self._process({key: medium for key, medium in wanted.items() if key not in self._known})
        return [row if isinstance(row, RowError) else self._shown(row) for row in located]

    def _locate(self, part: MediaPart, folder: Path | None) -> tuple[str, Located]:
        if part.kind not in self.placeholders:
            takes = " and ".join(f"{kind}s" for kind in sorted(self.placeholders)) or "no media"
            raise RowError(
                f"the model takes {takes}, and the row has {'an' if part.kind != 'video' else 'a'} {part.kind}"
            )
        medium = self.finder.find(part, folder)
        hashes = [blob.sha256 for blob in medium.blobs]
        named = json.dumps([self.fingerprint, medium.kind, medium.is_list, hashes])
        return hashlib.sha256(named.encode()).hexdigest(), medium

    def _process(self, wanted: dict[str, Located]) -> None:
        missing: list[tuple[str, Located]] = []
        for key, medium in wanted.items():
            facts = self.shelf.facts(key)
            if facts is None:
                missing.append((key, medium))
            else:
                self._known[key] = self._from_store(key, medium, facts)
        if not missing:
            return
        limits = self.settings.model_dump(include={"max_pixels", "min_pixels", "video_frames", "max_source_pixels"})
        answers = self._pool.process(missing, self.store, limits)
        for (key, medium), answer in zip(missing, answers, strict=True):
            self._known[key] = answer if isinstance(answer, RowError) else self._from_store(key, medium, answer)
        self.processed += len(missing)
        self.shelf.prune(self.settings.cache_gb * 1e9, time.time())

    def _from_store(self, key: str, medium: Located, facts: dict[str, Any]) -> Shown:
        return Shown(medium.kind, key, self.placeholders[medium.kind], self.shelf.tokens(key), facts, str(self.store))

    def _shown(self, row: Sequence[tuple[str, Located]]) -> list[Shown] | RowError:
        found: list[Shown] = []
        for key, medium in row:
            known = self._known[key]
            if isinstance(known, RowError):
                return known
            files = tuple((str(b.path), b.sha256) for b in medium.blobs if b.path is not None)
            found.append(replace(known, files=files))
        return found

    def keep(self, keys: Iterable[str]) -> bool:
        """Keep media that tokenised data name in the store from now on; False where one is gone already."""
        wanted = list(keys)
        self.shelf.hold(wanted)
        return all(self.shelf.facts(key) is not None for key in wanted)

    def retain(self, keys: set[str]) -> None:
        """Give up every medium but these; what was used longest ago leaves a store that is beyond its bound."""
        self.shelf.retain(keys)
        self._known = {key: known for key, known in self._known.items() if key in keys}
        self.shelf.prune(self.settings.cache_gb * 1e9, time.time())

    def unchanged(self, files: Sequence[tuple[str, str]]) -> bool:
        """Whether these files still hold what they held."""
        try:
            return all(Path(path).is_file() and self.finder.hash(Path(path)) == sha for path, sha in files)
        except RowError:
            return False

    def close(self) -> None:
        self._pool.close()
        self.shelf.close()
