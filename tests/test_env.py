"""The place of a process in its job: arguments, then variables, then defaults; contradictions are refused."""

from __future__ import annotations

import pytest

from dtrain import env
from dtrain.errors import UsageError

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "run-7",
    "TORCHELASTIC_RESTART_COUNT": "2",
}
DMLC = {
    "DMLC_ROLE": "worker",
    "DMLC_WORKER_ID": "1",
    "DMLC_NUM_WORKER": "2",
    "DMLC_PS_ROOT_URI": "10.0.0.5",
    "DMLC_PS_ROOT_PORT": "9000",
}
OURS = {
    "DTRAIN_BACKEND": "ps",
    "DTRAIN_STORE": "file:///tmp/a",
    "DTRAIN_SERVERS": "ipc:///tmp/b",
    "DTRAIN_ROLE": "server",
    "DTRAIN_JOB_ID": "j",
    "DTRAIN_KEYS": "/etc/keys",
    "DTRAIN_LANES": "off",
    "DTRAIN_RESTART": "3",
    "DTRAIN_TIMEOUT_S": "2.5",
    "DTRAIN_LAUNCHER_FD": "7",
    "DTRAIN_JOB_DIR": "/run/dtrain-x",
}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        pytest.param(
            {}, {"rank": 0, "world_size": 1, "role": "worker", "store": None, "timeout_s": None}, id="nothing"
        ),
        pytest.param(
            TORCHRUN,
            {
                "rank": 3,
                "world_size": 4,
                "local_rank": 1,
                "local_world_size": 2,
                "store": "tcp://node0:29500",
                "job_id": "run-7",
                "restart": 2,
            },
            id="torchrun",
        ),
        pytest.param(
            DMLC,
            {"rank": 1, "world_size": 2, "servers": "tcp://10.0.0.5:9000", "role": "worker", "backend": None},
            id="ps-lite",
        ),
        pytest.param(
            OURS,
            {
                "backend": "ps",
                "store": "file:///tmp/a",
                "servers": "ipc:///tmp/b",
                "role": "server",
                "job_id": "j",
                "keys": "/etc/keys",
                "lanes": "off",
                "restart": 3,
                "timeout_s": 2.5,
                "launcher_fd": 7,
                "job_dir": "/run/dtrain-x",
            },
            id="dtrain",
        ),
        pytest.param({"RANK": "1", "WORLD_SIZE": "2"}, {"local_rank": 1, "local_world_size": 2}, id="one host assumed"),
        pytest.param(
            {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"},
            {"local_rank": 0, "local_world_size": 1},
            id="hosts not known",
        ),
        pytest.param(
            {"RANK": "", "WORLD_SIZE": "", "MASTER_ADDR": ""}, {"rank": 0, "world_size": 1}, id="empty is absent"
        ),
        pytest.param({"RANK": " 1 ", "WORLD_SIZE": "2"}, {"rank": 1}, id="spaces around a number"),
        pytest.param({**TORCHRUN, "DMLC_WORKER_ID": "3"}, {"rank": 3}, id="two variables that agree"),
        pytest.param({**TORCHRUN, "DTRAIN_STORE": "file:///x"}, {"store": "file:///x"}, id="own store before the pair"),
        pytest.param({**TORCHRUN, "DTRAIN_JOB_ID": "mine"}, {"job_id": "mine"}, id="own job inside torchrun's"),
        pytest.param({"DTRAIN_SERVERS": "ipc:///s", **DMLC}, {"servers": "ipc:///s"}, id="own servers before the pair"),
    ],
)
def test_the_environment(environ: dict[str, str], expected: dict[str, object]):
    place = env.resolve(environ)
    assert {name: getattr(place, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("environ", "arguments", "expected"),
    [
        (TORCHRUN, {"rank": 0}, {"rank": 0, "world_size": 4}),
        (TORCHRUN, {"store": "file:///other"}, {"store": "file:///other"}),
        ({**TORCHRUN, "DMLC_WORKER_ID": "1"}, {"rank": 2}, {"rank": 2}),  # an argument settles the contradiction
        ({"MASTER_ADDR": "h"}, {"store": "tcp://h:1"}, {"store": "tcp://h:1"}),
        ({"DTRAIN_TIMEOUT_S": "5"}, {"timeout_s": 7.0}, {"timeout_s": 7.0}),
        ({"DTRAIN_TIMEOUT_S": "5"}, {"timeout_s": None}, {"timeout_s": 5.0}),
        ({"RANK": "no number"}, {"rank": 0}, {"rank": 0}),
    ],
)
def test_an_argument_beats_a_variable(
    environ: dict[str, str], arguments: dict[str, object], expected: dict[str, object]
):
    place = env.resolve(environ, **arguments)
    assert {name: getattr(place, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2", "DMLC_WORKER_ID": "1"}, ["RANK=0", "DMLC_WORKER_ID=1", "contradict"]),
        ({"RANK": "0", "WORLD_SIZE": "2", "DMLC_NUM_WORKER": "4"}, ["WORLD_SIZE=2", "DMLC_NUM_WORKER=4"]),
        ({"DTRAIN_ROLE": "worker", "DMLC_ROLE": "server"}, ["DTRAIN_ROLE=worker", "DMLC_ROLE=server"]),
        ({"MASTER_ADDR": "h"}, ["MASTER_PORT is not set", "MASTER_ADDR"]),
        ({"MASTER_PORT": "1"}, ["MASTER_ADDR is not set", "MASTER_PORT"]),
        ({"DMLC_PS_ROOT_URI": "h"}, ["DMLC_PS_ROOT_PORT is not set"]),
        ({"DMLC_PS_ROOT_PORT": "1"}, ["DMLC_PS_ROOT_URI is not set"]),
        ({"RANK": "one", "WORLD_SIZE": "2"}, ["RANK=one", "number"]),
        ({"RANK": "1.0", "WORLD_SIZE": "2"}, ["RANK=1.0", "number"]),
        ({"DTRAIN_TIMEOUT_S": "soon"}, ["DTRAIN_TIMEOUT_S=soon", "number"]),
        ({"RANK": "2", "WORLD_SIZE": "2"}, ["rank is 2", "world_size 2"]),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, ["rank is -1"]),
        ({"RANK": "0", "WORLD_SIZE": "0"}, ["world_size is 0"]),
        ({"RANK": "1"}, ["rank is 1", "world_size 1"]),
        ({"WORLD_SIZE": "2"}, ["world_size is 2 (WORLD_SIZE)", "no rank", "RANK"]),
        ({"DMLC_NUM_WORKER": "2", "DMLC_ROLE": "worker"}, ["world_size is 2 (DMLC_NUM_WORKER)", "DMLC_WORKER_ID"]),
        ({**TORCHRUN, "LOCAL_RANK": "2"}, ["local_rank is 2", "local_world_size 2"]),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "8"}, ["local_world_size 8", "world_size 4"]),
        ({"DMLC_ROLE": "joint"}, ["role is 'joint'", "worker, server or scheduler"]),
    ],
)
def test_what_cannot_be_meant_is_refused(environ: dict[str, str], words: list[str]):
    with pytest.raises(UsageError) as caught:
        env.resolve(environ)
    assert all(word in str(caught.value) for word in words), caught.value
    assert caught.value.exit_code == 64


