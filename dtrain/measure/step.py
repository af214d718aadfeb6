"""The jobs of one synchronous training step, and its boxes: what `dtrain.measure.simulate` plays.

All workers are alike, so one of them is played, with what the others ask of the links and servers that they share:

apart    each worker and each server has a host of its own, and a full-duplex link. A worker's part of a sum arrives at
         k servers that take n parts each: n/k of the bytes on a server's link. Jiang et al. 2020 ("BytePS"), 3.1.
beside   the servers live on the workers' hosts, and share their links.
host     everything on one host: all bytes go through one shared path, and every process wants the same cores.

Ring all-reduce: 2 (n-1)/n of the bytes in each direction of every link and 2 (n-1) latencies, for each bucket
(Patarasuk & Yuan 2009). Parameter server: buckets travel in parts; a server adds a part when all workers' have come,
makes its share of the optimizer's step where servers do that, and answers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dtrain.comm import parts
from dtrain.measure.intervals import merged, overlaps
from dtrain.measure.simulate import Job, play
from dtrain.measure.stopwatch import PHASES

Place = Literal["apart", "beside", "host"]

WHOLE_BYTES = 2**16
"""A message below this goes to one server whole."""

_COMPUTE = "compute"
_PHASES = (*PHASES, "rest")


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Gradients that travel together."""

    nbytes: float
    """Size on the wire."""
    ready: float
    """When it is full: the part of the last backward that is over, 0 to 1."""

    def __post_init__(self) -> None:
        if not (self.nbytes >= 0 and 0 <= self.ready <= 1):
            raise ValueError(f"nbytes is {self.nbytes}, ready {self.ready}: give 0 or more, and 0 to 1")


@dataclass(frozen=True, kw_only=True)
class NormMessage:
    """A synchronised batch-norm layer's statistics: a sum in forward and one in backward, each of which blocks."""

    forward_bytes: float
    """Size of the one in forward."""
    backward_bytes: float
    """Size of the one in backward."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one worker has to do in a step, by itself."""

    data_s: float = 0.0
    """Fetching the samples."""
    forward_s: float
    """Forward of one micro-batch."""
    backward_s: float
    """Backward of one micro-batch."""
    optimizer_s: float = 0.0
    """The optimizer's step."""
    rest_s: float = 0.0
    """What the trainer does beside all that."""
    micro_batches: int = 1
    """Forwards and backwards in a step; the last one sends."""
    buckets: tuple[Bucket, ...] = ()
    """In the order in which they leave."""
    norms: tuple[NormMessage, ...] = ()
    """In the order of forward; evenly spread over it."""


@dataclass(frozen=True, kw_only=True)
class Wiring:
    """How the workers are connected."""

    backend: Literal["ps", "allreduce", "solo"]
    """solo sends nothing."""
    workers: int = 1
    """n."""
    servers: int = 1
    """k, of ps."""
    place: Place = "apart"
    """Who shares a host."""
    alpha_s: float = 0.0
    """Latency of one message, one way."""
    small_alpha_s: float | None = None
    """The same for messages below `small_bytes`, where they take another way; None: the same."""
    small_bytes: int = 2**14
    """What counts as small."""
    bytes_per_s: float = math.inf
    """Rate of a host's link, in each direction. With place `host`: of the path that all share, by server for ps."""
    core_s_per_byte: float = 0.0
    """What a byte costs the processors, those of sender and receiver together."""
    cores: float = 1.0
    """Processors of a host."""
    threads: float = 1.0
    """Processors that a worker's model keeps busy."""
    part_bytes: int = 2**20
    """Size at which ps cuts a bucket."""
    sum_bytes_per_s: float = math.inf
    """Rate at which a server adds what has come."""
    update_on_servers: bool = False
    """The servers make the optimizer's step, each its share."""
    sharded: bool = False
    """Of allreduce: each worker gets the sum of its part, steps that, and all gather the parts."""
    uneven: float = 0.0
    """How unevenly the links of workers share a server's: 0 alike, 1 as a stick broken at random places."""
    lateness: float = 0.0
    """How much later than a typical worker the slowest one is, as part of its computing time: all wait for it."""

    def __post_init__(self) -> None:
        if self.workers < 1 or self.servers < 1:
            raise ValueError(f"workers is {self.workers}, servers {self.servers}: a job has at least one")
        if self.sharded and self.backend == "ps":
            raise ValueError("sharded with ps: only allreduce is modelled so")


