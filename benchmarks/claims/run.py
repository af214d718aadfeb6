"""All claims: runs their scripts, one after the other, and makes the table of README.md from their records.

    python benchmarks/claims/run.py --quick              all, short versions, a quarter of an hour; `make claims`
    python benchmarks/claims/run.py                      all in full, into results/, and the table
    python benchmarks/claims/run.py --only lars          some of them, by the name of the script
    python benchmarks/claims/run.py --table              the table again, from the records in results/

With --quick, records and pictures go into a folder of their own (`--into`; by default a new temporary one), and the
table is only printed. Each script has its own --help; seeds run in parallel processes, as many as there are cores.
A script that fails is named at the end, where the exit status is then 1; the others go on.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
README = HERE / "README.md"
BEGIN, END = "<!-- made by run.py --table: begin -->", "<!-- made by run.py --table: end -->"
PARTS = ("claim", "draw", "run", "tasks")
"""Modules here that are no claim."""

Record = dict[str, Any]


def scripts() -> list[str]:
    """Names of the claims there are."""
    return sorted(path.stem for path in HERE.glob("*.py") if path.stem not in PARTS)


def records(folder: Path) -> list[Record]:
    """What was recorded there, in the order of the claims' numbers: 1, 1b, 2, ..., 10."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    return sorted(found, key=lambda record: place(record["claim"]))


def place(number: str) -> tuple[int, str]:
    """A claim's number, to sort by."""
    digits = re.match(r"\d+", number)
    return (int(digits.group()) if digits else 0, number)


def table(found: Sequence[Record]) -> str:
    """A line a claim, in Markdown."""
    lines = ["| | claim | source | what was measured here | verdict |", "|---|---|---|---|---|"]
    for record in found:
        met = sum(check["met"] for check in record["checks"])
        verdict = f"**{record['verdict']}** ({met} of {len(record['checks'])})"
        cells = [record["claim"], record["title"], record["source"], record["measured"], verdict]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def sections(found: Sequence[Record]) -> str:
    """For each claim what was expected, what was seen, and the picture."""
    parts = []
    for record in found:
        seeds = len(record["seeds"])
        how = f"`benchmarks/claims/{record['name']}.py`{', quick' if record['quick'] else ''}, {seeds} seed"
        how += f"{'s' if seeds > 1 else ''}, {duration(record['seconds'])}"
        lines = [f"- {'yes' if check['met'] else '**no**'}: {check['text']}" for check in record["checks"]]
        heading = f"### {record['claim']}. {record['title']}"
        picture = f"![{record['title']}](results/{record['name']}.png)"
        parts.append("\n".join([heading, "", f"{how}: **{record['verdict']}**", "", *lines, "", picture]))
    return "\n\n".join(parts)


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def generated(found: Sequence[Record]) -> str:
    """What stands between the marks of README.md."""
    return "\n\n".join([BEGIN, table(found), "## One by one", sections(found), END])


def filled(text: str, found: Sequence[Record]) -> str:
    """The README with what the records give."""
    before, _, rest = text.partition(BEGIN)
    return before + generated(found) + rest.partition(END)[2]


# -- the command ------------------------------------------------------------------------------------------------------


def run(name: str, into: Path, more: Sequence[str]) -> bool:
    """One script; whether it went well. Its record and picture lie in the folder."""
    files = ["--json", str(into / f"{name}.json"), "--picture", str(into / f"{name}.png")]
    start_s = time.perf_counter()
    done = subprocess.run([sys.executable, str(HERE / f"{name}.py"), *more, *files], check=False)
    print(f"{name}: {duration(time.perf_counter() - start_s)}\n", flush=True)
    return done.returncode == 0


def _flags() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--quick", action="store_true", help="short versions")
    flags.add_argument("--only", nargs="+", choices=scripts(), metavar="NAME", help=", ".join(scripts()))
    flags.add_argument("--table", action="store_true", help="run nothing; make the table of README.md again")
    flags.add_argument("--into", type=Path, metavar="DIR", help="folder for records and pictures (full: results/)")
    flags.add_argument("--seeds", type=int, metavar="N", help="of each claim (default: its own, 3 for most)")
    flags.add_argument("--jobs", type=int, metavar="N", help="runs at a time (default: cores)")
    return flags


def main() -> None:
    arguments = _flags().parse_args()
    if arguments.table:
        README.write_text(filled(README.read_text(encoding="utf-8"), records(RESULTS)), encoding="utf-8")
        return
    into = arguments.into or (Path(tempfile.mkdtemp(prefix="claims-")) if arguments.quick else RESULTS)
    into.mkdir(parents=True, exist_ok=True)
    more = ["--quick"] if arguments.quick else []
    for flag in ("seeds", "jobs"):
        if getattr(arguments, flag) is not None:
            more += [f"--{flag}", str(getattr(arguments, flag))]
    failed = [name for name in arguments.only or scripts() if not run(name, into, more)]
    print(table(records(into)), f"\nRecords and pictures: {into}", sep="\n")
    if into == RESULTS:
        README.write_text(filled(README.read_text(encoding="utf-8"), records(RESULTS)), encoding="utf-8")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
