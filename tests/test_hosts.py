"""Hosts emulated for the benchmarks: links hold their rate, shared memory stays on its host, and nothing is left."""

from __future__ import annotations

import functools
import importlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import psutil
import pytest

SCRIPTS = Path(__file__).parents[1] / "benchmarks"
RATE_BYTES_PER_S = 25e6

sys.path.insert(0, str(SCRIPTS))
emulated: ModuleType = importlib.import_module("hosts")
trouble: ModuleType = importlib.import_module("trouble")
Sample, Use = (getattr(importlib.import_module("watching"), name) for name in ("Sample", "Use"))
sys.path.remove(str(SCRIPTS))


@functools.cache
def refusal() -> str | None:
    return emulated.available()


@pytest.fixture
def possible() -> None:
    if (reason := refusal()) is not None:
        pytest.skip(reason)


@pytest.fixture
def as_it_was() -> Iterator[None]:
    """Network devices, named namespaces and mounts of this machine are those from before."""
    before = outside()
    yield
    assert outside() == before


def outside() -> tuple[list[str], str, int]:
    devices = sorted(line.split(":")[0] for line in Path("/proc/net/dev").read_text().splitlines())
    names = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False).stdout
    return devices, names, len(Path("/proc/self/mounts").read_text().splitlines())


on_hosts = pytest.mark.usefixtures("possible", "as_it_was")


def below(owner: int) -> list[psutil.Process]:
    return psutil.Process(owner).children(recursive=True)


@on_hosts
@pytest.mark.parametrize("user_namespace", [False, True], ids=["root", "user namespace"])
def test_each_host_has_its_own_address_name_processes_and_shared_memory(user_namespace, tmp_path):
    try:
        with emulated.hosts(2, rate="25MB/s", user_namespace=user_namespace) as h:
            assert "bytes from" in h.run(0, ["sh", "-c", f"ip addr show eth0 && {reach(h.address(1))}"])
            assert [h.run(i, ["hostname"]).strip() for i in range(2)] == ["host0", "host1"]
            h.run(0, ["touch", "/dev/shm/here", tmp_path / "file"])  # noqa: S108
            assert h.run(0, ["ls", "/dev/shm"]).split() == ["here"]  # noqa: S108
            assert h.run(1, ["ls", "/dev/shm"]) == ""  # noqa: S108
            assert h.run(1, ["ls", tmp_path]).split() == ["file"]  # files are shared
            assert int(h.run(1, ["sh", "-c", "echo $$"])) < 100
            assert h.run(0, ["sh", "-c", "pwd; echo $WORD"], {"WORD": "told"}).split() == [str(Path.cwd()), "told"]
            assert not Path("/dev/shm/here").exists()  # noqa: S108
    except emulated.HostsError as error:
        if user_namespace != (psutil.Process().uids().effective == 0):  # the way that `available` has tried
            raise
        pytest.skip(str(error))


def reach(address: str) -> str:
    """A shell command that says `bytes from` when something answers there, without ping, which may be missing."""
    code = (
        "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_STREAM); "
        f"print('bytes from', s.connect_ex(('{address}', 9)))"
    )
    return f'{sys.executable} -c "{code}" | grep -E "from 111"'  # connection refused: the host is there


@on_hosts
def test_a_link_carries_its_rate_and_no_more_each_way():
    with emulated.hosts(2, rate="25MB/s") as h, h.watch() as use:
        got = h.throughput([(1, 0), (0, 1)], seconds=1.0)
    # Where the machine is held up less comes by; more than 1.03 times the rate, and what was saved, never does.
    assert max(got) < RATE_BYTES_PER_S * (1.03 + 0.03 + 0.02)
    assert min(got) > RATE_BYTES_PER_S * 0.2
    assert 0.2 < use.link < 1.1
    assert use.active_s > 1.0
    assert 0 < use.busy <= 1.0
    assert min(use.sent_bytes) > RATE_BYTES_PER_S * 0.2
    assert sum(use.sent_bytes) == pytest.approx(sum(use.received_bytes), rel=0.05)  # packets may be cut on the way
    assert "full in" in str(use)


