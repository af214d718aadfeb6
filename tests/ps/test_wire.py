"""The header codec: what it takes, and that anything else is a ProtocolError and nothing worse."""

from __future__ import annotations

import contextlib
import json
import tracemalloc
import zlib
from dataclasses import fields

import msgpack
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.errors import ProtocolError
from dtrain.ps import wire
from dtrain.ps.wire import Add, Bye, Clip, Failed, Hello, Message, Ping, Push

HELLO = Hello("job", 1, 2, "host", 77, 30_000, 3, 1, 0, 2, "probe")
ADD = Add(9, 7, "gradient/3", 5, 2, "float32", 1)
PUSH = Push(9, 7, 5, 3, 0, b"\x05", 1)
GOOD = wire.encode(HELLO)

text = st.text(st.characters(codec="utf-8"), max_size=60)
number = st.integers(0, 2**63 - 1)
FIELDS = {
    "str": text,
    "int": number,
    "float": st.floats(0, 2**62, allow_nan=False),
    "bytes": st.binary(max_size=60),
}
messages = st.one_of([st.builds(k, *(FIELDS[str(f.type)] for f in fields(k))) for k in wire._KINDS])


@given(messages)
def test_round_trip(message: Message):
    assert wire.decode(wire.encode(message)) == message


@pytest.mark.parametrize("kind", wire._KINDS, ids=lambda k: k.__name__)
def test_a_kind_and_its_payload(kind: type):
    """What brings a payload says what its checksum is, and nothing else does."""
    names = [f.name for f in fields(kind)]
    assert (kind in wire.WITH_PAYLOAD) == ("checksum" in names)
    if issubclass(kind, wire.Request):
        assert names[:2] == ["seq", "low"]
    if "checksum" in names:
        assert names[-1] == "checksum"


def sealed(packed: bytes) -> bytes:
    """With the checksum that makes it a header."""
    return packed + zlib.crc32(packed).to_bytes(4, "little")


def packed(*values: object) -> bytes:
    return sealed(msgpack.packb(values))


def with_rank(value: bytes) -> bytes:
    """A Hello whose rank is these msgpack bytes."""
    rest = [2, "host", 77, 30_000, 3, 1, 0, 2, "probe"]
    return sealed(bytes([0x9D, wire.PROTOCOL, 0]) + msgpack.packb("job") + value + b"".join(map(msgpack.packb, rest)))


def test_the_template_is_a_message():
    assert with_rank(b"\x01") == GOOD


HELLO_FIELDS = ("job", 1, 2, "host", 77, 30_000, 3, 1, 0, 2, "probe")
BYE = wire._KINDS.index(Bye)
CLIP = wire._KINDS.index(Clip)
PING = wire._KINDS.index(Ping)

