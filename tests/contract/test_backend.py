"""The contract of the seam: what every backend does alike, whoever carries the tensors.

Starting processes costs about a second, so one job a backend runs all checks of `survey`, and the tests look at what
its workers saw. Jobs that fail on purpose are separate.
"""

from __future__ import annotations

import os
import random
import signal
import time
import zlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dtrain.comm import collectives
from dtrain.comm.base import DTYPES, LANES, Backend
from dtrain.errors import CommError, LayoutError, UsageError
from dtrain.ps import wire
from tests.conftest import BACKENDS, everywhere, remembered

WORKERS = 3
SIZES = [0, 1, 5, 1000, wire.PART_BYTES // 4 * 2 + 7]  # the last one: three parts over the parameter server
PROCESSES = ["ps", "allreduce"]
TROUBLE_TIMEOUT_S = 20.0

BITS = {
    "minus zero": torch.tensor([-0.0, 0.0, 1.0]),
    "infinities": torch.tensor([float("inf"), float("-inf")], dtype=torch.float64),
    "NaN payloads": torch.tensor([0x7FC0BEEF, 0x7F800001, -0x3F4111], dtype=torch.int32).view(torch.float32),
    "halves": torch.tensor([1.5, -0.0, float("nan")], dtype=torch.bfloat16),
    "flags": torch.tensor([True, False, True]),
    "a number": torch.tensor(-7, dtype=torch.int64),
    "nothing": torch.empty(0, 3),
    "transposed": torch.arange(6.0).view(2, 3).t(),
    "large": torch.arange(2**19, dtype=torch.float64) - 0.5,
}


# --- what the workers do


def values(rank: int, numel: int, dtype: torch.dtype) -> Tensor:
    """Small whole numbers, which every type adds exactly."""
    return ((torch.arange(numel) * 7 + 3 * rank) % 11).to(dtype)


def real_values(rank: int, numel: int) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(rank), dtype=torch.float32)


def reduced(comm: Backend, flat: Tensor, key: str) -> Tensor:
    comm.all_reduce(flat, key).wait()
    return flat


def sums(comm: Backend) -> dict[tuple[str, int], Any]:
    return {
        (str(dtype), n): reduced(comm, values(comm.rank, n, dtype), f"gradient/{dtype}{n}").double().numpy()
        for dtype in DTYPES
        for n in SIZES
    }


def halves(comm: Backend, order: str) -> list[Any]:
    """Sums of half precision, on their way together; as bits."""
    flats = [real_values(comm.rank, n).to(dtype) for dtype in (torch.bfloat16, torch.float16) for n in (1, 7, 70_001)]
    works = [comm.all_reduce(flat, f"gradient/half{number}") for number, flat in enumerate(flats)]
    for work in works if order == "as started" or comm.rank else works[::-1]:
        work.wait()
    return [flat.view(torch.int16).numpy() for flat in flats]


def sum_in_own_memory(comm: Backend) -> list[float]:
    flat = comm.empty(5, torch.float32, "gradient/empty")
    flat.copy_(values(comm.rank, 5, torch.float32))
    return reduced(comm, flat, "gradient/empty").tolist()


def rounding(comm: Backend) -> list[Any]:
    """Sums that must round somewhere, as bits."""
    return [reduced(comm, real_values(comm.rank, n), "gradient/real").view(torch.int32).numpy() for n in SIZES]


def in_flight(comm: Backend, order: str) -> list[Any]:
    """Six transfers on three lanes, started in one order and waited for in another; sums as bits."""
    started = []
    for number in range(2):
        for lane in LANES:
            flat = real_values(comm.rank + 10 * number, 40_000 if lane == "gradient" else 9)
            started.append((flat, comm.all_reduce(flat, f"{lane}/{number}")))
    waits = started if order == "as started" else started[::-1]
    for _, work in waits:
        work.wait()
    return [flat.view(torch.int32).numpy() for flat, _ in started]


def wait_twice(comm: Backend) -> list[float]:
    flat = values(comm.rank, 5, torch.float64)
    work = comm.all_reduce(flat, "metric/twice")
    work.wait()
    flat.mul_(2)
    work.wait()
    return flat.tolist()


