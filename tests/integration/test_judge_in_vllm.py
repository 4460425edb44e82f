"""The judge against vLLM's own OpenAI server, in a process of its own, serving a tiny random model."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from rewards import Sample
from rewards.plugin import PluginSpec
from rewards.pool import RewardPool
from tests.tiny_models import write_tiny_qwen3

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
pytest.importorskip("vllm")

UP_S = 240.0
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}<|im_start|>"
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "TORCHDYNAMO_DISABLE": "1",
    "OMP_NUM_THREADS": "1",
}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = write_tiny_qwen3(tmp_path_factory.mktemp("served") / "tiny")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["--model", str(folder), "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port)]
    words += ["--max-model-len", "256", "--dtype", "float32", "--enforce-eager", "--max-num-seqs", "8"]
    log, sockets = folder.parent / "server.log", tempfile.mkdtemp(prefix="vllm-")  # which vLLM leaves there
    with log.open("wb") as out:
        server = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words],
            stdout=out, stderr=out, env={**os.environ, **ENVIRONMENT, "TMPDIR": sockets}, start_new_session=True,
        )  # fmt: skip
    try:
        _wait(f"http://127.0.0.1:{port}/health", server, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
        shutil.rmtree(sockets)


def _wait(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + UP_S
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            said = log.read_text(errors="replace")[-3000:]
            assert server.poll() is None, f"the server ended: {said}"
            assert time.monotonic() < deadline, f"the server is not up after {UP_S} s: {said}"
            time.sleep(0.5)


def test_a_served_model_judges_and_its_words_become_scores(url: str, tmp_path: Path) -> None:
    """A random model says anything, so vLLM holds it to two words: what is proved is the way there and back."""
    choices = {"good": 1.0, "bad": 0.0}
    args = {
        "base_url": url, "model": "tiny", "prompt": "{prompt}? {completion}", "parse": "choice", "choices": choices,
        "max_tokens": 16, "extra": {"structured_outputs": {"choice": list(choices)}},
    }  # fmt: skip
    samples = [Sample(f"answer {n}", [{"role": "user", "content": "well"}], sample_id=n) for n in range(24)]
    with RewardPool([PluginSpec("judge", args=args)], tmp_path, seed=0, cache=tmp_path / "c.sqlite") as pool:
        first = pool.score_sync(samples)
        assert not first.failures, first.failures[:2]
        for row, info in zip(first.scores, first.infos, strict=True):
            assert row[0] == choices[info["judge"]["answer"]]
        again = pool.score_sync(samples)
        assert again.scores == first.scores and again.metrics["reward/judge/cache_hits"] == len(samples)


def test_what_the_server_refuses_is_told(url: str, tmp_path: Path) -> None:
    args = {"base_url": url, "model": "another"}
    spec = PluginSpec("judge", args=args, options={"max_error_rate": 1.0, "retries": 0})
    with RewardPool([spec], tmp_path, seed=0) as pool:
        [failure] = pool.score_sync([Sample("a")]).failures
    assert "status 404" in failure.message and "another" in failure.message
