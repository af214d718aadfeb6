"""The page: one HTML file that needs nothing else, without any script."""

from __future__ import annotations

from collections.abc import Sequence

import jinja2

from dtrain.measure.report import overview
from dtrain.measure.report.blocks import Section
from dtrain.measure.report.story import heading, tell
from dtrain.measure.runfiles import Record, Run


def render(runs: Sequence[Run], plan: Record | None = None) -> str:
    """The HTML of a report on one or more runs.

    Args:
        plan: a prediction as `dtrain plan --json` writes it, for the runs that it fits.
    """
    several = len(runs) > 1
    names = overview.labels(len(runs)) if several else [""]
    stories = [tell(run, f"r{place}", names[place], place, plan) for place, run in enumerate(runs)]
    together: list[Section | None] = []
    if several:
        together = [overview.learning(runs, names), overview.step(runs, names), overview.paying(runs, names)]
    page = _templates().get_template("page.html")
    return page.render(
        subtitle=overview.alike(runs) if several else "",
        title=f"{len(runs)} runs side by side" if several else heading(runs[0]),
        stories=stories,
        table=overview.table(runs, names) if several else None,
        differences=overview.differences(runs, names) if several else None,
        together=[section for section in together if section is not None],
    )


def _templates() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("dtrain.measure.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