def same_key(comm: Backend) -> list[float]:
    """One key three times, all on their way before the first wait."""
    flats = [values(comm.rank + i, 1, torch.float64) for i in range(3)]
    works = [comm.all_reduce(flat, "metric/again") for flat in flats]
    for work in works:
        work.wait()
    return [flat.item() for flat in flats]


MISUSE: dict[str, Callable[[Backend], object]] = {
    "no lane": lambda comm: comm.all_reduce(torch.zeros(1), "weights"),
    "unknown lane": lambda comm: comm.all_reduce(torch.zeros(1), "weights/1"),
    "two dimensions": lambda comm: comm.all_reduce(torch.zeros(2, 2), "metric/x"),
    "no dimension": lambda comm: comm.all_reduce(torch.tensor(1.0), "metric/x"),
    "not contiguous": lambda comm: comm.all_reduce(torch.zeros(6)[::2], "metric/x"),
    "complex": lambda comm: comm.all_reduce(torch.zeros(2, dtype=torch.complex64), "metric/x"),
    "bool": lambda comm: comm.all_reduce(torch.zeros(2, dtype=torch.bool), "metric/x"),
    "sparse": lambda comm: comm.all_reduce(torch.zeros(2).to_sparse(), "metric/x"),
}


def outcome(act: Callable[[Backend], object], comm: Backend) -> tuple[str, str]:
    try:
        act(comm)
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def broadcast(comm: Backend) -> dict[str, list[int]]:
    mine = {name: t.clone() if comm.rank == 0 else torch.ones_like(t) for name, t in BITS.items()}
    collectives.broadcast(comm, mine.values())
    return {name: bits(t) for name, t in mine.items()}


def bits(tensor: Tensor) -> list[int]:
    data = bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return [len(data), zlib.crc32(data)]


def text_of(rank: int) -> bytes:
    return bytes(range(256)) * (rank * 3) + b"." * rank


def survey(comm: Backend) -> dict[str, Any]:
    """All checks that leave the backend well."""
    seen = {
        "place": (comm.name, comm.rank, comm.world_size, isinstance(comm, Backend)),
        "sums": sums(comm),
        "own memory": sum_in_own_memory(comm),
        "rounding": rounding(comm),
        "halves": [halves(comm, order) for order in ("as started", "in different orders")],
        "waits": {order: in_flight(comm, order) for order in ("as started", "reversed")},
        "wait twice": wait_twice(comm),
        "same key": same_key(comm),
        "misuse": {name: outcome(act, comm) for name, act in MISUSE.items()},
        "broadcast": broadcast(comm),
        "bytes": collectives.gather_bytes(comm, text_of(comm.rank)),
        "no bytes": collectives.gather_bytes(comm, b""),
        "numbers": collectives.gather_numbers(comm, [-comm.rank, -(2**63) + comm.rank, 2**63 - 1]),
        "sum of numbers": collectives.sum_numbers(comm, [0.5, comm.rank, -1e300]),
        "agree": outcome(lambda c: collectives.agree(c, ["a (2,) float32", "b (3,) float32"], "models"), comm),
        "disagree": outcome(lambda c: collectives.agree(c, ["a", f"b{c.rank // 2}", "c"], "models"), comm),
        "disagree in length": outcome(lambda c: collectives.agree(c, ["a", "b"][: 1 + (c.rank > 0)], "models"), comm),
        "difference": collectives.first_difference(
            comm, [("same", torch.ones(3)), ("odd", torch.tensor(float(comm.rank == 1))), ("none", torch.zeros(0))]
        ),
        "barrier": barrier_times(comm),
        "traffic": dict(comm.traffic.sent),
    }
    comm.close()
    comm.close()
    return seen


def barrier_times(comm: Backend) -> tuple[float, float]:
    time.sleep(0.05 * comm.rank)
    before = time.monotonic()
    collectives.barrier(comm)
    return before, time.monotonic()


# --- what is true of it


@remembered
def seen(backend: str) -> list[dict[str, Any]]:
    return everywhere(survey, backend=backend, workers=WORKERS)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def workers(backend: str) -> list[dict[str, Any]]:
    """What each worker of a job on this backend saw."""
    return seen(backend)


def test_place(backend: str, workers: list[dict[str, Any]]) -> None:
    """A backend knows its name, and each worker its rank; `run` returns results in worker order."""
    assert [w["place"] for w in workers] == [(backend, r, len(workers), True) for r in range(len(workers))]


