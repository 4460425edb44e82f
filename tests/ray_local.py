"""A Ray cluster on this machine for tests: two CPUs on paper, no dashboard, gone afterwards."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def local_ray() -> Iterator[None]:
    """Use the cluster that is there, or start one and end it."""
    import ray

    if ray.is_initialized():
        yield
        return
    folder = tempfile.mkdtemp(prefix="align-ray-")  # not under tmp_path: paths of sockets end at 107 bytes
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=128 << 20,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _temp_dir=folder,
        # as in a run: what a killed vLLM leaves in the temporary folder goes with the cluster
        runtime_env={"env_vars": {"TMPDIR": folder}},
    )
    try:
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
