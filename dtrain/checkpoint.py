"""Crash-consistent checkpoints of nested training state: safetensors and JSON, no pickle.

A root directory holds one directory per checkpoint:

    root/step-120/model.safetensors   the tensors of the group "model"
                  manifest.json       step; per group: size, sha256, and the structure that held the tensors
                  COMMIT.json         step; size and sha256 of manifest.json

`write` fills `step-120.tmp-<nonce>/`, syncs each file and then the directory, renames it to `step-120` and
syncs the root; `commit` puts COMMIT.json in place by the same sequence. A directory is a checkpoint only if
COMMIT.json matches the manifest and the manifest matches the files. So a kill or a power cut at any point
leaves the checkpoint before or the one after; the next `save` removes what else was left. Nothing committed
is touched before its successor is committed.

A step that is saved again goes to `step-120.1`, then `step-120.2`: once committed, the higher number replaces
the lower. No committed directory ever moves aside, so at no moment is there no checkpoint of that step.

`dtrain.trees` says what a group may hold. Tied weights are stored twice.

Errors: DataError for what is wrong with a file, the disk or a value; UsageError for arguments. POSIX only.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import stat
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dtrain import trees
from dtrain.errors import DataError, UsageError

_log = logging.getLogger(__name__)

_FORMAT, _VERSION = "dtrain.checkpoint", 2
_MANIFEST, _COMMIT = "manifest.json", "COMMIT.json"
_COMMIT_MAX_BYTES = 4096
_STEP_DIR = re.compile(r"step-(0|[1-9][0-9]{0,17})(?:\.([1-9][0-9]{0,8}))?")
_TMP_DIR = re.compile(r"step-[0-9]+(?:\.[0-9]+)?\.tmp-[0-9a-f]{16}")
_GROUP = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose every file was checked: where it lies, its step, and its groups by name."""

    path: Path
    step: int
    groups: dict[str, Any]


# --- the protocol


def save(root: Path, step: int, groups: Mapping[str, object], *, keep: int = 3) -> Path:
    """Writes and commits a checkpoint, then removes all but the newest `keep`; returns its directory.

    `groups` maps a name ([A-Za-z0-9_-]) to a tree; the module's docstring says what a tree may hold. On
    return the checkpoint is on disk. On an error the root holds the checkpoints that it held, and DataError
    names the file and the reason: disk full, no permission, a value that cannot be stored, another process
    saving here. The one just saved is always kept, even where later steps lie (a run that went back).
    """
    if keep < 1:
        raise UsageError(f"keep: {keep}: at least 1 checkpoint has to stay")
    root = Path(root)
    with _named(root, "cannot save a checkpoint here"):
        _make_directory(root)
        with _lock(root):
            _sweep(root)
            path = write(root, step, groups)
            try:
                commit(path)
            except BaseException:
                _discard(path)
                raise
            try:
                _prune(root, path, keep)
            except (OSError, DataError) as exc:  # the new one is safe: not an error of this save
                _log.warning("%s: old checkpoints could not be removed: %s", root, exc)
    return path


def write(root: Path, step: int, groups: Mapping[str, object]) -> Path:
    """First half of `save`: every file on disk under its final name, but not a checkpoint before `commit`.

    Returns the directory. On an error it is removed again. The caller sees to it that `root` exists and that
    nobody calls `save` on it meanwhile.
    """
    if type(step) is not int or not _STEP_DIR.fullmatch(f"step-{step}"):
        raise UsageError(f"step: {step!r}: expected an int of 0 to 10**18 - 1")
    for name in groups:
        if not isinstance(name, str) or not _GROUP.fullmatch(name):
            raise UsageError(f"groups: {name!r}: expected 1 to 64 of [A-Za-z0-9_-], a letter or digit first")
    final = root / _free_name(root, step)
    path = _tmp_name(final)
    try:
        with _named(path, "cannot write the checkpoint"):
            os.mkdir(path, 0o700)
            entries = {name: _write_group(path, name, tree) for name, tree in groups.items()}
            _write_file(path / _MANIFEST, _dumps({**_header(step), "groups": entries}))
            _sync_directory(path)
            os.rename(path, final)
            path = final
            _sync_directory(root)
    except BaseException:
        _discard(path)
        raise
    return final