MALFORMED: dict[str, bytes] = {
    "nothing": sealed(b""),
    "never used": sealed(b"\xc1"),
    "trailing byte": sealed(GOOD[:-4] + b"\x00"),
    "two messages": sealed(GOOD[:-4] + GOOD[:-4]),
    "array of 2^32-1": sealed(b"\xdd\xff\xff\xff\xff"),
    "map of 2^32-1": sealed(b"\xdf\xff\xff\xff\xff"),
    "bin of 2^32-1": sealed(b"\xc6\xff\xff\xff\xff"),
    "str of 2^32-1": sealed(b"\xdb\xff\xff\xff\xff"),
    "ext of 2^32-1": sealed(b"\xc9\xff\xff\xff\xff\x01"),
    "str of 2^32-1 as rank": with_rank(b"\xdb\xff\xff\xff\xff"),
    "deep": sealed(b"\x91" * 1000),
    "deeper": sealed(b"\x91" * 4000),
    "too long": sealed(b"\x91" * 100_000),
    "empty maps": sealed(b"\xdd\x00\x00\x0f\x00" + b"\x80" * 0xF00),
    "array of 17": packed(wire.PROTOCOL, 0, *range(15)),
    "a map": sealed(msgpack.packb({0: wire.PROTOCOL, 1: 0})),
    "a map with a key twice": sealed(b"\x82\x01\x01\x01\x02"),
    "map as rank": with_rank(b"\x80"),
    "bytes as keys": sealed(msgpack.packb({b"a": 1})),
    "a number": sealed(b"\x02"),
    "a text": sealed(msgpack.packb("hello")),
    "nil": sealed(b"\xc0"),
    "empty array": sealed(b"\x90"),
    "protocol alone": packed(wire.PROTOCOL),
    "protocol 0": packed(0, PING),
    "protocol 1": packed(1, PING),
    "protocol true": packed(True, PING),
    "protocol as text": packed("2", PING),
    "protocol as float": packed(2.0, PING),
    "protocol huge": packed(2**63, PING),
    "kind -1": packed(wire.PROTOCOL, -1),
    "kind after the last": packed(wire.PROTOCOL, len(wire._KINDS)),
    "kind true": packed(wire.PROTOCOL, True),
    "kind as text": packed(wire.PROTOCOL, "Hello"),
    "kind as float": packed(wire.PROTOCOL, 1.0),
    "kind nil": packed(wire.PROTOCOL, None),
    "kind huge": packed(wire.PROTOCOL, 2**64 - 1),
    "a field too few": packed(wire.PROTOCOL, 0, *HELLO_FIELDS[:-1]),
    "a field too many": packed(wire.PROTOCOL, 0, *HELLO_FIELDS, 0),
    "no fields": packed(wire.PROTOCOL, 0),
    "Ping with a field": packed(wire.PROTOCOL, PING, 0),
    "bytes for text": packed(wire.PROTOCOL, BYE, b"reason"),
    "number for text": packed(wire.PROTOCOL, BYE, 3),
    "nil for text": packed(wire.PROTOCOL, BYE, None),
    "text too long": packed(wire.PROTOCOL, BYE, "x" * 2049),
    "text that is not UTF-8": sealed(GOOD[:-4].replace(b"host", b"ho\xc3\x28")),
    "a lone surrogate": sealed(GOOD[:-4].replace(b"host", b"h\xed\xa0\x80")),
    "rank -1": with_rank(msgpack.packb(-1)),
    "rank -2^63": with_rank(msgpack.packb(-(2**63))),
    "rank 2^63": with_rank(msgpack.packb(2**63)),
    "rank true": with_rank(b"\xc3"),
    "rank 1.0": with_rank(msgpack.packb(1.0)),
    "rank NaN": with_rank(msgpack.packb(float("nan"))),
    "rank inf": with_rank(msgpack.packb(float("inf"))),
    "rank -0.0": with_rank(msgpack.packb(-0.0)),
    "rank nil": with_rank(b"\xc0"),
    "rank as text": with_rank(msgpack.packb("1")),
    "rank as array": with_rank(b"\x91\x01"),
    "rank as timestamp": with_rank(b"\xd6\xff\x00\x00\x00\x01"),
    "rank as ext 42": with_rank(b"\xd4\x2a\x00"),
    "factor NaN": packed(wire.PROTOCOL, CLIP, 1, 1, 0, float("nan")),
    "factor inf": packed(wire.PROTOCOL, CLIP, 1, 1, 0, float("inf")),
    "factor below 0": packed(wire.PROTOCOL, CLIP, 1, 1, 0, -0.5),
    "factor 1": packed(wire.PROTOCOL, CLIP, 1, 1, 0, 1),
    "pickle": sealed(b"\x80\x04\x95\x0f\x00\x00\x00\x00\x00\x00\x00cos\nsystem\n\x94."),
    "JSON": sealed(json.dumps([2, 0, *HELLO_FIELDS]).encode()),
    "zeros": sealed(bytes(64)),
}
DAMAGED = {
    "nothing": b"",
    "a byte": b"\x90",
    "no checksum": GOOD[:-4],
    "another checksum": GOOD[:-1] + bytes([GOOD[-1] ^ 1]),
    "HTTP": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "a version before checksums": msgpack.packb([1, 0, "job", 1, 2, "host", 77, 30_000]),
    "ones": b"\xff" * 64,
}


