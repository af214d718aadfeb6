"""Which module may import which, who may read the environment, and what may not be used to read bytes.

The rules read the syntax tree of every file under `dtrain/`, function bodies and `if TYPE_CHECKING` included.
"""

import ast
import graphlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

# From top to bottom. A module imports from lower floors or from its own package; there are no exceptions.
FLOORS = [
    {"__main__"},
    {"cli", "examples"},
    {"scoring"},
    {"plan"},
    {"compare", "doctor", "probe", "room"},  # what the commands do
    {"__init__"},  # the front door: what `import dtrain` offers
    {"runs", "links"},
    {"outcome", "resuming"},
    {"spec"},
    {"learning"},
    {"trainer", "timeline", "live", "steering"},
    {"hooks"},
    {"evaluate", "snapshot"},
    {"replica", "jobs", "launcher"},
    {"early", "exchange", "pushes", "weights"},  # what a replica is made of
    {"sharded"},
    {"connect"},
    {"serving"},
    {"recipes", "measure", "largebatch", "norm", "ps"},
    {"comm"},
    {"checkpoint", "buckets", "data", "optim", "processes", "interfaces"},
    {"trees", "generators"},
    {"config", "tables", "prometheus"},
    {"env"},
    {"clusters"},
    {"errors"},
]
HEIGHT = {unit: -depth for depth, floor in enumerate(FLOORS) for unit in floor}

ENVIRONMENT = {"os.environ", "os.environb", "os.getenv", "os.getenvb", "os.putenv", "os.unsetenv"}

# The same list as ruff's banned-api in pyproject.toml, which also guards tests and benchmarks.
UNSAFE = {
    "cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve",
    "torch.load", "torch.save", "torch.serialization",
    "torch.distributed.checkpoint", "torch.distributed.rpc",
    "torch.distributed.all_gather_object", "torch.distributed.gather_object",
    "torch.distributed.broadcast_object_list", "torch.distributed.scatter_object_list",
    "torch.distributed.recv_object_list", "torch.distributed.send_object_list",
}  # fmt: skip
UNSAFE_METHODS = {"send_pyobj", "recv_pyobj"}  # of a ZeroMQ socket

PACKAGE = Path(__file__).parents[1] / "dtrain"


# --- reading a source tree


@dataclass(frozen=True)
class Module:
    name: str  # dtrain.ps.wire; a package's own file is dtrain.ps.__init__
    tree: ast.Module

    @property
    def unit(self) -> str:
        """The part of the house that it belongs to: the first word after `dtrain`."""
        return self.name.split(".")[1]


def read(package: Path) -> dict[str, Module]:
    modules = {}
    for path in sorted(package.rglob("*.py")):
        name = ".".join((package.name, *path.relative_to(package).with_suffix("").parts))
        modules[name] = Module(name, ast.parse(path.read_text(encoding="utf-8"), str(path)))
    return modules


def nodes(tree: ast.AST, *, at_import: bool) -> Iterator[ast.AST]:
    """Every node below `tree`, or only what runs when the module is imported."""
    for child in ast.iter_child_nodes(tree):
        if at_import and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if at_import and isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from nodes(child, at_import=at_import)


def imported(module: Module, *, at_import: bool = False) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import. `from a import b` is a.b; relative names become absolute."""
    for node in nodes(module.tree, at_import=at_import):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=source, names=names, level=level):
                parts = module.name.split(".")[:-level] if level else []
                base = ".".join([*parts, source] if source else parts)
                yield from ((node.lineno, f"{base}.{alias.name}") for alias in names)
            case ast.Call(
                func=ast.Name("import_module" | "__import__") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(str(name)), *_],
            ):
                yield node.lineno, name


def used(module: Module) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything imported and of every attribute chain, local aliases resolved."""
    aliases = {}
    for node in ast.walk(module.tree):
        match node:
            case ast.Import(names=names):
                aliases |= {alias.asname: alias.name for alias in names if alias.asname}
            case ast.ImportFrom(module=str(source), names=names, level=0):
                aliases |= {alias.asname or alias.name: f"{source}.{alias.name}" for alias in names}
    yield from imported(module)
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute):
            head, _, rest = ast.unparse(node).partition(".")
            yield node.lineno, f"{aliases.get(head, head)}.{rest}"


def target(name: str, modules: dict[str, Module], package: str) -> str | None:
    """The module of the package that an imported name is, or lives in; None outside the package."""
    parts = name.split(".")
    if parts[0] != package:
        return None
    while len(parts) > 1:
        for candidate in (".".join(parts), ".".join([*parts, "__init__"])):
            if candidate in modules:
                return candidate
        parts.pop()
    return f"{package}.__init__"


# --- the rules: each yields one line per violation


def upward_imports(modules: dict[str, Module], package: str) -> Iterator[str]:
    for module in modules.values():
        if module.unit not in HEIGHT:
            yield f"{module.name}: {module.unit} has no floor in tests/test_layers.py"
            continue
        for line, name in imported(module):
            lower = target(name, modules, package)
            if lower is None or (unit := lower.split(".")[1]) == module.unit:
                continue
            if HEIGHT.get(unit, 0) >= HEIGHT[module.unit]:
                yield f"{module.name}:{line} imports {lower}, which is not below {module.unit}"


