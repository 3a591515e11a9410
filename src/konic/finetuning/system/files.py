"""Paths and data -> files and folders: checks paths, and gives a file its name only when it is complete."""

import hashlib
import json
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from safetensors import SafetensorError

from konic.finetuning.errors import ConfigError, KonicError, OutputError, is_valid_text, safe_cause
from konic.finetuning.system.places import find_stray, is_url, read_regular
from konic.text import describe_error


def as_path(value: Any, option: str, error: type[KonicError]) -> Path:
    """Return an absolute path with `~` resolved. The file or folder need not exist.

    Raises:
        ConfigError: The value is not a path, or is empty; the message names `option`.
        KonicError: Of the class `error`: no file can have this path.
    """
    if not isinstance(value, str | os.PathLike) or not isinstance(os.fspath(value), str):
        raise ConfigError(f"{option} takes a path, got {value!r}.")
    if not os.fspath(value).strip():
        raise ConfigError(f"{option} takes a path, got {value!r}, which is empty. The current folder is '.'.")
    shown = f"{option}={str(value)[:400]!r}"
    if error is OutputError and is_url(value):
        raise error(f"{shown}: this is a URL, and it takes a path on this machine.")
    try:
        path = Path(value).expanduser().absolute()
    except FileNotFoundError:
        raise error(f"{shown}: the current folder no longer exists: change to one that does.") from None
    except RuntimeError as problem:
        raise error(f"{shown}: no such file or folder can exist: {problem}.") from None
    if not is_valid_text(str(path)):
        raise error(f"{shown}: the path {str(path)[:400]!r} is not valid UTF-8, which some libraries need. Rename it.")
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass
    except (OSError, ValueError) as problem:
        raise error(f"{shown}: no such file or folder can exist: {_reason(problem)}.") from None
    return path


def unwritable(path: Path | str, problem: Exception) -> OutputError:
    """Return the error for a file or folder that cannot be written, with the operating system's reason."""
    return OutputError(f"{path}: cannot be written: {_reason(problem)}.")


def require_writable(folder: Path, option: str) -> None:
    """Check that a folder can be written, or created, without creating it.

    Raises:
        OutputError: It cannot, or it is a file; the message names `option`.
    """
    beside = next(parent for parent in folder.parents if os.path.lexists(parent))
    try:
        for place in (beside, folder) if os.path.lexists(folder) else (beside,):
            with tempfile.TemporaryFile(dir=place):
                pass
    except OSError as error:
        raise unwritable(f"{option} {folder}", error) from None


def require_writable_file(path: Path, option: str) -> None:
    """Check that a file can be written into its folder, without writing it.

    Raises:
        OutputError: It cannot, or it is a folder; the message names `option`.
    """
    try:
        if path.is_dir():
            raise OutputError(f"{option} {path}: is a folder. Name a file.")
        with tempfile.TemporaryFile(dir=path.absolute().parent):
            pass
    except OSError as error:
        raise unwritable(f"{option} {path}", error) from None


def set_aside(folder: Path, written: list[Path]) -> Path:
    """Move files and folders of a folder into a new folder `earlier-N` in it, under the same names.

    Raises:
        OSError: Something cannot be moved.
    """
    aside = next(path for n in range(1, sys.maxsize) if not os.path.lexists(path := folder / f"earlier-{n}"))
    for path in written:
        target = aside / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
    return aside


def require_no_link(path: Path, folder: Path) -> None:
    """Check that no part of a path below `folder` is a link; `folder` itself may be one.

    Raises:
        OutputError: One is: what is written there would be written elsewhere.
    """
    for place in (path, *path.parents):
        if place == folder:
            return
        if place.is_symlink():
            raise OutputError(
                f"{place}: is a link to {os.readlink(place)}, and nothing is written through it. Remove the link, or "
                "replace it with what it links to."
            )