def commit(path: Path) -> None:
    """Second half of `save`: makes what `write` returned a checkpoint, by one rename of a small file."""
    header = _header(_order(path)[0])
    record = {**header, "manifest": _digest(_read(path / _MANIFEST))}
    _replace(path / _COMMIT, _dumps(record))


def load(root: Path, step: int | None = None) -> Checkpoint:
    """The checkpoint of the highest step, or of `step`, after checking every size and hash.

    Without `step`, a damaged or unfinished one is passed over for the one before, with a RuntimeWarning and a
    log record that name the bad file. DataError if none is valid, or if `step` is not there or not valid.
    """
    failures: list[DataError] = []
    for path in _step_directories(Path(root)):
        found = _order(path)[0]
        if step is not None and found != step:
            continue
        try:
            groups = _load_directory(path)
        except DataError as exc:
            failures.append(exc)
            continue
        if failures:
            message = f"loading {path} instead of a newer checkpoint: {'; '.join(map(str, failures))}"
            _log.warning(message)
            warnings.warn(message, RuntimeWarning, stacklevel=2)
        return Checkpoint(path, found, groups)
    wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
    if failures:
        raise DataError(f"{root}: no valid {wanted}: {'; '.join(map(str, failures))}")
    remedy = "; to begin a new run, leave out --resume" if step is None else ""
    raise DataError(f"{root}: no {wanted} here; committed steps: {steps(root) or 'none'}{remedy}")


def steps(root: Path) -> list[int]:
    """The committed steps, ascending; none if there is no root. Only `load` checks the tensors' hashes."""
    return sorted({_order(path)[0] for path in _step_directories(Path(root)) if _is_committed(path)})


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes one safetensors file: `path` holds its old content or all of the new; on disk on return."""
    _replace(Path(path), trees.to_bytes(dict(tensors), Path(path).name))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Reads one safetensors file onto the CPU. A file on its own has no hash; the order may change."""
    return trees.from_bytes(_read(Path(path)), Path(path))


# --- directories: names, leftovers, the lock


def _order(path: Path) -> tuple[int, int]:
    """(step, how often the step was replaced) of a step directory, by its name."""
    match = _STEP_DIR.fullmatch(path.name)
    if match is None:
        raise UsageError(f"{path}: not the name of a step directory")
    return int(match[1]), int(match[2] or 0)


def _step_directories(root: Path) -> list[Path]:
    """Everything under root named like a step directory, the newest first, committed or not."""
    names: list[str] = []
    with _named(root, "cannot be listed"), suppress(FileNotFoundError):
        names = [name for name in os.listdir(root) if _STEP_DIR.fullmatch(name)]
    return sorted((root / name for name in names), key=_order, reverse=True)


def _free_name(root: Path, step: int) -> str:
    for path in _step_directories(root):
        if _order(path)[0] == step:
            return f"step-{step}.{_order(path)[1] + 1}"
    return f"step-{step}"


def _tmp_name(path: Path) -> Path:
    return path.with_name(f"{path.name}.tmp-{secrets.token_hex(8)}")


def _is_committed(path: Path) -> bool:
    try:
        with _opened(path) as dir_fd:
            _read_manifest(path, dir_fd)
    except DataError:
        return False
    return True


def _discard(path: Path) -> None:
    """Removes a directory; one rename ends its being a checkpoint, and a crash leaves it to `_sweep`."""
    try:
        if not _TMP_DIR.fullmatch(path.name):
            path = path.rename(_tmp_name(path))
        shutil.rmtree(path)
    except FileNotFoundError:
        pass
    except OSError as exc:
        _log.warning("%s: could not be removed: %s", path, exc)


