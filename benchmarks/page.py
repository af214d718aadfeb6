"""One page of what the benchmark scripts found: a file of HTML that needs nothing else.

    python benchmarks/page.py --run                        all scripts, their quick versions, ten minutes; `make bench`
    python benchmarks/page.py --run --only sync links      some of them
    python benchmarks/page.py benchmarks/results/*.json    the same page from records that there are

With `--run`, each script is a process of its own, one after the other. What it leaves is in the folder `--into`
(build/bench): NAME.json, its record; NAME.out and NAME.err, what it printed; its picture, where it draws one. To the
record is added how long it took, and what the machine did meanwhile: the load average before, and the parts of the
processors' time that were used by whomever, and that other virtual machines took ("stolen"). A script that fails has
a record too, which says why; so has one that cannot run here. The page is made from the records, so that

    python benchmarks/page.py build/bench/*.json

makes the same one again. Exit status 1: a script failed.

Tables are those that scripts print: their own functions make them from the rows of a record.
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pictures
import psutil
from watching import processors_s

from dtrain.tables import table

try:
    import jinja2
    from markupsafe import Markup, escape

    from dtrain.measure.report import words
except ModuleNotFoundError as missing:
    raise SystemExit(f"the page needs {missing.name}: pip install 'dtrain[report]'") from None

HERE = Path(__file__).parent
ROOT = HERE.parent
FOLDER = Path("build/bench")
HOSTS = "hosts"
"""The module that knows whether hosts can be emulated."""
LIMIT_S = 300.0
"""Longest time of a script; then it is ended, and has failed."""

Record = dict[str, Any]
Row = dict[str, Any]


# -- the scripts ------------------------------------------------------------------------------------------------------


def _shown(module: ModuleType, record: Record) -> list[str]:
    """What most scripts print: `show`, their own or that of common."""
    show = getattr(module, "show", None) or module.common.show
    return [show(record["rows"])]


def _norm(module: ModuleType, record: Record) -> list[str]:
    shared = [row for row in record["rows"] if "waiting_ms" in row]
    alone = [row for row in record["rows"] if "waiting_ms" not in row]
    return [module.show(alone), *([module.show_shared(shared)] if shared else [])]


def _norm_batch(module: ModuleType, record: Record) -> list[str]:
    return [module.show(_sizes(record)), module.show_lags(_lags(record))]


def _sizes(record: Record) -> list[Row]:
    return [row for row in record["rows"] if row["part"] == "norm batch"]


def _lags(record: Record) -> list[Row]:
    return [row for row in record["rows"] if row["part"] != "norm batch"]


def _meter(module: ModuleType, record: Record) -> list[str]:
    cost = f"{module.common.show(record['rows'])}\n{module.show_processors(record['rows'])}".rstrip()
    return [cost, module.show_truth(record["truth"])]


def _published(module: ModuleType, record: Record) -> list[str]:
    names = module.Row.__dataclass_fields__
    return [module.text([module.Row(**{name: row[name] for name in names}) for row in record["rows"]])]


def _stragglers(module: ModuleType, record: Record) -> list[str]:
    def numbered(row: Row) -> Row:  # names of a JSON object are text
        return {**row, "staleness": [{int(k): n for k, n in worker.items()} for worker in row["staleness"]]}

    return [module._table([numbered(row) for row in record["rows"]])]


def _batch(module: ModuleType, record: Record) -> list[str]:
    found = []
    for name, known, rows in _recipes(module, record):
        found.append(f"{name}\n{module.show(rows, known)}")
        if both := module.of_recipe(record["rows"], name, "accumulation"):
            found.append(f"{name}: micro-batches against the batch in one\n{module.show_accumulation(both)}")
    return found


def _recipes(module: ModuleType, record: Record) -> list[tuple[str, Any, list[Row]]]:
    """Name of each recipe, what is known of it, and its rows by batch."""
    return [
        (name, module.Facts(**known), module.of_recipe(record["rows"], name, "batch"))
        for name, known in record["recipes"].items()
    ]


def _hosts(module: ModuleType, record: Record) -> list[str]:
    names = {"of the rate": "of_rate", "processors busy": "busy", "stolen": "stolen"}
    cells = [[row["rate"], row["case"], *(f"{row[name]:.1%}" for name in names.values())] for row in record["rows"]]
    return [table(["rate", "transfers", *names], cells, left=2)]


@dataclass(frozen=True)
class Script:
    """A benchmark script, and what the page makes of its record."""

    title: str
    tables: Callable[[ModuleType, Record], list[str]] = _shown
    """Text tables, as the script prints them."""
    draw: Callable[[ModuleType, Record, Path], object] = lambda module, record, file: module.draw(record["rows"], file)
    """Of those that have a picture of their own."""
    hosts: bool = False
    """Whether it needs emulated hosts."""


def _draw_scaling(module: ModuleType, record: Record, file: Path) -> None:
    case = record["case"]
    module.draw(record["rows"], f"{case['name']}, links of {case['rate']}, {record['cores']} cores for all hosts", file)


def _draw_batch(module: ModuleType, record: Record, file: Path) -> None:
    module.draw(_recipes(module, record), file)


def _draw_norm_batch(module: ModuleType, record: Record, file: Path) -> None:
    title = f"{record['recipe']}: {record['samples']} images, {record['epochs']} epochs, {record['seeds']} seed(s)"
    module.draw(_sizes(record), _lags(record), title, file)


SCRIPTS = {
    "step": Script("Training step"),
    "batch": Script("Global batch", _batch, _draw_batch),
    "scaling": Script("Weak and strong scaling", draw=_draw_scaling, hosts=True),
    "sync": Script("Sum of a gradient on one host"),
    "links": Script("Sum of a gradient over slow links", hosts=True),
    "links_step": Script("Training step over slow links", hosts=True),
    "stragglers": Script("One slow worker", _stragglers),
    "norm": Script("Kinds of batch norm", _norm),
    "norm_batch": Script("Test error by norm batch", _norm_batch, _draw_norm_batch),
    "meter": Script("What measuring costs", _meter),
    "noise": Script("What the gradient noise scale costs"),
    "memory": Script("Memory of a step"),
    "predict": Script("Predicted step times", hosts=True),
    "published": Script("Published scaling", _published),
    "hosts": Script("Emulated links", _hosts, hosts=True),
}
"""In the order of the page."""

HELPERS = {"common", "echo", "page", "peers", "pictures", "watching"}
"""Modules here that measure nothing by themselves."""


@dataclass(frozen=True)
class Run:
    """A script with its arguments; the name is that of its files."""

    name: str
    script: str
    arguments: tuple[str, ...] = ()


RUNS = [
    Run("step", "step", ("--peers",)),
    Run("step_server", "step", ("--contender", "server", "--case", "mlp")),
    *(Run(name, name) for name in SCRIPTS if name != "step"),
]


# -- running them -----------------------------------------------------------------------------------------------------


def run_all(runs: Sequence[Run], folder: Path, *, limit_s: float = LIMIT_S, scripts: Path = HERE) -> list[Record]:
    """Run them one after the other, with a line for each; their records, which are in the folder too."""
    folder.mkdir(parents=True, exist_ok=True)
    refusal = _no_hosts(scripts) if any(SCRIPTS[run.script].hosts for run in runs) else None
    found = []
    for run in runs:
        print(f"{run.name:<12}", end="", flush=True)
        record = _one(run, folder, limit_s, scripts, refusal)
        (folder / f"{run.name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        found.append(record)
        print(f"{record['run'].get('seconds', 0.0):6.0f} s  {_outcome(record)}", flush=True)
    return found


def _no_hosts(scripts: Path) -> str | None:
    """Why hosts cannot be emulated here."""
    reason: str | None = _module(HOSTS, scripts).available()
    return reason


def _one(run: Run, folder: Path, limit_s: float, scripts: Path, refusal: str | None) -> Record:
    """The record of a run, whatever became of it."""
    script = scripts / f"{run.script}.py"
    for suffix in (".json", ".svg", ".out", ".err"):
        folder.joinpath(run.name + suffix).unlink(missing_ok=True)
    command = ["python", _short(script), *run.arguments]
    about: Record = {"command": " ".join(command), "date": time.strftime("%Y-%m-%d"), "rows": []}
    if not script.exists():
        return {**about, "run": {"absent": f"there is no {_short(script)}"}}
    if refusal is not None and SCRIPTS[run.script].hosts:
        return {**about, "run": {"absent": refusal}}
    text = script.read_text(encoding="utf-8")
    flags = ["--quick"] if "--quick" in text else []
    command = [*command[:2], *flags, *command[2:]]
    out = {"--json": folder / f"{run.name}.json"}
    if '"--picture"' in text:
        out["--picture"] = folder / f"{run.name}.svg"
    files = [word for flag, file in out.items() for word in (flag, str(file.resolve()))]
    with _Watch() as watch:
        code = _wait([sys.executable, *command[1:], *files], folder / run.name, limit_s)
    about |= {"command": " ".join(command), "run": watch.figures()}
    if code is None:
        about["run"]["failed"] = f"it still ran after {limit_s:g} s"
    elif code:
        about["run"]["failed"] = _last_words(folder / f"{run.name}.err") or f"it ended with exit status {code}"
    try:  # a script may leave what it has, and fail
        left = read(out["--json"])
    except (OSError, ValueError):
        return {**about, "run": {"failed": "it left no record that can be read", **about["run"]}}
    return {**left, **about, "rows": left["rows"]}


def _wait(command: Sequence[str], files: Path, limit_s: float) -> int | None:
    """The exit status of a command; None where time was up and it was ended, with all that it had started."""
    with files.with_suffix(".out").open("wb") as out, files.with_suffix(".err").open("wb") as err:
        process = subprocess.Popen(
            list(command), cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
        )
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _last_words(file: Path) -> str:
    lines = [line.strip() for line in file.read_text(encoding="utf-8", errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "")


def _short(file: Path) -> str:
    """As seen from the root of the repository, where it is below that."""
    return str(file.relative_to(ROOT)) if file.is_relative_to(ROOT) else str(file)


class _Watch:
    """How long something took, and what the processors did meanwhile."""

    def __enter__(self) -> _Watch:
        self._load_average = psutil.getloadavg()[0]
        self._before = processors_s()
        self._start_s = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._seconds = time.perf_counter() - self._start_s
        self._spent = {name: seconds - self._before[name] for name, seconds in processors_s().items()}

    def figures(self) -> dict[str, Any]:
        all_s = self._spent["all"]
        return {
            "seconds": round(self._seconds, 1),
            "load_average": round(self._load_average, 2),
            **{name: round(part / all_s, 4) if all_s else 0.0 for name, part in self._spent.items() if name != "all"},
        }


def _outcome(record: Record) -> str:
    about = record.get("run", {})
    for state in ("failed", "absent"):
        if state in about:
            return f"{state}: {about[state]}"
    return "ok"


# -- reading records --------------------------------------------------------------------------------------------------


def read(file: Path) -> Record:
    """A record.

    Raises:
        ValueError: it is none.
    """
    record = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(record, dict) or "rows" not in record or "command" not in record:
        raise ValueError(f"{file} is no record of a benchmark: it has no command, or no rows")
    return record


def script_of(record: Record) -> str:
    """Name of the script that left it, from its command."""
    found = re.search(r"(\w+)\.py\b", str(record["command"]))
    return found.group(1) if found else "?"


def _module(name: str, scripts: Path = HERE) -> ModuleType:
    """A script as a module; it imports its siblings."""
    sys.path.insert(0, str(scripts))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(scripts))


def purpose(script: str, scripts: Path = HERE) -> str:
    """The first paragraph of what a script says of itself."""
    file = scripts / f"{script}.py"
    if not file.exists():
        return ""
    said = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return " ".join(said.partition("\n\n")[0].split())


# -- parts of the page ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """A table."""

    head: list[str]
    rows: list[list[str]]
    figures: list[bool]
    """Which columns hold figures."""
    caption: str = ""


@dataclass(frozen=True, kw_only=True)
class Part:
    """What the page says of one record."""

    key: str
    title: str
    purpose: Markup
    command: str
    facts: Sequence[tuple[str, str]]
    tables: Sequence[Table]
    notes: Sequence[str]
    state: str
    reason: str
    seconds: str
    picture: Markup | None = None
    picture_title: str = ""
    caption: str = ""
    own: bool = False
    """Whether the picture is the script's own, with colours of its own."""


