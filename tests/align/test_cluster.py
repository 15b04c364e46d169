import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import ray
import torch

import align.cluster
from align import settings
from align.cluster import Cluster, Resources, explain_shortage, resources_to_ask
from align.config import BaseModelConfig, ClusterConfig
from align.connection import connect, is_in_ray_job
from align.errors import PlacementError, UsageError, WorkerError
from align.worker import _lack_of_memory_told  # pyright: ignore[reportPrivateUsage]
from tests.align.recipe import write_recipe
from tests.shell import PATIENCE_SECONDS, new_shell

CPU_NODE, GPU_NODE = Resources(cpus=16, gpus=0), Resources(cpus=8, gpus=2)


def asked(nodes: list[Resources], *, device: str = "auto", **cluster: int) -> Resources:
    base = BaseModelConfig.model_validate({"device": device})
    return resources_to_ask(ClusterConfig.model_validate(cluster), base, nodes)


def test_a_worker_gets_all_cpus_of_the_largest_node() -> None:
    assert asked([Resources(2, 0), CPU_NODE]) == Resources(cpus=16, gpus=0)


def test_a_worker_gets_a_gpu_where_there_is_one_and_the_cpus_of_that_node() -> None:
    assert asked([CPU_NODE, GPU_NODE]) == Resources(cpus=8, gpus=1)


def test_on_the_cpu_no_gpu_is_taken() -> None:
    assert asked([CPU_NODE, GPU_NODE], device="cpu") == Resources(cpus=16, gpus=0)


def test_cuda_asks_for_a_gpu_even_where_none_is() -> None:
    assert asked([CPU_NODE], device="cuda") == Resources(cpus=16, gpus=1)


def test_what_the_config_says_is_what_is_asked() -> None:
    assert asked([GPU_NODE], cpus=3, gpus=0) == Resources(cpus=3, gpus=0)


def explained(wanted: Resources, nodes: list[Resources], **free: float) -> str:
    return explain_shortage(wanted, nodes, free, seconds=10)


def test_too_many_cpus_names_what_was_asked_what_there_is_and_what_to_change() -> None:
    assert explained(Resources(64, 0), [CPU_NODE], CPU=16.0) == (
        "Ray could not place the worker within 10 s. Asked for: 64 CPUs and 0 GPUs on one node. There is: a node with "
        "16 CPUs and 0 GPUs; free now: 16 CPUs and 0 GPUs. Change: cluster.cpus=16 or less, or a larger node."
    )


def test_cpus_that_only_several_nodes_together_have_are_too_many() -> None:
    assert "cluster.cpus=16 or less" in explained(Resources(20, 0), [CPU_NODE, CPU_NODE], CPU=32.0)


def test_a_gpu_that_no_node_has_names_the_way_without() -> None:
    assert "cluster.gpus=0 base.device=cpu" in explained(Resources(2, 1), [CPU_NODE], CPU=16.0)


def test_cpus_that_others_hold_name_what_is_left() -> None:
    assert "Change: cluster.cpus=5, or wait" in explained(Resources(16, 0), [CPU_NODE], CPU=5.0)


def test_a_cluster_that_others_hold_wholly_can_only_be_waited_for() -> None:
    assert "wait for them" in explained(Resources(16, 0), [CPU_NODE])
    assert "no node" in explained(Resources(1, 0), [])


def test_a_ray_job_is_known_by_what_ray_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    assert not is_in_ray_job()
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert is_in_ray_job()


@pytest.mark.parametrize(
    ("address", "said"),
    [("127.0.0.1:9", "Connection refused"), ("ray://127.0.0.1:9", "Connection refused"), ("127.0.0.1", "HOST:PORT"),
     ("127.0.0.1:99999", "no connection to Ray")],
)  # fmt: skip
def test_an_address_where_nobody_listens_is_told_at_once(
    address: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray would ask without end"))
    kind = UsageError if said == "HOST:PORT" else PlacementError
    with pytest.raises(kind, match=rf"--address: '{address}': .*{said}.*use --address=local"):
        connect(address, key="--address")


@pytest.mark.parametrize(("failures", "calls"), [(1, 2), (2, 2)])
def test_a_ray_that_is_slow_to_start_is_tried_once_more(
    failures: int, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def slow(**options: object) -> None:
        tried.append(str(options["address"]))
        if len(tried) <= failures:
            raise Exception("The current node timed out during startup. The rest.")

    monkeypatch.setattr(ray, "init", slow)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with nullcontext() if failures == 1 else pytest.raises(PlacementError, match="timed out during startup"):
        connect("local")
    assert tried == ["local"] * calls


@pytest.mark.parametrize(("address", "megabytes"), [("local", 512), ("auto", None)])
def test_only_a_ray_of_our_own_is_given_a_size_and_none_keeps_what_hears_sigterm(
    address: str, megabytes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    asked: list[Any] = []

    def init(**options: object) -> None:
        asked.append(options["object_store_memory"])
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as Ray sets its own

    def own(number: int, frame: object) -> None: ...

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    before = signal.signal(signal.SIGTERM, own)
    try:
        assert connect(address)
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)
    assert asked == [megabytes and megabytes * 2**20]


def test_a_ray_that_whoever_called_us_has_is_theirs_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("there is one"))
    assert not connect("local")


def test_a_base_that_does_not_fit_ends_the_run_with_what_to_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_recipe(tmp_path)
    config = settings.load(tmp_path / "small.yaml", [])
    cluster = Cluster(
        config, run=tmp_path, import_root=tmp_path, poll=lambda: None, note=lambda text: None, again="align run"
    )

    def load(*_: object, doing: str) -> None:
        with _lack_of_memory_told(doing):
            torch.empty(2**60)

    for name in ("_reserve", "_wait_for_place", "_new_worker"):
        monkeypatch.setattr(cluster, name, MagicMock())
    monkeypatch.setattr(cluster, "_wait", load)
    monkeypatch.setattr(align.cluster, "connect", lambda address: False)
    said = r"out of memory in loading the base model: .*The base model does not fit: change base\.dtype=bfloat16"
    with pytest.raises(WorkerError, match=said):
        cluster.start()


def test_nothing_of_a_ray_of_our_own_listens_beyond_this_machine(tmp_path: Path) -> None:
    program = """
import os
from align.connection import connect
from tests.shell import descendants
assert connect("local")
inodes = {}
for name in ("tcp", "tcp6"):
    for line in open(f"/proc/net/{name}").readlines()[1:]:
        fields = line.split()
        if fields[3] == "0A":
            inodes[f"socket:[{fields[9]}]"] = fields[1].rpartition(":")[0]
for pid in (os.getpid(), *descendants(os.getpid())):
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            address = inodes.get(os.readlink(f"/proc/{pid}/fd/{name}"))
        except FileNotFoundError:
            continue
        if address:
            print(address)
"""
    shell = new_shell(tmp_path, tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", program], env=shell.environment, capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )
    addresses = done.stdout.split()
    assert len(addresses) > 5, done.stderr
    assert {address.removeprefix("0000000000000000FFFF0000") for address in addresses} == {"0100007F"}


def test_cpus_of_a_node_without_a_gpu_are_no_help_beside_one() -> None:
    assert "Change: cluster.cpus=8 or less" in explained(Resources(12, 1), [CPU_NODE, GPU_NODE], CPU=24.0, GPU=2.0)


def test_a_gpu_that_others_hold_is_not_to_be_had_for_fewer_cpus() -> None:
    said = explained(Resources(4, 1), [GPU_NODE], CPU=8.0, GPU=0.0)
    assert said.endswith("Others hold it: wait for them, or raise cluster.placement_timeout_seconds.")