def _sweep(root: Path) -> None:
    """Removes what writers that died left behind. The lock says that none of them lives."""
    for entry in os.scandir(root):
        if _TMP_DIR.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
            _discard(Path(entry.path))


def _prune(root: Path, newest: Path, keep: int) -> None:
    """Removes what `newest` replaces, what never was committed, and what is older than `keep` good ones.

    A damaged checkpoint counts for nothing, and stays until it is older than those. The oldest goes first:
    where later steps lie (a run that went back), `load` finds the last of them until it finds `newest`.
    """
    kept, doomed = 1, []
    for path in _step_directories(root):
        if path == newest or path.is_symlink() or not path.is_dir():
            continue
        replaced = _order(path)[0] == _order(newest)[0]
        if replaced or kept >= keep or not os.path.lexists(path / _COMMIT):
            doomed.append(path)
        elif _is_committed(path):
            kept += 1
    for path in reversed(doomed):
        _discard(path)


def _make_directory(path: Path) -> None:
    if not path.is_dir():
        _make_directory(path.parent)
        with suppress(FileExistsError):
            os.mkdir(path)
        _sync_directory(path.parent)


@contextmanager
def _lock(root: Path) -> Iterator[None]:
    """One `save` at a time per root. The system drops the lock of a process that dies."""
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{root}: another process saves here; let one worker save") from None
        except OSError as exc:
            _log.debug("%s: no locks on this file system: %s", root, exc)
        yield
    finally:
        with suppress(OSError):  # close would not do: a child forked meanwhile shares the lock
            fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)


# --- files


@contextmanager
def _named(path: Path, problem: str) -> Iterator[None]:
    """Turns an OSError into a DataError that names the file and says what the system said."""
    try:
        yield
    except OSError as exc:
        reason = "it is a symbolic link" if exc.errno == errno.ELOOP else exc.strerror or str(exc)
        raise DataError(f"{path}: {problem}: {reason}") from exc


def _write_file(path: Path, data: bytes) -> None:
    """Creates a file that only the owner reads, and waits until its content is on disk."""
    with _named(path, "cannot be written"):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(fd, rest[: 1 << 30]) :]
            os.fsync(fd)
        finally:
            os.close(fd)


def _replace(path: Path, data: bytes) -> None:
    """Puts a file in place by one rename: whole or not at all."""
    tmp = _tmp_name(path)
    try:
        _write_file(tmp, data)
        with _named(path, "cannot be put in place"):
            os.rename(tmp, path)
            _sync_directory(path.parent)
    except BaseException:
        with suppress(OSError):
            os.unlink(tmp)
        raise


def _sync_directory(path: Path) -> None:
    with _opened(path, follow=True) as fd, _named(path, "cannot be synced"):
        os.fsync(fd)


@contextmanager
def _opened(path: Path, *, follow: bool = False) -> Iterator[int]:
    """A directory's descriptor; `follow` for directories that the user named."""
    with _named(path, "cannot be opened as a directory"):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW))
    try:
        yield fd
    finally:
        os.close(fd)


def _read(path: Path, *, dir_fd: int | None = None, max_bytes: int | None = None) -> bytes:
    """A regular file's content. With `dir_fd`, the file is looked up there, and `path` only names it."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # NONBLOCK: a pipe must not stop us
    with _named(path, "cannot be read"):
        fd = os.open(path if dir_fd is None else path.name, flags, dir_fd=dir_fd)
        with open(fd, "rb") as file:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode):
                raise DataError(f"{path}: not a regular file")
            if max_bytes is not None and info.st_size > max_bytes:
                raise DataError(f"{path}: {info.st_size} bytes, at most {max_bytes} expected")
            return file.read(info.st_size)


def _read_checked(path: Path, dir_fd: int, digest: Mapping[str, Any], source: str) -> bytes:
    """A file's content, if it has the size and the sha256 that `digest`, out of the file `source`, says."""
    data = _read(path, dir_fd=dir_fd, max_bytes=digest["size"])
    if len(data) != digest["size"]:
        raise DataError(f"{path}: {len(data)} bytes, {digest['size']} in {source}")
    if hashlib.sha256(data).hexdigest() != digest["sha256"]:
        raise DataError(f"{path}: damaged: its sha256 is not the one in {source}")
    return data


