"""What predictions mean, in words: which backend, how many servers, what batch, where more workers stop paying.

Everything here asks a function for predictions, and knows nothing of probes or hosts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dtrain.measure.predict import Prediction

ENOUGH = 0.9
"""The efficiency that the advised batch reaches."""
PAYS = 0.5
"""What doubling the workers must add to the samples per second to pay."""
BINDS = 0.02
"""A server more that shortens the step by less than this part does not matter."""

_MOST_SAMPLES = 2**20

Ask = Callable[[str, int, int, float], Prediction]
"""(backend, workers, servers, samples of each worker) -> what is predicted."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked, beside the predictions themselves."""

    backends: Sequence[str]
    """Which may be taken."""
    workers: Sequence[int]
    """How many, ascending."""
    servers: Sequence[int]
    """How many, for ps, ascending."""
    batch: Callable[[int], float]
    """Workers -> samples of each."""
    most_servers: Callable[[int], int]
    """Workers -> servers that there could be."""
    fits: Callable[[float], bool] = lambda _: True
    """Whether a worker has the memory for a micro-batch of that many samples."""


def best(ask: Ask, question: Question, backend: str, workers: int) -> Prediction:
    """The fastest number of servers, of those asked for."""
    counts = [k for k in question.servers if k <= question.most_servers(workers)] if backend == "ps" else [1]
    found = [ask(backend, workers, k, question.batch(workers)) for k in counts or [1]]
    return min(found, key=lambda p: p.boxes.step_ms)


def words(ask: Ask, question: Question) -> list[str]:
    """The answers, a sentence or two each."""
    several = [n for n in question.workers if n > 1]
    if not several:
        return ["One worker sends nothing: there is nothing to choose."]
    said = [which_backend(ask, question, several)]
    if "ps" in question.backends:
        said.append(how_many_servers(ask, question, several[-1]))
    said.append(what_batch(ask, question, several))
    said.append(how_many_workers(ask, question))
    return said


def which_backend(ask: Ask, question: Question, several: Sequence[int]) -> str:
    """The fastest backend for each number of workers, as ranges."""
    if len(question.backends) < 2:
        return f"Backend: {question.backends[0]} alone was asked for."
    winners = []
    for n in several:
        found = {b: best(ask, question, b, n) for b in question.backends}
        name = min(found, key=lambda b: found[b].boxes.step_ms)
        others = min(p.boxes.step_ms for b, p in found.items() if b != name)
        clear = all(found[name].high_ms < p.low_ms for b, p in found.items() if b != name)
        winners.append((n, name, found[name], others / found[name].boxes.step_ms, clear))
    parts = []
    for n, name, chosen, lead, clear in winners:
        servers = f" with {_count(chosen.setting.servers, 'server')}" if name == "ps" else ""
        sure = "" if clear else ", but the intervals overlap"
        parts.append(f"{n} workers: {name}{servers} ({_times(lead)}{sure})")
    names = {name for _, name, *_ in winners}
    if len(names) == 1:
        head = f"Backend: {winners[0][1]} is the fastest from {winners[0][0]} workers on"
    else:
        last = winners[-1][1]
        since = next(n for i, (n, *_) in enumerate(winners) if all(w[1] == last for w in winners[i:]))
        head = f"Backend: from {since} workers on, {last} is the fastest"
    return f"{head}. {'; '.join(parts)}."


def how_many_servers(ask: Ask, question: Question, workers: int) -> str:
    """The smallest number of servers that one more would not make faster."""
    most = question.most_servers(workers)
    batch = question.batch(workers)
    counts = sorted({k for k in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, most) if k <= most})
    steps = {k: ask("ps", workers, k, batch).boxes.step_ms for k in counts}
    fastest = min(steps.values())
    enough = next(k for k in counts if steps[k] <= fastest * (1 + BINDS))
    if enough == 1:
        return f"Servers: with {workers} workers one server is enough; more shorten the step by less than 2 %."
    gain = steps[1] / steps[enough]
    text = f"Servers: with {workers} workers the servers bind up to {enough} of them ({gain:.1f} times as fast as one)"
    return f"{text}{'; more would help still, if there were hosts for them' if enough == most else ''}."


def what_batch(ask: Ask, question: Question, several: Sequence[int]) -> str:
    """The smallest batch per worker with which communication costs less than a tenth of the step."""
    parts = []
    for n in several:
        backend = min(question.backends, key=lambda b: best(ask, question, b, n).boxes.step_ms)
        servers = best(ask, question, backend, n).setting.servers
        samples = batch_for(ask, question, backend, n, servers)
        if samples is None:
            parts.append(f"{n} workers: none up to {_MOST_SAMPLES}, or to what fits")
        else:
            parts.append(f"{n} workers: {samples} ({backend})")
    return f"Batch per worker for {ENOUGH:.0%} efficiency: {'; '.join(parts)}."


def batch_for(ask: Ask, question: Question, backend: str, workers: int, servers: int) -> int | None:
    """Smallest number of samples per worker whose predicted efficiency is `ENOUGH`; None where there is none."""

    def enough(samples: int) -> bool:
        return ask(backend, workers, servers, samples).efficiency >= ENOUGH

    high = 1
    while not enough(high):
        high *= 2
        if high > _MOST_SAMPLES or not question.fits(high):
            return None
    low = high // 2
    while high - low > max(1, high // 32):
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def how_many_workers(ask: Ask, question: Question) -> str:
    """The first number of workers whose doubling adds less than half."""
    backend = min(question.backends, key=lambda b: best(ask, question, b, question.workers[-1]).boxes.step_ms)
    rates = {n: best(ask, question, backend, n).samples_per_s for n in question.workers}
    pairs = [(n, 2 * n) for n in question.workers if 2 * n in rates]
    if not pairs:
        return "Workers: ask for numbers that double, such as --workers 1,2,4,8, to see where more stop paying."
    for n, twice in pairs:
        gain = rates[twice] / rates[n] - 1
        if gain < PAYS:
            how = f"adds {gain:.0%}" if gain > 0 else f"takes away {-gain:.0%}"
            if n == pairs[0][0]:
                little = f", less than {PAYS:.0%}" if gain > 0 else ""
                return f"Workers: from {n} to {twice} {how} of the samples per second ({backend}){little}."
            return (
                f"Workers: up to {n} each doubling adds {PAYS:.0%} of the samples per second or more ({backend}); "
                f"going on to {twice} {how}."
            )
    return (
        f"Workers: up to {pairs[-1][1]} each doubling adds more than {PAYS:.0%} of the samples per second ({backend})."
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _times(lead: float) -> str:
    return "as fast as the next" if lead < 1.005 else f"{lead:.2f} times as fast as the next"
