"""What is known of the engine of transformers (`align.model.generate.engine`) before it is imported."""

from __future__ import annotations

from align.engines import EngineFacts

MAX_ROWS = 64  # completions computed at once: bounds the key-value cache

FACTS = EngineFacts(
    engine="align.model.generate.engine:TransformersEngine",
    title="transformers",
    options=(),
    slots=MAX_ROWS,
    whole_batches=True,
)