_FIGURE = re.compile(r"[-+~<≤]?[\d.,]+ ?\S{0,3}|-|–|yes|no|nan|inf|MISSED|[\d.]+-[\d.]+|[-+]?[\d.]+ \(.*\)")


def parse(text: str) -> list[Table]:
    """The tables in what a script prints: a head, a line of dashes beneath it, and rows to the next empty line. A line
    right before the head is what the table is about."""
    lines = ["", "", *text.splitlines(), ""]
    found = []
    for number, line in enumerate(lines):
        if not re.fullmatch(r"-+(  -+)*", line):
            continue
        spans = [match.span() for match in re.finditer("-+", line)]
        rows = [_cut(row, spans) for row in lines[number + 1 : lines.index("", number)]]
        found.append(Table(_cut(lines[number - 1], spans), rows, _columns(rows), caption=lines[number - 2]))
    return found


def _columns(rows: Sequence[Sequence[str]]) -> list[bool]:
    """Which columns hold figures."""
    return [all(_FIGURE.fullmatch(cell) for cell in column if cell) for column in zip(*rows, strict=True)]


def _cut(line: str, spans: Sequence[tuple[int, int]]) -> list[str]:
    return [line[start:end].strip() for start, end in spans]


def plain_table(rows: Sequence[Row]) -> Table:
    """All that rows hold, where nothing better is known."""
    head = list(dict.fromkeys(name for row in rows for name, value in row.items() if not isinstance(value, dict)))
    cells = [[words.plain(row[name]) if name in row else "" for name in head] for row in rows]
    return Table([words.named(name) for name in head], cells, _columns(cells))