@dataclass(frozen=True, kw_only=True)
class Boxes:
    """Where a step's time goes, in ms, by the meter's names: phases, rest and exposed communication are the step."""

    step_ms: float
    """The whole step."""
    data_ms: float
    """Fetching samples."""
    forward_ms: float
    """Forward, without waiting."""
    backward_ms: float
    """Backward, without waiting."""
    optimizer_ms: float
    """The optimizer's step on the worker."""
    rest_ms: float
    """What the trainer does beside all that."""
    exposed_comm_ms: float
    """Standing still for a transfer."""
    hidden_comm_ms: float
    """Transfers that went on while the worker computed."""
    wait_ms: float
    """Of the exposed communication: waiting for the slowest worker."""
    transfer_ms: float
    """Of the exposed communication: the transfers themselves."""

    @property
    def compute_ms(self) -> float:
        """Forward, backward and optimizer."""
        return self.forward_ms + self.backward_ms + self.optimizer_ms


@dataclass(frozen=True)
class _Hop:
    """One leg of a sum."""

    lane: str
    uses: dict[str, float]
    delay_s: float = 0.0
    blocks_s: float = 0.0  # a latency in which the lane is held
    least_s: float = 0.0


def boxes(work: Work, wiring: Wiring) -> Boxes:
    """Play one step; where its time goes."""
    step = _Step(work, wiring)
    end_s = play(step.jobs, capacity(wiring))
    phases = {phase: [j for j in step.jobs if j.lane == _COMPUTE and j.name.startswith(phase)] for phase in _PHASES}
    seconds = {phase: sum(j.end_s - j.start_s for j in jobs) for phase, jobs in phases.items()}
    computing = [(j.start_s, j.end_s) for jobs in phases.values() for j in jobs]
    exposed_s = max(0.0, end_s - sum(seconds.values()))
    travelling = [(j.released_s - j.delay_s, j.end_s) for j in step.jobs if j.lane != _COMPUTE]
    wait_s = min(exposed_s, wiring.lateness * sum(seconds.values()) if step.sends else 0.0)
    return Boxes(
        step_ms=end_s * 1e3,
        **{f"{phase}_ms": s * 1e3 for phase, s in seconds.items()},
        exposed_comm_ms=exposed_s * 1e3,
        hidden_comm_ms=sum(overlaps(merged(computing), merged(travelling))) * 1e3,
        wait_ms=wait_s * 1e3,
        transfer_ms=(exposed_s - wait_s) * 1e3,
    )


def capacity(wiring: Wiring) -> dict[str, float]:
    """What there is of each resource, per second."""
    rate = wiring.bytes_per_s
    shared = rate * (wiring.servers if wiring.backend == "ps" else 1)
    links = dict.fromkeys(("out", "in", "server out", "server in"), rate)
    return {**links, "bus": shared, "server": wiring.sum_bytes_per_s, "cores": wiring.cores}


