"""A folder at a URL, such as in an object store -> a copy of it on this machine, and what changed there back."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from konic.finetuning.errors import KonicError, OutputError, safe_cause
from konic.finetuning.system.files import remove, unwritable, write_text
from konic.finetuning.system.places import read_json
from konic.output import get_logger
from konic.text import describe_error

if TYPE_CHECKING:
    from pyarrow.fs import FileInfo

logger = get_logger(__name__)

Stamp = tuple[int, int]
"""Size in bytes and time of the last change in ns: two files of the same name and stamp are taken as equal."""
_OF_PYARROW = ("s3", "gs", "gcs", "abfs", "abfss", "file")
"""Schemes of URLs that pyarrow reads itself."""
_GCS_SECONDS = 30
"""How long a request to Google Cloud Storage is tried again."""


class Mirror:
    """A folder at a URL and its copy on this machine. The copy keeps what was never sent.

    Args:
        url: Of a file system of `pyarrow.fs`, such as `s3://bucket/run` or `gs://bucket/run`, or else of fsspec.
        copies: A folder of this user's, in which each URL has a folder.
        only_reads: True to send nothing. What was added to the copy, such as a report, then stays there.

    Raises:
        OutputError: It is a path.
    """

    def __init__(self, url: str, copies: Path, only_reads: bool = False) -> None:
        self.address = re.sub(r"//[^/@]*@|[?#].*$", lambda found: "//" if found[0][0] == "/" else "", url).rstrip("/")
        """The URL without what may be secret: a name, a password, and what follows `?`."""
        if "://" not in url:
            raise OutputError(f"{self.address}: give a URL as text, not as a path, which has one slash less.")
        if "#" in url:
            raise OutputError(f"{self.address}: a folder's URL has no part after #. Write %23, or leave it out.")
        self._url, self._only_reads = url, only_reads
        digest = hashlib.sha256(self.address.encode()).hexdigest()[:12]
        self.path = copies / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', self.address.rpartition('/')[2])}-{digest}"

    @cached_property
    def _place(self) -> tuple[Any, str]:
        """The file system, and the folder in it."""
        return _opened(self._url, self.address)

    def check(self) -> None:
        """Raise OutputError if there is no such file system, or its library is missing; nothing is read."""
        _ = self._place

    def require_writable(self) -> None:
        """Raise OutputError if a small file cannot be written at the URL, and removed again."""
        with self.marked(f".konic-{os.getpid()}"):
            pass

    @contextmanager
    def marked(self, name: str) -> Iterator[None]:
        """Within it, a small file of this name is at the URL.

        Raises:
            OutputError: It cannot be written, or not be removed again.
        """
        place = f"{self._place[1]}/{name}"
        with self._naming_failures("cannot be written"):
            self._make_folder_of(place)
            with self._place[0].open_output_stream(place) as file:
                file.write(b"konic")
        try:
            yield
        finally:
            with self._naming_failures("cannot be written"):
                self._place[0].delete_file(place)

    def has(self, name: str) -> bool:
        """True if a file of this name is at the URL, asked there.

        Raises:
            OutputError: The URL cannot be read.
        """
        with self._naming_failures("cannot be read"):
            return bool(self._place[0].get_file_info(f"{self._place[1]}/{name}").is_file)

    def fetch(self) -> None:
        """Make the copy equal to what is at the URL.

        Files of the copy that were never sent are sent now if nothing has changed at the URL since; otherwise the copy
        is moved aside, with a warning.

        Raises:
            OutputError: The URL or the copy cannot be read or written.
        """
        there, here, synced = self._there(), self._here(), self._synced()
        if not here:
            synced = {}  # somebody has made room
        if self._only_reads:
            here = {name: stamp for name, stamp in here.items() if synced.get(name) == stamp}
        elif any(synced.get(name) != stamp for name, stamp in here.items()):
            if there == synced:
                self.send(deletes=False)
                there, here = self._there(), self._here()
            else:
                self._set_aside()
                here = {}
        changed = [name for name, stamp in there.items() if here.get(name) != stamp]
        with self._naming_failures("cannot be read"):
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            for name in here.keys() - there.keys():
                remove(self.path / name)
                for folder in _folders_of(name):
                    with suppress(OSError):  # it is not empty
                        (self.path / folder).rmdir()
            for name in changed:
                self._download(name, there[name])
            self._remember(there)
        if changed:
            size = sum(there[name][0] for name in changed)
            logger.warning("%s: %d files (%.1f MB) are now in %s.", self.address, len(changed), size / 1e6, self.path)

    def send(self, deletes: bool = True) -> None:
        """Make what is at the URL equal to the copy. What this machine never knew of there stays.

        Without `deletes`, all that is there stays: somebody may have made room in the copy.

        Raises:
            OutputError: The URL cannot be written. What was not sent is sent by the next call.
        """
        synced = self._synced()
        try:
            with self._naming_failures("cannot be written"):
                for name, stamp in sorted(self._here().items()):
                    if synced.get(name) != stamp:
                        self._upload(name)
                        synced[name] = self._stamp_here(name)
                gone = synced.keys() - self._here().keys() if deletes else set()
                for name in gone:
                    with suppress(FileNotFoundError):
                        self._place[0].delete_file(f"{self._place[1]}/{name}")
                    del synced[name]
                for folder in {folder for name in gone for folder in _folders_of(name)}:
                    self._remove_empty(f"{self._place[1]}/{folder}")
        finally:
            self._remember(synced)

    def _download(self, name: str, stamp: Stamp) -> None:
        import pyarrow.fs

        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}")
        local = pyarrow.fs.LocalFileSystem()
        pyarrow.fs.copy_files(f"{self._place[1]}/{name}", str(part), self._place[0], local, use_threads=False)
        os.utime(part, ns=(stamp[1], stamp[1]))
        os.replace(part, target)

    def _upload(self, name: str) -> None:
        import pyarrow.fs

        place = f"{self._place[1]}/{name}"
        self._make_folder_of(place)
        local = pyarrow.fs.LocalFileSystem()
        pyarrow.fs.copy_files(str(self.path / name), place, local, self._place[0], use_threads=False)
        changed = _stamp(self._place[0].get_file_info(place))[1]
        os.utime(self.path / name, ns=(changed, changed))

    def _make_folder_of(self, place: str) -> None:
        if not self._place[0].type_name.startswith(("s3", "gcs", "abfs")):  # an object store has no folders
            self._place[0].create_dir(place.rpartition("/")[0], recursive=True)

    def _remove_empty(self, folder: str) -> None:
        from pyarrow.fs import FileSelector, FileType

        inside = self._place[0].get_file_info(FileSelector(folder, recursive=True, allow_not_found=True))
        if all(info.type == FileType.Directory for info in inside):
            with suppress(FileNotFoundError):
                self._place[0].delete_dir(folder)

    def _there(self) -> dict[str, Stamp]:
        from pyarrow.fs import FileSelector, FileType

        with self._naming_failures("cannot be read"):
            found = self._place[0].get_file_info(FileSelector(self._place[1], recursive=True, allow_not_found=True))
        root = PurePosixPath(self._place[1])
        files = {PurePosixPath(info.path).relative_to(root): info for info in found if info.type == FileType.File}
        return {str(name): _stamp(info) for name, info in files.items() if _belongs(name)}

    def _here(self) -> dict[str, Stamp]:
        names = (path.relative_to(self.path).as_posix() for path in self.path.rglob("*") if path.is_file())
        return {name: self._stamp_here(name) for name in names if _belongs(PurePosixPath(name))}

    def _stamp_here(self, name: str) -> Stamp:
        found = os.stat(self.path / name)
        return found.st_size, found.st_mtime_ns

    @property
    def _record(self) -> Path:
        """Beside the copy: what was equal at both places, and when."""
        return self.path.with_name(f"{self.path.name}.synced.json")

    def _synced(self) -> dict[str, Stamp]:
        try:
            return {str(name): (int(size), int(at)) for name, (size, at) in read_json(self._record).items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def _remember(self, stamps: Mapping[str, Stamp]) -> None:
        if self.path.is_dir():
            write_text(self._record, json.dumps(stamps))

    def _set_aside(self) -> None:
        numbered = (self.path.with_name(f"{self.path.name}-unsent-{number}") for number in range(1, 10**6))
        aside = next(path for path in numbered if not path.exists())
        try:
            shutil.move(self.path, aside)
        except OSError as error:
            raise unwritable(self.path, error) from None
        logger.warning(
            "%s has changed elsewhere, and its copy here held files that were never sent. That copy is now in %s.",
            self.address, aside,
        )  # fmt: skip

    @contextmanager
    def _naming_failures(self, what: str) -> Iterator[None]:
        """Turn what the file system raises inside the context into one OutputError."""
        import pyarrow

        has_errors_of_its_own = self._place[0].type_name.startswith("py::")  # fsspec, by the library of a store
        try:
            yield
        except Exception as error:
            is_of_storage = has_errors_of_its_own or isinstance(error, OSError | pyarrow.ArrowException)
            if isinstance(error, KonicError) or not is_of_storage:
                raise
            raise OutputError(
                f"{self.address}: {what}: {describe_error(error)}. Check its name and your rights there. What was not "
                f"sent is in {self.path}."
            ) from safe_cause(error)


def _opened(url: str, address: str) -> tuple[Any, str]:
    """Return the file system of a URL, and the place in it."""
    import pyarrow
    from pyarrow.fs import FileSystem, FSSpecHandler, PyFileSystem

    if not url.partition("://")[2].strip("/"):
        raise OutputError(f"{address}: names no folder there. Give one, such as s3://bucket/run.")
    if url.lower().startswith("file://") and urlsplit(url).netloc not in ("", "localhost"):
        raise OutputError(f"{address}: names a folder of another machine. A folder here is file:///folder, or /folder.")
    scheme, rest = url.split("://", 1)
    scheme = scheme.lower()
    if scheme == "file":
        rest = re.sub(r"[^!-~]", lambda found: quote(found[0]), rest.removeprefix("localhost"))
    url = f"{scheme}://{rest}"
    options = url.partition("?")[2]
    if scheme in ("gs", "gcs") and "retry_limit_seconds=" not in options:  # its own limit is a quarter of an hour
        url += f"{'&' if options else '?'}retry_limit_seconds={_GCS_SECONDS}"
    try:
        files, root = FileSystem.from_uri(url)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError) as error:
        if scheme in _OF_PYARROW:
            raise OutputError(f"{address}: is no URL of a folder: {describe_error(error)}.") from safe_cause(error)
        from fsspec.core import url_to_fs  # type: ignore[import-untyped]

        try:
            found, root = url_to_fs(url)
        except Exception as error:  # a store's library has errors of its own
            raise OutputError(f"{address}: is no URL of a folder: {describe_error(error)}.") from safe_cause(error)
        files = PyFileSystem(FSSpecHandler(found))
    except OSError as error:
        raise OutputError(f"{address}: cannot be reached: {describe_error(error)}.") from safe_cause(error)
    return files, root.rstrip("/")


def _folders_of(name: str) -> list[str]:
    """Return the folders of a file, the innermost first."""
    return [str(folder) for folder in PurePosixPath(name).parents if folder.parts]


def _belongs(name: PurePosixPath) -> bool:
    """False for hidden files, which are half written or of this machine, and for what leads out of the folder."""
    return not any(part.startswith(".") for part in name.parts)


def _stamp(info: "FileInfo") -> Stamp:
    return info.size or 0, info.mtime_ns or 0