def tables_of(script: str, record: Record) -> tuple[list[Table], list[str]]:
    """The script's own tables, or else all that the rows hold, with a note."""
    if not record["rows"]:
        return [], []
    trouble = f"the page does not know {script}.py"
    if script in SCRIPTS:
        try:
            found = [part for text in SCRIPTS[script].tables(_module(script), record) for part in parse(text)]
        except Exception as error:  # the record may be older than the script, or younger
            trouble = f"{script}.py does not read its record: {type(error).__name__}: {error}"
        else:
            if found:
                return found, []
            trouble = f"{script}.py printed no table"
    return [plain_table(record["rows"])], [f"All that the rows hold: {trouble}."]


def picture_of(script: str, record: Record, file: Path | None, key: str) -> dict[str, Any]:
    """Fields of a `Part`: the page's own drawing, or the script's, from its file beside the record or from the rows."""
    if not record["rows"]:
        return {}
    if script in pictures.KINDS:
        kind = pictures.KINDS[script]
        drawn = pictures.embed(script, record["rows"], key)
        return {"picture": drawn, "picture_title": kind.title, "caption": kind.caption}
    title = SCRIPTS[script].title if script in SCRIPTS else script
    for suffix in (".svg", ".png"):
        if file is not None and (beside := file.with_suffix(suffix)).exists():
            return {"picture": _image(beside, title), "own": True}
    if script not in SCRIPTS:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "picture.svg")
        SCRIPTS[script].draw(_module(script), record, target)
        return {"picture": _image(target, title), "own": True}


