"""The connection to Ray: a cluster of this process's own, or one that runs."""

import logging
import os
import re
import signal
import socket
import threading

from align.errors import PlacementError, UsageError

_OBJECT_STORE_BYTES = 512 * 2**20  # of a Ray of our own: only the records pass through it
_SLOW_START = "timed out during startup"  # Ray's own limit, 30 s and fixed: one more try helps on a busy machine
_ANSWER_SECONDS = 10.0
_IN_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by Ray for the entrypoint of a submitted job


def is_in_ray_job() -> bool:
    return _IN_JOB in os.environ


def connect(address: str, *, key: str = "cluster.address") -> bool:
    """Whether the connection is ours to end; PlacementError, which says where the address stood, if there is none, and
    UsageError if the address is none."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "0")  # or SIGTERM in ray.init waits half a minute
    if address == "local" and is_in_ray_job():
        address = "auto"
    is_own = address == "local"
    if is_own:  # before Ray is imported, which reads it there: "no cluster of machines", so all listen on 127.0.0.1
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    import ray

    if ray.is_initialized():
        return False  # by whoever called us: theirs to choose, and to shut down
    if address not in ("local", "auto") and ("://" not in address or address.startswith("ray://")):
        _verify_answers(address, key=key)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    for attempt in (1, 2):
        try:
            ray.init(
                address=address,
                namespace="align",
                object_store_memory=_OBJECT_STORE_BYTES if is_own else None,  # a running cluster has its own
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
            break
        except Exception as error:  # Ray raises a bare one when its own node is slow to start
            ray.shutdown()
            if attempt == 1 and is_own and _SLOW_START in str(error):
                continue
            said = str(error).strip() or type(error).__name__
            raise PlacementError(_no_connection(address, said, key=key, is_own=is_own)) from error
    if callable(on_sigterm) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # in place of Ray's, which also prints a stack
    return True


def _verify_answers(address: str, *, key: str) -> None:
    """PlacementError if nobody listens at host:port: Ray would ask again and again, without end. UsageError if it is
    no such address."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_SECONDS).close()
    except OSError as error:
        raise PlacementError(_no_connection(address, str(error), key=key, is_own=False)) from None
    except (ValueError, OverflowError):
        raise UsageError(_no_connection(address, "it is not HOST:PORT", key=key, is_own=False)) from None


def _no_connection(address: str, said: str, *, key: str, is_own: bool) -> str:
    remedy = (
        "Is the machine overloaded, or /tmp full? Run again."
        if is_own
        else f"Start it (ray start --head), or use {key}=local for a Ray of this command's own."
    )
    return f"{key}: {address!r}: no connection to Ray: {said.splitlines()[0].rstrip('.')}. {remedy}"


def condense(error: Exception) -> str:
    """Ray's cause without its table of ids and its list of guesses."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("\t")]
    return re.split(r" (?:Some common|There are some potential root) causes", " ".join(lines))[0]
