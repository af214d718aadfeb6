"""What worker and server say to each other: a small msgpack header of fixed fields, and raw tensor bytes beside it.

A message is one header frame and, for some kinds, payload frames. The header is an array: protocol number, kind, then
the fields of the kind in order, and the crc32 of all that behind it. Nothing is allocated from a number on the wire,
and nothing is unpickled. In front of what goes to a server or a scheduler there is one more frame, the name of the
session that it belongs to.
"""

from __future__ import annotations

import secrets
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import msgpack
import numpy as np
import torch
from torch import Tensor

from dtrain.comm import parts
from dtrain.comm.base import DTYPES, dtype_name
from dtrain.errors import ProtocolError

PROTOCOL = 5
MAX_HEADER_BYTES = 4096
PART_BYTES = parts.MOST_BYTES
"""A tensor travels in parts of at most this size, so that adding, sending and receiving overlap, and heartbeats do not
queue behind a long message."""


# -- worker to server -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hello:
    """A worker asks to take part."""

    job_id: str
    rank: int
    world_size: int
    host: str
    pid: int
    patience_ms: int  # how long it waits for the others
    epoch: int  # how often it knows the job to have been rewound
    incarnation: int  # how often this worker has been started again
    server: int  # which of the servers it takes this one for
    num_servers: int
    probe: str  # name of a segment that proves a common memory; empty: none is wanted


@dataclass(frozen=True)
class Bye:
    """A worker leaves, with the reason where it is a bad one."""

    reason: str


@dataclass(frozen=True)
class Request:
    """What wants an answer: exactly one, which repeats `seq`."""

    seq: int  # this worker's requests to this server, counted
    low: int  # all answers before this one have come


@dataclass(frozen=True)
class Share(Request):
    """A segment of shared memory, to be mapped by the server. -> Done"""

    segment: int
    name: str
    nbytes: int


@dataclass(frozen=True)
class Unshare(Request):
    """A segment is used no more. -> Done"""

    segment: int


@dataclass(frozen=True)
class Add(Request):
    """A worker's part of one transfer; the payload follows. -> Sum"""

    key: str
    call: int  # how many transfers of this key came before
    part: int
    dtype: str
    checksum: int  # of the payload, see `checksum_of`; 0 where the transport needs none


@dataclass(frozen=True)
class AddShared(Request):
    """A worker's part of one transfer, in shared memory; the sum is wanted in the same place. -> Done"""

    key: str
    call: int
    part: int
    dtype: str
    segment: int
    offset: int  # bytes
    numel: int


@dataclass(frozen=True)
class Await(Request):
    """A worker has been waiting for others on their common board for a while. -> Done"""

    key: str
    call: int
    missing: bytes  # ranks, two bytes each

    @property
    def ranks(self) -> list[int]:
        return unpack_ranks(self.missing)


@dataclass(frozen=True)
class Resume(Request):
    """It waits no more. -> Done"""


@dataclass(frozen=True)
class Open(Request):
    """The parameters that the server is to hold; the layout follows, see `ps.layout`. -> Done, when all have agreed"""

    checksum: int


@dataclass(frozen=True)
class Put(Request):
    """Values of parameters and the optimizer's state, by worker 0, in parts; the payload follows. -> Done"""

    part: int
    parts: int
    checksum: int


@dataclass(frozen=True)
class Fetch(Request):
    """Asks for the same, as they are now. -> Piece"""

    part: int


@dataclass(frozen=True)
class Begin(Request):
    """A worker's step; the optimizer's settings for it follow. -> Received, Squares or Closed"""

    step: int
    share: float  # this worker's part of the samples of the step
    checksum: int


@dataclass(frozen=True)
class Push(Request):
    """A part of a gradient; the payload follows. -> Done, when it has been used"""

    step: int
    bucket: int
    part: int
    flags: bytes  # a bit a parameter of the bucket: has it a gradient here?
    checksum: int