def _image(file: Path, title: str) -> Markup:
    """An image that is inside the page, as wide as is needed to read it."""
    data = file.read_bytes()
    kind = "svg+xml" if file.suffix == ".svg" else "png"
    return Markup('<img alt="{}" src="data:image/{};base64,{}"{}>').format(
        title, kind, base64.b64encode(data).decode(), _widths(data)
    )


def _widths(data: bytes) -> Markup:
    """Text of an SVG by matplotlib is small: below this width it scrolls instead. Nor is it blown up."""
    found = re.search(rb'<svg[^>]* width="([\d.]+)pt"', data)
    if found is None:
        return Markup("")
    points = float(found.group(1))
    return Markup(' style="min-width: {:.0f}px; max-width: {:.0f}px"').format(0.9 * points, 1.4 * points)


def facts_of(record: Record) -> list[tuple[str, str]]:
    """Commit, date, versions, hardware, settings, and what the machine was doing."""
    hardware = dict(record.get("hardware", {}))
    before = next((hardware.pop(name) for name in ("load_average", "load_before") if name in hardware), None)
    about = {"load_average": before, **record.get("run", {})}
    doing = [] if about["load_average"] is None else [f"load average {about['load_average']:g}"]
    if "busy" in about:
        doing.append(f"processors {words.percent(about['busy'])} busy")
    stolen = [share for share in (about.get("stolen"), *_stolen(record)) if share is not None]
    if stolen:
        doing.append(f"{words.percent(max(stolen))} stolen" + (" at most" if len(stolen) > 1 else ""))
    found = {
        "commit": record.get("commit"),
        "date": record.get("date"),
        "versions": ", ".join(f"{name} {number}" for name, number in record.get("versions", {}).items()),
        "hardware": _hardware(hardware),
        "machine": ", ".join(doing),
        "settings": ", ".join(_settings(record)),
    }
    return [(name, str(value)) for name, value in found.items() if value]


