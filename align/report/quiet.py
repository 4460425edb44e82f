"""Quiet libraries: a run prints what the user asked for, and every error.

Ray, vLLM, transformers and the hub client log each start-up step and draw progress bars of their own. Only their
chatter goes: errors are still logged, exceptions still raised, and a variable that the user has set is left alone
(`VLLM_LOGGING_LEVEL=INFO align run ...` is loud again).
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping
from types import MappingProxyType

QUIET_ENVIRONMENT: Mapping[str, str] = MappingProxyType(
    {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # Ray's own recommendation; it warns on every start otherwise
        "RAY_USAGE_STATS_ENABLED": "0",
        "TRANSFORMERS_VERBOSITY": "error",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",  # else tokenizers warns in every forked child
        "TQDM_DISABLE": "1",
    }
)
"""What a process of a run needs in its environment before it imports anything; actors get the same."""

_LOGGERS = ("ray", "vllm", "transformers", "datasets", "huggingface_hub", "httpx", "peft", "filelock")
_SET_THEMSELVES = ("DeepSpeed",)  # sets its own level when it is imported
_DEPRECATIONS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def quiet() -> None:
    """Silences the libraries' chatter in this process and in those it starts. Call it before they are imported."""
    for name, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in _SET_THEMSELVES:
        logging.getLogger(name).addFilter(_is_error)
    for category in _DEPRECATIONS:  # addressed to the libraries' authors, not to the user of a recipe
        warnings.simplefilter("ignore", category)
