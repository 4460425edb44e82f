"""Freed memory stays with a process that trains on a CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from align.train.memory import ENVIRONMENT

PROGRAM = """
import resource, torch
from align.train.memory import keep_freed_memory
assert keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept = [torch.ones(1 << 22) for _ in range(4)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first = faults()
print(first, [faults() for _ in range(4)][-1])  # the first ones find their places
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc is asked")
def test_what_an_update_frees_the_next_one_finds_without_a_page_fault() -> None:
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=True)
    first, later = map(int, run.stdout.split())
    assert later * 10 < first


HUGE = """
import torch
kept = torch.ones(1 << 22)
flags = [line for line in open("/proc/self/smaps") if line.startswith("VmFlags")]
print(any("hg" in line.split() for line in flags))
"""


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").is_dir(), reason="this kernel has no huge pages")
def test_large_tensors_of_a_process_that_trains_ask_for_huge_pages() -> None:
    environment = {**os.environ, **ENVIRONMENT}
    run = subprocess.run([sys.executable, "-c", HUGE], capture_output=True, text=True, check=True, env=environment)
    assert run.stdout.strip() == "True"
