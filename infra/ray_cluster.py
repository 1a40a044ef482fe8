"""Ray, found or started."""

from __future__ import annotations

import os
from pathlib import Path

import ray

LOGICAL_CPUS = 64
"""Ray's CPU count on an embedded cluster. Actors here declare what they need by threads of their own; Ray's number only decides what it
admits, and a laptop's two cores must admit engine, learner, hosts and queue beside each other."""

OBJECT_STORE_BYTES = 1 << 30


def connect(run_dir: Path) -> None:
    """Join the cluster that RAY_ADDRESS names (inside a Ray job it always does), or start one that ends with this process."""
    del run_dir
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False)
        return
    ray.init(
        address="local", num_cpus=LOGICAL_CPUS, object_store_memory=OBJECT_STORE_BYTES, include_dashboard=False, log_to_driver=False,
    )  # fmt: skip