def _stolen(record: Record) -> list[float]:
    """Shares of the processors' time that other virtual machines took, where the script has looked."""
    places = [record, record.get("hardware", {}), *record["rows"]]
    return [place["stolen"] for place in places if isinstance(place.get("stolen"), float)]


def _hardware(hardware: Mapping[str, Any]) -> str:
    if not hardware:
        return ""
    gpus = ", ".join(hardware.get("gpus", [])) or "no GPU"
    cores = words.plural(hardware.get("cores") or 0, "core")
    return f"{hardware.get('processor', '?')}, {cores}, {hardware.get('memory_gib', '?')} GiB, {gpus}"


_KNOWN = {
    "command",
    "commit",
    "date",
    "versions",
    "hardware",
    "rows",
    "run",
    "absent",
    "left_out",
    "failed",
    "json",
    "picture",
}


def _settings(record: Record) -> list[str]:
    """What else a record says of how it was made."""
    simple = (str, int, float, bool)
    found = []
    for name, value in record.items():
        if name in _KNOWN or value in (None, "", [], {}) or (name == "quick" and not value):
            continue
        if isinstance(value, simple) or (isinstance(value, list) and all(isinstance(one, simple) for one in value)):
            found.append(f"{words.named(name)} {words.plain(value)}")
        elif isinstance(value, dict) and all(isinstance(one, simple) for one in value.values()):
            found.append(f"{words.named(name)} ({', '.join(f'{k}: {words.plain(v)}' for k, v in value.items())})")
    return found


def _notes(record: Record) -> list[str]:
    """What is not there, and why."""
    return [
        f"{head}: {what}: {str(why).rstrip('.')}."
        for name, head in (("absent", "Absent"), ("left_out", "Left out"), ("failed", "Failed"))
        for what, why in (record.get(name) or {}).items()
    ]


def _title(script: str, record: Record) -> str:
    """A script's title, with the contender where there may be one or another."""
    title = SCRIPTS[script].title if script in SCRIPTS else script
    contenders = {row.get("contender") for row in record["rows"]}
    return f"{title}: {contenders.pop()}" if script == "step" and len(contenders) == 1 else title


