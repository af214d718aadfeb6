"""Memory that processes of one host share, so that tensor bytes need not go through a socket.

A worker makes a segment, servers open it by its name, and then the worker unlinks the file: from there on the memory
lives as long as a process maps it, and goes with the last one however that ends. A process that is killed before it
unlinks leaves a file, which `sweep` finds by the process number in its name.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import hmac
import mmap
import os
import re
import secrets
import stat
import sys
import weakref
from collections.abc import Collection

import numpy as np
import psutil
import torch
from torch import Tensor

from dtrain.errors import CommError, ProtocolError, UsageError

DIRECTORY = "/dev/shm"  # noqa: S108  # the kernel's own place for this; files are made with O_EXCL and random names
"""Where segments are made."""

_NAME = re.compile(r"dtrain-([1-9][0-9]{0,9})-[0-9a-f]{32}")
_MADE = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
_OPENED = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # a pipe of that name must not block
_MAPPED = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)  # 100 MiB of page faults cost more than one sum

_CHALLENGE_BYTES = 32
_PROBE_BYTES = 2 * _CHALLENGE_BYTES  # challenge and answer

_CLOCKS_S = 10.0
"""How far the times of a file and of a process may be apart for other reasons than their order."""


class NoRoom(CommError):
    """A segment cannot be made here; sockets can do its work, more slowly."""


class Gone(ProtocolError):
    """No such segment, or not any more: who made it has gone on without it."""


def available() -> bool:
    """Whether segments can be made on this system."""
    return sys.platform == "linux" and os.path.isdir(DIRECTORY) and os.access(DIRECTORY, os.W_OK | os.X_OK)


def room(nbytes: int) -> str:
    """Empty if that many more bytes fit, else a sentence for a warning."""
    try:
        figures = os.statvfs(DIRECTORY)
    except OSError as error:
        return f"{DIRECTORY} cannot be used ({error.strerror}): gradients go through sockets, which is slower"
    left = figures.f_bavail * figures.f_frsize
    if left >= nbytes:
        return ""
    return (
        f"{DIRECTORY} has {_mib(left)} left and {_mib(nbytes)} are needed: gradients go through sockets, which is "
        "slower; in a container give --shm-size=2g (Docker) or an emptyDir of medium Memory (Kubernetes)"
    )


class Segment:
    """A piece of shared memory. Tensors over it stay valid when it is closed; the memory goes with the last of them."""

    def __init__(self, name: str, nbytes: int, fd: int, *, made_here: bool, private: bool = False) -> None:
        """Map an open file. `create` and `open` are what to call."""
        self.name = name
        self.nbytes = nbytes
        self._has_file = made_here
        # Nobody closes the mapping: frombuffer keeps the object, but does not keep it from being closed under a tensor.
        mapping = mmap.mmap(fd, nbytes, flags=mmap.MAP_PRIVATE if private else _MAPPED)
        self.mapping = weakref.ref(mapping)
        """Dies with the last tensor over it."""
        self._bytes: Tensor | None = torch.frombuffer(mapping, dtype=torch.uint8)

    @classmethod
    def create(cls, nbytes: int) -> Segment:
        """A new segment of zeros; whoever knows its name can open it until `unlink`.

        Raises:
            NoRoom: it cannot be made; no file is left.
        """
        if nbytes <= 0:
            raise UsageError(f"a segment of {nbytes} bytes: give at least 1")
        name = f"dtrain-{os.getpid()}-{secrets.token_hex(16)}"
        try:
            fd = os.open(_path(name), _MADE, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_SH)  # held by the mapping, and let go by the kernel: see `sweep`
                os.posix_fallocate(fd, 0, nbytes)  # else a full directory is a SIGBUS at the first touch of a page
                return cls(name, nbytes, fd, made_here=True)
            except BaseException:
                os.unlink(_path(name))
                raise
            finally:
                os.close(fd)
        except (OSError, OverflowError) as error:
            why = room(nbytes) or f"{error}: gradients go through sockets, which is slower"
            raise NoRoom(f"no segment of {_mib(nbytes)} in {DIRECTORY}: {why}") from error

    @classmethod
    def open(cls, name: str, nbytes: int, *, private: bool = False) -> Segment:
        """The segment that another process has made.

        Args:
            private: what is written here is not seen by others: the kernel copies a page that is written to, and from
                then on also hides what they write there, until `show_theirs`.

        Raises:
            ProtocolError: no such file, not one that `create` made for this user, or not of that size.
        """
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ProtocolError(f"a segment named {name!r:.80}, which is no name of a segment")
        try:
            fd = os.open(_path(name), _OPENED)
        except FileNotFoundError as error:
            raise Gone(f"segment {name} cannot be opened: {error.strerror}") from error
        except OSError as error:
            raise ProtocolError(f"segment {name} cannot be opened: {error.strerror}") from error
        try:
            if fault := _fault(os.fstat(fd), nbytes):
                raise ProtocolError(f"segment {name} {fault}")
            return cls(name, nbytes, fd, made_here=False, private=private)
        except OSError as error:
            raise ProtocolError(f"segment {name} cannot be mapped: {error.strerror}") from error
        finally:
            os.close(fd)

    @property
    def bytes(self) -> Tensor:
        """All of it."""
        if self._bytes is None:
            raise UsageError(f"segment {self.name} has been closed")
        return self._bytes

    def view(self, dtype: torch.dtype, offset_bytes: int, numel: int) -> Tensor:
        """A flat tensor over a part of it.

        Raises:
            ProtocolError: beyond the segment, or at an offset that is no multiple of the type's size.
        """
        end = offset_bytes + numel * dtype.itemsize
        if offset_bytes < 0 or numel < 0 or end > self.nbytes:
            raise ProtocolError(
                f"{numel} x {dtype} at byte {offset_bytes} of segment {self.name}, which has {self.nbytes} bytes"
            )
        if offset_bytes % dtype.itemsize:
            raise ProtocolError(f"{dtype} at byte {offset_bytes} of segment {self.name}: no multiple of its size")
        return self.bytes[offset_bytes:end].view(dtype)

    def show_theirs(self) -> None:
        """Of a private one: forget what was written here, and show what others have written."""
        mapping, address = self.mapping(), self.bytes.data_ptr()
        if mapping is None or not _has_copies(address, self.nbytes):
            return
        try:
            mapping.madvise(mmap.MADV_DONTNEED)
        except OSError:  # of memory that is locked, as mlockall does; it need not be
            ctypes.CDLL(None).munlock(ctypes.c_void_p(address), ctypes.c_size_t(self.nbytes))
            mapping.madvise(mmap.MADV_DONTNEED)

    def unlink(self) -> None:
        """Remove the name; the memory stays. Idempotent."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(_path(self.name))
        self._has_file = False

    def close(self) -> None:
        """Let go of it; whoever made it also unlinks it. Idempotent."""
        if self._has_file:
            self.unlink()
        self._bytes = None


