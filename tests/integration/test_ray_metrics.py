"""What Prometheus would read from a real Ray node while a driver of ours emits its events."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.test_trackers import queried, undocumented

ROOT = Path(__file__).parents[2]

DRIVER = """
import sys, time, urllib.request
import ray
from infra.jobs import free_ports
from infra.trackers.ray_metrics import RayMetrics
from rl_core.events import Event
from tests.unit.stored_runs import events

(port,) = free_ports(1)
ray.init(address="local", num_cpus=1, include_dashboard=False, object_store_memory=128 << 20, log_to_driver=False,
         _metrics_export_port=port, _system_config={"metrics_report_interval_ms": 500})
sink = RayMetrics("demo")
for event in events(steps=4):
    sink.emit(event)
more = {"env/code/component/tests": 0.5, "step/seconds": 3.0, "env/math/groups_filtered": 2.0}
sink.emit(Event(kind="step", data={"version": 5, "metrics": more}))
deadline = time.monotonic() + 120
text = ""
while "ray_polyrl_step_seconds_hist_bucket" not in text or "ray_polyrl_env_groups_filtered" not in text:
    if time.monotonic() > deadline:
        sys.exit("the endpoint never served them:\\n" + text[-3000:])
    try:
        text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
    except OSError:
        pass
    time.sleep(0.2)
print(text)
ray.shutdown()
"""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def served() -> dict[str, dict[str, float]]:
    """{metric: {labels as text: value}} of one scrape."""
    done = subprocess.run([sys.executable, "-c", DRIVER], cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found: dict[str, dict[str, float]] = {}
    for line in done.stdout.splitlines():
        if line.startswith("ray_polyrl_"):
            name, _, rest = line.partition("{")
            labels, _, value = rest.rpartition("}")
            found.setdefault(name, {})[labels] = float(value)
    return found


def value(served: dict[str, dict[str, float]], metric: str, /, **labels: str) -> float:
    wanted = [f'{key}="{text}"' for key, text in labels.items()]
    (only,) = (v for text, v in served[metric].items() if all(w in text for w in wanted))
    return only


def test_a_ray_node_serves_what_the_driver_emits_with_its_labels(served: dict[str, dict[str, float]]) -> None:
    assert value(served, "ray_polyrl_env_reward", env="math", run="demo") == pytest.approx(0.7)
    assert value(served, "ray_polyrl_env_reward", env="code") == pytest.approx(0.2)
    assert value(served, "ray_polyrl_env_component", env="code", name="tests") == 0.5
    assert value(served, "ray_polyrl_env_held_out_pass_rate", env="math") == 0.8
    assert value(served, "ray_polyrl_learner_tokens_per_s", run="demo") == 9000


def test_counters_and_histograms_are_served_under_the_names_that_the_board_uses(served: dict[str, dict[str, float]]) -> None:
    assert value(served, "ray_polyrl_env_groups_trained_total", env="math") == 12
    assert value(served, "ray_polyrl_env_groups_filtered_total", env="math") == 2
    assert value(served, "ray_polyrl_step_seconds_hist_bucket", le="5.0") == 1
    assert value(served, "ray_polyrl_step_seconds_hist_bucket", le="2.0") == 0
    assert len(queried() & set(served)) >= 10
    assert not undocumented({"env/code/component/tests", "step/seconds"})
