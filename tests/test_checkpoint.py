"""Checkpoints: exact round trips; the old or the new state after a crash at any point; damage is found."""

import collections
import copy
import errno
import fcntl
import json
import math
import os
import random
import re
import resource
import shutil
import stat
import struct
import subprocess
import warnings
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from dtrain import checkpoint, trees
from dtrain.errors import DataError, UsageError

DTYPES = sorted(trees.DTYPES, key=str)


def state(value: int) -> dict[str, object]:
    """A small state of two groups, each of which says which save it is from."""
    return {
        "model": {"w": torch.full((3, 2), float(value)), "b": torch.tensor(value)},
        "loop": {"value": value, "lr": 0.1 * value, 7: (value, [None, True])},
    }


def same(a: object, b: object) -> bool:
    """Equal in type, value and bits, all the way down; the order of keys counts."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        a, b = (t.detach().resolve_conj().resolve_neg().contiguous().flatten().view(torch.uint8) for t in (a, b))
        return torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return struct.pack("d", a) == struct.pack("d", b) or (math.isnan(a) and math.isnan(b))
    if isinstance(a, dict):
        return same(list(a), list(b)) and same(list(a.values()), list(b.values()))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def round_trip(root: Path, tree: object) -> object:
    checkpoint.save(root, 1, {"group": tree}, keep=1)
    return checkpoint.load(root).groups["group"]


def load_quietly(root: Path, step: int | None = None) -> checkpoint.Checkpoint:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return checkpoint.load(root, step)


# --- round trips


@pytest.mark.parametrize("tree", [
    {}, [], (), None, True, 0, -1, 2**53, 2**53 + 1, -(2**64), [10**5000],
    1.5, -0.0, 5e-324, math.inf, -math.inf, math.nan,
    "", "é\0\U0001f600", "$tensor", {"$tensor": "w"}, {"$dict": []}, {"$": 1}, [[], ()], ((),),
    {1: "a", "1": "b"}, {-3: {2**70: None}}, {True: 1, 2: 3}, {"a.b": 1, "": {"": 0}},
    collections.Counter({3: 1, "x": 2}), random.Random(5).getstate(),
])  # fmt: skip
def test_values(tmp_path, tree):
    assert same(round_trip(tmp_path, tree), tree)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (5,), (2, 3, 4)], ids=str)
def test_tensors(tmp_path, dtype, shape):
    numel = math.prod(shape)
    raw = torch.randint(0, 256, (numel * dtype.itemsize,), dtype=torch.uint8)
    raw = raw % 2 if dtype == torch.bool else raw
    tensor = raw.view(dtype).reshape(shape)
    assert same(round_trip(tmp_path, {"t": tensor}), {"t": tensor})


def test_views_shared_and_lazy_tensors(tmp_path):
    """Shared, overlapping, strided, expanded and lazily conjugated tensors; none shares memory afterwards."""
    base = torch.arange(24.0).reshape(4, 6)
    z = torch.randn(3, dtype=torch.complex64).conj()
    tree = {
        "tied": [base, base, base.view(-1)],
        "views": (base.t(), base[1:3, ::2], base[0], torch.tensor(1.0).expand(5)),
        "lazy": [
            z,
            z.imag,
            torch._neg_view(torch.ones(3)),
            torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last),
        ],
        "empty": [base[:0], base[:0]],
        "param": nn.Parameter(base.clone()),
    }
    assert (z.is_conj(), z.imag.is_neg()) == (True, True)
    expected = {**tree, "param": tree["param"].detach()}
    loaded = round_trip(tmp_path, tree)
    assert same(loaded, expected)
    loaded["tied"][0].zero_()
    assert same(loaded["tied"][1], base)
    assert not loaded["param"].requires_grad
    assert same(round_trip(tmp_path, base), base)  # a group that is one tensor


def test_names_of_tensors_never_clash(tmp_path):
    t = list(torch.arange(6.0).split(1))
    tree = {"a.b": t[0], "a": {"b": t[1], "b_": t[2]}, 1: t[3], "1": t[4], "__metadata__": t[5]}
    assert same(round_trip(tmp_path, tree), tree)


def test_the_file_of_a_model_has_its_names(tmp_path):
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    path = checkpoint.save(tmp_path, 1, {"model": model.state_dict()})
    tensors = checkpoint.load_tensors(path / "model.safetensors")
    assert tensors.keys() == model.state_dict().keys()
    model.load_state_dict(tensors)


def test_subclasses_come_back_plain(tmp_path):
    numpy = pytest.importorskip("numpy")
    tree = [collections.OrderedDict(b=1, a=2), numpy.float64(0.1), torch.Size([2, 3])]
    assert same(round_trip(tmp_path, tree), [{"b": 1, "a": 2}, 0.1, (2, 3)])


SCALARS = st.none() | st.booleans() | st.integers() | st.integers(-(2**200), 2**200) | st.floats() | st.text(max_size=5)
TENSORS = st.builds(
    lambda dtype, shape, seed: torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)).to(dtype),
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 3), max_size=3),
    st.integers(0, 9),
)
TREES = st.recursive(
    SCALARS | TENSORS,
    lambda tree: (
        st.lists(tree, max_size=4)
        | st.lists(tree, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=4) | st.integers() | st.sampled_from(["$int", "a.b", "a"]), tree, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tree=TREES)
def test_any_tree(tmp_path, tree):
    with mock.patch.object(os, "fsync"):  # for speed
        assert same(round_trip(tmp_path, tree), tree)


def make_training(scheduler: str, seed: int):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, amsgrad=True)
    lr = torch.optim.lr_scheduler
    made = {
        "multistep": lambda: lr.MultiStepLR(optimizer, [2, 5, 7]),
        "onecycle": lambda: lr.OneCycleLR(optimizer, 0.1, total_steps=20),
        "plateau": lambda: lr.ReduceLROnPlateau(optimizer, patience=0),
        "sequential": lambda: lr.SequentialLR(
            optimizer, [lr.LinearLR(optimizer), lr.CosineAnnealingWarmRestarts(optimizer, 3)], [4]
        ),
    }[scheduler]()
    return model, optimizer, made, torch.amp.GradScaler("cpu", growth_interval=2)


def train(training, num_steps: int) -> None:
    model, optimizer, scheduler, scaler = training
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss = model(torch.randn(6, 4) * random.random()).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
        scheduler.step(*[loss.item()] * plateau)


@pytest.mark.parametrize("scheduler", ["multistep", "onecycle", "plateau", "sequential"])
@pytest.mark.filterwarnings("ignore:The epoch parameter in:UserWarning")  # torch's SequentialLR calls itself so
def test_training_goes_on_to_the_same_bits(tmp_path, scheduler):
    """Model, AdamW, scheduler, loss scaler and random number generators, by way of files, into fresh objects."""
    random.seed(3)
    first = make_training(scheduler, seed=1)
    train(first, 4)
    names = ["model", "optimizer", "scheduler", "scaler"]
    groups = {name: part.state_dict() for name, part in zip(names, first, strict=True)}
    groups["rng"] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    checkpoint.save(tmp_path, 4, groups)
    saved = copy.deepcopy(groups["optimizer"])  # which holds the live tensors
    train(first, 5)

    second = make_training(scheduler, seed=2)
    random.seed(4)
    loaded = checkpoint.load(tmp_path).groups
    assert same(loaded["optimizer"], saved)
    for name, part in zip(names, second, strict=True):
        part.load_state_dict(loaded[name])
    random.setstate(loaded["rng"]["python"])
    torch.set_rng_state(loaded["rng"]["torch"])
    train(second, 5)
    for name, a, b in zip(names, first, second, strict=True):
        assert same(dict(a.state_dict()), dict(b.state_dict())), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_tensors_come_back_on_the_cpu(tmp_path):
    t = torch.arange(6.0).reshape(2, 3)
    assert same(round_trip(tmp_path, {"t": t.cuda(), "view": t.cuda().t()}), {"t": t, "view": t.t()})


def cyclic() -> list[object]:
    loop: list[object] = []
    loop.append(loop)
    return loop


@pytest.mark.parametrize(("tree", "says"), [
    ({"a": [0, object()]}, r"group\.a\.1: cannot store a builtins\.object"),
    ({"a": {1, 2}}, r"group\.a: cannot store a builtins\.set"),
    ({1.5: 0}, r"group: the key 1\.5 is neither str nor int"),
    ({"a": "\ud800"}, r"group\.a: .* surrogate"),
    ({"\ud800": 0}, r"group: .* surrogate"),
    ({"a": torch.zeros(2, dtype=torch.complex128)}, r"group: a: .*complex128"),
    ({"a": torch.zeros(2, dtype=torch.float8_e8m0fnu)}, r"group: a: .*e8m0"),
    ({"a": torch.eye(2).to_sparse()}, r"group: a: .*sparse"),
    ({"a": torch.zeros(2, device="meta")}, r"group: a: .*meta"),
    (cyclic(), r"nested deeper than 64, or a cycle"),
])  # fmt: skip
def test_what_cannot_be_stored_is_named(tmp_path, tree, says):
    checkpoint.save(tmp_path, 1, state(1))
    with pytest.raises(DataError, match=says):
        checkpoint.save(tmp_path, 2, {"first": {"w": torch.zeros(3)}, "group": tree})
    assert os.listdir(tmp_path) == ["step-1"]
    assert same(checkpoint.load(tmp_path).groups, state(1))


@pytest.mark.parametrize(("step", "groups", "keep"), [
    (-1, {}, 1), (10**18, {}, 1), (True, {}, 1), (1.0, {}, 1), ("1", {}, 1), (1, {}, 0),
    (1, {"": 0}, 1), (1, {"../x": 0}, 1), (1, {"a/b": 0}, 1), (1, {".a": 0}, 1), (1, {"a\n": 0}, 1),
    (1, {3: 0}, 1), (1, {"a" * 65: 0}, 1),
])  # fmt: skip
def test_arguments(tmp_path, step, groups, keep):
    with pytest.raises(UsageError):
        checkpoint.save(tmp_path, step, groups, keep=keep)
    assert os.listdir(tmp_path) == []


# --- which checkpoints there are


def test_layout_and_modes(tmp_path):
    root = tmp_path / "a" / "b"
    assert checkpoint.save(root, 0, state(0)) == root / "step-0"
    files = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (root / "step-0").iterdir()}
    expected = ["COMMIT.json", "loop.safetensors", "manifest.json", "model.safetensors"]
    assert files == dict.fromkeys(expected, 0o600)
    assert stat.S_IMODE((root / "step-0").stat().st_mode) == 0o700
    found = checkpoint.load(root)
    assert (found.path, found.step) == (root / "step-0", 0)


def test_steps_are_ordered_as_numbers_and_the_newest_are_kept(tmp_path):
    for step in (9, 10, 100, 11):
        checkpoint.save(tmp_path, step, state(step), keep=3)
    assert checkpoint.steps(tmp_path) == [10, 11, 100]
    assert sorted(os.listdir(tmp_path)) == ["step-10", "step-100", "step-11"]
    assert checkpoint.load(tmp_path).step == 100
    assert same(checkpoint.load(tmp_path, 10).groups, state(10))
    with pytest.raises(DataError, match=r"no checkpoint of step 9 here; committed steps: \[10, 11, 100\]"):
        checkpoint.load(tmp_path, 9)


def test_the_one_just_saved_is_kept_even_after_going_back(tmp_path):
    for step in (10, 20, 30):
        checkpoint.save(tmp_path, step, state(step))
    checkpoint.save(tmp_path, 5, state(5), keep=2)
    assert checkpoint.steps(tmp_path) == [5, 30]


def test_nothing_there(tmp_path):
    for root in (tmp_path, tmp_path / "none"):
        assert checkpoint.steps(root) == []
        with pytest.raises(DataError, match="no checkpoint here; committed steps: none"):
            checkpoint.load(root)
    (tmp_path / "file").touch()
    for call in (checkpoint.steps, checkpoint.load, lambda root: checkpoint.save(root, 1, {})):
        with pytest.raises(DataError, match=r"file: .*Not a directory"):
            call(tmp_path / "file")


def test_other_names_are_left_alone(tmp_path, caplog):
    others = [
        "step-",
        "step-01",
        "step-1x",
        "Step-7",
        "step-7 ",
        "step--7",
        "step-7.0",
        "step-7.01",
        "step-٧",
        "step-7\n",
    ]
    others += ["step-7.tmp", "step-7.tmp-xyz", "step-7.bak", "7", "logs"]
    for name in others:
        (tmp_path / name).mkdir()
        (tmp_path / name / "COMMIT.json").write_text("{}")
    (tmp_path / "step-3.tmp-0123456789abcdef").symlink_to("logs")
    checkpoint.save(tmp_path, 1, state(1), keep=1)
    checkpoint.save(tmp_path, 2, state(2), keep=1)
    assert checkpoint.steps(tmp_path) == [2]
    assert checkpoint.load(tmp_path).step == 2  # and no warning
    assert sorted(os.listdir(tmp_path)) == sorted([*others, "step-2", "step-3.tmp-0123456789abcdef"])
    assert caplog.text == ""


def test_leftovers_are_removed_by_the_next_save(tmp_path):
    checkpoint.save(tmp_path, 1, state(1))
    shutil.copytree(tmp_path / "step-1", tmp_path / "step-4.tmp-0123456789abcdef")
    shutil.copytree(tmp_path / "step-1", tmp_path / "step-1.1.tmp-0123456789abcdef")
    unfinished = checkpoint.write(tmp_path, 5, state(5))
    assert checkpoint.steps(tmp_path) == [1]
    with pytest.warns(RuntimeWarning, match=r"step-5/COMMIT\.json: missing: that save did not finish"):
        assert checkpoint.load(tmp_path).step == 1
    checkpoint.save(tmp_path, 2, state(2))
    assert sorted(os.listdir(tmp_path)) == ["step-1", "step-2"]
    assert not unfinished.exists()


def test_write_and_commit_are_two(tmp_path):
    path = checkpoint.write(tmp_path, 3, state(3))
    with pytest.raises(DataError, match=r"COMMIT\.json: missing"):
        checkpoint.load(tmp_path, 3)
    checkpoint.commit(path)
    checkpoint.commit(path)  # again is no harm
    assert same(checkpoint.load(tmp_path, 3).groups, state(3))
    with pytest.raises(UsageError):
        checkpoint.commit(tmp_path)
    with pytest.raises(DataError, match=r"step-9/manifest\.json: cannot be read: No such file"):
        checkpoint.commit(tmp_path / "step-9")


def test_what_write_leaves_is_durable(tmp_path):
    """With several writers, the one who commits relies on it."""
    root = tmp_path / "root"
    root.mkdir()
    with Disk(root) as disk:
        checkpoint.write(root, 3, state(3))
    lay_out(disk.history[-1][1], tmp_path / "after")
    checkpoint.commit(tmp_path / "after" / "step-3")
    assert same(checkpoint.load(tmp_path / "after").groups, state(3))


def test_what_cannot_be_removed_is_no_error(tmp_path, caplog):
    with mock.patch.object(checkpoint, "_prune", side_effect=PermissionError("not yours")):
        checkpoint.save(tmp_path, 1, state(1))
    assert "old checkpoints could not be removed: not yours" in caplog.text
    assert checkpoint.load(tmp_path).step == 1


def test_saving_a_step_again_replaces_it(tmp_path):
    for value in (1, 2, 3):
        checkpoint.save(tmp_path, 5, state(value))
        assert checkpoint.steps(tmp_path) == [5]
        assert same(checkpoint.load(tmp_path, 5).groups, state(value))
        assert len(os.listdir(tmp_path)) == 1


def test_one_save_at_a_time(tmp_path):
    fd = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    (tmp_path / "step-4.tmp-0123456789abcdef").mkdir()  # the other process's
    with pytest.raises(DataError, match="another process saves here"):
        checkpoint.save(tmp_path, 1, state(1))
    assert os.listdir(tmp_path) == ["step-4.tmp-0123456789abcdef"]
    os.close(fd)
    checkpoint.save(tmp_path, 1, state(1))
    assert os.listdir(tmp_path) == ["step-1"]


def test_a_child_forked_during_a_save_does_not_keep_the_lock(tmp_path):
    """As a data loader's workers would, forked by one thread while another one saves."""
    read_end, write_end = os.pipe()
    real, children = checkpoint.write, []

    def fork_and_write(*args):
        children.append(os.fork())
        if children[0] == 0:
            os.close(write_end)
            os.read(read_end, 1)  # lives until the parent closes its end
            os._exit(0)
        return real(*args)

    with mock.patch.object(checkpoint, "write", fork_and_write):
        checkpoint.save(tmp_path, 1, state(1))
    try:
        checkpoint.save(tmp_path, 2, state(2))
    finally:
        os.close(write_end)
        os.waitpid(children[0], 0)
        os.close(read_end)


