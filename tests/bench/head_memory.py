"""Memory that forward and backward of the fused head add: 8,192 scored tokens, vocabulary 151,936, hidden 896, float32.

    python -m tests.bench.head_memory [--tokens 8192 --vocabulary 151936 --hidden 896]

Each case runs in a process of its own: hidden states and weight are made, the peak of the resident memory is set back
to what is resident now (Linux: 5 into /proc/self/clear_refs), then forward and backward run; what the peak grew by is
the figure, the gradients that come back included. The first product of matrices of a process, which allocates buffers
of the library, comes before. Beside it plain logits with torch's cross entropy and a trainable
head, at a tenth of the tokens and times ten.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

from tests.bench import common
from tests.bench.resident import reset_peak, resident_peak

LIMITS_GB = {"frozen head": 0.2, "trainable head": 0.75}
SMALLER = 10
"""The plain computation is measured at this fraction of the tokens."""


def measure(case: str, tokens: int, vocabulary: int, hidden: int, threads: int | None) -> tuple[int, float]:
    """(Bytes added at the peak, seconds of forward and backward); in a process that has done nothing else."""
    import torch

    common.use_threads(threads)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, hidden, generator=generator).requires_grad_()
    weight = torch.randn(vocabulary, hidden, generator=generator).mul_(0.02)
    weight.requires_grad_(case != "frozen head")
    labels = torch.randint(0, vocabulary, (tokens,), generator=generator)
    run(case, x[:64].detach().requires_grad_(), weight[:512].detach().requires_grad_(), labels[:64] % 512)
    reset_peak()
    before = resident_peak()
    started = time.perf_counter()
    run(case, x, weight, labels)
    return resident_peak() - before, time.perf_counter() - started


def run(case: str, x: Any, weight: Any, labels: Any) -> None:
    """Mean log-probability of the labels, forward and backward; the gradients stay."""
    import torch

    from align.model.head import fused_head

    if case.startswith("plain"):
        torch.nn.functional.cross_entropy(x @ weight.T, labels).backward()
    else:
        fused_head(x, weight, labels).logps.mean().backward()
    assert x.grad is not None


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run and print; returns what is recorded."""
    arguments = parse(argv)
    started = time.perf_counter()
    tokens, vocabulary, hidden = arguments.tokens, arguments.vocabulary, arguments.hidden
    print(f"{tokens:,} scored tokens, vocabulary {vocabulary:,}, hidden {hidden}, float32")
    found: dict[str, dict[str, float]] = {}
    rows = [["", "GB added", "limit", "seconds"]]
    for case, limit in LIMITS_GB.items():
        added, seconds = common.apart(measure, case, tokens, vocabulary, hidden, arguments.threads)
        found[case] = {"gb": added / 1e9, "limit_gb": limit, "seconds": seconds}
        rows.append([case, f"{added / 1e9:.3f}", f"{limit:.2f}", f"{seconds:.1f}"])
    few = max(1, tokens // SMALLER)
    added, seconds = common.apart(measure, "plain logits", few, vocabulary, hidden, arguments.threads)
    gradient = vocabulary * hidden * 4
    plain = (added - gradient) * tokens / few + gradient
    found["plain logits"] = {"gb": plain / 1e9, "measured_at_tokens": few, "seconds": seconds * tokens / few}
    rows.append(["plain logits", f"{plain / 1e9:.3f}", "", f"{seconds * tokens / few:.1f}", f"from {few} tokens"])
    print(common.columns(rows))
    logits, own = tokens * vocabulary * 4 / 1e9, gradient / 1e9
    print(f"one copy of the logits: {logits:.2f} GB; the gradient of the head, in float32: {own:.2f} GB")
    figures = {"tokens": tokens, "vocabulary": vocabulary, "hidden": hidden, "cases": found}
    if not arguments.toy:
        met = all(found[case]["gb"] <= limit for case, limit in LIMITS_GB.items())
        limits = " and ".join(f"{limit} GB with a {case}" for case, limit in LIMITS_GB.items())
        goal = f"forward and backward of the head add at most {limits}"
        common.write_result("head-memory", goal=goal, met=met, figures=figures, started=started)
    return figures


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--toy", action="store_true", help="nothing is recorded")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
