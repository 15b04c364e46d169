from contextlib import nullcontext

import pytest
import ray

from align.cluster import Resources, connect, explain_shortage, is_in_ray_job, resources_to_ask
from align.config import BaseModelConfig, ClusterConfig
from align.errors import PlacementError

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
