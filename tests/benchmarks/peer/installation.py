"""TRL 1.12.0, the last release with a PPOTrainer: put beside the project once, and run in processes of its own.

The project depends on a later TRL, from which PPO was removed. So the peer lives in the cache, first on the path of
its own process only; torch, transformers, peft and accelerate are the ones that the project itself runs with.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from align.embedded import cache_folder

VERSION = "1.12.0"


def install_peer() -> Path:
    """The folder that holds the peer, for PYTHONPATH; installed on the first call."""
    folder = cache_folder() / f"trl-{VERSION}"
    if folder.is_dir():
        return folder
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*command, "--target", str(temporary), f"trl=={VERSION}"], check=True)
    if folder.exists():  # another process may have been faster
        shutil.rmtree(temporary)
    else:
        temporary.rename(folder)
    return folder


def start(
    module: str, job: dict[str, object], folder: Path, *, peer: Path | None = None, threads: int = 1
) -> subprocess.Popen[bytes]:
    """Run `python -m module folder/job.json`; what it says goes to folder/log.txt.

    Args:
        peer: the peer's folder, if this process is to see the peer's TRL instead of the project's.
        threads: that torch computes with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "job.json"
    path.write_text(json.dumps({**job, "folder": str(folder.absolute())}), encoding="utf-8")
    first = [] if peer is None else [str(peer)]
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*first, *filter(None, inherited)]),
        "OMP_NUM_THREADS": str(threads),
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    with (folder / "log.txt").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", module, str(path)], stdout=log, stderr=subprocess.STDOUT, env=environment
        )


def finish(process: subprocess.Popen[bytes], folder: Path) -> None:
    """Wait for what `start` started. Raises RuntimeError with the end of its log if it failed."""
    if process.wait() != 0:
        end = (folder / "log.txt").read_text(encoding="utf-8", errors="replace")[-3000:]
        raise RuntimeError(f"{folder} failed with exit code {process.returncode}:\n{end}")
