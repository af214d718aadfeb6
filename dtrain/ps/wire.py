"""What worker and server say to each other: a small msgpack header of fixed fields, and raw tensor bytes beside it.

A message is one header frame and, for `Add` and `Sum`, one payload frame. The header is an array: protocol number,
kind, then the fields of the kind in order. Nothing is allocated from a number on the wire, and nothing is unpickled.
"""

from __future__ import annotations

import zlib
from dataclasses import astuple, dataclass, fields
from typing import Any

import msgpack
import torch
from torch import Tensor

from dtrain.comm.base import DTYPES
from dtrain.errors import ProtocolError

PROTOCOL = 1
MAX_HEADER_BYTES = 4096
PART_BYTES = 2**20
"""A tensor travels in parts of at most this size, so that adding, sending and receiving overlap, and heartbeats do not
queue behind a long message."""


@dataclass(frozen=True)
class Hello:
    """A worker asks to take part."""

    job_id: str
    rank: int
    world_size: int
    host: str
    pid: int
    patience_ms: int  # how long it waits for the others


@dataclass(frozen=True)
class Welcome:
    """All workers are here."""

    host: str
    pid: int


@dataclass(frozen=True)
class Add:
    """A worker's part of one transfer; the payload follows."""

    key: str
    call: int  # how many transfers of this key came before
    part: int
    dtype: str
    checksum: int  # crc32 of the payload, 0 where the transport needs none


@dataclass(frozen=True)
class Sum:
    """The sum over workers of that part; the payload follows."""

    key: str
    call: int
    part: int
    checksum: int


@dataclass(frozen=True)
class Ping:
    """The server makes sure that a worker can be reached; no answer."""


@dataclass(frozen=True)
class Failed:
    """The job is over, or this peer has no place in it. `kind` is the name of an error in `dtrain.errors`."""

    kind: str
    text: str


@dataclass(frozen=True)
class Bye:
    """A worker leaves, with the reason where it is a bad one."""

    reason: str


Message = Hello | Welcome | Add | Sum | Ping | Failed | Bye
_KINDS: tuple[type, ...] = (Hello, Welcome, Add, Sum, Ping, Failed, Bye)
_TYPES: dict[str, type] = {"str": str, "int": int}
WITH_PAYLOAD = (Add, Sum)

_TEXT_BYTES = 2048
"""Longest text in a header."""

DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


def encode(message: Message) -> bytes:
    """The header frame of a message."""
    packed: bytes = msgpack.packb((PROTOCOL, _KINDS.index(type(message)), *astuple(message)))
    return packed


def fitting(text: str, nbytes: int = _TEXT_BYTES) -> str:
    """The text, cut to what a header takes."""
    return text.encode(errors="replace")[:nbytes].decode(errors="ignore")


def decode(header: bytes) -> Message:
    """The message of a header frame.

    Raises:
        ProtocolError: anything but an array of the right length and types, of this protocol.
    """
    if len(header) > MAX_HEADER_BYTES:
        raise ProtocolError(f"a header of {len(header)} bytes; the limit is {MAX_HEADER_BYTES}")
    limits: dict[str, Any] = {"max_array_len": 16, "max_map_len": 0, "max_bin_len": 0, "max_ext_len": 0}
    try:
        values: Any = msgpack.unpackb(header, use_list=False, max_str_len=_TEXT_BYTES, **limits)
    except Exception as error:  # msgpack raises ValueError, UnicodeDecodeError and several of its own
        raise ProtocolError(f"a header that is not msgpack of this protocol ({type(error).__name__})") from error
    if not isinstance(values, tuple) or len(values) < 2 or type(values[0]) is not int:
        raise ProtocolError("a header that is not an array of protocol number, kind and fields")
    if values[0] != PROTOCOL:
        raise ProtocolError(f"protocol {values[0]}, and this side speaks {PROTOCOL}: install one version everywhere")
    if type(values[1]) is not int or not 0 <= values[1] < len(_KINDS):
        raise ProtocolError(f"a message of unknown kind {values[1]!r:.20}")
    kind = _KINDS[values[1]]
    wanted = [(f.name, _TYPES[str(f.type)]) for f in fields(kind)]
    if len(values) - 2 != len(wanted):
        raise ProtocolError(f"{kind.__name__} with {len(values) - 2} fields; it has {len(wanted)}")
    for (name, type_), value in zip(wanted, values[2:], strict=True):
        if type(value) is not type_ or (isinstance(value, int) and value < 0):
            raise ProtocolError(f"{kind.__name__}.{name} is {value!r:.40}, which is no {type_.__name__} from 0 up")
    message: Message = kind(*values[2:])
    return message


def tensor_of(payload: memoryview, dtype: str, checksum: int) -> Tensor:
    """A flat tensor over the bytes of a payload, without a copy.

    Raises:
        ProtocolError: unknown type, a length that is no multiple of its size, or a wrong checksum.
    """
    if dtype not in DTYPE_NAMES:
        raise ProtocolError(f"a payload of unknown type {dtype!r:.20}")
    kind = DTYPE_NAMES[dtype]
    if len(payload) == 0 or len(payload) % kind.itemsize:
        raise ProtocolError(f"a payload of {len(payload)} bytes, which is no multiple of {dtype}")
    if checksum and zlib.crc32(payload) != checksum:
        raise ProtocolError("a payload whose checksum is wrong: the network damaged it")
    return torch.frombuffer(payload, dtype=kind)


def bytes_of(flat: Tensor) -> memoryview:
    """The bytes of a flat contiguous tensor on the processor, without a copy."""
    return flat.detach().view(torch.uint8).numpy().data


def checksum_of(payload: memoryview) -> int:
    """crc32 of a payload, never 0 (which stands for none)."""
    return zlib.crc32(payload) or 1


def parts_of(flat: Tensor) -> list[Tensor]:
    """A flat tensor cut into the parts that travel; views of it."""
    if flat.numel() == 0:
        return []
    return list(flat.split(max(1, PART_BYTES // flat.element_size())))