class _Step:
    """Builds the jobs of a step, in order."""

    def __init__(self, work: Work, wiring: Wiring) -> None:
        self.jobs: list[Job] = []
        self.sends = wiring.backend != "solo" and wiring.workers > 1 and bool(work.buckets or work.norms)
        self._work = work
        self._wiring = wiring
        self._before: list[Job] = []  # what the next piece of computing waits for
        self._computed_s = 0.0
        self._late_s = 0.0
        self._build()
        if wiring.backend == "ps" and wiring.place != "host" and wiring.uneven:
            self._await_slowest()

    def _await_slowest(self) -> None:
        """A part is added up when the slowest worker's has come: by then the others' next parts are there as well.

        All bytes take the same time in all; but of what has to pass before the first part is complete there is more,
        and answers begin later. No worker gets further ahead of the slowest than it may have parts unanswered.
        """
        up = [job for job in self.jobs if job.lane == "gradient up"]
        shared = [name for name in ("server in", "in") if up and name in up[0].uses]
        total = sum(job.uses[name] for name in shared for job in up)
        before = passed = 0.0
        for job in up:
            for name in shared:
                before += job.uses[name] / total
                ahead = parts.UNDER_WAY * job.uses[name] / total * (1 - 1 / self._wiring.workers)
                until = min(slowest_arrival(self._wiring.workers, self._wiring.uneven, before), before + ahead)
                until = max(passed, min(1.0, until))
                job.uses = {**job.uses, name: total * (until - passed)}
                passed = until

    def _build(self) -> None:
        work = self._work
        self._compute("data", work.data_s)
        answers: list[Job] = []
        for number in range(work.micro_batches):
            last = number == work.micro_batches - 1
            self._forward()
            answers += self._backward(work.buckets if last and self.sends else ())
        if self._wiring.sharded and self.sends:
            self._before += self._step_in_parts(answers)
        else:
            self._before += answers
            if not (self._wiring.update_on_servers and self.sends):
                self._compute("optimizer", work.optimizer_s)
        self._compute("rest", work.rest_s)

    def _step_in_parts(self, sums: Sequence[Job]) -> list[Job]:
        """A worker steps its part of each bucket when the sum is there, and sends it to all; the last jobs of that."""
        total = sum(bucket.nbytes for bucket in self._work.buckets)
        gathers: list[Job] = []
        for bucket, arrived in zip(self._work.buckets, sums, strict=True):
            self._before.append(arrived)
            share = bucket.nbytes / total / self._wiring.workers if total else 0.0
            self._compute("optimizer", self._work.optimizer_s * share)
            gathers += self._sum("gradient", bucket.nbytes)
        return gathers

    def _forward(self) -> None:
        norms = self._work.norms if self.sends else ()
        piece_s = self._work.forward_s / (len(norms) + 1)
        for norm in norms:
            self._compute("forward", piece_s)
            self._before += self._sum("norm", norm.forward_bytes)
        self._compute("forward", piece_s)

    def _backward(self, buckets: Sequence[Bucket]) -> list[Job]:
        """The pieces of backward between the moments at which something is sent; the last jobs of its buckets."""
        norms = self._work.norms if self.sends else ()
        moments: list[tuple[float, Bucket | NormMessage]] = [(bucket.ready, bucket) for bucket in buckets]
        moments += [((i + 1) / (len(norms) + 1), norm) for i, norm in enumerate(reversed(norms))]
        done = 0.0
        answers: list[Job] = []
        for at, what in sorted(moments, key=lambda moment: moment[0]):
            self._compute("backward", (at - done) * self._work.backward_s)
            done = at
            if isinstance(what, Bucket):
                answers += self._sum("gradient", what.nbytes)
            else:
                self._before += self._sum("norm", what.backward_bytes)
        self._compute("backward", (1.0 - done) * self._work.backward_s)
        return answers

    def _compute(self, phase: str, seconds: float) -> None:
        if seconds <= 0:
            return
        wiring = self._wiring
        beside = wiring.workers if wiring.place == "host" else 1
        uses = {"cores": seconds * wiring.threads * beside}
        job = Job(name=phase, lane=_COMPUTE, uses=uses, least_s=seconds, after=tuple(self._before))
        self.jobs.append(job)
        self._before = [job]
        self._computed_s += seconds

    def _sum(self, kind: str, nbytes: float) -> list[Job]:
        """A sum over workers that begins when the last piece of computing is over; its last jobs."""
        wiring = self._wiring
        parts = 1
        if wiring.backend == "ps":
            parts = max(1, math.ceil(nbytes / wiring.part_bytes))
        late_s = wiring.lateness * self._computed_s
        if kind == "norm":  # it blocks all, and lets them go on together
            late_s, self._late_s = late_s - self._late_s, late_s
        answers: list[Job] = []
        for _ in range(parts):
            before: tuple[Job, ...] = tuple(self._before)
            for number, hop in enumerate(self._hops(kind, nbytes / parts)):
                lane, delay_s = f"{kind} {hop.lane}", hop.delay_s + (max(0.0, late_s) if number == 0 else 0.0)
                if hop.blocks_s:
                    held = Job(name=kind, lane=lane, least_s=hop.blocks_s, after=before, delay_s=delay_s)
                    self.jobs.append(held)
                    before, delay_s = (held,), 0.0
                job = Job(name=kind, lane=lane, uses=hop.uses, least_s=hop.least_s, after=before, delay_s=delay_s)
                self.jobs.append(job)
                before = (job,)
            answers += before
        return answers

    def _hops(self, kind: str, nbytes: float) -> list[_Hop]:
        wiring = self._wiring
        small = nbytes < wiring.small_bytes and wiring.small_alpha_s is not None
        alpha_s = (wiring.small_alpha_s or 0.0) if small else wiring.alpha_s
        if wiring.backend == "ps":
            return self._server_hops(nbytes, alpha_s)
        return ring_hops(wiring, nbytes, alpha_s, part=0.5 if wiring.sharded and kind == "gradient" else 1.0)

    def _server_hops(self, nbytes: float, alpha_s: float) -> list[_Hop]:
        wiring, n = self._wiring, self._wiring.workers
        k = wiring.servers if nbytes >= WHOLE_BYTES else 1
        half = wiring.core_s_per_byte / 2  # sender's and receiver's
        if wiring.place == "host":
            up = down = {"bus": n * nbytes, "cores": 2 * half * n * nbytes}
        elif wiring.place == "beside":
            sent, served = nbytes * (k - 1) / k, nbytes * (n - 1) / k
            up = {"out": sent, "in": served, "cores": half * (sent + served)}
            down = {"in": sent, "out": served, "cores": up["cores"]}
        else:
            up = {"out": nbytes, "server in": n * nbytes / k, "cores": half * nbytes}
            down = {"in": nbytes, "server out": n * nbytes / k, "cores": half * nbytes}
        total = sum(bucket.nbytes for bucket in self._work.buckets)
        step_s = self._work.optimizer_s * nbytes / total / k if wiring.update_on_servers and total else 0.0
        return [
            _Hop("up", up),
            _Hop("server", {"server": n * nbytes / k}, delay_s=alpha_s, least_s=step_s),
            _Hop("down", down),
            _Hop("arrived", {}, delay_s=alpha_s),
        ]