@dataclass(frozen=True)
class PushShared(Request):
    """A gradient in shared memory. -> Done, when it has been used"""

    step: int
    bucket: int
    flags: bytes
    segment: int
    offset: int  # bytes


@dataclass(frozen=True)
class Pull(Request):
    """Asks for a part of the parameters as they are after so many steps. -> Sum"""

    step: int
    bucket: int
    part: int


@dataclass(frozen=True)
class PullShared(Request):
    """Asks for them in shared memory. -> Done"""

    step: int
    bucket: int
    segment: int
    offset: int  # bytes


@dataclass(frozen=True)
class Ready(Request):
    """All servers have this worker's step. -> Chosen, by server 0, when enough workers are ready"""

    step: int


@dataclass(frozen=True)
class Commit(Request):
    """Passes on which workers a step is made of. -> Squares or Closed"""

    step: int
    ranks: bytes


@dataclass(frozen=True)
class Clip(Request):
    """Passes on what the mean gradient is to be multiplied by. -> Squares or Closed"""

    step: int
    factor: float


@dataclass(frozen=True)
class Scale(Request):
    """Passes on the trust ratio of each piece that the server has, float64, which follow. -> Closed"""

    step: int
    checksum: int


@dataclass(frozen=True)
class Recall(Request):
    """Asks for what the server did lately, see `spans`. -> Piece"""


# -- server to worker -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Welcome:
    """All workers are here."""

    host: str
    pid: int
    epoch: int
    credit: int  # bytes that the worker may have under way, unanswered
    token: str  # what the server read in the probe; empty: it sees another memory
    on_loss: str  # what is done when a worker is lost: fail, wait or drop


@dataclass(frozen=True)
class Done:
    """It is as was asked."""

    seq: int


@dataclass(frozen=True)
class Sum:
    """What was asked for follows: the sum over workers, or new parameters."""

    seq: int
    checksum: int


@dataclass(frozen=True)
class Piece:
    """A part of what was asked for follows."""

    seq: int
    parts: int
    checksum: int


@dataclass(frozen=True)
class Received:
    """The worker's step is all here."""

    seq: int


@dataclass(frozen=True)
class Chosen:
    """The workers that a step is made of."""

    seq: int
    ranks: bytes


@dataclass(frozen=True)
class Squares:
    """Sums of squares by block follow: of the mean gradient, or of the parameters and then of what moves them."""

    seq: int
    checksum: int


@dataclass(frozen=True)
class Closed:
    """The step has been made."""

    seq: int
    version: int  # updates made so far
    behind: int  # updates by others since this worker last got the parameters: the staleness of its gradient
    counted: int  # workers whose gradient is in it; 0: this worker came too late, its gradient was dropped
    factor: float  # what it was clipped by, for servers that have not heard of it; else 1


@dataclass(frozen=True)
class Again:
    """A damaged message has come: send what is unanswered again."""


@dataclass(frozen=True)
class Ping:
    """The server makes sure that a worker can be reached, or a worker tells which connection is its own; no answer."""


@dataclass(frozen=True)
class Rewind:
    """The job goes back to its last commit: come again, in that epoch."""

    epoch: int
    reason: str


@dataclass(frozen=True)
class Failed:
    """The job is over, or this peer has no place in it. `kind` is the name of an error in `dtrain.errors`."""

    kind: str
    text: str


# -- anybody to a server, and its answer -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inquire:
    """Asks how the server is; takes no part. -> Standing, or Failed if the job has"""


@dataclass(frozen=True)
class Standing:
    """The server's loop goes round."""

    server: int
    num_servers: int
    workers: int  # that have joined and not left
    world_size: int


# -- servers and workers to the scheduler, and its answers -------------------------------------------------------------


@dataclass(frozen=True)
class Register:
    """A server tells where it listens. -> Numbered"""

    job_id: str
    address: str
    wanted: int  # which of the servers it is to be, counted from 1; 0: the next one