def test_arguments_that_do_not_fit_together():
    with pytest.raises(UsageError, match="rank is 5, world_size 2"):
        env.resolve({}, rank=5, world_size=2)
    with pytest.raises(UsageError, match=r"world_size is 3 \(argument\) and no rank"):
        env.resolve({}, world_size=3)


def test_table_names_what_set_each_field():
    table = env.resolve({**DMLC, "OMP_NUM_THREADS": "1"}, backend="ps").table()
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in table.splitlines()}
    assert rows["backend"] == "ps argument"
    assert rows["rank"] == "1 DMLC_WORKER_ID"
    assert rows["world_size"] == "2 DMLC_NUM_WORKER"
    assert rows["servers"] == "tcp://10.0.0.5:9000 DMLC_PS_ROOT_URI, DMLC_PS_ROOT_PORT"
    assert rows["store"] == "None default"


@pytest.mark.parametrize(
    ("environ", "inside"),
    [
        ({}, False),
        (TORCHRUN, True),
        (DMLC, True),
        ({"RANK": "0"}, False),
        ({"WORLD_SIZE": "2"}, False),
        ({"RANK": "0", "WORLD_SIZE": "1"}, True),
    ],
)
def test_in_job(environ: dict[str, str], inside: bool):
    assert env.in_job(environ) is inside


