"""CURVE keys: four small files that say who may join a job, and encrypt what its processes send.

The servers of a job have one pair, its workers another. libzmq itself proves the server's key to a worker; whether a
worker's key is the job's is asked of a `Gatekeeper` on the server's side.
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import logging
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import zmq
from zmq.auth.thread import ThreadAuthenticator

from dtrain.errors import UsageError

log = logging.getLogger(__name__)

Role = Literal["server", "worker"]

_PEER: dict[str, str] = {"server": "worker", "worker": "server"}
_DOMAIN = "dtrain"
_CHARACTERS = 40  # 32 bytes as Z85
_OTHERS = 0o077


@dataclass(frozen=True)
class Keys:
    """What one process holds, as Z85. The peer's key is the server's for a worker, the workers' for a server."""

    public: bytes
    secret: bytes = field(repr=False)
    peer: bytes


def make(folder: Path) -> None:
    """Write server.public, server.secret, worker.public and worker.secret. Only the owner may look into the folder.

    A server needs all but worker.secret, a worker all but server.secret.

    Raises:
        UsageError: the folder holds keys already, is open to others, or cannot be written.
    """
    _check_curve()
    try:
        made = _make_folder(folder)
        try:
            _fill(folder)
        except BaseException:
            if made:
                with contextlib.suppress(OSError):
                    folder.rmdir()
            raise
    except OSError as exc:
        raise UsageError(f"{folder}: cannot write keys there: {exc.strerror}; give a folder of your own") from exc


def _make_folder(folder: Path) -> bool:
    """Whether the folder is new."""
    try:
        folder.mkdir(0o700)
        return True
    except FileExistsError:
        return False


def _fill(folder: Path) -> None:
    """Through the folder's descriptor, so that nobody puts another one in its place meanwhile."""
    at = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    written: list[str] = []
    try:
        mode = stat.S_IMODE(os.fstat(at).st_mode)
        if mode & _OTHERS:
            raise UsageError(f"{folder} is open to others (mode {mode:04o}): chmod 700 {folder}, or give a new folder")
        names = [f"{role}.{part}" for role in _PEER for part in ("public", "secret")]
        if held := sorted(set(names) & set(os.listdir(at))):
            raise UsageError(f"{folder} holds keys already ({', '.join(held)}): remove them, or give a new folder")
        pairs = [key for _ in _PEER for key in zmq.curve_keypair()]
        for name, key in zip(names, pairs, strict=True):
            mode = 0o600 if name.endswith(".secret") else 0o644
            fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode, dir_fd=at)
            written.append(name)
            with open(fd, "wb") as file:
                file.write(key + b"\n")
    except BaseException:
        for name in written:
            with contextlib.suppress(OSError):
                os.unlink(name, dir_fd=at)
        raise
    finally:
        os.close(at)


def load(folder: Path, role: Role) -> Keys:
    """The keys of that role, read from its own two files and the other role's public one.

    Raises:
        UsageError: a file is missing, holds no key or not the one that belongs to the others, or a secret one is open
            to others than its owner.
    """
    _check_role(role)
    _check_curve()
    secret = _read(folder / f"{role}.secret", secret=True)
    public = _read(folder / f"{role}.public")
    if not hmac.compare_digest(zmq.curve_public(secret), public):
        raise UsageError(
            f"{folder / role}.public does not belong to {role}.secret beside it: copy both from where they were made"
        )
    return Keys(public, secret, _read(folder / f"{_PEER[role]}.public"))