@dataclass(frozen=True)
class Lookup:
    """Asks where the servers are. -> Located for each of them, when all have registered"""

    job_id: str
    patience_ms: int  # how long it waits for them


@dataclass(frozen=True)
class Numbered:
    """Which of the servers the one that asked is."""

    server: int
    num_servers: int


@dataclass(frozen=True)
class Located:
    """Where one of the servers listens."""

    server: int
    num_servers: int
    address: str


Answer = Done | Sum | Piece | Received | Chosen | Squares | Closed
Rendezvous = Register | Lookup | Numbered | Located
Message = Hello | Bye | Request | Welcome | Answer | Again | Ping | Rewind | Failed | Inquire | Standing | Rendezvous
_KINDS: tuple[type, ...] = (
    *(Hello, Bye, Share, Unshare, Add, AddShared, Await, Resume),
    *(Open, Put, Fetch, Begin, Push, PushShared, Pull, PullShared, Ready, Commit, Clip, Scale, Recall),
    *(Welcome, Done, Sum, Piece, Received, Chosen, Squares, Closed, Again, Ping, Rewind, Failed),
    *(Register, Lookup, Numbered, Located),
    *(Inquire, Standing),
)
WITH_PAYLOAD = (Add, Open, Put, Begin, Push, Scale, Sum, Piece, Squares)
_FIELDS = {
    kind: [(f.name, {"str": str, "int": int, "float": float, "bytes": bytes}[str(f.type)]) for f in fields(kind)]
    for kind in _KINDS
}

_TEXT_BYTES = 2048
"""Longest text in a header."""

_BLOCKS = 16
_SUMMED_BYTES = 32 * 2**10

_LARGEST = 2**63
"""Above all numbers in a header."""

DTYPE_NAMES = {dtype_name(dtype): dtype for dtype in DTYPES}


_NAME_BYTES = 20


def new_name() -> bytes:
    """A name for a session, which nobody guesses: 16 bytes, and their crc32."""
    name = b"\x01" + secrets.token_bytes(15)
    return name + zlib.crc32(name).to_bytes(4, "little")


def is_name(frame: bytes) -> bool:
    """Whether a frame is the name of a session, as it was sent."""
    sealed = len(frame) == _NAME_BYTES and zlib.crc32(frame[:-4]).to_bytes(4, "little") == frame[-4:]
    return sealed and frame[:1] == b"\x01"


def encode(message: Message) -> bytes:
    """The header frame of a message."""
    kind = type(message)
    values = [getattr(message, name) for name, _ in _FIELDS[kind]]
    packed: bytes = msgpack.packb((PROTOCOL, _KINDS.index(kind), *values))
    return packed + zlib.crc32(packed).to_bytes(4, "little")


def pack_ranks(ranks: Iterable[int]) -> bytes:
    """Ranks, two bytes each."""
    return b"".join(rank.to_bytes(2, "little") for rank in ranks)


def unpack_ranks(data: bytes) -> list[int]:
    """The reverse of `pack_ranks`."""
    return [int.from_bytes(data[i : i + 2], "little") for i in range(0, len(data), 2)]


def fitting(text: str, nbytes: int = _TEXT_BYTES) -> str:
    """The text, cut to what a header takes."""
    return text.encode(errors="replace")[:nbytes].decode(errors="ignore")