# --- one checkpoint's content


def _header(step: int) -> dict[str, Any]:
    return {"format": _FORMAT, "version": _VERSION, "step": step}


def _digest(data: bytes) -> dict[str, Any]:
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _dumps(value: object) -> bytes:
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode("ascii")


def _write_group(directory: Path, name: str, tree: object) -> dict[str, Any]:
    """Writes one group's tensors; returns its entry of the manifest."""
    tensors: dict[str, Tensor] = {}
    structure = trees.encode(tree, (name,), tensors)
    data = trees.to_bytes(tensors, name)
    _write_file(directory / f"{name}.safetensors", data)
    return {**_digest(data), "structure": structure}


def _load_directory(path: Path) -> dict[str, Any]:
    with _opened(path) as dir_fd:
        groups = {}
        for name, entry in _read_manifest(path, dir_fd).items():
            file = path / f"{name}.safetensors"
            tensors = trees.from_bytes(_read_checked(file, dir_fd, entry, _MANIFEST), file)
            try:
                groups[name] = trees.decode(entry["structure"], tensors, path / _MANIFEST)
            except RecursionError:
                raise DataError(f"{path / _MANIFEST}: group {name!r} is nested too deep") from None
            if tensors:
                raise DataError(f"{file}: the manifest does not know the tensor {min(tensors)!r}")
        return groups


def _read_manifest(path: Path, dir_fd: int) -> dict[str, Any]:
    """The manifest's groups, once the manifest fits COMMIT.json and both fit the directory."""
    step = _order(path)[0]
    file = path / _COMMIT
    with _named(path, "cannot be listed"):
        if _COMMIT not in os.listdir(dir_fd):
            raise DataError(f"{file}: missing: that save did not finish")
    digest = _parse(_read(file, dir_fd=dir_fd, max_bytes=_COMMIT_MAX_BYTES), file, step, "manifest")
    _check_fields(digest, file, size=int, sha256=str)
    file = path / _MANIFEST
    groups = _parse(_read_checked(file, dir_fd, digest, _COMMIT), file, step, "groups")
    for name, entry in groups.items():
        if not _GROUP.fullmatch(name):
            raise DataError(f"{file}: {name!r} is not the name of a group")
        _check_fields(entry, file, size=int, sha256=str, structure=object)
    return groups


def _parse(data: bytes, file: Path, step: int, field: str) -> dict[str, Any]:
    """The object under `field` of a JSON file of ours, for this step."""
    try:
        record = json.loads(data.decode("ascii"))
    except (ValueError, RecursionError) as exc:
        raise DataError(f"{file}: not the JSON that was written: {exc}") from None
    if not isinstance(record, dict) or record.get("format") != _FORMAT:
        raise DataError(f"{file}: its format is not {_FORMAT!r}")
    if record.get("version") != _VERSION:
        raise DataError(f"{file}: format version {record.get('version')!r}; this dtrain reads {_VERSION}")
    _check_fields(record, file, format=str, version=int, step=int, **{field: dict})
    if record["step"] != step:
        raise DataError(f"{file}: step {record['step']} in a directory of step {step}")
    value: dict[str, Any] = record[field]
    return value


def _check_fields(node: object, file: Path, **kinds: type) -> None:
    """Exactly these fields, of exactly these types (`object`: any)."""
    if not isinstance(node, dict) or node.keys() != kinds.keys():
        raise DataError(f"{file}: expected an object with the fields {', '.join(kinds)}")
    for name, kind in kinds.items():
        if kind is not object and type(node[name]) is not kind:
            raise DataError(f"{file}: {name}: {node[name]!r} is not of type {kind.__name__}")
