"""Ray, found or started."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import ray

LOGICAL_CPUS = 64
"""Ray's CPU count on an embedded cluster. Actors here declare what they need by threads of their own; Ray's number only decides what it
admits, and a laptop's two cores must admit engine, learner, hosts and queue beside each other."""

OBJECT_STORE_BYTES = 1 << 30

START_ATTEMPTS = 3

log = logging.getLogger(__name__)


def connect(run_dir: Path) -> None:
    """Join the cluster that RAY_ADDRESS names (inside a Ray job it always does), or start one that ends with this process."""
    del run_dir
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False)
        return
    start_local(num_cpus=LOGICAL_CPUS, object_store_memory=OBJECT_STORE_BYTES)


def start_local(*, num_cpus: int, object_store_memory: int) -> None:
    """An embedded Ray. It gives a new node 30 s to answer, which a busy laptop may miss: then once more, and once again."""
    for attempt in range(1, START_ATTEMPTS + 1):
        try:
            ray.init(
                address="local", num_cpus=num_cpus, object_store_memory=object_store_memory, include_dashboard=False, log_to_driver=False,
            )  # fmt: skip
            return
        except Exception as error:
            ray.shutdown()
            if attempt == START_ATTEMPTS or "timed out during startup" not in str(error):
                raise
            log.warning("Ray did not start within its 30 s; trying again")
