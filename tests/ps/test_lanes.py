"""Shared memory: both ends see the same, nobody opens what is no segment, and no way to end leaves any behind."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from dtrain.errors import ProtocolError, UsageError
from dtrain.ps import lanes
from dtrain.ps.lanes import NoRoom, Probe, Segment

pytestmark = pytest.mark.skipif(not lanes.available(), reason="no /dev/shm on this system")

MIB = 2**20
WRONG_NAMES = [
    "",
    "dtrain",
    "../etc/passwd",
    f"{lanes.DIRECTORY}/dtrain-1-" + "0" * 32,
    "dtrain-0-" + "0" * 32,
    "dtrain-1-" + "0" * 31,
    "dtrain-1-" + "0" * 32 + "\n",
    "dtrain-1-" + "A" * 32,
    "dtrain-1-" + "0" * 32 + "\0",
    "dtrain-12345678901-" + "0" * 32,
    "dtrain-١-" + "0" * 32,
    None,
    7,
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory of this test's own in shared memory, so that tests at the same time do not sweep each other."""
    own = Path(lanes.DIRECTORY, f"dtrain-test-{os.getpid()}-{tmp_path.name}")
    own.mkdir(mode=0o700)
    monkeypatch.setattr(lanes, "DIRECTORY", str(own))
    yield own
    left = sorted(p.name for p in own.iterdir())
    for name in left:
        (own / name).unlink()
    own.rmdir()
    assert left == []


def other(code: str, folder: Path) -> subprocess.Popen[str]:
    """A process that runs `code` with `lanes` imported and its directory set."""
    setup = f"import os, sys, time\nfrom dtrain.ps import lanes\nlanes.DIRECTORY = {str(folder)!r}\n"
    return subprocess.Popen(
        [sys.executable, "-c", setup + code], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )


def used(folder: Path) -> int:
    figures = os.statvfs(folder)
    return (figures.f_blocks - figures.f_bfree) * figures.f_frsize


def mapped(name: str) -> bool:
    return name in Path("/proc/self/maps").read_text()


def ended_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def planted(folder: Path, pid: int, nbytes: int = 4096, digit: str = "0") -> Path:
    path = folder / f"dtrain-{pid}-{digit * 32}"
    path.touch(mode=0o600)
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, nbytes)
    return path


def test_two_maps_of_one_memory(folder):
    made = Segment.create(3 * MIB)
    assert [p.name for p in folder.iterdir()] == [made.name]
    assert (folder / made.name).stat().st_mode & 0o777 == 0o600
    opened = Segment.open(made.name, 3 * MIB)
    made.unlink()
    made.unlink()
    assert int(opened.bytes.count_nonzero()) == 0
    opened.view(torch.float32, MIB, 3).copy_(torch.tensor([1.0, 2.0, 3.0]))
    assert made.view(torch.float32, MIB, 3).tolist() == [1.0, 2.0, 3.0]
    assert (opened.nbytes, opened.bytes.numel(), opened.bytes.dtype) == (3 * MIB, 3 * MIB, torch.uint8)
    made.close()
    opened.close()
    opened.close()
    with pytest.raises(UsageError, match="closed"):
        _ = opened.bytes


def test_memory_goes_with_the_last_tensor(folder):
    segment = Segment.create(2 * MIB)
    name = segment.name
    view = segment.view(torch.int64, 8, 4)
    array = view.numpy()
    segment.close()
    del segment, view
    gc.collect()
    assert mapped(name)  # the array still lies there
    array[:] = 5
    del array
    assert not mapped(name)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.int64], ids=str)
