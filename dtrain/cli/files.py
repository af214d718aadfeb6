"""The file that `--json` names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dtrain.errors import UsageError
from dtrain.hooks import finite


def check_json(file: str | None) -> None:
    """Say before a long run that its figures cannot be written."""
    if file is not None and (Path(file).is_dir() or not Path(file).absolute().parent.is_dir()):
        raise UsageError(f"--json {file}: no file can be made there; its directory must exist")


def write_json(file: str | None, record: dict[str, Any]) -> None:
    if file is None:
        return
    try:
        text = json.dumps(finite(record), indent=1, allow_nan=False)
        Path(file).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--json {file}: {error.strerror}") from error