@on_hosts
@pytest.mark.parametrize("rate", ["50mbit", "200mbit", "1gbit"])
def test_packets_travel_uncut(rate):
    """A frame costs the processors as much as a packet of many, so links would have to wait for them."""
    with emulated.hosts(2, rate=rate) as h:
        h.throughput([(0, 1)], seconds=0.3)
        report = h.run(0, ["cat", "/proc/net/dev"])
    numbers = next(line for line in report.splitlines() if "eth0" in line).split(":")[1].split()
    sent_bytes, sent_packets = int(numbers[8]), int(numbers[9])
    assert sent_bytes / sent_packets > 4 * 1514


@on_hosts
def test_settings_of_tcp():
    name = "tcp_slow_start_after_idle"
    with emulated.hosts(2, rate="25MB/s", tcp={name: "0"}) as h:
        assert [h.run(i, ["cat", f"/proc/sys/net/ipv4/{name}"]).strip() for i in range(2)] == ["0", "0"]
        assert h.congestion_control() in ("cubic", "reno")
    with (
        pytest.raises(emulated.HostsError, match="tcp_of_tomorrow"),
        emulated.hosts(1, rate="25MB/s", tcp={"tcp_of_tomorrow": "1"}),
    ):
        pass


@on_hosts
def test_a_failure_names_the_process_and_ends_the_others():
    with emulated.hosts(2, rate="1gbit") as h:
        waits = h.start(0, ["sleep", "60"])
        fails = h.start(1, ["sh", "-c", "echo oh no; exit 3"], name="worker 1")
        with pytest.raises(emulated.HostsError, match=r"(?s)worker 1 ended with 3: oh no"):
            emulated.finish([waits, fails], timeout_s=20.0)
        assert waits.popen.returncode == -signal.SIGKILL
        with pytest.raises(emulated.HostsError, match=r"sleep on host 1 still ran after 0\.1 s"):
            h.run(1, ["sleep", "60"], timeout_s=0.1)


OWNER = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job ignores
sys.path.insert(0, sys.argv[1])
import hosts
with hosts.hosts(2, rate="1gbit") as h:
    h.start(0, ["sleep", "600"])
    h.start(1, ["setsid", "sleep", "600"])  # in a session of its own
    print("ready", flush=True)
    time.sleep(600)
