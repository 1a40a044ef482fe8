"""A real NeMo-Gym resource server: the newest release in a folder of its own, one server process on 127.0.0.1.

nemo-gym 0.7.0 asks for Python 3.13.14, and for packages that differ from ours (omegaconf 2.3, antlr 4.9). Its resource servers use
nothing that Python 3.11 lacks, so the wheel is unpacked without its declared requirements into a folder, with the few packages that a
server imports; only the server's process sees that folder. It has two parts, since nemo-gym moves its own root to the end of
sys.path. It is kept for the next time.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

VERSION = "0.7.0"
NEEDS = [
    "antlr4-python3-runtime==4.9.3", "hydra-core==1.3.6", "itsdangerous==2.2.0", "omegaconf==2.3.1", "orjson==3.13.0",
    "pydot==4.0.1", "scipy==1.17.1", "wandb==0.31.0", "yappi==1.7.6",
]  # fmt: skip
"""What `nemo_gym.base_resources_server` imports and the project's own environment lacks, or has in another version."""
FOLDER = (
    Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    / "polyrl"
    / f"nemo-gym-{VERSION}-py{sys.version_info[0]}{sys.version_info[1]}"
)
INSTALL_S = 240
START_S = 60


class NotHere(RuntimeError):
    """nemo-gym cannot be installed on this machine."""


def install() -> Path:
    """The folder with nemo-gym in it; made the first time. Raises NotHere."""
    FOLDER.parent.mkdir(parents=True, exist_ok=True)
    with (FOLDER.parent / f"{FOLDER.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if FOLDER.is_dir():
            return FOLDER
        building = FOLDER.with_suffix(".building")
        shutil.rmtree(building, ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        run([*pip, "install", "--no-deps", "--target", str(building / "needs"), *NEEDS])
        run([*pip, "download", "--no-deps", "--ignore-requires-python", "--dest", str(building), f"nemo-gym=={VERSION}"])
        (wheel,) = building.glob("nemo_gym-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            wanted = ("nemo_gym/", f"nemo_gym-{VERSION}.dist-info/", "resources_servers/example_")
            archive.extractall(building / "gym", [name for name in archive.namelist() if name.startswith(wanted)])
        wheel.unlink()
        building.rename(FOLDER)
        return FOLDER


def run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise NotHere(f"pip took longer than {INSTALL_S} s") from error
    if done.returncode:
        raise NotHere(f"pip could not install nemo-gym {VERSION}: {done.stderr.strip().splitlines()[-1:]}")


@contextmanager
def server(name: str, log: Path) -> Iterator[str]:
    """Run the resource server `resources_servers/NAME/app.py`; gives its URL, and ends the process."""
    folder = install()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    instance = {"host": "127.0.0.1", "port": port, "entrypoint": "app.py", "domain": "other"}
    config = {
        "head_server": {"host": "127.0.0.1", "port": 1}, "dry_run": False, "ray_head_node_address": "",
        "example": {"resources_servers": {name: instance}},
    }  # fmt: skip
    environ = {
        "PATH": os.environ["PATH"], "HOME": str(log.parent), "PYTHONPATH": f"{folder}/needs{os.pathsep}{folder}/gym",
        "NEMO_GYM_CONFIG_PATH": "example",
        "NEMO_GYM_CONFIG_DICT": json.dumps(config), "WANDB_MODE": "disabled",
    }  # fmt: skip
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "app.py"],
            cwd=folder / "gym" / "resources_servers" / name,
            env=environ,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        wait_until_healthy(process, f"http://127.0.0.1:{port}", log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def wait_until_healthy(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with opener.open(f"{url}/health", timeout=2) as reply:
                if reply.status == 200:
                    return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"the server did not start:\n{log.read_text(encoding='utf-8', errors='replace')[-3000:]}")
