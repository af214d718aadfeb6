"""The proxy does to a connection what it says, and what ZeroMQ makes of it.

Nothing here rests on a pause being long enough: a test waits for an event, and a bound on time is one from below, or
far away.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import zmq
from zmq.utils.monitor import recv_monitor_message

from tests.faults.proxy import Proxy
from tests.strangers import closed_port, listening

FAR_S = 10.0
QUIET_S = 0.1
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"NULL".ljust(20, b"\0") + bytes(32)
READY = b"\x04\x1a\x05READY\x0bSocket-Type\0\0\0\x04PAIR"
PING = b"\x04\x07\x04PING\0\0"


def echo(peer: socket.socket) -> None:
    while data := peer.recv(65536):
        peer.sendall(data)


@dataclass
class Sink:
    """Takes everything; says how it ended."""

    got: bytearray = field(default_factory=bytearray)
    ended: str = ""

    def __call__(self, peer: socket.socket) -> None:
        self.ended = ended(peer, self.got)


def ended(peer: socket.socket, got: bytearray | None = None) -> str:
    """How the connection ends, after taking everything."""
    try:
        while data := peer.recv(65536):
            if got is not None:
                got += data
    except ConnectionResetError:
        return "RST"
    return "FIN"


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    """In front of an echo."""
    with listening(echo) as port, Proxy("127.0.0.1", port) as proxy:
        yield proxy


@pytest.fixture
def sink() -> Sink:
    return Sink()


@pytest.fixture
def drain(sink: Sink) -> Iterator[Proxy]:
    """In front of the sink."""
    with listening(sink) as port, Proxy("127.0.0.1", port) as proxy:
        yield proxy


def connect(proxy: Proxy) -> socket.socket:
    peer = socket.create_connection(("127.0.0.1", proxy.port), FAR_S)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return peer


def exactly(peer: socket.socket, size: int) -> bytes:
    got = b""
    while len(got) < size:
        data = peer.recv(size - len(got))
        assert data, f"ended after {got!r}"
        got += data
    return got


def talk(peer: socket.socket, data: bytes) -> bytes:
    peer.sendall(data)
    return exactly(peer, len(data))


def silent(peer: socket.socket) -> bool:
    peer.settimeout(QUIET_S)
    try:
        peer.recv(1)
    except TimeoutError:
        return True
    finally:
        peer.settimeout(FAR_S)
    return False


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + FAR_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def noise(size: int) -> bytes:
    return random.Random(size).randbytes(size)


def test_passes_everything_on_and_counts(proxy: Proxy) -> None:
    data = noise(1_000_000)
    with connect(proxy) as peer, connect(proxy) as other:
        sender = threading.Thread(target=peer.sendall, args=(data,))
        sender.start()
        assert exactly(peer, len(data)) == data
        sender.join()
        assert talk(other, b"hello") == b"hello"
    assert (proxy.connections, proxy.bytes_up, proxy.bytes_down, proxy.fired) == (2, 1_000_005, 1_000_005, 0)


def test_an_end_of_one_direction_is_passed_on(proxy: Proxy) -> None:
    with connect(proxy) as peer:
        peer.sendall(b"last")
        peer.shutdown(socket.SHUT_WR)
        assert exactly(peer, 4) == b"last"
        assert peer.recv(1) == b""


def test_a_reset_of_a_peer_is_passed_on_behind_its_bytes(drain: Proxy, sink: Sink) -> None:
    with connect(drain) as peer:
        peer.sendall(b"last")
        until(lambda: sink.got)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    until(lambda: sink.ended)
    assert (bytes(sink.got), sink.ended) == (b"last", "RST")


def test_a_target_that_is_not_there() -> None:
    # The end may come before `connect` has returned.
    with Proxy("127.0.0.1", closed_port()) as proxy, pytest.raises(ConnectionResetError), connect(proxy) as peer:
        peer.recv(1)


def test_blackhole_holds_what_is_sent_and_accepts_in_silence(proxy: Proxy) -> None:
    with connect(proxy) as peer:
        assert talk(peer, b"before") == b"before"
        proxy.blackhole()
        peer.sendall(b"held")
        with connect(proxy) as late:
            late.sendall(b"late")
            assert silent(peer)
            assert silent(late)
            assert (proxy.bytes_up, proxy.bytes_down) == (6, 6)
            proxy.heal()
            assert exactly(peer, 4) == b"held"
            assert exactly(late, 4) == b"late"
        assert talk(peer, b"after") == b"after"


@pytest.mark.parametrize(("direction", "passed"), [("up", (0, 0)), ("down", (4, 0))])
def test_blackhole_of_one_direction(proxy: Proxy, direction: str, passed: tuple[int, int]) -> None:
    with connect(proxy) as peer:
        proxy.blackhole(direction=direction)
        peer.sendall(b"held")
        assert silent(peer)
        assert (proxy.bytes_up, proxy.bytes_down) == passed
        proxy.heal()
        assert exactly(peer, 4) == b"held"


def test_blackhole_for_a_time_and_what_is_closed_meanwhile(drain: Proxy, sink: Sink) -> None:
    start = time.monotonic()
    drain.blackhole(0.3)
    with connect(drain) as peer:
        peer.sendall(b"held")
    until(lambda: sink.ended)
    assert time.monotonic() - start >= 0.3
    assert (bytes(sink.got), sink.ended) == (b"held", "FIN")


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("held", [True, False])
def test_reset_ends_both_sides_and_new_ones_are_served(drain: Proxy, sink: Sink, known: bool, held: bool) -> None:
    with connect(drain) as peer:
        if known:
            peer.sendall(b"x")
            until(lambda: sink.got)
        if held:
            drain.blackhole()
        drain.reset()
        with pytest.raises(ConnectionResetError):
            peer.recv(1)
    if known:
        until(lambda: sink.ended)
        assert sink.ended == "RST"
    drain.heal()
    with connect(drain) as peer:
        peer.sendall(b"again")
        until(lambda: sink.got.endswith(b"again"))


def test_reset_after_some_bytes_up(drain: Proxy, sink: Sink) -> None:
    with connect(drain) as peer, connect(drain) as other:
        peer.sendall(b"before")
        until(lambda: len(sink.got) == 6)
        drain.reset_after(10, "up")
        peer.sendall(b"0123456789abcdef")
        with pytest.raises(ConnectionResetError):
            peer.recv(1)
        until(lambda: sink.ended == "RST")
        assert (bytes(sink.got), drain.fired) == (b"before0123456789", 1)
        other.sendall(b"still there")  # another connection is not hit
        until(lambda: sink.got.endswith(b"still there"))


def test_reset_after_some_bytes_down(proxy: Proxy) -> None:
    with connect(proxy) as peer:
        proxy.reset_after(3, "down")
        peer.sendall(b"012345")
        assert exactly(peer, 3) == b"012"
        with pytest.raises(ConnectionResetError):
            peer.recv(1)


@pytest.mark.parametrize("direction", ["up", "down"])
def test_cut_ends_both_sides_in_order_after_so_many_bytes(proxy: Proxy, direction: str) -> None:
    with connect(proxy) as peer:
        proxy.cut(100_000, direction)
        got = bytearray()
        sender = threading.Thread(target=peer.sendall, args=(noise(200_000),))
        sender.start()
        while data := peer.recv(65536):
            got += data
        sender.join()
    assert noise(200_000).startswith(got)
    if direction == "down":
        assert len(got) == 100_000
    else:  # the answers to what came through may be thrown away
        assert proxy.bytes_up == 100_000
    assert proxy.fired == 1


def test_cut_is_a_fin_and_no_reset(drain: Proxy, sink: Sink) -> None:
    with connect(drain) as peer:
        drain.cut(10, "up")
        peer.sendall(bytes(1000))
        assert peer.recv(1) == b""
        until(lambda: sink.ended)
        assert (len(sink.got), sink.ended) == (10, "FIN")


def test_delay_is_there_and_back_but_not_for_each_chunk(proxy: Proxy) -> None:
    data = noise(2_000_000)
    with connect(proxy) as peer:
        assert talk(peer, b"x") == b"x"
        proxy.delay(0.1)
        start = time.monotonic()
        assert talk(peer, b"y") == b"y"
        assert time.monotonic() - start >= 0.2
        sender = threading.Thread(target=peer.sendall, args=(data,))
        start = time.monotonic()
        sender.start()
        assert exactly(peer, len(data)) == data
        sender.join()
        assert 0.2 <= time.monotonic() - start < 30 * 0.1  # of some 31 chunks and more in each direction
        proxy.delay(0)
        assert talk(peer, b"z") == b"z"


def test_rate_holds_for_all_connections_together(drain: Proxy, sink: Sink) -> None:
    drain.rate(200_000)
    start = time.monotonic()
    with connect(drain) as peer, connect(drain) as other:
        for each in (peer, other):
            each.sendall(bytes(30_000))
        until(lambda: len(sink.got) == 60_000)
        assert time.monotonic() - start >= 0.3 - 0.02  # what the link may catch up
        drain.rate(0)
        peer.sendall(bytes(5_000_000))  # would take 25 s
        until(lambda: len(sink.got) == 5_060_000)


@pytest.mark.parametrize("direction", ["up", "down"])
def test_flip_one_bit_once(proxy: Proxy, direction: str) -> None:
    with connect(proxy) as peer:
        proxy.flip(3, direction, bit=5)
        assert talk(peer, b"ab") == b"ab"
        assert talk(peer, b"cdef") == b"cDef"
        assert talk(peer, b"abcdef") == b"abcdef"
    assert proxy.fired == 1


@pytest.mark.parametrize("direction", ["up", "down"])
def test_flip_behind_a_marker_that_comes_in_pieces(proxy: Proxy, direction: str) -> None:
    with connect(proxy) as peer, connect(proxy) as other:
        proxy.flip_in(b"MARK", 2, direction)
        for data in (b"..MA", b"R", b"K0"):  # each is a chunk of its own: the next follows its answer
            assert talk(peer, data) == data
        assert talk(other, b"0000") == b"0000"
        assert talk(peer, b"10") == b"11"
        assert talk(peer, b"MARK000") == b"MARK000"
    assert proxy.fired == 1


def test_each_flip_has_a_marker_of_its_own(proxy: Proxy) -> None:
    with connect(proxy) as peer:
        proxy.flip_in(b"M", 0, "up")
        proxy.flip_in(b"M", 0, "up", bit=1)
        assert talk(peer, b"M0M0M0") == b"M1M2M0"


def short(payload: bytes, more: bool = False) -> bytes:
    return bytes([more, len(payload)]) + payload


def long(payload: bytes, more: bool = False) -> bytes:
    return bytes([2 | more]) + len(payload).to_bytes(8, "big") + payload


@pytest.mark.parametrize("size", [1, 7, 1_000_000])
@pytest.mark.parametrize(
    ("fault", "n", "order"),
    [("duplicate", 1, "AABCD"), ("duplicate", 2, "AABBCD"), ("swap", 1, "BACD"), ("swap", 2, "BADC")],
)
def test_messages_of_many_frames_and_sizes(drain: Proxy, sink: Sink, fault: str, n: int, order: str, size: int) -> None:
    messages = {
        "A": long(noise(300), more=True) + short(b"", more=True) + short(b"end"),
        "B": short(b"alone"),
        "C": short(b"first", more=True) + long(b""),
        "D": long(noise(500)),
    }
    start = GREETING + READY
    stream = start + b"".join(messages.values())
    getattr(drain, fault)(n)
    with connect(drain) as peer:
        for at in range(0, len(stream), size):
            peer.sendall(stream[at : at + size])
    until(lambda: sink.ended)
    assert bytes(sink.got) == start + b"".join(messages[name] for name in order)
    assert drain.fired == n


def test_commands_pass_at_once_and_once(drain: Proxy, sink: Sink) -> None:
    first, second = short(b"first", more=True), short(b"second")
    drain.swap()
    with connect(drain) as peer:
        peer.sendall(GREETING + READY + first + PING + second + PING)
        until(lambda: bytes(sink.got) == GREETING + READY + PING + PING)
        peer.sendall(short(b"next") + PING)
        until(lambda: bytes(sink.got) == GREETING + READY + PING * 2 + short(b"next") + first + second + PING)


def test_a_greeting_passes_piece_by_piece_and_other_streams_as_they_are(proxy: Proxy) -> None:
    proxy.duplicate()
    with connect(proxy) as peer:
        assert talk(peer, GREETING[:10]) == GREETING[:10]
    for other in (b"GET / HTTP/1.1\r\n\r\n" * 10, GREETING.replace(b"NULL", b"CURV") + short(b"x")):
        with connect(proxy) as peer:
            assert talk(peer, other) == other
    assert proxy.fired == 0


@pytest.mark.parametrize("held", [True, False])
def test_leaves_nothing_behind_and_does_not_wait_for_anybody(held: bool) -> None:
    with listening(echo) as port, contextlib.ExitStack() as peers:
        files = len(os.listdir("/proc/self/fd"))
        with Proxy("127.0.0.1", port) as proxy:
            connected = [peers.enter_context(connect(proxy)) for _ in range(5)]
            assert talk(connected[0], b"x") == b"x"
            if held:
                proxy.blackhole()
            connected += [peers.enter_context(connect(proxy)) for _ in range(5)]
            connected[0].sendall(b"x")
            start = time.monotonic()
        assert time.monotonic() - start < 1
        for peer in connected:
            assert ended(peer) == "RST"
        peers.close()
        assert "proxy" not in [thread.name for thread in threading.enumerate()]
        until(lambda: len(os.listdir("/proc/self/fd")) <= files)  # the echo's go a moment later


class Pair:
    """A ROUTER, the proxy, and a DEALER."""

    def __init__(self, stack: contextlib.ExitStack, dead_after_ms: int) -> None:
        context = stack.enter_context(zmq.Context())
        self.router = stack.enter_context(context.socket(zmq.ROUTER))
        self.dealer = stack.enter_context(context.socket(zmq.DEALER))
        for each in (self.router, self.dealer):
            each.setsockopt(zmq.LINGER, 0)
            each.setsockopt(zmq.RCVTIMEO, int(FAR_S * 1000))
            each.setsockopt(zmq.HEARTBEAT_IVL, 50)
            each.setsockopt(zmq.HEARTBEAT_TIMEOUT, dead_after_ms)
            each.setsockopt(zmq.RECONNECT_IVL, 10)
        self.monitor = self.dealer.get_monitor_socket(zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED)
        stack.enter_context(self.monitor)
        stack.callback(self.dealer.disable_monitor)
        port = self.router.bind_to_random_port("tcp://127.0.0.1")
        self.proxy = stack.enter_context(Proxy("127.0.0.1", port))
        self.dealer.connect(self.proxy.address)
        self.comes(zmq.EVENT_HANDSHAKE_SUCCEEDED)

    def comes(self, event: int) -> None:
        assert self.monitor.poll(int(FAR_S * 1000))
        assert recv_monitor_message(self.monitor)["event"] == event

    def quiet(self) -> bool:
        return not self.router.poll(int(QUIET_S * 1000)) and not self.dealer.poll(0) and not self.monitor.poll(0)

    def arrives(self, *frames: bytes) -> bytes:
        """Who sent what has arrived at the ROUTER, which is this."""
        sender, *got = self.router.recv_multipart()
        assert got == list(frames)
        return sender


@pytest.fixture
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    with contextlib.ExitStack() as stack:
        yield Pair(stack, getattr(request, "param", 20_000))


def test_zeromq_passes(pair: Pair) -> None:
    pair.dealer.send_multipart([b"head", noise(1_000_000), b""])
    sender = pair.arrives(b"head", noise(1_000_000), b"")
    pair.router.send_multipart([sender, b"answer"])
    assert pair.dealer.recv_multipart() == [b"answer"]


@pytest.mark.parametrize("size", [100, 1_000_000])
def test_zeromq_loses_the_message_during_which_the_connection_breaks(pair: Pair, size: int) -> None:
    pair.dealer.send(b"before")
    pair.arrives(b"before")
    pair.proxy.reset_after(size // 2, "up")
    pair.dealer.send(noise(size))
    pair.comes(zmq.EVENT_DISCONNECTED)
    pair.comes(zmq.EVENT_HANDSHAKE_SUCCEEDED)
    pair.dealer.send(b"after")
    pair.arrives(b"after")  # messages of a DEALER keep their order: nothing of the other will come
    assert pair.quiet()
    assert pair.proxy.connections == 2


def test_zeromq_loses_the_answer_during_which_the_connection_breaks(pair: Pair) -> None:
    pair.dealer.send(b"ask")
    sender = pair.arrives(b"ask")
    pair.proxy.reset_after(50, "down")
    pair.router.send_multipart([sender, noise(100)])
    pair.comes(zmq.EVENT_DISCONNECTED)
    pair.comes(zmq.EVENT_HANDSHAKE_SUCCEEDED)
    pair.dealer.send(b"ask again")
    again = pair.arrives(b"ask again")
    assert again != sender  # a new connection is a new peer
    pair.router.send_multipart([again, b"answer"])
    assert pair.dealer.recv_multipart() == [b"answer"]
    assert pair.quiet()


def test_zeromq_reads_an_older_connection_late(pair: Pair) -> None:
    pair.proxy.blackhole(direction="up")
    pair.dealer.send(b"before")
    assert pair.quiet()
    pair.proxy.strand(0.5)
    pair.proxy.heal()
    pair.comes(zmq.EVENT_DISCONNECTED)
    pair.comes(zmq.EVENT_HANDSHAKE_SUCCEEDED)
    pair.dealer.send(b"after")
    assert pair.arrives(b"after") != pair.arrives(b"before")
    assert pair.proxy.connections == 2


def test_zeromq_loses_nothing_in_a_short_silence(pair: Pair) -> None:
    pair.proxy.blackhole()
    pair.dealer.send(b"held")
    assert pair.quiet()
    pair.proxy.heal()
    pair.arrives(b"held")
    assert pair.proxy.connections == 1


@pytest.mark.parametrize("pair", [500], indirect=True)
def test_zeromq_notices_a_long_silence_by_its_heartbeats(pair: Pair) -> None:
    pair.proxy.blackhole()
    pair.comes(zmq.EVENT_DISCONNECTED)
    pair.proxy.heal()
    pair.dealer.send(b"after")
    pair.arrives(b"after")


def test_zeromq_gets_a_flipped_payload_as_a_good_message(pair: Pair) -> None:
    pair.proxy.flip_in(b"payload:", 2, "up", bit=1)
    pair.dealer.send_multipart([b"head", b"payload:0000"])
    pair.arrives(b"head", b"payload:0020")


def test_zeromq_drops_a_message_that_is_cut(pair: Pair) -> None:
    pair.proxy.cut(5000, "up")
    pair.dealer.send_multipart([b"head", noise(10_000)])
    pair.comes(zmq.EVENT_DISCONNECTED)
    pair.comes(zmq.EVENT_HANDSHAKE_SUCCEEDED)
    pair.dealer.send(b"after")
    pair.arrives(b"after")


def test_zeromq_gets_a_message_twice(pair: Pair) -> None:
    pair.proxy.duplicate()
    for frames in ([b"one", noise(1000)], [b"two"]):
        pair.dealer.send_multipart(frames)
    senders = {pair.arrives(*frames) for frames in ([b"one", noise(1000)], [b"one", noise(1000)], [b"two"])}
    assert len(senders) == 1
    pair.proxy.duplicate(direction="down")
    pair.router.send_multipart([*senders, b"answer"])
    assert [pair.dealer.recv() for _ in range(2)] == [b"answer", b"answer"]
    assert pair.quiet()


def test_zeromq_gets_two_messages_in_the_other_order(pair: Pair) -> None:
    pair.proxy.swap()
    pair.dealer.send_multipart([b"one", b"1"])
    assert pair.quiet()  # and the heartbeats go on
    pair.dealer.send_multipart([b"two", b"2"])
    pair.dealer.send(b"three")
    for frames in ([b"two", b"2"], [b"one", b"1"], [b"three"]):
        pair.arrives(*frames)
