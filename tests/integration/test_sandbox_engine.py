"""A Docker engine that dies and comes back. It kills the engine, so it wants one of its own:

POLYRL_OWN_ENGINE=FOLDER pytest tests/integration/test_sandbox_engine.py      a folder of infra/docker/start-engine.sh, with the image
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from environments.sandbox.docker import DockerSandbox
from infra.chaos import DockerEngine
from tests.integration.sandboxes import HONEST, attempt

FOLDER = os.environ.get("POLYRL_OWN_ENGINE", "")


@pytest.mark.docker
@pytest.mark.skipif(not FOLDER, reason="POLYRL_OWN_ENGINE names no engine that may be killed")
def test_without_its_engine_a_program_has_no_result_and_with_it_again_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = DockerEngine(Path(FOLDER))
    monkeypatch.setenv("DOCKER_HOST", engine.address)
    engine.start()
    sandbox = DockerSandbox(width=2)
    try:
        assert attempt(sandbox, HONEST).paid
        (daemon,) = engine.processes()
        daemon.kill()
        daemon.wait(10)
        began = time.monotonic()
        lost = [attempt(sandbox, HONEST).result for _ in range(3)]
        assert {r.kind for r in lost} == {"infra_error"}, "never a result, so never a reward"
        assert all(r.stderr_tail for r in lost), "and it says why"
        assert time.monotonic() - began < 30
        engine.start()
        assert [attempt(sandbox, HONEST).paid for _ in range(4)] == [True] * 4, "the same backend goes on"
    finally:
        sandbox.close()