"""


@on_hosts
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_nothing_outlives_the_owner(number):
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(SCRIPTS)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert owner.stdout is not None
    assert owner.stdout.readline() == b"ready\n"
    deadline_s = time.monotonic() + 10.0
    while sum("sleep" in process.name() for process in below(owner.pid)) < 2 and time.monotonic() < deadline_s:
        time.sleep(0.02)
    there = below(owner.pid)
    assert sum(process.name() == "sleep" for process in there) == 2
    owner.send_signal(number)
    owner.communicate(timeout=20.0)
    _, alive = psutil.wait_procs(there, timeout=10.0)
    assert alive == []


SHARES = {
    # Two workers send a gradient each to the server's host, which answers both.
    "ps apart": (1.0, 1.0, 2.0),
    # Worker 0 and the server are on one host, which sends to worker 1 only.
    "ps together": (1.0, 1.0, 0.0),
    # A ring of two: each sends half of the gradient twice.
    "allreduce apart": (1.0, 1.0, 0.0),
}
"""Gradients that each host sends in a step."""


@on_hosts
@pytest.mark.parametrize(
    "how", ["ps apart", *(pytest.param(how, marks=pytest.mark.slow) for how in ("ps together", "allreduce apart"))]
)
def test_a_job_sends_each_gradient_through_the_links(how, tmp_path):
    backend, placement = how.split()
    sizes = ("--option", "hidden=256", "layers=1", "classes=100")
    task = ["train", "synthetic", *sizes, "--steps", "6", "--checkpoint-every", "never"]
    with emulated.hosts(3, rate="1gbit") as h:
        made = emulated.job(h, task, backend=backend, workers=2, placement=placement, run_dir=tmp_path, timeout_s=90.0)
    assert [made.summary[name] for name in ("backend", "workers", "steps")] == [backend, 2, 6]
    all_bytes = 4 * (256 * 256 + 256 + 256 * 100 + 100) * 6
    tried = 0 if backend == "allreduce" else 2**16 * (1 + 4 + 16 + 64)  # to learn how fast the links are
    for sent, share in zip(made.use.sent_bytes, SHARES[how], strict=True):
        most = (1.6 * share + 0.05) * all_bytes + 1.05 * share * tried  # the weights at the start go as well
        assert share * all_bytes <= sent <= most
    assert ("listening" in made.outputs.get("server 0", "")) == (backend == "ps")


def test_places_of_servers():
    assert emulated.server_hosts(5, workers=3, servers=2, placement="apart") == [3, 4]
    assert emulated.server_hosts(3, workers=3, servers=2, placement="together") == [0, 1]
    with pytest.raises(emulated.HostsError, match="3 workers and 2 servers apart need 5 hosts; there are 4"):
        emulated.server_hosts(4, workers=3, servers=2, placement="apart")


@pytest.mark.parametrize(("text", "bytes_per_s"), [("200mbit", 25e6), ("1.5gbit", 187.5e6), ("25MB/s", 25e6)])
def test_rates(text, bytes_per_s):
    assert emulated.bytes_per_s(text) == bytes_per_s


@pytest.mark.parametrize("text", ["", "200", "0mbit", "-1mbit", "fast", "1..0gbit"])
def test_a_rate_that_cannot_be_meant(text):
    with pytest.raises(ValueError, match="give bits a second"):
        emulated.bytes_per_s(text)


def test_where_tools_are_missing_it_says_which(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda tool: None if tool in ("tc", "nsenter") else f"/usr/bin/{tool}")
    assert "missing: tc, nsenter" in emulated.available()


def test_what_was_used_is_told_from_samples():
    def sample(at_s, busy_s, sent):
        return Sample(at_s=at_s, busy_s=busy_s, stolen_s=0.0, all_s=2 * at_s, sent=[sent, 0], received=[0, sent])

    use = Use(rate_bytes_per_s=1000.0)
    use.fill([sample(0.0, 0.0, 0), sample(1.0, 2.0, 0), sample(2.0, 3.0, 950), sample(3.0, 3.5, 1150)])
    assert (use.seconds, use.active_s) == (3.0, 2.0)  # nothing was sent in the first second
    assert use.sent_bytes == [1150, 0]
    assert use.received_bytes == [0, 1150]
    assert use.link == pytest.approx(1150 / 2000)
    assert use.saturated == 0.5
    assert use.busy == pytest.approx(1.5 / 4)
    assert use.busy_while_saturated == pytest.approx(1.0 / 2)


BUSY = "import time\nend = time.perf_counter() + 1.5\nwhile time.perf_counter() < end: pass\nprint(time.process_time())"


@on_hosts
def test_a_slow_host():
    with emulated.hosts(1, rate="100mbit") as h:
        with trouble.slow(h, 0, factor=4.0):
            used_s = float(h.run(0, [sys.executable, "-c", BUSY]))
        assert used_s < 0.6 * 1.5  # a quarter, and what starting took; never more for being disturbed
        assert h.on(0) == []
    with pytest.raises(ValueError, match=r"factor is 0\.5"), trouble.slow(h, 0, factor=0.5):
        pass


REACHES = "import socket, sys\nsocket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=float(sys.argv[3]))"
LISTENS = """
import socket, sys, time
door = socket.create_server(("0.0.0.0", int(sys.argv[1])))
print("on", flush=True)
time.sleep(60)
"""


@on_hosts
def test_a_link_that_is_cut_and_a_host_that_is_lost():
    with emulated.hosts(2, rate="100mbit") as h:
        listener = h.start(0, [sys.executable, "-c", LISTENS, 4000])
        deadline_s = time.monotonic() + 20.0
        while "on" not in listener.said() and time.monotonic() < deadline_s:
            time.sleep(0.05)
        reach = [sys.executable, "-c", REACHES, h.address(0), 4000]
        h.run(1, [*reach, 10])
        trouble.cut(h, 0)
        with pytest.raises(emulated.HostsError, match="ended with 1"):
            h.run(1, [*reach, 1])
        trouble.mend(h, 0)
        h.run(1, [*reach, 20])
        started_s = time.monotonic()
        trouble.late(h, 0, seconds=0.2)
        assert time.monotonic() - started_s >= 0.2
        assert h.on(0) == [listener]
        trouble.lose(h, 0)
        assert h.on(0) == []
        assert listener.ended
