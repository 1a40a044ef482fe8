"""Figures to TensorBoard, Weights & Biases and MLflow, beside the run's own store; and to Ray's metrics, for Prometheus and Grafana.

event --> Background (bounded queue, thread) --> Tracker        one of each per tracker: a slow one holds up neither run nor others
      --> RayMetrics (in memory)             --> Ray's agent --> Prometheus --> Grafana
"""

from infra.trackers.background import Background, open_trackers
from infra.trackers.figures import figures

__all__ = ["Background", "figures", "open_trackers"]
