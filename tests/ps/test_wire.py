"""The header codec: what it takes, and that anything else is a ProtocolError and nothing worse."""

from __future__ import annotations

import contextlib
import json
import tracemalloc
import zlib

import msgpack
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.errors import ProtocolError
from dtrain.ps import wire
from dtrain.ps.wire import Add, Bye, Failed, Hello, Message, Ping, Sum, Welcome

HELLO = Hello("job", 1, 2, "host", 77, 30_000)
ADD = Add("gradient/3", 5, 2, "float32", 1)
GOOD = wire.encode(HELLO)

text = st.text(st.characters(codec="utf-8"), max_size=60)
number = st.integers(0, 2**64 - 1)
messages = st.one_of(
    st.builds(Hello, text, number, number, text, number, number),
    st.builds(Welcome, text, number),
    st.builds(Add, text, number, number, text, number),
    st.builds(Sum, text, number, number, number),
    st.just(Ping()),
    st.builds(Failed, text, text),
    st.builds(Bye, text),
)


@given(messages)
def test_round_trip(message: Message):
    assert wire.decode(wire.encode(message)) == message


def packed(*values: object) -> bytes:
    return msgpack.packb(values)


def with_rank(value: bytes) -> bytes:
    """A Hello whose rank is these msgpack bytes."""
    head = b"\x98\x01\x00" + msgpack.packb("job")
    return head + value + msgpack.packb(2) + msgpack.packb("host") + msgpack.packb(77) + msgpack.packb(30_000)


def test_the_template_is_a_message():
    assert with_rank(b"\x01") == GOOD


MALFORMED: dict[str, bytes] = {
    "nothing": b"",
    "never used": b"\xc1",
    "trailing byte": GOOD + b"\x00",
    "two messages": GOOD + GOOD,
    "array of 2^32-1": b"\xdd\xff\xff\xff\xff",
    "map of 2^32-1": b"\xdf\xff\xff\xff\xff",
    "bin of 2^32-1": b"\xc6\xff\xff\xff\xff",
    "str of 2^32-1": b"\xdb\xff\xff\xff\xff",
    "ext of 2^32-1": b"\xc9\xff\xff\xff\xff\x01",
    "str of 2^32-1 as rank": with_rank(b"\xdb\xff\xff\xff\xff"),
    "deep": b"\x91" * 1000,
    "deeper": b"\x91" * 4000,
    "too long": b"\x91" * 100_000,
    "empty maps": b"\xdd\x00\x00\x0f\x00" + b"\x80" * 0xF00,
    "array of 17": packed(1, 0, *range(15)),
    "a map": msgpack.packb({0: 1, 1: 0}),
    "a map with a key twice": b"\x82\x01\x01\x01\x02",
    "map as rank": with_rank(b"\x80"),
    "bytes as keys": msgpack.packb({b"a": 1}),
    "a number": b"\x01",
    "a text": msgpack.packb("hello"),
    "nil": b"\xc0",
    "empty array": b"\x90",
    "protocol alone": packed(1),
    "protocol 0": packed(0, 5),
    "protocol 2": packed(2, 5),
    "protocol true": packed(True, 5),
    "protocol as text": packed("1", 5),
    "protocol as float": packed(1.0, 5),
    "protocol huge": packed(2**63, 5),
    "kind -1": packed(1, -1),
    "kind 7": packed(1, 7),
    "kind true": packed(1, True),
    "kind as text": packed(1, "Hello"),
    "kind as float": packed(1, 5.0),
    "kind nil": packed(1, None),
    "kind huge": packed(1, 2**64 - 1),
    "a field too few": packed(1, 0, "job", 1, 2, "host", 77),
    "a field too many": packed(1, 0, "job", 1, 2, "host", 77, 30_000, 0),
    "no fields": packed(1, 0),
    "Ping with a field": packed(1, 4, 0),
    "bytes for text": packed(1, 6, b"reason"),
    "number for text": packed(1, 6, 3),
    "nil for text": packed(1, 6, None),
    "text too long": packed(1, 6, "x" * 2049),
    "text that is not UTF-8": packed(1, 6, "ab").replace(b"ab", b"\xc3\x28"),
    "a lone surrogate": packed(1, 6, "abc").replace(b"abc", b"\xed\xa0\x80"),
    "rank -1": with_rank(msgpack.packb(-1)),
    "rank -2^63": with_rank(msgpack.packb(-(2**63))),
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
    "pickle": b"\x80\x04\x95\x0f\x00\x00\x00\x00\x00\x00\x00cos\nsystem\n\x94.",
    "JSON": json.dumps([1, 0, "job", 1, 2, "host", 77, 30_000]).encode(),
    "HTTP": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "zeros": bytes(64),
}


@pytest.mark.parametrize("header", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed(header: bytes):
    with pytest.raises(ProtocolError) as caught:
        wire.decode(header)
    assert type(caught.value) is ProtocolError
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("message", [HELLO, ADD, Ping(), Bye("why")], ids=lambda m: type(m).__name__)
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


@settings(max_examples=2500)
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


objects = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | text | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(text | st.integers(0, 9), inner, max_size=3),
    max_leaves=10,
)


@settings(max_examples=500)
@given(st.lists(objects, max_size=9), st.integers(0, 8))
def test_any_fields(fields: list[object], kind: int):
    decodes_or_refuses(msgpack.packb([wire.PROTOCOL, kind, *fields]))


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
    assert torch.equal(wire.tensor_of(memoryview(bytearray(payload)), name, wire.checksum_of(payload)), flat)


@pytest.mark.parametrize(
    ("payload", "dtype", "checksum", "words"),
    [
        (b"", "float32", 0, "0 bytes"),
        (b"abc", "float32", 0, "3 bytes"),
        (b"abcde", "bfloat16", 0, "5 bytes"),
        (bytes(8), "float128", 0, "unknown type"),
        (bytes(8), "complex64", 0, "unknown type"),
        (bytes(8), "object", 0, "unknown type"),
        (bytes(8), "", 0, "unknown type"),
        (bytes(8), "__class__", 0, "unknown type"),
        (bytes(8), "float32", zlib.crc32(bytes(8)) ^ 1, "checksum"),
        (bytes(8), "float32", 2**64 - 1, "checksum"),
    ],
)
def test_payloads_that_are_refused(payload: bytes, dtype: str, checksum: int, words: str):
    with pytest.raises(ProtocolError, match=words):
        wire.tensor_of(memoryview(bytearray(payload)), dtype, checksum)


def test_every_flipped_bit_is_seen():
    flat = torch.randn(5, generator=torch.Generator().manual_seed(1))
    payload = bytearray(wire.bytes_of(flat))
    checksum = wire.checksum_of(memoryview(payload))
    for bit in range(len(payload) * 8):
        payload[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ProtocolError, match="checksum"):
            wire.tensor_of(memoryview(payload), "float32", checksum)
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
