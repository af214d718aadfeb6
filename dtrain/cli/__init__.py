"""The commands: `dtrain COMMAND --help` explains each."""

from __future__ import annotations

import difflib
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from dtrain import __version__, env
from dtrain.cli.doctor import Doctor
from dtrain.cli.health import Health
from dtrain.cli.planning import PlanCommand
from dtrain.cli.reporting import Report
from dtrain.cli.serving import KeysCommand, SchedulerCommand, ServerCommand
from dtrain.cli.training import Compare, Launch, Train
from dtrain.errors import DtrainError, UsageError
from dtrain.processes import leave_word, print_whole_lines

_COMMANDS: dict[str, tuple[Any, str]] = {
    "train": (Train, "train a recipe over one backend"),
    "compare": (
        Compare,
        "train a recipe over several backends, and compare weights, speed and communication",
    ),
    "report": (Report, "show where the time of a run went, and compare runs, as one HTML page"),
    "plan": (PlanCommand, "predict step time and samples per second for other workers, servers, batches and links"),
    "launch": (Launch, "run a script of your own as n workers on this host"),
    "server": (ServerCommand, "run the parameter server by hand"),
    "scheduler": (SchedulerCommand, "tell several servers and their workers of each other"),
    "health": (Health, "ask a server whether it answers"),
    "keys": (KeysCommand, "make the keys that the parameter server needs beyond one host"),
    "doctor": (Doctor, "what is here, and what would go wrong"),
}

_ABOUT = f"""dtrain {__version__}: data-parallel training on PyTorch, over a parameter server or all-reduce.

Begin with: dtrain compare digits    (two backends, one model)
A command ends with 0, or with: 64 usage, 65 bad data, 69 another process lost, 75 asked to stop
and saved, 76 protocol, 77 key refused.
DTRAIN_DEBUG=1 shows tracebacks, DTRAIN_LOG_LEVEL=info the place in the job.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the console script; ends the process with the command's exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    print_whole_lines()
    sys.exit(_guarded(lambda: _dispatch(arguments)))


def _dispatch(arguments: list[str]) -> int:
    logging.basicConfig(level=env.log_level(), format="dtrain: %(message)s")
    if arguments[:1] == ["--version"]:
        print(f"dtrain {__version__}")
        return 0
    own, rest = _split_launch(arguments)
    try:
        if own[:1] and own[0] in _COMMANDS:
            command = tyro.cli(_COMMANDS[own[0]][0], args=own[1:], prog=f"dtrain {own[0]}")
        else:
            return _overview(own)
    except SystemExit as stop:  # tyro has said what is wrong
        return UsageError.exit_code if stop.code == 2 else int(stop.code or 0)
    if isinstance(command, Launch):
        return command.run(own, rest)
    code: int = command.run(own)
    return code


def _overview(arguments: list[str]) -> int:
    """What the commands are, and whether that was asked for."""
    lines = [f"  {name:<11}{what}" for name, (_, what) in _COMMANDS.items()]
    text = "\n".join([_ABOUT, "commands:", *lines, "", "dtrain COMMAND --help explains one of them."])
    if arguments[:1] in (["-h"], ["--help"], ["help"]):
        print(text)
        return 0
    close = difflib.get_close_matches(arguments[0], _COMMANDS, n=1) if arguments else []
    hint = f": did you mean {close[0]!r}?" if close else ""
    wrong = f"there is no command {arguments[0]!r}{hint}\n" if arguments else ""
    print(f"{wrong}{text}", file=sys.stderr)
    return UsageError.exit_code


def _split_launch(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The part that is ours, and the command that `launch` is to run with flags of its own."""
    if arguments[:1] != ["launch"]:
        return arguments, []
    position = 1
    while position < len(arguments) and arguments[position].startswith("-"):
        flag = arguments[position]
        if flag == "--":
            return arguments[:position], arguments[position + 1 :]
        position += 1 if "=" in flag or flag in ("-h", "--help") else 2
    return arguments[:position], arguments[position:]


def _guarded(work: Callable[[], int]) -> int:
    """Turn our errors into one line and an exit code."""
    try:
        return work()
    except DtrainError as error:
        if env.debug():
            raise
        leave_word(error)
        print(f"dtrain: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 0