def remove(path: Path) -> None:
    """Delete a file, a link or a whole folder. Of a link, only the link is deleted."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _reason(problem: Exception) -> Any:
    number = getattr(problem, "errno", None)
    return os.strerror(number) if number else problem


@contextmanager
def replacing_folder(folder: Path, keep_others: bool = False) -> Iterator[Path]:
    """Yield a new folder to fill. On exit without an error it is renamed to `folder` and replaces an older one.

    With `keep_others`, files of the older one whose names are not in the new one stay: they are others' files.

    Raises:
        OutputError: The folder cannot be written; an older folder is unchanged.
    """
    try:
        with _temporary_folder(folder) as temp_dir:
            yield temp_dir
            _sync_tree(temp_dir)
            if folder.is_symlink():
                folder.unlink()  # what it points to stays as it is
            if folder.exists():
                if keep_others:
                    _link_others(folder, temp_dir)
                old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
                os.replace(folder, old)
                try:
                    os.replace(temp_dir, folder)
                except OSError:
                    os.replace(old, folder)
                    raise
                shutil.rmtree(old)
            else:
                os.replace(temp_dir, folder)
            _sync(folder.parent)
    except (OSError, SafetensorError) as error:
        raise unwritable(folder, error) from safe_cause(error)


def _link_others(old: Path, new: Path) -> None:
    """Give every file of a folder whose name is not in a new one a second name in the new one. Links stay links."""
    for path in sorted(old.rglob("*")):
        target = new / path.relative_to(old)
        if path.is_dir() and not path.is_symlink():
            target.mkdir(exist_ok=True)
        elif not os.path.lexists(target):
            try:
                os.link(path, target, follow_symlinks=False)
            except OSError:  # such as a disk without hard links
                shutil.copy2(path, target, follow_symlinks=False)


@contextmanager
def creating_folder(folder: Path) -> Iterator[Path]:
    """Yield a new folder to fill. On exit without an error it is renamed to `folder`, unless that exists by then.

    Another process may have created `folder` first; its folder is kept.

    Raises:
        OutputError: The folder cannot be written.
    """
    with _temporary_folder(folder) as temp_dir:
        yield temp_dir
        try:
            _sync_tree(temp_dir)
            if not folder.exists():
                temp_dir.rename(folder)
        except OSError as error:
            raise unwritable(folder, error) from safe_cause(error)


@contextmanager
def filling_folder(folder: Path) -> Iterator[Path]:
    """Yield a new folder to fill. On exit without an error its files move into `folder` one by one.

    Other files that are already in `folder` stay there.

    Raises:
        OutputError: The folder cannot be written.
    """
    try:
        with _temporary_folder(folder) as temp_dir:
            yield temp_dir
            _sync_tree(temp_dir)
            folder.mkdir(exist_ok=True)
            for file in _files(temp_dir):
                require_no_link(folder / file.parent, folder)
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                os.replace(temp_dir / file, folder / file)
    except (OSError, SafetensorError) as error:
        raise unwritable(folder, error) from safe_cause(error)


@contextmanager
def replacing_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a new file to write to. On exit without an error it is renamed to `path`.

    At any time `path` is either the complete old file or the complete new file. A link is replaced, never followed.

    Raises:
        OutputError: The file cannot be written.
    """
    temp_file = path.parent / f".{path.name}"
    try:
        try:
            temp_file.unlink(missing_ok=True)  # of a run that was killed
            with temp_file.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temp_file, path)
        finally:
            with suppress(OSError):
                temp_file.unlink(missing_ok=True)
    except OSError as error:
        raise unwritable(path, error) from None


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically.

    Raises:
        OutputError: The file cannot be written; an older file is unchanged.
    """
    with replacing_file(path) as file:
        file.write(text.encode())


@contextmanager
def _temporary_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty temporary folder next to `folder`. On exit it is deleted, unless it was renamed."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temp_dir = folder.parent / f".{folder.name}-{secrets.token_hex(4)}"
        temp_dir.mkdir()  # not mkdtemp, which ignores the umask: others could not read the model
    except OSError as error:
        raise unwritable(folder, error) from safe_cause(error)
    try:
        yield temp_dir
    except Exception as error:
        if type(error) is not Exception:  # the tokenizers library has no class of its own for a full disk
            raise
        raise unwritable(folder, error) from safe_cause(error)
    finally:
        shutil.rmtree(temp_dir, ignore_errors=True)


def _sync_tree(folder: Path) -> None:
    """Write a folder to the disk. Its files get the rights that the umask gives: those of safetensors are private."""
    rights = folder.stat().st_mode & 0o666
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            with suppress(OSError):  # a disk without rights
                file.chmod(rights)
        _sync(file)
    _sync(folder)


SEAL_FILE = "complete.json"


def seal(folder: Path) -> None:
    """Mark a folder as complete with a file, written last, that holds the size and SHA-256 of every other file.

    README.md is left out, because people may edit it.
    """
    files = {path.as_posix(): _fingerprint(folder / path) for path in _files(folder) if path.name != "README.md"}
    for name in files:
        _sync(folder / name)
    (folder / SEAL_FILE).write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")


def find_corruption(folder: Path) -> str | None:
    """Return how a folder differs from what :func:`seal` marked, or None if every sealed byte is unchanged."""
    try:
        files = json.loads(read_regular(folder / SEAL_FILE))["files"]
        stray = find_stray((path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()), folder)
        if stray is not None:
            return stray
        for name, fingerprint in files.items():
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or not (folder / path).is_file():
                return f"{name} is missing"
            if _fingerprint(folder / name) != fingerprint:
                return f"{name} has changed since it was written"
    except FileNotFoundError:
        return f"it was never finished: {SEAL_FILE} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{SEAL_FILE} cannot be read: {describe_error(error)}"
    return None


def discard(folder: Path) -> None:
    """Delete a sealed folder, the seal first: a folder that is deleted only in part does not count as complete.

    Of a link, only the link is deleted.
    """
    if folder.is_symlink():
        folder.unlink()
        return
    (folder / SEAL_FILE).unlink(missing_ok=True)
    shutil.rmtree(folder)


def _sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files(folder: Path) -> list[Path]:
    """Return every file in a folder and its subfolders, as paths relative to the folder."""
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def _fingerprint(path: Path) -> dict[str, str | int]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
