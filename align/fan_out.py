"""One function over many items, by Ray Data, wherever the cluster has room."""

import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from align.connection import condense, connect
from align.errors import AlignError, WorkerError
from align.installation import verify_worker

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


def map_on_cluster(
    function: Callable[[ItemT], ResultT], items: Sequence[ItemT], *, address: str, import_root: Path
) -> Iterator[ResultT]:
    """`function` of each item by Ray Data, wherever there is room; results as they come.

    Raises:
        PlacementError: there is no Ray.
        AlignError: what `function` raised; WorkerError if it is none of ours, or a node was lost.
    """
    is_ours = connect(address, key="--address")
    import ray
    from ray.data import DataContext
    from ray.exceptions import RayError, RayTaskError

    DataContext.get_current().enable_progress_bars = False
    work = _Work(import_root, pickle.dumps(function), [pickle.dumps(item) for item in items])
    try:
        results = ray.data.range(len(items), override_num_blocks=len(items)).map(work)
        for row in results.iter_rows():
            result = pickle.loads(row["result"])
            if isinstance(result, AlignError):
                raise result
            yield result
    except RayTaskError as error:
        raise WorkerError(f"failed on the cluster: {condense(error)}") from None
    except RayError as error:
        raise WorkerError(f"a node of the cluster was lost: {condense(error)}. Run again.") from None
    finally:
        if is_ours:
            ray.shutdown()


@dataclass(frozen=True)
class _Work:
    """Pickled twice, so that nothing of `data` is imported before our own packages are first on the path."""

    import_root: Path
    function: bytes
    items: list[bytes]

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        verify_worker(self.import_root)
        try:
            result = pickle.loads(self.function)(pickle.loads(self.items[row["id"]]))
        except AlignError as error:  # as a value: Ray Data would leave a string of it
            result = error
        return {"result": pickle.dumps(result)}