@pytest.fixture
def busy_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is itself a worker of torchrun's and of ps-lite's."""
    for name, value in {**TORCHRUN, **DMLC, **OURS, "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME_OF_THE_USER", "stays")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)


@pytest.mark.usefixtures("busy_environment")
def test_a_child_gets_its_own_place_and_nothing_stale():
    place = env.Place(backend="ps", rank=1, world_size=3, local_rank=1, local_world_size=3, servers="ipc:///s")
    child = env.for_child(place, threads=4, loopback="lo")
    back = env.resolve(child)
    assert {n: getattr(back, n) for n in env.VARIABLES} == {n: getattr(place, n) for n in env.VARIABLES}
    stale = ("MASTER_", "DMLC_", "DTRAIN_STORE", "DTRAIN_TIMEOUT_S", "DTRAIN_LAUNCHER_FD", "DTRAIN_JOB_DIR")
    assert not [name for name in child if name.startswith(stale)]
    assert not [name for name in child if name.startswith("TORCHELASTIC_") and name != "TORCHELASTIC_RESTART_COUNT"]
    assert child["HOME_OF_THE_USER"] == "stays"
    assert (child["OMP_NUM_THREADS"], child["GLOO_SOCKET_IFNAME"]) == ("4", "lo")


@pytest.mark.usefixtures("busy_environment")
def test_a_child_keeps_what_the_user_set_for_libraries(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "9")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    child = env.for_child(env.Place(), threads=4, loopback="lo")
    assert (child["OMP_NUM_THREADS"], child["GLOO_SOCKET_IFNAME"]) == ("9", "eth7")


def test_switches(monkeypatch: pytest.MonkeyPatch):
    assert (env.debug(), env.log_level()) == (False, "WARNING")
    monkeypatch.setenv("DTRAIN_DEBUG", "1")
    monkeypatch.setenv("DTRAIN_LOG_LEVEL", "info")
    assert (env.debug(), env.log_level()) == (True, "INFO")
    monkeypatch.setenv("DTRAIN_DEBUG", "0")
    assert env.debug() is False


# --- ps-lite's pair of variables: the scheduler's address, or the only server's

ROOT = {"DMLC_PS_ROOT_URI": "10.0.0.5", "DMLC_PS_ROOT_PORT": "9000"}
AT = "tcp://10.0.0.5:9000"


@pytest.mark.parametrize(
    ("environ", "arguments", "expected"),
    [
        (ROOT, {}, (AT, None, None)),
        ({**ROOT, "DMLC_NUM_SERVER": "1"}, {}, (AT, None, 1)),
        ({**ROOT, "DMLC_NUM_SERVER": "2"}, {}, (None, AT, 2)),
        ({**ROOT, "DMLC_NUM_SERVER": "2"}, {"role": "server", "servers": "tcp://h:0"}, ("tcp://h:0", AT, 2)),
        ({**ROOT, "DMLC_ROLE": "scheduler"}, {}, (None, AT, None)),
        ({**ROOT, "DMLC_ROLE": "scheduler", "DMLC_NUM_SERVER": "1"}, {}, (AT, None, 1)),
        (ROOT, {"role": "scheduler"}, (None, AT, None)),
        ({**ROOT, "DTRAIN_SCHEDULER": "tcp://s:1"}, {}, (None, "tcp://s:1", None)),
        ({**ROOT, "DMLC_NUM_SERVER": "2", "DTRAIN_SERVERS": "tcp://s:1"}, {}, ("tcp://s:1", None, 2)),
        ({"DTRAIN_SERVERS": "tcp://s:1"}, {"scheduler": AT}, (None, AT, None)),
        ({"DTRAIN_SCHEDULER": "tcp://s:1"}, {"servers": AT}, (AT, None, None)),
        ({"DTRAIN_SCHEDULER": "tcp://s:1", "DTRAIN_SERVERS": AT}, {"role": "server"}, (AT, "tcp://s:1", None)),
    ],
)
def test_what_ps_lites_pair_names(
    environ: dict[str, str], arguments: dict[str, object], expected: tuple[str | None, str | None, int | None]
):
    place = env.resolve(environ, **arguments)
    assert (place.servers, place.scheduler, place.num_servers) == expected
    assert (place.local_rank, place.local_world_size) == (0, 1)


@pytest.mark.parametrize(
    ("environ", "arguments", "words"),
    [
        (
            {"DTRAIN_SCHEDULER": "tcp://s:1", "DTRAIN_SERVERS": AT},
            {},
            f"servers is {AT} (DTRAIN_SERVERS) and scheduler",
        ),
        ({}, {"servers": AT, "scheduler": "tcp://s:1"}, "tcp://s:1 (argument): the scheduler tells"),
        ({**ROOT, "DMLC_NUM_SERVER": "two"}, {}, "DMLC_NUM_SERVER=two: num_servers is a number"),
        ({"DMLC_NUM_SERVER": "2", "DMLC_PS_ROOT_URI": "h"}, {}, "DMLC_PS_ROOT_PORT is not set"),
    ],
)
def test_servers_and_scheduler_that_cannot_be_meant(environ: dict[str, str], arguments: dict[str, object], words: str):
    with pytest.raises(UsageError) as caught:
        env.resolve(environ, **arguments)
    assert words in str(caught.value)