def test_views_keep_within_the_segment(dtype, folder):
    segment = Segment.create(100)
    size = dtype.itemsize
    assert segment.view(dtype, 0, 100 // size).numel() == 100 // size
    assert segment.view(dtype, 96, 0).numel() == 0
    for offset, numel in [(0, 100 // size + 1), (100, 1), (-size, 1), (0, -1), (2**62, 1), (0, 2**62), (104, 0)]:
        with pytest.raises(ProtocolError, match="which has 100 bytes"):
            segment.view(dtype, offset, numel)
    if size > 1:
        with pytest.raises(ProtocolError, match="multiple"):
            segment.view(dtype, 1, 1)
    segment.close()


@pytest.mark.parametrize("name", WRONG_NAMES, ids=repr)
def test_names_that_are_none_are_refused(name):
    with pytest.raises(ProtocolError, match="no name of a segment"):
        Segment.open(name, 4096)
    assert lanes.answer(name) == ""


def test_files_that_are_no_segments_are_refused(folder):
    good = planted(folder, 1)
    Segment.open(good.name, 4096).close()
    name = good.name[:-1] + "1"
    path = folder / name

    def refused(said: str, nbytes: int = 4096) -> None:
        with pytest.raises(ProtocolError, match=said):
            Segment.open(name, nbytes)
        assert lanes.answer(name) == ""

    refused("No such file")
    path.symlink_to(good)
    refused("symbolic")
    path.unlink()
    path.hardlink_to(good)
    refused("2 names")
    path.unlink()
    path.mkdir()
    refused("directory")
    path.rmdir()
    os.mkfifo(path, 0o600)
    refused("regular")
    path.unlink()
    good.rename(path)
    refused("4096 bytes and is said to have 4097", 4097)
    refused("4096 bytes and is said to have 0", 0)
    path.chmod(0o644)
    refused("user's alone")
    path.chmod(0o600)
    path.write_bytes(b"")
    os.truncate(path, MIB)
    refused("reserved", MIB)
    path.unlink()


def test_another_users_file_is_refused(folder, monkeypatch):
    path = planted(folder, ended_pid(), 64)
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    with pytest.raises(ProtocolError, match="user's alone"):
        Segment.open(path.name, 64)
    assert lanes.answer(path.name) == ""
    assert lanes.sweep() == []
    assert lanes.sweep([int(path.name.split("-")[1])]) == []
    path.unlink()


# --- both ends in processes of their own


def test_proof_between_processes(folder, tmp_path):
    probe, second = Probe(), Probe()
    Path(tmp_path, probe.name).touch(mode=0o600)
    Path(tmp_path, probe.name).write_bytes(bytes(64))  # as if another machine had a file of that name
    code = f"print(lanes.answer({probe.name!r}))\nlanes.DIRECTORY = {str(tmp_path)!r}\n"
    with other(code + f"print(lanes.answer({probe.name!r}))\nprint(lanes.answer({second.name!r}))", folder) as process:
        seen, elsewhere, unseen = process.communicate(timeout=60)[0].splitlines()
    assert len(seen) == len(elsewhere) == 64
    assert probe.confirmed(seen)
    assert not second.confirmed(seen)  # nobody has answered that one
    for token in (elsewhere, unseen, "0" * 64, seen[:-2], seen + "00", "zz" * 32, "é", seen[::-1]):
        assert not probe.confirmed(token)
    probe.close()
    probe.close()
    second.close()
    assert lanes.answer(probe.name) == ""


def test_killed_before_and_after_the_file_is_unlinked(folder):
    code = """
first, second = lanes.Segment.create(2**20), lanes.Segment.create(2**20)
print(first.name, flush=True)
print(second.name, flush=True)
sys.stdin.readline()
first.unlink()
print(flush=True)
time.sleep(60)
"""
    with other(code, folder) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        names = [process.stdout.readline().strip() for _ in range(2)]
        opened = [Segment.open(name, MIB) for name in names]
        process.stdin.write("\n")
        process.stdin.flush()
        process.stdout.readline()
        assert lanes.sweep() == []  # it lives
        assert lanes.sweep([os.getpid()]) == []
        assert [p.name for p in folder.iterdir()] == names[1:]
        process.kill()
        process.wait(20)
    assert lanes.sweep() == names[1:]
    assert lanes.sweep() == []
    for segment in opened:  # who has it keeps it
        assert int(segment.bytes.fill_(1).count_nonzero()) == MIB
        segment.close()


# --- what is swept, and what is not


def test_sweep_takes_only_segments_of_the_dead(folder):
    gone = ended_pid()
    stale = planted(folder, gone)
    mine = Segment.create(4096)
    kept = [folder / f"dtrain-{gone}-{'0' * 31}", folder / f"x-dtrain-{gone}-{'1' * 32}", folder / "psm_1234"]
    for path in kept:
        path.touch()
    link = folder / f"dtrain-{gone}-{'2' * 32}"
    link.symlink_to(kept[0])
    assert lanes.sweep() == [stale.name]
    assert sorted(folder.iterdir()) == sorted([*kept, link, folder / mine.name])
    for path in (*kept, link):
        path.unlink()
    mine.close()


def test_sweep_of_given_processes_asks_no_more(folder):
    segment, stale = Segment.create(4096), planted(folder, ended_pid())
    assert lanes.sweep([os.getpid()]) == [segment.name]
    assert lanes.sweep([]) == []
    assert lanes.sweep({int(stale.name.split("-")[1])}) == [stale.name]
    segment.close()  # its file is gone already


def test_a_later_process_with_the_same_number_does_not_protect_a_file(folder):
    path = planted(folder, os.getpid())
    assert lanes.sweep() == []
    before = psutil.Process().create_time() - 3600
    os.utime(path, (before, before))
    assert lanes.sweep() == [path.name]


def test_a_file_in_use_is_kept_though_its_process_is_not_seen(folder):
    """As between containers that share the directory, but not the numbers of processes."""
    segment = Segment.create(4096)
    path = folder / segment.name
    elsewhere = path.rename(folder / f"dtrain-{ended_pid()}-{'3' * 32}")
    assert lanes.sweep() == []
    del segment
    assert lanes.sweep() == [elsewhere.name]


def test_sweep_without_a_directory(monkeypatch):
    monkeypatch.setattr(lanes, "DIRECTORY", "/nonexistent")
    assert lanes.sweep() == []
    assert not lanes.available()
    assert "cannot be used" in lanes.room(1)
    assert lanes.answer("dtrain-1-" + "0" * 32) == ""
    with pytest.raises(NoRoom, match="nonexistent"):
        Segment.create(1)


# --- no room


def test_room_says_what_to_do(monkeypatch):
    assert lanes.room(4096) == ""
    left = os.statvfs(lanes.DIRECTORY).f_bavail
    said = lanes.room(2**60)
    assert "MiB left and 1099511627776.0 MiB are needed" in said, left
    assert "--shm-size" in said
    assert "emptyDir" in said


@pytest.fixture
def small(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file system of 1 MiB."""
    place = folder / "small"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", place], capture_output=True, check=False)
    if done.returncode:
        place.rmdir()
        pytest.skip("only root may mount a file system")
    with monkeypatch.context() as patch:
        patch.setattr(lanes, "DIRECTORY", str(place))
        yield place
    subprocess.run(["umount", place], check=True)
    place.rmdir()


def test_a_full_directory_is_an_error_at_once(small):
    held = Segment.create(MIB * 3 // 4)
    with pytest.raises(NoRoom, match=r"0.5 MiB in .*: .* has 0.2 MiB left and 0.5 MiB are needed"):
        Segment.create(MIB // 2)
    assert [p.name for p in small.iterdir()] == [held.name]
    assert "0.2 MiB left" in lanes.room(MIB)
    held.bytes.fill_(1)
    held.close()
    del held
    Segment.create(MIB * 3 // 4).close()


def test_memory_is_given_back_to_the_system(small):
    before = used(small)
    segment = Segment.create(MIB // 2)
    opened = Segment.open(segment.name, MIB // 2)
    view = opened.view(torch.float32, 4096, 100)
    segment.close()
    opened.close()
    del segment, opened
    assert used(small) - before == MIB // 2  # for the sake of the one view
    del view
    assert used(small) == before


@pytest.mark.parametrize("nbytes", [2**62, 2**63, 2**70])
def test_more_than_any_file_has(nbytes, folder):
    with pytest.raises(NoRoom, match="MiB in"):
        Segment.create(nbytes)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("where", ["posix_fallocate", "mmap"])
def test_no_file_is_left_when_making_one_fails(where, fault, folder, monkeypatch):
    def fail(*args: object, **kwargs: object) -> None:
        raise fault

    fds = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(mmap if where == "mmap" else os, where, fail)
        with pytest.raises(NoRoom if isinstance(fault, OSError) else KeyboardInterrupt):
            Segment.create(4096)
    assert list(folder.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == fds


@pytest.mark.parametrize("nbytes", [0, -1])
def test_an_empty_segment_is_refused(nbytes):
    with pytest.raises(UsageError, match="at least 1"):
        Segment.create(nbytes)


def test_making_segments_leaves_nothing_open(folder):
    fds = len(os.listdir("/proc/self/fd"))
    started = time.monotonic()
    for _ in range(200):
        segment = Segment.create(4096)
        Segment.open(segment.name, 4096).close()
        segment.close()
        del segment
    assert len(os.listdir("/proc/self/fd")) == fds
    assert time.monotonic() - started < 20


# -- private views ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("told", [True, False])
def test_a_private_view_keeps_what_is_written_here(told: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It shows what others write but for pages that were written to here, and those again when it is told to."""
    made = Segment.create(8 * mmap.PAGESIZE + 5)
    view = Segment.open(made.name, made.nbytes, private=True)
    made.unlink()
    if not told:  # what pages are its own
        monkeypatch.setattr(lanes, "_has_copies", lambda address, nbytes: True)
    made.bytes.fill_(1)
    assert int(view.bytes.min()) == 1
    view.bytes[3 * mmap.PAGESIZE + 7] = 9
    view.bytes[-1] = 9
    assert int(made.bytes.max()) == 1
    made.bytes.fill_(2)
    kept = sorted(set((view.bytes != 2).nonzero().flatten().div(mmap.PAGESIZE, rounding_mode="floor").tolist()))
    assert kept == [3, 8]
    view.show_theirs()
    assert int(view.bytes.min()) == int(view.bytes.max()) == 2
    made.bytes.fill_(3)
    assert int(view.bytes.min()) == int(view.bytes.max()) == 3


def test_pages_of_its_own_are_counted_alone() -> None:
    """The kernel is asked to drop pages only where there are any: to read them again costs as much as a step's sum."""
    made = Segment.create(64 * mmap.PAGESIZE)
    view = Segment.open(made.name, made.nbytes, private=True)
    made.unlink()

    def copied() -> bool:
        return lanes._has_copies(view.bytes.data_ptr(), view.nbytes)

    assert not copied()
    made.bytes.fill_(1)
    assert int(view.bytes.sum()) == made.nbytes
    assert not copied()
    view.bytes[40 * mmap.PAGESIZE] = 2
    assert copied()
    view.show_theirs()
    assert not copied()
    view.bytes[-1] = 2
    assert copied()


def test_a_private_view_that_is_locked_shows_theirs_too() -> None:
    """As in a process that has called mlockall."""
    made = Segment.create(2 * mmap.PAGESIZE)
    view = Segment.open(made.name, made.nbytes, private=True)
    made.unlink()
    address = ctypes.c_void_p(view.bytes.data_ptr())
    if ctypes.CDLL(None).mlock(address, ctypes.c_size_t(mmap.PAGESIZE)) != 0:
        pytest.skip("this process may lock no memory")
    with pytest.raises(OSError, match="Invalid argument"):
        view.mapping().madvise(mmap.MADV_DONTNEED)  # type: ignore[union-attr]
    view.bytes.fill_(1)
    made.bytes.fill_(2)
    view.show_theirs()
    assert int(view.bytes.min()) == 2


def test_what_the_kernel_does_not_tell_counts_as_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Segment.create(mmap.PAGESIZE)
    made.unlink()

    def refuse(path: str, flags: int) -> int:
        raise PermissionError(path)

    monkeypatch.setattr(lanes.os, "open", refuse)
    assert lanes._has_copies(made.bytes.data_ptr(), made.nbytes)
