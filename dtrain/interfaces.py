"""This host's network interfaces: by which of them another host is reached."""

from __future__ import annotations

import socket

import psutil

from dtrain import env
from dtrain.errors import UsageError


def address_towards(other: str, what: str) -> str:
    """This host's address as the other host, `tcp://host:port`, sees it. Nothing is sent.

    Raises:
        UsageError: no address of this host leads there; `what` says what that host has.
    """
    host, _, port = other.removeprefix("tcp://").rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, int(port)))
        except socket.gaierror as error:
            raise UsageError(f"{what} is {other!r}: {host} is the name of no host: {error.strerror}") from error
        except (OSError, ValueError) as error:
            raise UsageError(
                f"{what} is {other!r}: no address of this host leads there; name servers by hand"
            ) from error
        found: str = probe.getsockname()[0]
    return found


def interface_towards(other: str) -> str | None:
    """Name of the interface that leads to another host; None where it cannot be told.

    The other host may be this one, by a name that stands for a loopback address here, as Debian sets names up. Then it
    is the only interface that leads elsewhere.
    """
    host = other.removeprefix("tcp://").rpartition(":")[0]
    if host == "localhost" or host.startswith("127."):  # this host, as it was told
        return env.LOOPBACK
    try:
        address = address_towards(other, "host")
    except UsageError:
        return None
    mine = {
        entry.address: name
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family == socket.AF_INET
    }
    if not address.startswith("127."):
        return mine.get(address)
    elsewhere = {name for found, name in mine.items() if not found.startswith("127.")}
    return elsewhere.pop() if len(elsewhere) == 1 else None
