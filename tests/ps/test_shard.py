"""A server's mind as a whole: workers, rounds and steps on a network that loses, repeats, reorders and damages."""

from __future__ import annotations

from collections import Counter, defaultdict
from unittest import mock

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dtrain.ps import turn, wire
from dtrain.ps.layout import Rules
from tests.ps.acting import RATIO, Host, Net, by_step, gradient, hosted, sum_of, summing

STEPS = 3
number = st.integers(0, 10**6)


class Trouble(RuleBasedStateMachine):
    """What a network and its machines do. What is to hold, whatever they do, is said by the classes below."""

    net: Net | None = None
    restarts = 3
    looked_at = -1

    def start(self, net: Net) -> None:
        self.net = net

    def teardown(self) -> None:
        try:
            if self.net is not None:
                ended = self.net.settle()
                self.all_is_well()
                if ended:
                    self.at_the_end(self.net)
        finally:
            self.stop()

    def stop(self) -> None:
        pass

    def at_the_end(self, net: Net) -> None:
        if all(w.state != "late" for w in net.workers):
            assert all(host.shard.members.finished for host in net.hosts)

    @rule(index=number, count=st.integers(1, 12))
    def deliver(self, index: int, count: int) -> None:
        """In any order."""
        assert self.net is not None
        for _ in range(min(count, len(self.net.packets))):
            self.net.deliver(index % len(self.net.packets))

    @rule(count=st.integers(5, 60))
    def deliver_in_order(self, count: int) -> None:
        assert self.net is not None
        for _ in range(count):
            if self.net.packets:
                self.net.deliver(0)
            for server in range(len(self.net.hosts)):
                self.net.work(server)

    @rule(index=number, how=st.sampled_from(["drop", "duplicate", "damage", "damage"]))
    def spoil(self, index: int, how: str) -> None:
        net = self.net
        assert net is not None
        if not net.packets:
            return
        index %= len(net.packets)
        packet = net.packets[index]
        if how == "duplicate":
            net.packets.append(packet)
        elif isinstance(packet.message, wire.Bye):
            return
        elif how == "drop":
            net.packets.pop(index)
        else:
            net.damage(index)

    @rule(rank=number, server=number)
    def reconnect(self, rank: int, server: int) -> None:
        """The connection breaks: what is on its way is lost, and what is unanswered is sent again."""
        net = self.net
        assert net is not None
        worker, server = net.workers[rank % net.world_size], server % len(net.hosts)
        who = worker.lines[server].session
        if worker.state == "runs":
            net.packets = [p for p in net.packets if p.session != who]
            net.hosts[server].act(net.hosts[server].shard.away(who, net.now))
            net.hosts[server].shard.back(who)
            worker.resend(server)

    @rule(server=number, count=st.integers(1, 5))
    def work(self, server: int, count: int) -> None:
        assert self.net is not None
        for _ in range(count):
            self.net.work(server % len(self.net.hosts))

    @rule()
    def time_passes(self) -> None:
        net = self.net
        assert net is not None
        net.now += 0.01
        for server, host in enumerate(net.hosts):
            host.act(host.shard.tick(net.now))
            net.collect(server)

    def may_break(self) -> bool:
        return self.net is not None and self.restarts > 0

    @precondition(may_break)
    @rule(rank=number)
    def kill_a_worker(self, rank: int) -> None:
        net = self.net
        assert net is not None
        running = [w for w in net.workers if w.state == "runs"]
        ready = all(h.shard.members.complete for h in net.hosts)
        if net.on_loss == "fail" or (net.on_loss == "wait" and len(running) < net.world_size):
            return
        if net.on_loss == "drop" and (len(running) < 2 or not ready):
            return
        self.restarts -= 1
        net.kill(running[rank % len(running)].rank)

    @rule(server=number)
    def notice(self, server: int) -> None:
        assert self.net is not None
        self.net.notice(server % len(self.net.hosts))

    @rule()
    def replace_the_dead(self) -> None:
        assert self.net is not None
        for worker in self.net.workers:
            if worker.state == "dead" and self.net.on_loss == "wait":
                worker.restart()

    @precondition(may_break)
    @rule(server=number)
    def restart_a_server(self, server: int) -> None:
        net = self.net
        assert net is not None
        if net.on_loss == "wait" and all(w.state != "done" for w in net.workers):
            self.restarts -= 1
            net.restart_server(server % len(net.hosts))

    @invariant()
    def all_is_well(self) -> None:
        if self.net is None:
            return
        for host in self.net.hosts:
            assert host.shard.members.failed is None
            for member in host.shard.members.present:
                assert all(seq >= member.low for seq in member.answers)
                assert not member.pending.keys() & member.answers.keys()
                kept = [payload.nbytes for _, payload in member.answers.values() if payload is not None]
                assert member.held_bytes == sum(kept) + sum(member.pending.values())
        done = sum(len(h.updates) + len(h.summed) for h in [*self.net.hosts, *self.net.past])
        if done != self.looked_at:
            self.looked_at = done
            self.look(self.net)

    def look(self, net: Net) -> None:
        pass