def ring_hops(wiring: Wiring, nbytes: float, alpha_s: float, *, part: float = 1.0) -> list[_Hop]:
    """A sum by a ring, as one leg: the ring is busy in every link at once.

    Args:
        part: of the whole sum; its halves, reduce-scatter and all-gather, cost the same.
    """
    n = wiring.workers
    turns = 2 * (n - 1) * part
    cost = wiring.core_s_per_byte * nbytes * turns
    if wiring.place == "host":
        uses = {"bus": turns * nbytes, "cores": cost}
    else:
        uses = dict.fromkeys(("out", "in"), turns / n * nbytes) | {"cores": cost / n}
    return [_Hop("ring", uses, blocks_s=turns * alpha_s)]


def slowest_arrival(workers: int, uneven: float, part: float) -> float:
    """When the slowest of `workers` equal transfers into one link has that part of its bytes, as a part of the time
    in which all of them are there.

    Each has a share of the link as long as it lasts; the shares are those of a stick broken at random places (the mean
    of the i-th smallest of n pieces is 1/n (1/n + ... + 1/(n-i+1)); David and Nagaraja 2003, section 6.4), or all
    alike, or in between. When one is over, the others have its share.
    """
    stick = [sum(1 / (workers - j) for j in range(i + 1)) / workers for i in range(workers)]
    shares = [(1 - uneven) / workers + uneven * piece for piece in stick]
    left = [1.0] * workers  # of each, the slowest first
    now = 0.0
    for last in reversed(range(workers)):
        active = sum(shares[: last + 1])
        rates = [share / active * workers for share in shares[: last + 1]]
        wanted = (part - (1.0 - left[0])) / rates[0]
        ends = left[last] / rates[last]
        if wanted <= ends or last == 0:
            return now + max(0.0, wanted)
        now += ends
        left = [max(0.0, have - rate * ends) for have, rate in zip(left, rates, strict=False)]
    return now


# -- closed forms, which the play must meet in the limits


def ring_s(nbytes: float, workers: int, *, alpha_s: float, bytes_per_s: float) -> float:
    """Ring all-reduce of one message with nothing beside it: 2 (n-1)/n bytes/rate + 2 (n-1) latencies."""
    return 2 * (workers - 1) * (nbytes / workers / bytes_per_s + alpha_s)


def apart_s(nbytes: float, workers: int, servers: int, *, bytes_per_s: float) -> float:
    """Parameter servers on hosts of their own, in the limit of small parts: the worker's or the servers' link binds."""
    return max(nbytes / bytes_per_s, workers * nbytes / (servers * bytes_per_s))


def beside_s(nbytes: float, workers: int, *, bytes_per_s: float) -> float:
    """A server beside each worker, in the limit of small parts: the same as a ring, without its latencies."""
    return 2 * (workers - 1) * nbytes / (workers * bytes_per_s)