@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sum(workers: list[dict[str, Any]], dtype: torch.dtype, numel: int) -> None:
    """The tensor becomes the sum over workers, for every type and size: nothing, one part, several parts."""
    expected = sum(values(r, numel, dtype).double() for r in range(len(workers)))
    for worker in workers:
        assert (worker["sums"][str(dtype), numel] == expected.numpy()).all()  # type: ignore[union-attr]


def test_memory_of_the_backend_is_summed_too(workers: list[dict[str, Any]]) -> None:
    """A tensor from `empty` is a tensor as any other."""
    expected = sum(values(r, 5, torch.float32) for r in range(len(workers)))
    assert all(w["own memory"] == expected.tolist() for w in workers)  # type: ignore[union-attr]


def test_halves_are_added_in_float32_and_rounded_once(workers: list[dict[str, Any]]) -> None:
    """In worker order, so to the same bits on every backend; whatever order they are awaited in."""
    kinds = [(dtype, n) for dtype in (torch.bfloat16, torch.float16) for n in (1, 7, 70_001)]
    parts = [[real_values(r, n).to(dtype).float() for r in range(len(workers))] for dtype, n in kinds]
    expected = [
        sum(p[1:], p[0]).to(dtype).view(torch.int16).numpy() for p, (dtype, _) in zip(parts, kinds, strict=True)
    ]
    for worker in workers:
        for found in worker["halves"]:
            assert all((a == b).all() for a, b in zip(found, expected, strict=True))


def test_same_bits_on_every_worker(workers: list[dict[str, Any]]) -> None:
    """Where the sum must round, all workers have the same bits."""
    for worker in workers[1:]:
        for mine, first in zip(worker["rounding"], workers[0]["rounding"], strict=True):
            assert (mine == first).all()


@pytest.mark.parametrize("name", ["threads", "ps"])
def test_sum_is_in_worker_order(name: str) -> None:
    """((w0 + w1) + w2): the bits do not depend on who came first."""
    for number, numel in enumerate(SIZES):
        expected = (real_values(0, numel) + real_values(1, numel)) + real_values(2, numel)
        assert (seen(name)[0]["rounding"][number] == expected.view(torch.int32).numpy()).all()


def test_order_of_waits_does_not_matter(workers: list[dict[str, Any]]) -> None:
    """Several keys on three lanes are in flight at once; each wait brings its own tensor, in any order of waits."""
    for worker in workers:
        forward, backward = worker["waits"]["as started"], worker["waits"]["reversed"]
        assert all((a == b).all() for a, b in zip(forward, backward, strict=True))
        assert all((a == b).all() for a, b in zip(forward, workers[0]["waits"]["as started"], strict=True))
    total = sum(real_values(r + 10, 9).double() for r in range(len(workers)))
    got = torch.from_numpy(workers[0]["waits"]["reversed"][5]).view(torch.float32).double()
    torch.testing.assert_close(got, total, rtol=0, atol=1e-5)


def test_wait_twice(workers: list[dict[str, Any]]) -> None:
    """The second wait does nothing: what was written after the first stays."""
    expected = 2 * sum(values(r, 5, torch.float64) for r in range(len(workers)))
    assert all(w["wait twice"] == expected.tolist() for w in workers)  # type: ignore[attr-defined]


def test_one_key_several_times(workers: list[dict[str, Any]]) -> None:
    """Calls with one key are matched in their order."""
    n = len(workers)
    expected = [sum(values(r + i, 1, torch.float64).item() for r in range(n)) for i in range(3)]
    assert all(w["same key"] == expected for w in workers)


@pytest.mark.parametrize("name", MISUSE)
def test_misuse(workers: list[dict[str, Any]], name: str) -> None:
    """What cannot be summed is a UsageError before anything is sent: the same on every backend."""
    for worker in workers:
        kind, text = worker["misuse"][name]
        assert kind == "UsageError", text
        assert "weights" in text if "lane" in name else "metric/x" in text


@pytest.mark.parametrize("name", BITS)
def test_broadcast_keeps_every_bit(workers: list[dict[str, Any]], name: str) -> None:
    """All workers hold worker 0's bits: minus zero, infinities and NaN payloads too."""
    assert all(w["broadcast"][name] == bits(BITS[name]) for w in workers)


