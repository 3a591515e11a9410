"""Ray -> what it has inside and does not promise: all such names are here, and a Ray without them is one error."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from konic.finetuning.errors import ConfigError


def worker_resources(scaling: Any) -> Mapping[str, float]:
    """Return what each worker takes by a ScalingConfig, Ray's defaults included."""
    with _naming_the_version():
        found: Mapping[str, float] = scaling._resources_per_worker_not_none
    return found


def may_grow() -> bool:
    """Return True if an autoscaler can add nodes to the cluster that this process is connected to."""
    with _naming_the_version():
        from ray._private.state import state

        return bool(state.get_max_resources_from_cluster_config())


@contextmanager
def quiet() -> Iterator[None]:
    """Within it Ray prints nothing of its own: of a lost worker it has ten lines, and konic one."""
    with _naming_the_version():
        from ray._private import worker

        before = worker._worker_logs_enabled
    worker._worker_logs_enabled = False
    try:
        yield
    finally:
        worker._worker_logs_enabled = before


@contextmanager
def one_machine() -> Iterator[None]:
    """Within it a Ray that starts is for this machine alone: it listens on loopback. On Linux no variable says so."""
    with _naming_the_version():
        from ray._private import ray_constants

        before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _naming_the_version() -> Iterator[None]:
    try:
        yield
    except (ImportError, AttributeError) as error:
        import ray

        raise ConfigError(
            f"Ray {ray.__version__} is not one that this konic knows ({error}). Install another: pip install "
            "'ray[train]==2.60.0'."
        ) from None