def decode(header: bytes) -> Message:
    """The message of a header frame.

    Raises:
        Damaged: its checksum is wrong.
        ProtocolError: anything but an array of the right length and types, of this protocol.
    """
    if len(header) > MAX_HEADER_BYTES:
        raise ProtocolError(f"a header of {len(header)} bytes; the limit is {MAX_HEADER_BYTES}")
    packed, checksum = header[:-4], header[-4:]
    if zlib.crc32(packed).to_bytes(4, "little") != checksum:
        raise Damaged("a header whose checksum is wrong: the network damaged it, or it is no header of dtrain's")
    limits: dict[str, Any] = {"max_array_len": 16, "max_map_len": 0, "max_bin_len": _TEXT_BYTES, "max_ext_len": 0}
    try:
        values: Any = msgpack.unpackb(packed, use_list=False, max_str_len=_TEXT_BYTES, **limits)
    except Exception as error:  # msgpack raises ValueError, UnicodeDecodeError and several of its own
        raise ProtocolError(f"a header that is not msgpack of this protocol ({type(error).__name__})") from error
    if not isinstance(values, tuple) or len(values) < 2 or type(values[0]) is not int:
        raise ProtocolError("a header that is not an array of protocol number, kind and fields")
    if values[0] != PROTOCOL:
        raise ProtocolError(f"protocol {values[0]}, and this side speaks {PROTOCOL}: install one version everywhere")
    if type(values[1]) is not int or not 0 <= values[1] < len(_KINDS):
        raise ProtocolError(f"a message of unknown kind {values[1]!r:.20}")
    kind = _KINDS[values[1]]
    wanted = _FIELDS[kind]
    if len(values) - 2 != len(wanted):
        raise ProtocolError(f"{kind.__name__} with {len(values) - 2} fields; it has {len(wanted)}")
    for (name, type_), value in zip(wanted, values[2:], strict=True):
        if type(value) is not type_ or (isinstance(value, (int, float)) and not 0 <= value < _LARGEST):
            raise ProtocolError(f"{kind.__name__}.{name} is {value!r:.40}, which is no {type_.__name__} from 0 up")
    message: Message = kind(*values[2:])
    return message


class Damaged(ProtocolError):
    """Bytes that are not what was sent."""


def check(payload: memoryview, checksum: int) -> None:
    """Compare a payload with its checksum; 0 stands for none.

    Raises:
        Damaged: they do not agree.
    """
    if checksum and checksum_of(payload) != checksum:
        raise Damaged("a payload whose checksum is wrong: the network damaged it")


def tensor_of(payload: memoryview, dtype: str) -> Tensor:
    """A flat tensor over the bytes of a payload, without a copy.

    Raises:
        ProtocolError: unknown type, or a length that is no multiple of its size.
    """
    if dtype not in DTYPE_NAMES:
        raise ProtocolError(f"a payload of unknown type {dtype!r:.20}")
    kind = DTYPE_NAMES[dtype]
    if len(payload) == 0 or len(payload) % kind.itemsize:
        raise ProtocolError(f"a payload of {len(payload)} bytes, which is no multiple of {dtype}")
    return torch.frombuffer(payload, dtype=kind)


def bytes_of(flat: Tensor) -> memoryview:
    """The bytes of a flat contiguous tensor on the processor, without a copy."""
    return flat.detach().view(torch.uint8).numpy().data


def checksum_of(payload: memoryview) -> int:
    """Checksum of a payload, never 0 (which stands for none).

    The crc32 of short ones. Of long ones it is the crc32 of the sums of 16 blocks of 64-bit words, and of what is left:
    a tenth of the time. Whatever changes a word shows, and so do changes of several, unless they cancel in a block.
    """
    if len(payload) < _SUMMED_BYTES:
        return zlib.crc32(payload) or 1
    whole = len(payload) // (8 * _BLOCKS) * 8 * _BLOCKS
    words = np.frombuffer(payload, dtype=np.uint64, count=whole // 8).reshape(_BLOCKS, -1)
    return zlib.crc32(payload[whole:], zlib.crc32(np.add.reduce(words, axis=1).data)) or 1


def parts_of(flat: Tensor, most_bytes: int | None = None) -> list[Tensor]:
    """A flat tensor cut into the parts that travel, of at most so many bytes (`PART_BYTES`); views of it."""
    if flat.numel() == 0:
        return []
    return list(flat.split(max(1, (most_bytes or PART_BYTES) // flat.element_size())))
