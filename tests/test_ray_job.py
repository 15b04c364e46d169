"""`ray start --head`, then `ray job submit`: the command as a job on a cluster of the test's own, with a token."""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.shell import PATIENCE_SECONDS, ROOT

BIN = Path(sys.executable).parent

pytestmark = pytest.mark.slow


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


class Head:
    """A cluster of one node, which nobody uses without its token."""

    def __init__(self, folder: Path, temporary: Path) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHON"))}
        self.environment = {
            **kept,
            "HOME": str(folder),
            "ALIGN_CACHE": str(folder / "align-cache"),
            "HF_HUB_OFFLINE": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
        }
        names = ("port", "dashboard-port", "ray-client-server-port", "dashboard-agent-listen-port",
                 "dashboard-agent-grpc-port", "metrics-export-port")  # fmt: skip
        ports = dict(zip(names, free_ports(len(names)), strict=True))
        self.address = f"http://127.0.0.1:{ports['dashboard-port']}"
        self._log = (folder / "head.log").open("w")
        command = [
            str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=2", "--num-gpus=0",
            "--object-store-memory=100000000", "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1",
            f"--temp-dir={temporary}", *(f"--{name}={port}" for name, port in ports.items()),
        ]  # fmt: skip
        self._process = subprocess.Popen(command, env=self.environment, stdout=self._log, stderr=subprocess.STDOUT)

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self.ray("job", "list").returncode:
            assert self._process.poll() is None, Path(self._log.name).read_text()
            assert time.monotonic() < deadline
            time.sleep(1)

    def ray(self, *arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
        group, command, *rest = arguments
        words = [str(BIN / "ray"), group, command, "--address", self.address, *rest]
        return subprocess.run(
            words, cwd=folder, env=self.environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            timeout=PATIENCE_SECONDS, check=False,
        )  # fmt: skip

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)  # with --block, Ray ends all that it started
        self._process.wait(timeout=120)
        self._log.close()


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as temporary:  # sockets: a short path
        head = Head(tmp_path_factory.mktemp("head"), Path(temporary))
        try:
            head.wait_until_ready()
            yield head
        finally:
            head.stop()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a clone holds, without what lies around in this one."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("align", "stages", "data", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def submit(head: Head, checkout: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """As the README says it."""
    align = ["align", "run", "configs/tiny.yaml", *overrides]
    return head.ray("job", "submit", "--working-dir", ".", "--", str(BIN / align[0]), *align[1:], folder=checkout)


def test_a_submitted_run_with_an_absolute_root_leaves_its_summary(head: Head, checkout: Path, tmp_path: Path) -> None:
    finished = submit(head, checkout, f"run.root={tmp_path / 'runs'}", "ppo.updates=1")
    assert finished.returncode == 0, finished.stdout
    summary = json.loads((tmp_path / "runs" / "tiny" / "summary.json").read_text())
    assert summary["base"]["loads"] == 1
    assert summary["run"]["steps"] == ["sft", "reward", "ppo", "evaluation"]
    assert f"results: {tmp_path / 'runs' / 'tiny'}" in finished.stdout


def test_a_submitted_run_with_a_relative_root_is_refused_with_the_reason(head: Head, checkout: Path) -> None:
    finished = submit(head, checkout)
    assert finished.returncode != 0
    assert "error: run.root is 'runs', relative to the folder of this Ray job's package" in finished.stdout
    assert "run.root=/absolute/path" in finished.stdout
    assert "data.sft.train" not in finished.stdout  # nothing had begun