def _code(text: str) -> Markup:
    """Text, with what stands between backticks as code."""
    pieces = text.split("`")
    return Markup("").join(Markup("<code>{}</code>").format(p) if i % 2 else escape(p) for i, p in enumerate(pieces))


def part_of(record: Record, file: Path | None, key: str, scripts: Path = HERE) -> Part:
    script = script_of(record)
    tables, notes = tables_of(script, record)
    try:
        picture = picture_of(script, record, file, key)
    except Exception as error:  # as above
        picture = {}
        notes.append(f"Its picture could not be drawn: {type(error).__name__}: {error}.")
    state, _, reason = _outcome(record).partition(": ")
    seconds = record.get("run", {}).get("seconds")
    return Part(
        key=key,
        title=_title(script, record),
        purpose=_code(purpose(script, scripts)),
        command=re.sub(r" --(json|picture|profiles)[ =]\S+", "", str(record["command"])),
        facts=facts_of(record),
        tables=tables,
        notes=[*notes, *_notes(record)],
        state=state,
        reason=reason,
        seconds="" if seconds is None else words.seconds(seconds),
        **picture,
    )


# -- the page ---------------------------------------------------------------------------------------------------------


def render(records: Sequence[tuple[Record, Path | None]], scripts: Path = HERE) -> str:
    """The HTML of a page on records, each with its file, in the order of `SCRIPTS`."""
    order = {name: place for place, name in enumerate(SCRIPTS)}
    ordered = sorted(records, key=lambda pair: order.get(script_of(pair[0]), len(order)))
    parts = [part_of(record, file, f"b{place}", scripts) for place, (record, file) in enumerate(ordered)]
    templates = jinja2.Environment(
        loader=jinja2.PrefixLoader(
            {"benchmarks": jinja2.FileSystemLoader(HERE), "report": jinja2.PackageLoader("dtrain.measure.report")}
        ),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    timed = any(part.seconds for part in parts)
    page = templates.get_template("benchmarks/page.html")
    return page.render(parts=parts, timed=timed, summary=_summary(parts, ordered))


def _summary(parts: Sequence[Part], records: Sequence[tuple[Record, Path | None]]) -> str:
    """How many there are, and of when."""
    states = [part.state for part in parts]
    names = {"ok": "measured", "failed": "failed", "absent": "not possible here"}
    counts = [f"{states.count(state)} {name}" for state, name in names.items() if state in states]
    dates = sorted({record["date"] for record, _ in records if "date" in record})
    when = f" {' to '.join(dict.fromkeys([dates[0], dates[-1]]))}." if dates else ""
    return f"{words.plural(len(parts), 'record')}: {', '.join(counts)}.{when}"


def main() -> None:
    names = [run.name for run in RUNS]
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("records", type=Path, nargs="*", metavar="RECORD", help="files that --json of scripts wrote")
    flags.add_argument("--run", action="store_true", help="run the scripts")
    flags.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    flags.add_argument("--limit-s", type=float, default=LIMIT_S, help="longest time of a script (default %(default)s)")
    flags.add_argument("--into", type=Path, default=FOLDER, metavar="DIR", help="default: %(default)s")
    arguments = flags.parse_args()
    if arguments.run == bool(arguments.records):
        flags.error("give --run, or the files of records")
    if arguments.run:
        runs = [run for run in RUNS if run.name in arguments.only]
        found = run_all(runs, arguments.into, limit_s=arguments.limit_s)
        records = [(record, arguments.into / f"{run.name}.json") for run, record in zip(runs, found, strict=True)]
    else:
        try:
            records = [(read(file), file) for file in arguments.records]
        except (OSError, ValueError) as error:
            flags.error(str(error))
    page = arguments.into / "index.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(render(records), encoding="utf-8")
    print(page)
    failed = arguments.run and any("failed" in record["run"] for record, _ in records)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
