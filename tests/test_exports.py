"""What `import dtrain` offers, and that its version and the change log agree."""

import __future__

import re
from pathlib import Path
from types import ModuleType

import dtrain

CHANGELOG = Path(__file__).parents[1] / "CHANGELOG.md"


def sort_key(name: str) -> tuple[int, str]:
    """CONSTANTS, then Classes, then functions: the order that ruff's RUF022 asks for."""
    return 0 if name.isupper() else 1 if name[0].isupper() else 2, name


def test_all_is_sorted():
    assert list(dtrain.__all__) == sorted(set(dtrain.__all__), key=sort_key)


def test_all_is_what_there_is():
    missing = {name for name in dtrain.__all__ if not hasattr(dtrain, name)}
    assert not missing, f"in __all__, but not in dtrain: {sorted(missing)}"

    public = {
        name
        for name, value in vars(dtrain).items()
        if not name.startswith("_") and not isinstance(value, (ModuleType, __future__._Feature))
    }
    leaked = public - set(dtrain.__all__)
    assert not leaked, f"public in dtrain, but not in __all__: {sorted(leaked)}"


def test_the_change_log_ends_at_this_version():
    """The newest release in it is this version; before the first release, Unreleased says what there is."""
    sections = re.findall(r"^## \[([^\]]+)\](.*?)(?=^## |\Z)", CHANGELOG.read_text("utf-8"), re.M | re.S)
    releases = [title for title, _ in sections if title != "Unreleased"]
    if releases:
        assert releases[0] == dtrain.__version__
    else:
        assert re.search(r"^- ", dict(sections)["Unreleased"], re.M), "nothing under Unreleased"
