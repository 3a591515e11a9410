"""The folder of a run that is named by a URL: written in a copy on this machine, and sent after each checkpoint."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from konic.finetuning.errors import OutputError
from konic.finetuning.models.locations import cache_folder
from konic.finetuning.run.folder import RunFolder
from konic.finetuning.system.mirror import Mirror
from konic.finetuning.system.places import is_url
from konic.finetuning.system.world import World
from konic.output import get_logger

logger = get_logger(__name__)

_READ = "read"
"""Folder of the copies that are only read, in the cache folder."""


class RemoteRunFolder(RunFolder):
    """A run whose files others find at a URL."""

    def __init__(self, mirror: Mirror) -> None:
        super().__init__(mirror.path)
        self._mirror = mirror

    @contextmanager
    def opened(self) -> Iterator[None]:
        """As of a run on disk, if the URL can be written. Whatever ends the run, what it wrote is sent."""
        self._mirror.require_writable()
        with super().opened():
            try:
                yield
            finally:
                self.publish()

    def publish(self, is_last: bool = False) -> None:
        """Send what has changed. A failure is a warning until the run ends, because the next call sends it too."""
        try:
            self._mirror.send()
        except OutputError as error:
            if is_last:
                raise
            logger.warning("%s", error)

    def address(self, path: Path) -> str:
        """The URL of a file or folder of the run; what is elsewhere keeps its path."""
        is_own = path.is_relative_to(self.path)
        return (
            f"{self._mirror.address}/{path.relative_to(self.path).as_posix()}".removesuffix("/.")
            if is_own
            else str(path)
        )


def named_folder(place: str | os.PathLike[str] | None, model_name: str) -> RunFolder:
    """The folder that a user named, by a path or a URL, or a new one under `runs/` named by time and model.

    Raises:
        OutputError: No file can have this path, it is in a folder that another run writes, or the URL cannot be read.
    """
    if not is_url(place):
        return RunFolder.named(place, model_name)
    mirror = mirror_of(str(place))
    mirror.fetch()
    return RemoteRunFolder(mirror)


def mirror_of(url: str, only_reads: bool = False) -> Mirror:
    """The run at a URL, and its copy in the cache folder, which machines do not share even if they share a disk."""
    return Mirror(url, cache_folder() / (_READ if only_reads else "runs") / socket.gethostname(), only_reads)


def is_copy(path: Path) -> bool:
    """Return True for what :func:`fetched` returned for reading: it does not change while the run goes on."""
    return path.is_relative_to(cache_folder() / _READ)


def copy_of(place: Any) -> Any:
    """The path of the copy of a run or of one of its checkpoints. What is not a URL is returned as it is."""
    if not is_url(place):
        return place
    mirror, name = _run_and_checkpoint(str(place))
    return mirror.path / name


def fetched(place: Any, run: Any = None, only_reads: bool = False) -> Any:
    """The path of the copy of a run or of one of its checkpoints, made equal to what is at the URL.

    Args:
        place: A URL. What is not one is returned as it is.
        run: The place of the run that it may be of. Its URL may hold a password or options, which `place` leaves out.
        only_reads: True for a copy of its own, from which nothing is sent.

    Raises:
        OutputError: The URL cannot be read, or nothing is there.
    """
    if not is_url(place):
        return place
    mirror, name = _run_and_checkpoint(str(place), only_reads)
    if is_url(run) and mirror_of(str(run)).address == mirror.address:
        mirror = mirror_of(str(run))
    mirror.fetch()
    folder = mirror.path / name
    if not folder.is_dir() or not any(path.name[0] != "." for path in folder.iterdir()):
        raise OutputError(f"{place}: nothing is there.")
    return folder


def renew_copies(world: World, *places: Any) -> None:
    """Let every machine of a run have the copies that the first process's machine has; without a URL, do nothing."""
    if not any(map(is_url, places)):
        return
    hosts = [message["host"] for message in world.gather({"host": socket.gethostname()})]
    if hosts.index(hosts[world.rank]) == world.rank > 0:
        for place in places:
            fetched(place, places[0])
    world.gather({})


def _run_and_checkpoint(url: str, only_reads: bool = False) -> tuple[Mirror, str]:
    run, _, name = url.rstrip("/").rpartition("/")
    is_checkpoint = name.startswith("checkpoint-")
    return (mirror_of(run, only_reads), name) if is_checkpoint else (mirror_of(url, only_reads), "")