def _read(path: Path, *, secret: bool = False) -> bytes:
    remedy = f"copy {path.name} from the folder in which the job's keys were made"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # NONBLOCK: a pipe must not stop us
        try:
            found = os.fstat(fd)  # of what is read; a link's own mode says nothing
            mode = found.st_mode
            # As Kubernetes mounts secrets: root's, lent to this process by way of its group.
            lent = found.st_uid == 0 and os.geteuid() != 0
            if secret and mode & (_OTHERS & ~stat.S_IRGRP if lent else _OTHERS):
                raise UsageError(
                    f"{path} is a secret key and open to others than its owner (mode {stat.S_IMODE(mode):04o}): "
                    f"chmod 600 {path}"
                )
            text = os.read(fd, 4096).strip()
        finally:
            os.close(fd)
    except OSError as exc:
        raise UsageError(f"{path}: cannot be read: {exc.strerror}; {remedy}") from exc
    if len(text) != _CHARACTERS or not _is_z85(text):  # never show the text: it may be a secret
        raise UsageError(
            f"{path}: not a key: expected {_CHARACTERS} characters of Z85, found {len(text)} bytes; {remedy}"
        )
    return text


def _is_z85(text: bytes) -> bool:
    try:
        zmq.curve_public(text)  # takes any 32 bytes, public ones too, if the text stands for 32 bytes
    except (zmq.ZMQError, ValueError):
        return False
    return True


def _check_role(role: str) -> None:
    if role not in _PEER:
        raise UsageError(f"role is {role!r}: expected 'server' or 'worker'")


def _check_curve() -> None:
    if not zmq.has("curve"):
        raise UsageError("this libzmq is built without CURVE: install pyzmq's own wheel (pip install pyzmq)")


def among_servers(keys: Keys) -> Keys:
    """The keys with which a server comes to another listener of the servers' as workers do."""
    return Keys(keys.public, keys.secret, keys.public)


def secure(socket: zmq.Socket[bytes], keys: Keys, role: Role) -> None:
    """Make the socket encrypt, and talk only to its peer. A server's lets nobody in without a `Gatekeeper`.

    Raises:
        UsageError: the socket is bound or connected, and would go on in the clear.
    """
    _check_role(role)
    if socket.getsockopt(zmq.LAST_ENDPOINT):
        raise UsageError(f"keys for a socket at {socket.getsockopt(zmq.LAST_ENDPOINT)!r}: secure it before it is there")
    socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public)
    socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
    if role == "worker":
        socket.setsockopt(zmq.CURVE_SERVERKEY, keys.peer)
        return
    socket.setsockopt(zmq.CURVE_SERVER, 1)
    socket.setsockopt(zmq.ZAP_DOMAIN, _DOMAIN.encode())
    try:
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # without it, no gatekeeper means that any key will do
    except zmq.ZMQError as exc:
        if exc.errno != errno.EINVAL:  # libzmq before 4.3 does not know it
            raise


class Gatekeeper:
    """Lets those in whose key is `keys.peer`, at every socket of the context that is secured as a server's.

    One for the life of a context, with a thread of its own until it is closed. Start it before the sockets are bound.

    Args:
        servers_too: let those in as well whose key is `keys.public`, for a server's socket at another server's.

    Raises:
        UsageError: the context has one already.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], keys: Keys, *, servers_too: bool = False) -> None:
        self._authenticator = ThreadAuthenticator(context)
        allowed = (keys.peer, keys.public) if servers_too else (keys.peer,)
        self._authenticator.configure_curve_callback(_DOMAIN, _Provider(allowed))
        try:
            self._authenticator.start()
        except BaseException as exc:
            self._authenticator.stop()  # else its socket would stop the context from ending
            if isinstance(exc, zmq.ZMQError) and exc.errno == errno.EADDRINUSE:
                raise UsageError(
                    "gatekeeper: the context has one already, which serves all its sockets: give each job a context"
                ) from exc
            raise

    def close(self) -> None:
        """Let nobody in any more, and end the thread. May be called twice."""
        self._authenticator.stop()


class _Provider:
    """What the authenticator asks, in its own thread."""

    def __init__(self, allowed: tuple[bytes, ...]) -> None:
        self._allowed = allowed
        self._told = False

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether that public key, as Z85, may come in. The first refusal is logged; a stranger can try for ever."""
        if any(hmac.compare_digest(key, one) for one in self._allowed):
            return True
        if not self._told:
            self._told = True
            log.warning("refused a worker whose key is not this server's worker.public; further ones are not logged")
        return False