def test_gather_bytes(workers: list[dict[str, Any]]) -> None:
    """Everyone's bytes in worker order, of different lengths, none included."""
    assert all(w["bytes"] == [text_of(r) for r in range(len(workers))] for w in workers)
    assert all(w["no bytes"] == [b""] * len(workers) for w in workers)


def test_gather_numbers(workers: list[dict[str, Any]]) -> None:
    """64-bit integers arrive whole, the most negative and the largest too."""
    expected = [[-r, -(2**63) + r, 2**63 - 1] for r in range(len(workers))]
    assert all(w["numbers"] == expected for w in workers)


def test_sum_numbers(workers: list[dict[str, Any]]) -> None:
    """Numbers are added in float64."""
    n = len(workers)
    for worker in workers:
        assert worker["sum of numbers"] == pytest.approx([n * 0.5, n * (n - 1) / 2, -n * 1e300], rel=1e-15)


def test_barrier(workers: list[dict[str, Any]]) -> None:
    """No worker leaves the barrier before the last one has come."""
    times = [w["barrier"] for w in workers]
    assert min(after for _, after in times) >= max(before for before, _ in times)


def test_agree(workers: list[dict[str, Any]]) -> None:
    """The same list on every worker is fine; otherwise every worker names the first entry that differs, and by whom."""
    assert all(w["agree"] == ("nothing", "") for w in workers)
    if len(workers) > 1:
        for worker in workers:
            for case, held in (("disagree", ("has b0", "has b0", "has b1")), ("disagree in length", ("nothing", "b"))):
                kind, text = worker[case]
                assert kind == "LayoutError"
                assert "models differ" in text
                assert "number 1" in text
                assert all(f"worker {r}" in text for r in range(len(workers)))
                assert all(h in text for h in held)


def test_first_difference(workers: list[dict[str, Any]]) -> None:
    """The first tensor whose bits differ is named, with the workers that differ from worker 0."""
    assert all(w["difference"] == (("odd", [1]) if len(workers) > 1 else None) for w in workers)


def test_traffic_is_counted_by_lane(workers: list[dict[str, Any]]) -> None:
    """What is sent is counted on the lane of its key; alone, nothing is."""
    for worker in workers:
        sent = worker["traffic"]
        if len(workers) == 1:
            assert not any(sent.values())
        else:
            assert set(sent) == set(LANES)
            assert sent["gradient"] > sent["norm"] > 0


# --- jobs that fail


class Oops(Exception):
    pass


def raise_on_one(comm: Backend, culprit: int, own: bool) -> str:
    """The culprit raises, the others wait for it; they write down what they were told."""
    collectives.barrier(comm)
    if comm.rank == culprit:
        raise UsageError("cannot be meant") if own else Oops("out of luck")
    try:
        comm.all_reduce(torch.zeros(4), "gradient/0").wait()
    except CommError as error:
        raise CommError(f"told: {error}") from error
    return "went on"


@pytest.mark.parametrize(("backend", "culprit"), [("solo", 0), *((name, r) for name in BACKENDS[1:] for r in (0, 1))])
def test_worker_that_raises(backend: str, culprit: int) -> None:
    """`run` raises what the culprit raised, and soon: the others are told, and do not wait for it until their time-out.

    An error of the user's arrives as it is from this process, and as a RuntimeError with a traceback from another.
    """
    begin = time.monotonic()
    in_process = backend in ("solo", "threads")
    with pytest.raises(Oops if in_process else RuntimeError, match="out of luck") as caught:
        everywhere(raise_on_one, culprit, False, backend=backend, timeout_s=60.0)
    if not in_process:
        assert f"worker {culprit}" in str(caught.value)
        assert "Traceback" in str(caught.value)
    assert time.monotonic() - begin < TROUBLE_TIMEOUT_S


def test_error_of_ours_keeps_its_type(backend: str) -> None:
    """A DtrainError in a worker is the same type outside, so that the exit code is right."""
    with pytest.raises(UsageError, match="cannot be meant"):
        everywhere(raise_on_one, 0, True, backend=backend, timeout_s=60.0)


