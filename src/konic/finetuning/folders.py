"""Folders written whole: filled beside their place, synced and renamed, so that what bears a name is complete."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from safetensors import SafetensorError

from konic.finetuning.paths import unwritable

SEAL_FILE = "complete.json"


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A new folder to fill; on leaving without an error it is synced and takes its name, replacing what bore it.

    Raises:
        OutputError: It cannot be written; whatever bore the name is as it was.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        beside.chmod(0o755)
    except OSError as error:
        raise unwritable(folder, error) from error
    try:
        yield beside
        for file in beside.rglob("*"):
            sync(file)
        sync(beside)
        if folder.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
            os.replace(folder, old)
            try:
                os.replace(beside, folder)
            except OSError:
                os.replace(old, folder)
                raise
            shutil.rmtree(old)
        else:
            os.replace(beside, folder)
        sync(folder.parent)
    except (OSError, SafetensorError) as error:
        raise unwritable(folder, error) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def written_into(folder: Path) -> Iterator[Path]:
    """A new folder to fill; on leaving without an error its files go into `folder` one by one, beside what is there.

    Raises:
        OutputError: It cannot be written.
    """
    with written_whole(folder.parent / f".{folder.name}-{os.getpid()}") as beside:
        yield beside
    whole = folder.parent / f".{folder.name}-{os.getpid()}"
    try:
        folder.mkdir(exist_ok=True)
        for file in _files(whole):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            os.replace(whole / file, folder / file)
    except OSError as error:
        raise unwritable(folder, error) from error
    finally:
        shutil.rmtree(whole, ignore_errors=True)


def seal(folder: Path) -> None:
    """Mark a folder as complete: a file, written last, with the size and SHA-256 of every other one but README.md.

    That one is for people, who may add to it.
    """
    files = {path.as_posix(): _fingerprint(folder / path) for path in _files(folder) if path.name != "README.md"}
    for name in files:
        sync(folder / name)
    (folder / SEAL_FILE).write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")


def flaw(folder: Path) -> str | None:
    """What keeps a folder from being what :func:`seal` marked, or None where every byte is as it was."""
    try:
        files = json.loads((folder / SEAL_FILE).read_text(encoding="utf-8"))["files"]
        for name, fingerprint in files.items():
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or not (folder / path).is_file():
                return f"{name} is missing"
            if _fingerprint(folder / name) != fingerprint:
                return f"{name} is not as it was written"
    except FileNotFoundError:
        return f"it was never finished: {SEAL_FILE} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{SEAL_FILE} cannot be read: {type(error).__name__}: {error}"
    return None


def discard(folder: Path) -> None:
    """Delete a sealed folder; one that is deleted half is not taken for a whole one."""
    (folder / SEAL_FILE).unlink(missing_ok=True)
    shutil.rmtree(folder)


def write_text(path: Path, text: str) -> None:
    """Write a file beside its place, sync it and give it its name: there is the old text or the new one.

    Raises:
        OutputError: It cannot be written.
    """
    beside = path.parent / f".{path.name}"
    try:
        beside.write_text(text, encoding="utf-8")
        sync(beside)
        os.replace(beside, path)
    except OSError as error:
        raise unwritable(path, error) from None


def sync(path: Path) -> None:
    """Return when a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files(folder: Path) -> list[Path]:
    """Every file in a folder and those below it, relative to it."""
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def _fingerprint(path: Path) -> dict[str, str | int]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
