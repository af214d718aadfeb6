"""The command that predicts: plan."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from tyro.conf import arg

from dtrain import plan as planning
from dtrain import scoring
from dtrain.cli.files import check_json, write_json
from dtrain.cli.training import flags
from dtrain.compare import python_m_dtrain
from dtrain.errors import UsageError
from dtrain.measure.hardware import given, named
from dtrain.measure.predict import INTERVAL
from dtrain.measure.profile import Profile, load
from dtrain.probe import probe
from dtrain.room import Room, room
from dtrain.spec import Name, RunSpec, Task

_VERIFY_STEPS = 40
_MOST_PROBED = 512


@dataclass(frozen=True, kw_only=True)
class PlanCommand(Task):
    """Predict step time, samples per second and efficiency for other workers, servers, batches and links.

    Probes the recipe here for half a minute (or reads --profile) and plays steps of each setting through. Answers in
    words too: which backend, how many servers, what batch, how many workers. --json writes predictions, words, scores
    and the profile.
    """

    workers: Annotated[str, arg(aliases=["-n"], metavar="N,N")] = "1,2,4,8"
    """Numbers of workers, with commas between."""
    backends: str = "ps,allreduce"
    """ps, allreduce, or both."""
    servers: Annotated[str, arg(metavar="K,K")] = "1,2"
    """For ps: numbers of servers."""
    batches: Annotated[str | None, arg(metavar="B,B", help_behavior_hint="")] = None
    """Samples of each worker in a step. Default: the global batch, shared out."""
    hardware: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")] = None
    """Links between hosts: 1gbit, 10gbit, 25gbit, 100gbit, nvlink. Default: all on this host, as measured."""
    link_rate: Annotated[str | None, arg(metavar="RATE", help_behavior_hint="")] = None
    """Rate of each host's link, such as 200mbit or 1.2GB."""
    latency_us: Annotated[float | None, arg(metavar="US", help_behavior_hint="")] = None
    """Latency of that link, one way, in microseconds."""
    place: Annotated[Literal["host", "apart", "beside"] | None, arg(help_behavior_hint="")] = None
    """host: all on this one; apart: each worker and server on its own; beside: servers on the workers' hosts. Default:
    apart where a link is given, else host."""
    lanes: Literal["auto", "off"] = "auto"
    """For ps on one host: shared memory, or sockets only."""
    update: Literal["worker", "server", "sharded"] = "worker"
    """Who steps the optimizer; server: of ps, the servers; sharded: each worker of allreduce a part (ZeRO-1)."""
    send_as: Literal["same", "bf16", "fp16"] = "same"
    """Type that gradients travel as."""
    norm_batch: Literal["worker", "global"] = "worker"
    """Whose samples share batch-norm statistics."""
    memory: Annotated[str | None, arg(metavar="SIZE", help_behavior_hint="")] = None
    """Memory of each worker, such as 24GiB: says what a step needs, and advises no batch that does not fit."""
    profile: Annotated[str | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """Predict from a probe that was saved, of this recipe on this or another host."""
    save_profile: Annotated[str | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """Save the probe."""
    past_runs: Annotated[tuple[str, ...], arg(name="run", metavar="RUN_DIR ...", help_behavior_hint="")] = ()
    """Runs on this host to score the prediction by."""
    verify: bool = False
    """Run each number of workers here for some steps (--steps), and score the prediction."""
    timeout_s: float = 60.0
    """With --verify: longest wait of a worker for another, in seconds."""
    json: Annotated[str | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """Write predictions, words, scores and profile to this file."""

    def run(self, argv: Sequence[str]) -> int:
        check_json(self.json)
        wanted = self._wanted()
        if self.verify and (wanted.place != "host" or wanted.batches):
            raise UsageError("--verify runs a global batch on this host: leave out --batches, --place and links")
        memory = self._room(wanted)
        profile = self._profile(wanted)
        if self.save_profile is not None:
            self._save(profile)
        found = planning.predictions(profile, wanted)
        said = planning.words(profile, wanted, **({} if memory is None else {"fits": memory.fits}))
        micro_batch = wanted.largest_micro_batch(profile)
        if memory is not None:
            said.append(memory.words(micro_batch))
        parts = ["\n".join(planning.about(profile, wanted)), planning.text(found), INTERVAL, "\n".join(said)]
        if memory is not None:
            parts.append(memory.footprint.at(micro_batch, accumulate=True).table())
        print("\n\n".join(parts), flush=True)
        scored = [scoring.score_run(profile, Path(folder)) for folder in self.past_runs]
        if self.verify:
            with tempfile.TemporaryDirectory(prefix="dtrain-plan-") as folder:
                scored += scoring.verify(profile, wanted, Path(folder), self._command, timeout_s=self.timeout_s)
        if scored:
            print(f"\n{scoring.scores(scored)}", flush=True)
        needed = {} if memory is None else {"memory": memory.record(micro_batch)}
        write_json(self.json, planning.record(profile, wanted, found, said, [s.record() for s in scored]) | needed)
        return 0

    def _wanted(self) -> planning.Wanted:
        link = given(None if self.hardware is None else named(self.hardware), self.link_rate, self.latency_us)
        place = self.place or ("host" if link is None else "apart")
        if place == "host" and link is not None:
            raise UsageError(
                "--place host has no link between hosts: leave out --hardware, --link-rate and --latency-us"
            )
        if self.update != "worker" and self.send_as != "same":
            raise UsageError(f"--send-as {self.send_as} with --update {self.update}, which takes gradients as they are")
        return planning.Wanted(
            workers=_numbers("workers", self.workers),
            backends=tuple(b.strip() for b in self.backends.split(",") if b.strip()),
            servers=_numbers("servers", self.servers),
            batches=() if self.batches is None else _numbers("batches", self.batches),
            global_batch=self.global_batch,
            micro_batch=self.micro_batch,
            place=place,
            link=link,
            sockets=self.lanes == "off",
            update=self.update,
            norm=self.norm_batch,
        )

    def _profile(self, wanted: planning.Wanted) -> Profile:
        if self.profile is not None:
            profile = load(Path(self.profile))
            if profile.send_as != self.send_as:
                raise UsageError(f"--profile {self.profile} was probed with --send-as {profile.send_as}: probe again")
            known = profile.recipe.split()[:1]
            if known and known[0] in get_args(Name) and known[0] != self.recipe:
                raise UsageError(f"--profile {self.profile} is of {known[0]}: `dtrain plan {known[0]} --profile ...`")
            return profile
        spec = self._spec()
        recipe_batch = self.global_batch or spec.build().global_batch
        sizes = wanted.batches or tuple(math.ceil(recipe_batch / n) for n in wanted.workers)
        most = min(self.micro_batch or _MOST_PROBED, _MOST_PROBED)
        links = [link for link in ("allreduce", "ps", "ps sockets") if link.split()[0] in wanted.backends]
        if wanted.update == "sharded":
            links.append("allreduce sharded")
        several = [n for n in wanted.workers if n > 1]
        return probe(
            spec,
            probed_sizes([min(size, most) for size in sizes]),
            links=links if several else (),
            say=planning.teller(self.progress),
        )

    def _room(self, wanted: planning.Wanted) -> Room | None:
        """What a step needs, where the memory is told."""
        if self.memory is None:
            return None
        return room(self._spec(), self.memory, packs="ps" in wanted.backends, workers=min(wanted.workers))

    def _save(self, profile: Profile) -> None:
        path = Path(self.save_profile or "")
        try:
            profile.save(path)
        except OSError as error:
            raise UsageError(f"--save-profile {path}: {error.strerror}") from error

    def _spec(self, **more: Any) -> RunSpec:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(Task)}
        own = {"norm_batch": self.norm_batch, "update": self.update, "send_as": self.send_as}
        return RunSpec(**{**fields, **own, **more})

    def _command(self, backend: str, workers: int, run_dir: Path) -> list[str]:
        """The `dtrain train` that makes one of the runs of --verify."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(Task) if f.name not in ("recipe", "epochs")}
        fields["option"] = fields.pop("options")
        fields |= {"steps": self.steps or _VERIFY_STEPS, "norm_batch": self.norm_batch, "run_dir": str(run_dir)}
        fields |= {
            "backend": backend,
            "workers": workers,
            "checkpoint_every": "never",
            "quiet": True,
            "progress": False,
        }
        fields |= {"lanes": self.lanes, "send_as": self.send_as}
        if backend == "ps" or self.update == "sharded":
            fields["update"] = self.update
        return python_m_dtrain("train", self.recipe, *flags(fields))


def probed_sizes(sizes: Sequence[int]) -> list[int]:
    """Three sizes of a micro-batch between the smallest and the largest, which are a factor of four apart at least."""
    largest = max(sizes)
    smallest = max(1, min(*sizes, largest // 4))
    return sorted({smallest, max(1, round(math.sqrt(smallest * largest))), largest})


def _numbers(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise UsageError(f"--{name} {text}: give numbers with commas between, such as 1,2,4") from None
