from __future__ import annotations

import os
import subprocess
import sys

CODE = """
import logging, os, warnings
from align.report.quiet import quiet
quiet()
warnings.warn("library chatter", FutureWarning)
logging.getLogger("vllm").warning("vllm chatter")
logging.getLogger("vllm").error("vllm failed")
logger = logging.getLogger("DeepSpeed")
logger.setLevel(logging.WARNING)  # as DeepSpeed does when it is imported
logger.warning("deepspeed chatter")
logger.error("deepspeed failed")
warnings.warn("the user should know", UserWarning)
print(os.environ["VLLM_LOGGING_LEVEL"])
"""


def run(**environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", CODE], env=env, capture_output=True, text=True, check=True)


def test_chatter_is_silenced_and_errors_are_not() -> None:
    done = run()
    assert "chatter" not in done.stderr
    assert "vllm failed" in done.stderr and "deepspeed failed" in done.stderr
    assert "the user should know" in done.stderr


def test_a_variable_that_the_user_has_set_is_left_alone() -> None:
    assert run(VLLM_LOGGING_LEVEL="INFO").stdout == "INFO\n"