class Sums(Trouble):
    """Every sum is of exactly one contribution of each worker, in worker order, and the same on all workers."""

    @initialize(workers=st.integers(2, 4), servers=st.integers(1, 3), on_loss=st.sampled_from(["fail", "wait"]))
    def begin(self, workers: int, servers: int, on_loss: str) -> None:
        self.start(Net(workers, servers, on_loss, summing(4)))  # each worker compares with the sum that it expects

    def at_the_end(self, net: Net) -> None:
        super().at_the_end(net)
        for host in net.hosts:
            last = [(ranks, total) for epoch, ranks, total in host.summed if epoch == host.epoch]
            assert len(last) == 8
            assert all(ranks == list(range(net.world_size)) for ranks, _ in last)

    def look(self, net: Net) -> None:
        for host in net.hosts:
            seen = Counter((epoch, float(total[0])) for epoch, _, total in host.summed)
            assert not seen or max(seen.values()) == 1


class Hosted(Trouble):
    """Parameters that servers hold."""

    rules: Rules

    def start_hosted(self, rules: Rules, workers: int, servers: int, on_loss: str) -> None:
        self.rules = rules
        self.patch = mock.patch.object(turn, "PART_BYTES", 16)
        self.patch.start()
        layouts = {1: [(0, 1)], 2: [(0, 1), (1,)], 3: [(0,), (0, 1), (1,)]}[servers]
        self.start(Net(workers, servers, on_loss, hosted(rules, layouts, STEPS)))

    def stop(self) -> None:
        if hasattr(self, "patch"):
            self.patch.stop()


