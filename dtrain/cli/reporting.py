"""The command that reports on runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from dtrain.errors import DataError, UsageError
from dtrain.measure import runfiles


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write a report on a run, or on several side by side: one HTML file, for a browser, a phone or paper.

    It shows where the time of a step went, who was late, what was sent and what was learnt; of several runs, what is
    different between them. A run that is still going, was killed, or is of an older version gives a page of what there
    is. Needs dtrain[report].
    """

    runs: Positional[Annotated[tuple[str, ...], arg(metavar="RUN ...", help_behavior_hint="")]] = ()
    """Run directories: what `dtrain train --run-dir` names."""
    output: Annotated[str | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """Where the page goes. Default: report.html in the run directory; of several runs, in the present one."""
    plan: Annotated[str | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """A prediction to hold against the runs: what `dtrain plan --json FILE` wrote."""

    def run(self, argv: Sequence[str]) -> int:
        if not self.runs:
            raise UsageError("no run is given: dtrain report RUN ..., where RUN is the --run-dir of a run")
        folders = [Path(name) for name in self.runs]
        runs = [runfiles.read(folder) for folder in folders]
        output = Path(self.output) if self.output else (folders[0] if len(folders) == 1 else Path()) / "report.html"
        if output.is_dir() or not output.absolute().parent.is_dir():
            raise UsageError(f"--output {output}: no file can be made there; its directory must exist")
        page = _render(runs, _plan(self.plan))
        try:
            output.write_text(page, encoding="utf-8")
        except OSError as error:
            raise UsageError(f"--output {output}: {error.strerror}") from error
        print(f"Report: {output}")
        return 0


def _render(runs: Sequence[runfiles.Run], plan: dict[str, Any] | None) -> str:
    try:
        from dtrain.measure import report
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("jinja2", "markupsafe", "matplotlib"):
            raise
        raise UsageError(f"{error.name} is not installed, which draws reports: pip install 'dtrain[report]'") from error
    return report.render(runs, plan)


def _plan(file: str | None) -> dict[str, Any] | None:
    if file is None:
        return None
    try:
        found = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"--plan {file} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"--plan {file} is no JSON object: give what `dtrain plan --json` wrote")
    return found
