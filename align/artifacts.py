"""Directories that are whole or not there: artifacts and checkpoints, with the SHA-256 of every file.

A directory is written under a temporary name, every file fsynced, `manifest.json` added, then renamed. Reading
verifies it, the manifest by its own digest. No clock enters a manifest, so equal states are equal bytes.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from align.errors import ArtifactError, StorageError

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Artifact:
    """What one stage hands to the next, by value: never "the newest file in a folder"."""

    kind: str  # adapter, value_adapter, head or checkpoint
    stage: str  # the stage that made it; "brought" for a user's own
    path: Path
    step: int
    content_hash: str  # SHA-256 over the names and SHA-256s of its files
    base_identity: str  # SHA-256 of the base's source weight files and config; "" for a brought one that has none


def sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_json(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _hash_files(folder: Path) -> dict[str, str]:
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    return {name: sha256_of_file(folder / name) for name in names}


@contextmanager
def writing(path: Path) -> Generator[None]:
    """StorageError, with `path`, for whatever the system has against writing to it."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors has an error of its own for a full disk
        raise StorageError(
            f"cannot write {path}: {error}. Free space, or choose another place; what was finished before is kept."
        ) from error


def write_text(path: Path, text: str, *, durable: bool = True) -> None:
    """Write a file whole or not at all; `durable` also waits until it is on the disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            temporary.replace(path)
            if durable:
                _fsync(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: object, *, durable: bool = True) -> None:
    text = json.dumps(value, indent=1, sort_keys=True, default=str, allow_nan=False)
    write_text(path, text + "\n", durable=durable)


def read_json(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing") from None
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ArtifactError(f"{path} is damaged: {error}. Delete it and run its stage again.") from None


def write_directory(
    path: Path, fill: Callable[[Path], None], *, kind: str, stage: str, step: int, base_identity: str
) -> Artifact:
    """Let `fill` write files into a temporary folder, then put it at `path` in one rename, replacing what was there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with writing(path):
            temporary.mkdir(parents=True)
            fill(temporary)
            files = _hash_files(temporary)
            meta = {"kind": kind, "stage": stage, "step": step, "base_identity": base_identity, "files": files}
            write_json(temporary / MANIFEST, {**meta, "digest": sha256_of_json(meta)}, durable=False)
            for own in (*temporary.rglob("*"), temporary):
                _fsync(own)
            if path.exists():  # a rename cannot replace a folder that is not empty
                old = path.with_name(f".{path.name}.{os.getpid()}.old")
                path.rename(old)
                temporary.rename(path)
                shutil.rmtree(old)
            else:
                temporary.rename(path)
            _fsync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return _as_artifact(path, meta)


@contextmanager
def scratch(folder: Path, name: str) -> Generator[Path]:
    """A folder that is gone afterwards; where its process is killed, `clear_leftovers` finds it."""
    path = folder / f".{name}.{os.getpid()}.tmp"
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def clear_leftovers(run: Path) -> None:
    """Remove what writers that were killed left in a run's folder, which nobody writes to now. What cannot be removed
    stays: it is in nobody's way."""
    for folder in (run, *run.glob("*/"), *run.glob("*/checkpoints/")):
        for path in folder.glob(".*"):
            if not re.fullmatch(r"\..+\.\d+\.(tmp|old)", path.name):
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with suppress(OSError):
                    path.unlink()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _as_artifact(path: Path, meta: Mapping[str, object]) -> Artifact:
    return Artifact(
        kind=str(meta["kind"]),
        stage=str(meta["stage"]),
        path=path,
        step=int(str(meta["step"])),
        content_hash=sha256_of_json(meta["files"]),
        base_identity=str(meta["base_identity"]),
    )


def read_artifact(path: Path, *, base_identity: str | None = None) -> Artifact:
    """Verify the folder against its manifest and return its record.

    Raises:
        ArtifactError: it is missing, a file differs from the manifest, or it was made on another base.
    """
    if not path.is_dir():
        raise ArtifactError(f"there is no artifact at {path}")
    meta = read_json(path / MANIFEST)
    if not isinstance(meta, dict) or not {"kind", "stage", "step", "base_identity", "files"} <= meta.keys():
        raise ArtifactError(f"{path / MANIFEST} is not a manifest of align")
    if "digest" not in meta:
        raise ArtifactError(f"{path / MANIFEST} is of an earlier version of align, or damaged")
    if meta.pop("digest") != sha256_of_json(meta):
        raise ArtifactError(f"{path} is damaged: {MANIFEST} is not as it was written")
    expected = meta["files"]
    try:
        actual = _hash_files(path)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from None
    if actual != expected:
        names = sorted(name for name in {*actual, *expected} if actual.get(name) != expected.get(name))
        said = [f"{name} {_what_differs(name, actual, expected)}" for name in names]
        raise ArtifactError(f"{path} is damaged: {', '.join(said)}")
    artifact = _as_artifact(path, meta)
    if base_identity is not None:
        verify_base(artifact, base_identity)
    return artifact


def _what_differs(name: str, actual: Mapping[str, object], expected: Mapping[str, object]) -> str:
    if name not in actual:
        return "is missing"
    return f"differs from {MANIFEST}" if name in expected else f"is not in {MANIFEST}"


def verify_base(artifact: Artifact, base_identity: str) -> None:
    """ArtifactError if it was made on another base."""
    if artifact.base_identity != base_identity:
        raise ArtifactError(
            f"{artifact.path} was made on base {artifact.base_identity[:16]}…, this run's base is "
            f"{base_identity[:16]}…; use the same base.model, or another run.name"
        )


def newest_whole(checkpoints: Path) -> tuple[Artifact | None, list[str]]:
    """Of the checkpoints in a folder the newest that is whole, and what is wrong with those that are newer."""
    damage: list[str] = []
    for path in reversed(checkpoint_folders(checkpoints)):
        try:
            return read_artifact(path), damage
        except ArtifactError as error:
            damage.append(str(error))
    return None, damage


def checkpoint_folders(checkpoints: Path) -> list[Path]:
    """The oldest first, whole or not. From the hundred thousandth step on the name is longer."""
    found = (path for path in checkpoints.glob("update-*") if path.is_dir())
    return sorted(found, key=lambda path: (len(path.name), path.name))
