"""What a benchmark ran on, to be kept beside its results."""

import os
import platform
from pathlib import Path


def describe_machine() -> dict[str, object]:
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {"cpu": models[0].split(":")[1].strip(), "cores": os.cpu_count(), "python": platform.python_version()}
