"""The measurement that `model.dtype: auto` rests on."""

from __future__ import annotations

import time

import torch

from align.model.speed import multiplied


def test_both_dtypes_are_measured_within_seconds_and_threads_are_left_as_they_were() -> None:
    threads, begun = torch.get_num_threads(), time.monotonic()
    found = multiplied(4096, 11008, threads=1)
    assert set(found) == {"float32", "bfloat16"} and all(0 < speed < 1e6 for speed in found.values())
    assert time.monotonic() - begun < 30, "a CPU without bfloat16 must not take long to say so"
    assert torch.get_num_threads() == threads