# --- a crash at the n-th file system operation, for every n

OPERATIONS = ["mkdir", "open", "write", "fsync", "rename", "unlink", "rmdir"]


class Meddler(ExitStack):
    """Counts the changes to the file system, and calls `at` before the n-th, if there are that many.

    Opening a file to read it does not count.
    """

    def __init__(self, n: int, at) -> None:
        super().__init__()
        self.n, self.at, self.count = n, at, 0

    def __enter__(self):
        for name in OPERATIONS:
            self.enter_context(mock.patch.object(os, name, self.wrap(name, getattr(os, name))))
        return self

    def wrap(self, name, real):
        def operation(*args, **kwargs):
            if name != "open" or args[1] & os.O_CREAT:
                self.count += 1
                if self.count == self.n:
                    self.at(name, real, args)
            return real(*args, **kwargs)

        return operation


def killed_at(n: int, save) -> bool:
    """Runs `save` in a child that is gone at the n-th operation, a write half done. True if it got there."""

    def die(name, real, args):
        if name == "write":
            real(args[0], args[1][: len(args[1]) // 2])
        os._exit(9)

    child = os.fork()
    if child == 0:
        try:
            with Meddler(n, die):
                save()
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 9


def fails_at(n: int, save) -> tuple[bool, bool]:
    """Runs `save` with an I/O error at the n-th operation: (whether there was one, whether save raised)."""

    def fail(name, real, args):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with Meddler(n, fail) as meddler:
        try:
            save()
        except DataError as exc:
            return "Input/output error" in str(exc), True
    return meddler.count >= n, False


# what lies there before: [(step, value)]; the save under test: step, value, keep
SCENARIOS = {
    "first": ([], 1, 1, 3),
    "next": ([(1, 1)], 2, 2, 3),
    "replaces": ([(5, 1)], 5, 2, 3),
    "replaces a replacement": ([(5, 0), (5, 1)], 5, 2, 1),
    "drops old ones": ([(1, 1), (2, 2), (3, 3)], 4, 4, 1),
    "replaces and drops": ([(1, 1), (2, 2), (3, 3)], 3, 4, 1),
    "goes back": ([(7, 7), (8, 8)], 3, 3, 1),
}


def prepare(root: Path, before: list[tuple[int, int]]) -> None:
    root.mkdir()
    for step, value in before:
        checkpoint.save(root, step, state(value))


def value_at(root: Path, step: int | None = None) -> int | None:
    """The value of the state that load() returns, which has to be of one save; None if there is none."""
    try:
        found = load_quietly(root, step)
    except DataError:
        return None
    value = found.groups["loop"]["value"]
    assert same(found.groups, state(value))
    return value


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # fork and threads, from Python 3.12 on
def test_killed_anywhere(tmp_path, name):
    before, step, value, keep = SCENARIOS[name]
    template = tmp_path / "template"
    prepare(template, before)
    old, old_at_step = value_at(template), value_at(template, step)
    seen = set()
    for n in range(1, 1000):
        root = tmp_path / f"{n}"
        shutil.copytree(template, root)
        killed = killed_at(n, lambda root=root: checkpoint.save(root, step, state(value), keep=keep))
        seen.add((value_at(root), value_at(root, step)))
        assert seen <= {(old, old_at_step), (old, value), (value, value)}
        if not killed:
            break
        checkpoint.save(root, 9, state(9), keep=2)  # life goes on, and nothing is left of the dead
        assert value_at(root) == 9
        assert len(checkpoint.steps(root)) == len(os.listdir(root)) <= 2
        shutil.rmtree(root)
    assert n > 10
    assert value_at(root, step) == value
    assert (old, old_at_step) in seen


@pytest.mark.parametrize("name", SCENARIOS)
def test_error_anywhere(tmp_path, name):
    """If save raises, the old state is there and nothing else; if it does not, the new one is."""
    before, step, value, keep = SCENARIOS[name]
    template = tmp_path / "template"
    prepare(template, before)
    old, old_at_step = value_at(template), value_at(template, step)
    outcomes = collections.Counter()
    for n in range(1, 1000):
        root = tmp_path / f"{n}"
        shutil.copytree(template, root)
        reached, raised = fails_at(n, lambda root=root: checkpoint.save(root, step, state(value), keep=keep))
        outcomes[raised] += 1
        if raised:
            assert (value_at(root), value_at(root, step)) == (old, old_at_step)
            assert sorted(os.listdir(root)) == sorted(os.listdir(template))
        else:
            assert value_at(root, step) == value
        if not reached:
            break
        shutil.rmtree(root)
    assert outcomes[True] > 10


# --- a power cut: what was not synced may be gone


class Disk:
    """A model of a disk under a directory: what each file and directory holds, and what of that is durable.

    It follows the calls of `os` while they are made for real. A node is {"live": ..., "durable": ...}, of bytes
    for a file, of a dict from names to nodes for a directory. `history` has two pictures per change: what a power
    cut leaves if names reach the disk at once, and if they only do when their directory is synced.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.fds, self.history, self.patches = root, {}, [], ExitStack()
        self.top = self.read(root)

    def read(self, path: Path) -> dict:
        data = {child.name: self.read(child) for child in path.iterdir()} if path.is_dir() else path.read_bytes()
        return {"live": data, "durable": dict(data) if path.is_dir() else data}

    def find(self, path, dir_fd=None) -> dict:
        node = self.top if dir_fd is None else self.fds[dir_fd]
        for part in Path(os.path.relpath(path, self.root) if dir_fd is None else path).parts:
            node = node["live"][part]
        return node

    def parent(self, path, dir_fd=None) -> tuple[dict, str]:
        path = Path(path)
        return self.find(path.parent, dir_fd), path.name

    def __enter__(self):
        for name in [*OPERATIONS, "close"]:
            self.patches.enter_context(mock.patch.object(os, name, self.wrap(name, getattr(os, name))))
        self.snap()
        return self

    def __exit__(self, *exc_info) -> None:
        self.patches.close()

    def wrap(self, name, real):
        def operation(*args, **kwargs):
            result = real(*args, **kwargs)
            getattr(self, name)(result, *args, **kwargs)
            self.snap()
            return result

        return operation

    def snap(self) -> None:
        self.history.append((self.picture(self.top, "live"), self.picture(self.top, "durable")))

    def picture(self, node: dict, entries: str):
        """The tree after a power cut: the live names or only the durable ones; content only if durable."""
        if isinstance(node["durable"], bytes):
            return node["durable"]
        return {name: self.picture(child, entries) for name, child in node[entries].items()}

    def mkdir(self, _, path, mode=0o777) -> None:
        directory, name = self.parent(path)
        directory["live"][name] = {"live": {}, "durable": {}}

    def open(self, fd, path, flags, mode=0o777, *, dir_fd=None) -> None:
        if flags & os.O_CREAT:
            directory, name = self.parent(path, dir_fd)
            directory["live"][name] = {"live": b"", "durable": b""}
        self.fds[fd] = self.find(path, dir_fd)

    def close(self, _, fd) -> None:
        self.fds.pop(fd, None)

    def write(self, count, fd, data) -> None:
        self.fds[fd]["live"] += bytes(data[:count])

    def fsync(self, _, fd) -> None:
        live = self.fds[fd]["live"]
        self.fds[fd]["durable"] = dict(live) if isinstance(live, dict) else live

    def rename(self, _, old, new) -> None:
        (source, old_name), (target, new_name) = self.parent(old), self.parent(new)
        target["live"][new_name] = source["live"].pop(old_name)

    def unlink(self, _, path, *, dir_fd=None) -> None:
        directory, name = self.parent(path, dir_fd)
        del directory["live"][name]

    rmdir = unlink


def lay_out(picture: dict, path: Path) -> None:
    path.mkdir()
    for name, content in picture.items():
        if isinstance(content, dict):
            lay_out(content, path / name)
        else:
            (path / name).write_bytes(content)


@pytest.mark.parametrize("name", SCENARIOS)
def test_power_cut_anywhere(tmp_path, name):
    """Old or new at each point, whether or not names reach the disk unasked; new once save has returned."""
    before, step, value, keep = SCENARIOS[name]
    root = tmp_path / "root"
    prepare(root, before)
    old, old_at_step = value_at(root), value_at(root, step)
    with Disk(root) as disk:
        checkpoint.save(root, step, state(value), keep=keep)
    assert disk.read(root)["live"].keys() == disk.top["live"].keys()  # the model kept up
    pictures = []
    for live, durable in disk.history:
        pictures += [picture for picture in (live, durable) if picture not in pictures]
    for n, picture in enumerate(pictures):
        lay_out(picture, tmp_path / f"{n}")
        allowed = {(old, old_at_step), (old, value), (value, value)}
        assert (value_at(tmp_path / f"{n}"), value_at(tmp_path / f"{n}", step)) in allowed, sorted(picture)
        shutil.rmtree(tmp_path / f"{n}")
    assert len(pictures) > 8
    for n, picture in enumerate(disk.history[-1]):
        lay_out(picture, tmp_path / f"end-{n}")
        assert value_at(tmp_path / f"end-{n}", step) == value


def test_new_root_is_durable(tmp_path):
    with Disk(tmp_path) as disk:
        checkpoint.save(tmp_path / "a" / "b", 1, state(1))
        checkpoint.save_tensors(tmp_path / "a" / "w.safetensors", {"w": torch.ones(2)})
    lay_out(disk.history[-1][1], tmp_path / "after")
    assert value_at(tmp_path / "after" / "a" / "b") == 1
    assert same(checkpoint.load_tensors(tmp_path / "after" / "a" / "w.safetensors"), {"w": torch.ones(2)})


# --- the disk says no


def in_child(function, *args) -> str:
    """What `function` returns, run in a forked child."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            answer = function(*args)
        except BaseException as exc:
            answer = f"{type(exc).__name__}: {exc}"
        os.write(write_end, answer.encode())
        os._exit(0)
    os.close(write_end)
    with open(read_end, encoding="utf-8") as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return answer


def save_and_report(root: Path, step: int, groups: dict[str, object]) -> str:
    checkpoint.save(root, step, groups)
    return "saved"


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_file_size_limit(tmp_path):
    """The old one is intact, nothing is left over, the error says which file and why."""
    checkpoint.save(tmp_path, 1, state(1))
    # Made here: a forked child has lost torch's threads, and filling a large tensor would wait for them.
    groups = {"small": {"w": torch.zeros(9)}, "big": {"w": torch.zeros(50_000)}}

    def save_with_limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        return save_and_report(tmp_path, 2, groups)

    answer = in_child(save_with_limit)
    assert answer.startswith("DataError")
    assert "big.safetensors: cannot be written: File too large" in answer
    assert os.listdir(tmp_path) == ["step-1"]
    assert same(checkpoint.load(tmp_path).groups, state(1))


def test_disk_full(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as exc:
        pytest.skip(f"cannot mount a small tmpfs: {getattr(exc, 'stderr', exc)}")
    try:
        checkpoint.save(tmp_path, 1, state(1))
        with pytest.raises(DataError, match=r"big\.safetensors: cannot be written: No space left on device"):
            checkpoint.save(tmp_path, 2, {"big": {"w": torch.zeros(100_000)}})
        assert os.listdir(tmp_path) == ["step-1"]
        assert same(checkpoint.load(tmp_path).groups, state(1))
        for step in range(2, 9):  # and there is room again
            checkpoint.save(tmp_path, step, {"half": {"w": torch.zeros(16_000)}}, keep=1)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def as_nobody(root: Path, function) -> str:
    """`function(root)` in a child without root's rights. It goes there first: the way may be closed to others."""

    def run() -> str:
        os.chdir(root.parent)
        if os.geteuid() == 0:
            os.setuid(65534)
        return function(Path(root.name))

    root.parent.chmod(0o755)
    return in_child(run)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_read_only_root(tmp_path):
    root = tmp_path / "root"
    checkpoint.save(root, 1, state(1))
    root.chmod(0o555)
    answer = as_nobody(root, lambda root: save_and_report(root, 2, state(2)))
    root.chmod(0o755)
    assert re.fullmatch(r"DataError: root/step-2\.tmp-\w+: cannot write the checkpoint: Permission denied", answer)
    assert os.listdir(root) == ["step-1"]
    assert same(checkpoint.load(root).groups, state(1))


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_unreadable_directory(tmp_path):
    root = tmp_path / "root"
    path = checkpoint.save(root, 1, state(1))
    path.chmod(0)
    answer = as_nobody(root, lambda root: str(checkpoint.load(root)))
    path.chmod(0o700)
    assert answer.startswith("DataError: root: no valid checkpoint: root/step-1: ")
    assert answer.endswith("cannot be opened as a directory: Permission denied")


# --- damage


def damaged(root: Path, file: str, damage) -> None:
    """Steps 1 and 2, of which step 2's `file` is damaged."""
    checkpoint.save(root, 1, state(1))
    checkpoint.save(root, 2, state(2))
    damage(root / "step-2" / file)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def flip(path: Path, bit: int = -3) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def link(path: Path) -> None:
    """The same content, by a symbolic link to outside."""
    outside = path.parents[2] / f"outside-{path.name}"
    path.rename(outside)
    path.symlink_to(outside)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "damage", [cut, empty, grow, flip, Path.unlink, link, pipe, directory], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("file", ["COMMIT.json", "manifest.json", "model.safetensors", "loop.safetensors"])
def test_damaged_file(tmp_path, caplog, file, damage):
    """The one before is loaded and a warning names the file; a step asked for by name is an error that does."""
    root = tmp_path / "root"
    damaged(root, file, damage)
    with pytest.raises(DataError, match=f"no valid checkpoint of step 2: .*step-2/{file}: ") as caught:
        checkpoint.load(root, 2)
    assert caught.value.exit_code == 65
    with pytest.warns(RuntimeWarning, match=f"loading .*step-1 instead of a newer checkpoint: .*step-2/{file}: "):
        found = checkpoint.load(root)
    assert f"step-2/{file}" in caplog.text
    assert found.step == 1
    assert same(found.groups, state(1))
    assert checkpoint.steps(root) == ([1] if file.endswith("json") else [1, 2])
    checkpoint.save(root, 2, state(3))  # and mends it
    assert checkpoint.steps(root) == [1, 2]
    assert same(checkpoint.load(root).groups, state(3))


@pytest.mark.parametrize("file", ["COMMIT.json", "manifest.json", "model.safetensors"])
def test_any_flipped_bit_is_seen(tmp_path, file):
    path = checkpoint.save(tmp_path, 1, state(1)) / file
    for bit in range(0, 8 * path.stat().st_size, 1 if file == "COMMIT.json" else 11):
        flip(path, bit)
        with pytest.raises(DataError, match=r"step-1/\w+\.(json|safetensors): "):
            checkpoint.load(tmp_path, 1)
        flip(path, bit)
    assert same(checkpoint.load(tmp_path, 1).groups, state(1))


def test_large_commit_file_is_not_read(tmp_path):
    path = checkpoint.save(tmp_path, 1, state(1)) / "COMMIT.json"
    path.write_bytes(path.read_bytes() + b" " * 4096)
    with pytest.raises(DataError, match=r"COMMIT\.json: \d+ bytes, at most 4096 expected"):
        checkpoint.load(tmp_path)


def test_all_damaged(tmp_path):
    damaged(tmp_path, "manifest.json", cut)
    flip(tmp_path / "step-1" / "model.safetensors")
    with pytest.raises(DataError, match=r"no valid checkpoint: .*step-2/manifest\.json.*step-1/model\.safetensors"):
        checkpoint.load(tmp_path)


def test_step_directory_is_a_link_or_a_file(tmp_path):
    root = tmp_path / "root"
    checkpoint.save(root, 1, state(1))
    elsewhere = checkpoint.save(tmp_path / "elsewhere", 5, state(5))
    (root / "step-5").symlink_to(elsewhere)
    (root / "step-6").touch()
    with pytest.warns(RuntimeWarning, match=r"step-6: cannot be opened as a directory: .*step-5: cannot be opened"):
        assert checkpoint.load(root).step == 1
    checkpoint.save(root, 2, state(2), keep=1)  # touches neither
    assert sorted(os.listdir(root)) == ["step-2", "step-5", "step-6"]
    assert same(checkpoint.load(tmp_path / "elsewhere").groups, state(5))


def test_renamed_directory_is_no_checkpoint_of_that_step(tmp_path):
    checkpoint.save(tmp_path, 1, state(1)).rename(tmp_path / "step-2")
    with pytest.raises(DataError, match=r"step-2/COMMIT\.json: step 1 in a directory of step 2"):
        checkpoint.load(tmp_path)


def test_a_damaged_one_takes_no_place_of_a_good_one(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, state(step))
    flip(tmp_path / "step-3" / "manifest.json")
    checkpoint.save(tmp_path, 4, state(4), keep=2)
    assert checkpoint.steps(tmp_path) == [2, 4]
    assert sorted(os.listdir(tmp_path)) == ["step-2", "step-3", "step-4"]


def forge(root: Path, change) -> None:
    """Changes the manifest of a checkpoint and makes COMMIT.json fit it again."""
    path = checkpoint.save(root, 1, {"g": {"w": torch.zeros(2), "t": (1, 2)}})
    manifest = json.loads((path / "manifest.json").read_bytes())
    text = change(manifest)
    text = json.dumps(manifest) if text is None else text
    (path / "manifest.json").write_text(text)
    checkpoint.commit(path)


def set_structure(structure: object):
    return lambda manifest: manifest["groups"]["g"].update(structure=structure)


@pytest.mark.parametrize(("change", "says"), [
    (lambda m: "{", "not the JSON"),
    (lambda m: "\xe9", "not the JSON"),
    (lambda m: "[" * 100_000, "not the JSON"),
    (lambda m: '{"step":' + "1" * 5000 + "}", "not the JSON"),
    (lambda m: "[]", "its format is not"),
    (lambda m: m.update(format="x"), "its format is not"),
    (lambda m: m.update(version=1), "format version 1; this dtrain reads 2"),
    (lambda m: m.update(step=2), "step 2 in a directory of step 1"),
    (lambda m: m.update(step=True), "step: True is not of type int"),
    (lambda m: m.update(more=1), "expected an object with the fields"),
    (lambda m: m.update(groups=[]), "groups: .* is not of type dict"),
    (lambda m: m["groups"].update(g=0), "expected an object with the fields"),
    (lambda m: m["groups"].update(g={}), "expected an object with the fields"),
    (lambda m: m["groups"]["g"].update(size="1"), "size: '1' is not of type int"),
    (lambda m: m["groups"]["g"].update(size=-1), r"g\.safetensors: \d+ bytes, at most -1 expected"),
    (lambda m: m["groups"]["g"].update(size=10**30), r"g\.safetensors: \d+ bytes, 10{30} in manifest"),
    (lambda m: m["groups"].update({"../g": m["groups"]["g"]}), "'../g' is not the name of a group"),
    (lambda m: m["groups"].update({"h": m["groups"]["g"]}), r"h\.safetensors: cannot be read: No such file"),
    (set_structure(None), "the manifest does not know the tensor 'w'"),
    (set_structure({"$tensor": "v"}), "bad node .*KeyError"),
    (set_structure({"$tensor": ["w"]}), "bad node .*TypeError"),
    (set_structure([{"$tensor": "w"}, {"$tensor": "w"}]), "bad node .*KeyError"),
    (set_structure({"$int": "zz"}), "bad node .*ValueError"),
    (set_structure({"$int": 5}), "bad node .*TypeError"),
    (set_structure({"$float": "1"}), "bad node .*KeyError"),
    (set_structure({"$tuple": "ab"}), "bad node .*ValueError"),
    (set_structure({"$dict": [["a", 1], ["a", 2]]}), "bad node .*keys repeat"),
    (set_structure({"$dict": [["a"]]}), "bad node .*ValueError"),
    (set_structure({"$dict": [[None, 1]]}), "bad node .*neither str nor int"),
    (set_structure({"$dict": [[[1], 1]]}), "bad node .*TypeError"),
    (set_structure({"$pickle": []}), "bad node .*unknown tag"),
    (set_structure({"$tuple": [], "$dict": []}), "bad node .*ValueError"),
    (set_structure({"$tuple": [], "a": []}), "bad node .*ValueError"),
])  # fmt: skip
def test_forged_manifest(tmp_path, change, says):
    """Hashes are no signature: whoever writes them anew gets an error too, not a traceback from within."""
    forge(tmp_path, change)
    with pytest.raises(DataError, match=says):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("depth", [500, 900])
def test_forged_depth(tmp_path, depth):
    def change(manifest):
        manifest["groups"]["g"]["structure"] = "HERE"
        return json.dumps(manifest).replace('"HERE"', "[" * depth + "]" * depth)

    forge(tmp_path, change)
    with pytest.raises(DataError, match=r"nested too deep|not the JSON|does not know"):
        checkpoint.load(tmp_path)


# --- one file of tensors


def test_save_tensors_replaces_and_follows_no_link(tmp_path):
    path = tmp_path / "final.safetensors"
    weights = {"w": torch.randn(3, 2).t(), "b": torch.zeros(0)}
    checkpoint.save_tensors(path, {"w": torch.zeros(1)})
    checkpoint.save_tensors(path, weights)
    loaded = checkpoint.load_tensors(path)
    assert same({name: loaded.pop(name) for name in weights}, weights)
    assert not loaded
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["final.safetensors"]
    (tmp_path / "link.safetensors").symlink_to(path)
    with pytest.raises(DataError, match=r"link\.safetensors: cannot be read: it is a symbolic link"):
        checkpoint.load_tensors(tmp_path / "link.safetensors")


def test_save_tensors_fails_anywhere(tmp_path):
    path = tmp_path / "final.safetensors"
    old, new = {"w": torch.zeros(3)}, {"w": torch.ones(3)}
    checkpoint.save_tensors(path, old)
    for n in range(1, 100):
        reached, raised = fails_at(n, lambda: checkpoint.save_tensors(path, new))
        loaded = checkpoint.load_tensors(path)
        assert same(loaded, new) or (raised and same(loaded, old))
        assert os.listdir(tmp_path) == ["final.safetensors"]
        if not reached:
            break
        checkpoint.save_tensors(path, old)
    assert n == 6  # open, write, fsync, rename, fsync; then none


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 64, b"\x02" + bytes(7) + b"[]"])
def test_load_tensors_of_something_else(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(DataError, match=r"x: not a safetensors file"):
        checkpoint.load_tensors(tmp_path / "x")
    with pytest.raises(DataError, match="y: cannot be read: No such file"):
        checkpoint.load_tensors(tmp_path / "y")
    os.mkfifo(tmp_path / "z")
    with pytest.raises(DataError, match="z: not a regular file"):
        checkpoint.load_tensors(tmp_path / "z")