@pytest.mark.parametrize("header", DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged(header: bytes):
    with pytest.raises(wire.Damaged, match="checksum is wrong"):
        wire.decode(header)


@pytest.mark.parametrize("message", [HELLO, ADD, PUSH, Ping()], ids=lambda m: type(m).__name__)
def test_every_flipped_bit_of_a_header_is_seen(message: Message):
    header = bytearray(wire.encode(message))
    for bit in range(len(header) * 8):
        header[bit // 8] ^= 1 << bit % 8
        with pytest.raises(wire.Damaged):
            wire.decode(bytes(header))
        header[bit // 8] ^= 1 << bit % 8


@pytest.mark.parametrize("header", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed(header: bytes):
    with pytest.raises(ProtocolError) as caught:
        wire.decode(header)
    assert type(caught.value) is ProtocolError
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("message", [HELLO, ADD, PUSH, Bye("why")], ids=lambda m: type(m).__name__)
def test_cut_at_every_byte(message: Message):
    whole = wire.encode(message)
    for length in range(len(whole)):
        with pytest.raises(ProtocolError):
            wire.decode(whole[:length])


def test_a_header_costs_little_memory():
    tracemalloc.start()
    for header in MALFORMED.values():
        with pytest.raises(ProtocolError):
            wire.decode(header)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def decodes_or_refuses(header: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        message = wire.decode(header)
        assert wire.decode(wire.encode(message)) == message


@settings(max_examples=1500)
@given(st.binary(max_size=200))
def test_any_bytes(header: bytes):
    decodes_or_refuses(header)
    decodes_or_refuses(sealed(header))


@settings(max_examples=1000)
@given(
    messages,
    st.lists(
        st.tuples(st.sampled_from(["flip", "set", "cut", "insert", "swap"]), st.integers(0), st.integers(0, 255)),
        max_size=3,
    ),
)
def test_mutated_messages(message: Message, mutations: list[tuple[str, int, int]]):
    header = bytearray(wire.encode(message))
    for kind, where, value in mutations:
        at = where % (len(header) or 1)
        if kind == "insert":
            header.insert(at, value)
        elif kind == "cut":
            del header[at:]
        elif kind == "swap":
            header[:] = header[at:] + header[:at]
        elif header:
            header[at] = value if kind == "set" else header[at] ^ (1 << value % 8)
    decodes_or_refuses(bytes(header))
    decodes_or_refuses(sealed(bytes(header[:-4])))


objects = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | text | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(text | st.integers(0, 9), inner, max_size=3),
    max_leaves=10,
)


@settings(max_examples=500)
@given(st.lists(objects, max_size=9), st.integers(0, len(wire._KINDS)))
def test_any_fields(values: list[object], kind: int):
    decodes_or_refuses(packed(wire.PROTOCOL, kind, *values))


# --- texts


@given(st.text(max_size=3000), st.integers(0, 2048))
def test_a_fitting_text_can_be_sent(any_text: str, nbytes: int):
    cut = wire.fitting(any_text, nbytes)
    assert len(cut.encode()) <= nbytes
    assert wire.decode(wire.encode(Bye(cut))) == Bye(cut)


@pytest.mark.parametrize("long", ["x" * 5000, "\u4e2d" * 5000, "\U0001f600" * 5000, "\ud800" * 5000])
def test_the_longest_text_fits_in_a_header(long: str):
    failed = Failed("CommError", wire.fitting(long))
    assert len(wire.encode(failed)) <= wire.MAX_HEADER_BYTES
    assert wire.decode(wire.encode(failed)) == failed


# --- payloads


@pytest.mark.parametrize("name", wire.DTYPE_NAMES)
def test_payloads_round_trip(name: str):
    dtype = wire.DTYPE_NAMES[name]
    flat = torch.arange(7).to(dtype)
    payload = wire.bytes_of(flat)
    assert torch.equal(wire.tensor_of(memoryview(bytearray(payload)), name), flat)
    wire.check(payload, wire.checksum_of(payload))


@pytest.mark.parametrize(
    ("payload", "dtype", "words"),
    [
        (b"", "float32", "0 bytes"),
        (b"abc", "float32", "3 bytes"),
        (b"abcde", "bfloat16", "5 bytes"),
        (bytes(8), "float128", "unknown type"),
        (bytes(8), "complex64", "unknown type"),
        (bytes(8), "object", "unknown type"),
        (bytes(8), "", "unknown type"),
        (bytes(8), "__class__", "unknown type"),
    ],
)
def test_payloads_that_are_refused(payload: bytes, dtype: str, words: str):
    with pytest.raises(ProtocolError, match=words):
        wire.tensor_of(memoryview(bytearray(payload)), dtype)


@pytest.mark.parametrize("checksum", [zlib.crc32(bytes(8)) ^ 1, 2**64 - 1, 1])
def test_a_wrong_checksum_is_damage(checksum: int):
    with pytest.raises(wire.Damaged, match="a payload whose checksum is wrong"):
        wire.check(memoryview(bytes(8)), checksum)
    wire.check(memoryview(bytes(8)), 0)  # none was made


def test_every_flipped_bit_is_seen():
    flat = torch.randn(5, generator=torch.Generator().manual_seed(1))
    payload = bytearray(wire.bytes_of(flat))
    checksum = wire.checksum_of(memoryview(payload))
    for bit in range(len(payload) * 8):
        payload[bit // 8] ^= 1 << bit % 8
        with pytest.raises(wire.Damaged):
            wire.check(memoryview(payload), checksum)
        payload[bit // 8] ^= 1 << bit % 8


def test_no_checksum_is_never_a_checksum():
    payload = memoryview(bytearray.fromhex("9d0ad96d"))
    assert zlib.crc32(payload) == 0
    assert wire.checksum_of(payload) == 1


@given(st.integers(0, 3 * wire.PART_BYTES // 4))
@settings(max_examples=20)
def test_parts_cover_the_tensor(numel: int):
    flat = torch.zeros(numel)
    parts = wire.parts_of(flat)
    assert sum(p.numel() for p in parts) == numel
    assert all(0 < p.numel() * 4 <= wire.PART_BYTES for p in parts)