class Steps(Hosted):
    """Synchronous steps: of all workers, or of the same ones on all servers."""

    @initialize(
        workers=st.integers(2, 4),
        servers=st.integers(1, 3),
        mode=st.sampled_from(
            [
                *("plain wait", "plain fail", "clip wait", "agreed wait", "agreed drop", "agreed drop clip"),
                *("ratios wait", "ratios fail", "clip ratios wait"),
            ]
        ),
        backup=st.integers(0, 1),
    )
    def begin(self, workers: int, servers: int, mode: str, backup: int) -> None:
        agreed = "agreed" in mode
        backup = backup if agreed else 0
        rules = Rules(agreed=agreed, clip="clip" in mode, ratios="ratios" in mode, backup_workers=backup)
        on_loss = next(w for w in mode.split() if w in ("wait", "fail", "drop"))
        self.start_hosted(rules, workers, servers, on_loss)

    def look(self, net: Net) -> None:
        made: dict[tuple[int, int], set[tuple[int, ...]]] = defaultdict(set)
        for host in net.hosts:
            for epoch in {e for e, _ in host.updates}:
                for step, buckets in by_step(host, epoch).items():
                    for bucket, gradients in buckets.items():
                        made[epoch, step].add(tuple(g.rank for g in gradients))
                        for g in gradients:  # the right one, and whole
                            assert torch.equal(torch.cat(g.payloads), gradient(g.rank, step, bucket))
        for ranks in made.values():
            assert len(ranks) == 1  # on all servers
            (chosen,) = ranks
            assert list(chosen) == sorted(set(chosen))
            if not self.rules.agreed:
                assert list(chosen) == list(range(net.world_size))

    def at_the_end(self, net: Net) -> None:
        super().at_the_end(net)
        epoch = net.hosts[0].epoch
        made = [by_step(host, epoch) for host in net.hosts]
        for steps in made:
            assert len(steps) == STEPS
        ranks = {s: next([g.rank for g in gs] for m in made for gs in m[s].values()) for s in range(STEPS)}
        for worker in net.workers:
            for e, step, closed in worker.closed:
                counted = {c.counted for c in closed}
                if e == epoch:
                    assert counted == ({len(ranks[step])} if worker.rank in ranks[step] else {0})
            for (e, step, bucket, part), values in worker.pulled.items():
                if e == epoch and (not self.rules.agreed or (step < STEPS and worker.rank in ranks[step])):
                    for host in net.hosts:
                        snaps = host.snaps.get((epoch, bucket))
                        if snaps is not None and torch.equal(values, snaps[step][part * 2 : part * 2 + 2]):
                            break
                    else:
                        raise AssertionError(f"values of step {step} that no server had")
        if not self.rules.agreed:
            factor = (0.5 if self.rules.clip else 1.0) * (RATIO if self.rules.ratios else 1.0)
            for host in net.hosts:
                for bucket, values in host.values.items():
                    total = sum_of(range(net.world_size), 0, bucket) * 0
                    for step in range(STEPS):
                        total += sum_of(range(net.world_size), step, bucket) * factor
                    assert torch.equal(values, total)


class Stale(Hosted):
    """Each worker's gradients as updates of their own, none twice, and nobody too far ahead."""

    @initialize(
        workers=st.integers(2, 4),
        servers=st.integers(1, 3),
        staleness=st.sampled_from([1, 2, None]),
        on_loss=st.sampled_from(["fail", "wait", "drop"]),
    )
    def begin(self, workers: int, servers: int, staleness: int | None, on_loss: str) -> None:
        self.start_hosted(Rules(staleness=staleness), workers, servers, on_loss)
        assert self.net is not None
        self.net.on_give = self.check

    def look(self, net: Net) -> None:
        for host in [*net.hosts, *net.past]:
            clocks: dict[tuple[int, int, int], int] = Counter()
            for epoch, update in host.updates:
                (g,) = update.gradients
                step = clocks[epoch, update.bucket, g.rank]
                assert torch.equal(torch.cat(g.payloads), gradient(g.rank, step, update.bucket))
                clocks[epoch, update.bucket, g.rank] += 1
                assert update.factor == net.world_size

    def check(self, host: Host, rank: int, pull: wire.Pull | wire.PullShared) -> None:
        members = host.shard.members
        here = [m.rank for m in members.present]
        clocks = Counter(u.gradients[0].rank for e, u in host.updates if e == host.epoch and u.bucket == pull.bucket)
        assert clocks[rank] >= pull.step
        if self.rules.staleness is not None and members.complete:
            # A worker that has left may have been waited for when this was decided.
            assert pull.step - min((clocks[r] for r in here), default=0) <= self.rules.staleness

    def at_the_end(self, net: Net) -> None:
        super().at_the_end(net)
        for host in net.hosts:
            for bucket in host.values:
                made = Counter(u.gradients[0].rank for e, u in host.updates if (e, u.bucket) == (host.epoch, bucket))
                for worker in net.workers:
                    if worker.state == "done":
                        assert made[worker.rank] == STEPS


Sums.TestCase.settings = settings(max_examples=60, stateful_step_count=50)
Steps.TestCase.settings = settings(max_examples=100, stateful_step_count=50)
Stale.TestCase.settings = settings(max_examples=45, stateful_step_count=50)
TestSums = Sums.TestCase
TestSteps = Steps.TestCase
TestStale = Stale.TestCase
