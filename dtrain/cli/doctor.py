"""The command that looks around."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import arg

from dtrain import doctor
from dtrain.cli.files import write_json
from dtrain.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """What is here (torch, gloo, NCCL, shared memory, cores, interfaces), and what would go wrong.

    Run in a job (torchrun -m dtrain doctor is one; srun dtrain doctor another) it shows this process's place in it, as
    dtrain.connect() takes it, and which variable has set what. Ends with 64 where variables contradict each other.
    """

    json: Annotated[str | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """Write the facts to this file."""

    def run(self, argv: Sequence[str]) -> int:
        facts = doctor.examine()
        print(doctor.text(facts))
        write_json(self.json, facts)
        return 0 if "place in the job" in facts else UsageError.exit_code