def meet_and_sum(comm: Backend) -> None:
    collectives.barrier(comm)  # where the news may come already
    comm.all_reduce(torch.zeros(4), "gradient/0").wait()


def notes_of_the_others(comm: Backend, folder: str) -> None:
    if comm.rank == 1:
        collectives.barrier(comm)
        raise Oops("out of luck")
    begin = time.monotonic()
    kind, text = outcome(meet_and_sum, comm)
    with open(os.path.join(folder, str(comm.rank)), "w") as file:
        file.write(f"{time.monotonic() - begin:.1f}\n{kind}\n{text}")


@pytest.mark.parametrize("name", ["threads", *PROCESSES])
def test_the_others_get_a_comm_error(name: str, tmp_path: Any) -> None:
    """Who waits for a worker that raised gets a CommError that names what is missing, long before the time-out."""
    with pytest.raises((Oops, RuntimeError), match="out of luck"):
        everywhere(notes_of_the_others, str(tmp_path), backend=name, workers=3, timeout_s=60.0)
    for rank in (0, 2):
        waited, kind, text = (tmp_path / str(rank)).read_text().split("\n", 2)
        assert kind == "CommError"
        assert float(waited) < TROUBLE_TIMEOUT_S
        assert "gradient/0" in text or "worker 1" in text


def die(comm: Backend, how: str) -> None:
    collectives.barrier(comm)
    if comm.rank == 1:
        if how == "exit":
            os._exit(3)
        os.kill(os.getpid(), signal.SIGKILL)
    comm.all_reduce(torch.zeros(4), "gradient/0").wait()


@pytest.mark.parametrize("how", ["exit", "kill"])
@pytest.mark.parametrize("name", PROCESSES)
def test_worker_that_dies(name: str, how: str) -> None:
    """A worker that ends without a word is named, and how it ended."""
    ended = {"exit": "ended with exit code 3", "kill": "was killed by SIGKILL"}[how]
    begin = time.monotonic()
    with pytest.raises(CommError, match=rf"^worker 1 {ended}"):
        everywhere(die, how, backend=name, workers=3, timeout_s=60.0)
    assert time.monotonic() - begin < TROUBLE_TIMEOUT_S


def differ(comm: Backend) -> None:
    comm.all_reduce(torch.zeros(3 + comm.rank), "gradient/0").wait()


@pytest.mark.parametrize("name", ["threads", "ps"])
def test_tensors_of_different_sizes(name: str) -> None:
    """Tensors that cannot be added are a LayoutError that names key and workers.

    Over all-reduce the library would abort, which is why layouts are compared by `agree` before anything is sent.
    """
    with pytest.raises(LayoutError, match=r"gradient/0.*worker [01].*workers? \[?[01]"):
        everywhere(differ, backend=name)


def never_come(comm: Backend) -> None:
    if comm.rank == 1:
        return
    comm.all_reduce(torch.zeros(3), "gradient/0").wait()


@pytest.mark.parametrize("name", ["threads", *PROCESSES])
def test_worker_that_never_comes(name: str) -> None:
    """Who waits for a worker that has finished, or is late, gets a CommError within the time given."""
    begin = time.monotonic()
    with pytest.raises(CommError, match="1"):
        everywhere(never_come, backend=name, timeout_s=1.5)
    assert time.monotonic() - begin < TROUBLE_TIMEOUT_S


def jitter(comm: Backend, seed: int) -> list[Any]:
    """Many sums, with pauses that differ from worker to worker and from run to run."""
    pauses = random.Random(seed * 100 + comm.rank)
    results = []
    for number in range(12):
        flat = real_values(comm.rank + 10 * number, 3000)
        work = comm.all_reduce(flat, f"{LANES[number % 3]}/{number}")
        time.sleep(pauses.random() * 0.01)
        work.wait()
        results.append(flat.view(torch.int32).numpy())
    return results


def test_sums_do_not_depend_on_timing() -> None:
    """Over the parameter server and over threads the bits are the same, whoever is slow."""
    runs = [everywhere(jitter, seed, backend="ps", workers=3)[0] for seed in (1, 2)]
    runs.append(everywhere(jitter, 3, backend="threads", workers=3)[0])
    for run in runs[1:]:
        assert all((a == b).all() for a, b in zip(run, runs[0], strict=True))