class Probe:
    """A worker's question whether a server sees the same memory: pids and host names do not tell in containers.

    One for each server. The worker sends `name`, the server answers with what `answer` returns, and `confirmed` is
    true only if the server has read and written this very segment.
    """

    def __init__(self) -> None:
        """
        Raises:
            NoRoom: as `Segment.create`.
        """
        self._segment = Segment.create(_PROBE_BYTES)
        self._challenge = secrets.token_bytes(_CHALLENGE_BYTES)
        _write(self._segment, 0, self._challenge)

    @property
    def name(self) -> str:
        return self._segment.name

    def confirmed(self, token: str) -> bool:
        """Whether the token came from a process that shares memory with this one."""
        try:
            nonce = bytes.fromhex(token)
        except (TypeError, ValueError):
            return False
        written = _read(self._segment, _CHALLENGE_BYTES)
        return len(nonce) == _CHALLENGE_BYTES and hmac.compare_digest(written, _proof(self._challenge, nonce))

    def close(self) -> None:
        """Remove it. Idempotent."""
        self._segment.close()


def answer(name: str) -> str:
    """The server's part of a `Probe`: a token to send back, empty if the segment cannot be seen from here."""
    try:
        segment = Segment.open(name, _PROBE_BYTES)
    except ProtocolError:
        return ""
    nonce = secrets.token_bytes(_CHALLENGE_BYTES)
    _write(segment, _CHALLENGE_BYTES, _proof(_read(segment, 0), nonce))
    segment.close()
    return nonce.hex()


def sweep(pids: Collection[int] | None = None) -> list[str]:
    """Remove this user's files that nobody will unlink any more.

    Args:
        pids: remove at once those of these processes, which are known to have ended; without it, those of processes
            that do not exist.

    Returns:
        Names of the files removed.
    """
    removed = []
    try:
        names = os.listdir(DIRECTORY)
    except OSError:
        return []
    for name in names:
        match = _NAME.fullmatch(name)
        if match is None:
            continue
        pid = int(match[1])
        with contextlib.suppress(OSError):  # another sweep, or its owner, was faster
            status = os.lstat(_path(name))
            if status.st_uid != os.geteuid() or not stat.S_ISREG(status.st_mode):
                continue
            if pid in pids if pids is not None else _is_gone(pid, status.st_mtime) and _is_unlocked(name):
                os.unlink(_path(name))
                removed.append(name)
    return sorted(removed)


def _is_gone(pid: int, since: float) -> bool:
    """Whether the process that had this number at that time (s since 1970) has ended."""
    try:
        return bool(psutil.Process(pid).create_time() > since + _CLOCKS_S)  # a later process with the same number
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return False


def _is_unlocked(name: str) -> bool:
    """Whether no process maps what it made: it may live in another container, where process numbers are others."""
    fd = os.open(_path(name), _OPENED)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


def _fault(status: os.stat_result, nbytes: int) -> str:
    """What is wrong with a file that is said to be a segment, in words."""
    if not stat.S_ISREG(status.st_mode):
        return "is not a regular file"
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
        return "is not this user's alone"
    if status.st_nlink != 1:
        return f"has {status.st_nlink} names; it may have one"
    if status.st_size != nbytes or nbytes <= 0:
        return f"has {status.st_size} bytes and is said to have {nbytes}"
    if status.st_blocks * 512 < nbytes:
        return "has no memory reserved for all of its bytes"
    return ""


def _has_copies(address: int, nbytes: int) -> bool:
    """Whether the kernel has given this process pages of its own in a private mapping, as far as it tells."""
    first, last = address // mmap.PAGESIZE, -(-(address + nbytes) // mmap.PAGESIZE)
    try:
        fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            data = os.pread(fd, 8 * (last - first), 8 * first)
        finally:
            os.close(fd)
    except OSError:
        return True
    kind = np.frombuffer(data, dtype=np.uint64) >> np.uint64(61)  # present, swapped out, a file's
    return len(kind) < last - first or bool(((kind > 1) & (kind % 2 == 0)).any())


def _path(name: str) -> str:
    return os.path.join(DIRECTORY, name)


def _proof(challenge: bytes, nonce: bytes) -> bytes:
    return hashlib.sha256(challenge + nonce).digest()


def _read(segment: Segment, offset: int) -> bytes:
    return bytes(segment.bytes[offset : offset + _CHALLENGE_BYTES].tolist())


def _write(segment: Segment, offset: int, data: bytes) -> None:
    segment.bytes[offset : offset + len(data)] = torch.tensor(list(data), dtype=torch.uint8)


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:.1f} MiB"