def cycles(modules: dict[str, Module], package: str) -> Iterator[str]:
    graph = {
        module.name: {target(name, modules, package) for _, name in imported(module, at_import=True)}
        - {None, module.name}
        for module in modules.values()
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        yield "import cycle: " + " -> ".join(reversed(error.args[1]))


def environment_reads(modules: dict[str, Module], package: str) -> Iterator[str]:
    for module in modules.values():
        if module.unit != "env":
            for line in sorted({line for line, name in used(module) if within(name, ENVIRONMENT)}):
                yield f"{module.name}:{line} touches the environment; only env.py may"


def unsafe_readers(modules: dict[str, Module], package: str) -> Iterator[str]:
    for module in modules.values():
        found = {(line, hit) for line, name in used(module) if (hit := within(name, UNSAFE))}
        for node in ast.walk(module.tree):
            match node:
                case ast.Attribute(attr=method) if method in UNSAFE_METHODS:
                    found.add((node.lineno, method))
                case ast.keyword(arg="allow_pickle", value=value) if ast.unparse(value) != "False":
                    found.add((value.lineno, "allow_pickle"))
        for line, hit in sorted(found):
            yield f"{module.name}:{line} uses {hit}, which can run what it reads"


def within(name: str, banned: set[str]) -> str | None:
    """The banned name that `name` is or lies below."""
    return next((prefix for prefix in banned if f"{name}.".startswith(f"{prefix}.")), None)


RULES = (upward_imports, cycles, environment_reads, unsafe_readers)


def violations(package: Path) -> list[str]:
    modules = read(package)
    return [line for rule in RULES for line in rule(modules, package.name)]


# --- the house, and houses with a fault planted in them


def test_dtrain_keeps_the_rules():
    assert read(PACKAGE), f"no source under {PACKAGE}"
    assert violations(PACKAGE) == []


def test_no_unit_stands_on_two_floors():
    assert len(HEIGHT) == sum(len(floor) for floor in FLOORS)


def plant(tmp_path: Path, files: dict[str, str]) -> Path:
    package = tmp_path / "dtrain"
    for name, source in files.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    return package


SOUND = {
    "__init__.py": "from .trainer import Trainer\n__version__ = '0'",
    "__main__.py": "from dtrain.cli import main\nmain()",
    "cli.py": "from dtrain import __version__\nfrom dtrain.trainer import Trainer\ndef main(): ...",
    "trainer.py": "import torch\nfrom dtrain import comm\nfrom dtrain.ps.wire import Frame\nTrainer = 1",
    "ps/__init__.py": "from .wire import Frame",
    "ps/wire.py": "from ..errors import CommError\nclass Frame:\n    def load(self): from . import rounds",
    "ps/rounds.py": "from dtrain.ps import wire\nimport numpy as np\nnp.load('x', allow_pickle=False)",
    "comm/__init__.py": "import torch.distributed as dist\ndist.all_reduce",
    "env.py": "import os\nos.environ.get('RANK')",
    "errors.py": "class CommError(Exception): ...",
}


def test_a_sound_tree_has_no_violations(tmp_path):
    assert violations(plant(tmp_path, SOUND)) == []


@pytest.mark.parametrize(
    ("file", "source", "said"),
    [
        ("errors.py", "import dtrain.config", "errors:1 imports"),
        ("comm/__init__.py", "from dtrain.ps.wire import Frame", "comm.__init__:1 imports dtrain.ps.wire"),
        ("comm/__init__.py", "from ..ps import Frame", "comm.__init__:1 imports dtrain.ps.__init__"),
        ("comm/__init__.py", "def f():\n    from dtrain import trainer", "__init__:2 imports dtrain.trainer"),
        ("comm/__init__.py", "if TYPE_CHECKING:\n    import dtrain.ps", "comm.__init__:2 imports dtrain.ps"),
        ("comm/__init__.py", "import importlib as i\ni.import_module('dtrain.ps')", "__init__:2 imports"),
        ("trainer.py", "from dtrain import __version__", "trainer:1 imports dtrain.__init__"),
        ("norm/sync.py", "from dtrain.ps import wire", "norm.sync:1 imports dtrain.ps.wire"),
        ("misc.py", "", "misc has no floor"),
        ("ps/wire.py", "from dtrain.ps import rounds", "import cycle: dtrain.ps."),
        ("ps/wire.py", "from . import Frame", "import cycle: dtrain.ps."),
        ("ps/wire.py", "import os\nos.environ['RANK']", "ps.wire:2 touches the environment"),
        ("ps/wire.py", "import os as o\no.getenv('RANK')", "ps.wire:2 touches the environment"),
        ("ps/wire.py", "from os import environ as e", "ps.wire:1 touches the environment"),
        ("ps/wire.py", "def f():\n    import pickle", "ps.wire:2 uses pickle"),
        ("ps/wire.py", "from marshal import loads", "ps.wire:1 uses marshal"),
        ("ps/wire.py", "__import__('dill')", "ps.wire:1 uses dill"),
        ("ps/wire.py", "import torch\ntorch.load('x')", "ps.wire:2 uses torch.load"),
        ("ps/wire.py", "import torch as t\nt.save({}, 'x')", "ps.wire:2 uses torch.save"),
        ("ps/wire.py", "from torch import load", "ps.wire:1 uses torch.load"),
        (
            "ps/wire.py",
            "import torch.distributed as d\nd.gather_object(1)",
            "uses torch.distributed.gather_obj",
        ),
        ("ps/wire.py", "from torch.distributed import rpc", "uses torch.distributed.rpc"),
        ("ps/wire.py", "from torch import distributed\ndistributed.rpc.f", "uses torch.distributed.rpc"),
        ("ps/wire.py", "socket.recv_pyobj()", "uses recv_pyobj"),
        ("ps/wire.py", "np.load('x', allow_pickle=True)", "uses allow_pickle"),
    ],
)
def test_a_planted_violation_is_found(tmp_path, file, source, said):
    found = violations(plant(tmp_path, SOUND | {file: source}))
    assert any(said in line for line in found), found
