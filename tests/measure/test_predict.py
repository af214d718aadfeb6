"""Predictions from a made-up profile: exact where that can be worked out by hand, and in order elsewhere."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.errors import DataError, UsageError
from dtrain.measure import advice
from dtrain.measure.hardware import Link, named
from dtrain.measure.predict import Prediction, Setting, expected_maximum, predict, wiring_of, work_of
from dtrain.measure.profile import Line, Profile, load
from dtrain.measure.step import Boxes, Bucket, NormMessage

GBIT = Link(name="a link", alpha_s=0.0, bytes_per_s=125e6, scatter=0.0)
HERE = Link(name="measured", alpha_s=1e-4, bytes_per_s=1e9, core_s_per_byte=1e-9, scatter=0.2, shared=True)

PROFILE = Profile(
    recipe="made up",
    parameters=2_500_000,
    global_batch=64,
    data=Line(base_s=0.001),
    forward=Line(base_s=0.002, per_sample_s=0.001),
    backward=Line(base_s=0.004, per_sample_s=0.002),
    optimizer=Line(base_s=0.005),
    buckets=tuple(Bucket(nbytes=2e6, ready=(i + 1) / 5) for i in range(5)),
    packed=(Bucket(nbytes=1e7, ready=1.0),),
    norms=(NormMessage(forward_bytes=80, backward_bytes=64),) * 2,
    cores=2,
    threads=1,
    links={"allreduce": HERE, "ps": HERE, "ps sockets": HERE},
)


def at(backend: str, workers: int, batch: float = 32, **more: object) -> Setting:
    return Setting(backend=backend, workers=workers, batch=batch, **more)  # type: ignore[arg-type]


def test_one_worker_is_its_computing():
    found = predict(PROFILE, at("solo", 1))
    assert found.boxes.step_ms == pytest.approx(1 + 34 + 68 + 5)
    assert (found.low_ms, found.high_ms) == pytest.approx((108, 108))
    assert found.samples_per_s == pytest.approx(32 / 0.108)
    assert (found.efficiency, found.scaling) == pytest.approx((1.0, 1.0))


def test_a_bucket_at_the_end_of_backward_is_exposed_in_full():
    found = predict(PROFILE, at("ps", 2, place="apart", link=GBIT))
    # One server takes 2 * 10 MB in, and gives as much: in parts, one way hides behind the other but for a part.
    assert found.boxes.exposed_comm_ms == pytest.approx(160.0, rel=0.12)
    more = predict(PROFILE, at("ps", 2, servers=2, place="apart", link=GBIT))
    assert more.boxes.exposed_comm_ms == pytest.approx(80.0, rel=0.12)


def test_micro_batches_divide_the_forward_and_add_up_what_each_costs():
    found = predict(PROFILE, at("solo", 1, micro_batch=8))
    assert found.boxes.forward_ms == pytest.approx(4 * 2 + 32)
    assert found.boxes.backward_ms == pytest.approx(4 * 4 + 64)


def test_workers_on_one_host_share_its_cores():
    two, four = (
        predict(replace(PROFILE, links={"ps": replace(HERE, core_s_per_byte=0.0)}), at("ps", n)) for n in (2, 4)
    )
    assert two.boxes.backward_ms == pytest.approx(68)
    assert four.boxes.backward_ms == pytest.approx(136)


def test_more_workers_than_cores_take_turns_with_messages_too():
    quiet = replace(PROFILE, buckets=(), links={"allreduce": replace(HERE, bytes_per_s=1e12)})
    exposed = [predict(quiet, at("allreduce", n, norm="global")).boxes.exposed_comm_ms for n in (2, 4)]
    # 4 sums of 2 (n-1) hops of 0.1 ms; with 4 workers on 2 cores each hop takes twice as long.
    assert exposed == pytest.approx([0.8, 4.8], rel=0.01)


def test_threads_and_crowding_are_those_that_were_measured():
    profile = replace(PROFILE, all_threads=0.6, crowded=1.5)
    assert predict(profile, at("solo", 1)).boxes.backward_ms == pytest.approx(68 * 0.6)
    crowd = predict(profile, at("allreduce", 2, link=None))
    assert crowd.boxes.backward_ms >= 68 * 1.5


def test_synchronised_batch_norm_costs_its_latencies():
    quiet = replace(PROFILE, buckets=())
    joint = predict(quiet, at("allreduce", 2, place="apart", link=named("1gbit"), norm="global"))
    # A sum in forward and one in backward for each of two layers, two hops of 50 us each.
    assert joint.boxes.exposed_comm_ms == pytest.approx(4 * 2 * 0.05, rel=0.02)
    assert predict(quiet, at("allreduce", 2, place="apart", link=named("1gbit"))).boxes.exposed_comm_ms == 0.0


def test_intervals_are_of_what_scattered():
    exact = predict(PROFILE, at("ps", 2, place="apart", link=GBIT))
    step_ms = exact.boxes.step_ms
    assert (exact.low_ms, exact.high_ms) == pytest.approx((0.96 * step_ms, 1.04 * step_ms))  # of the model itself
    loose = predict(replace(PROFILE, scatter=0.1), at("solo", 1))
    assert loose.low_ms == pytest.approx(108 * (1 - 0.12), rel=0.02)
    assert loose.high_ms == pytest.approx(108 * (1 + 0.13), rel=0.02)
    link = predict(PROFILE, at("ps", 2, place="apart", link=replace(GBIT, scatter=0.3)))
    assert link.low_ms < exact.low_ms < exact.high_ms < link.high_ms


def test_more_workers_wait_for_a_later_one():
    profile = replace(PROFILE, scatter=0.1)
    waits = [
        predict(profile, at("allreduce", n, place="apart", link=named("100gbit"))).boxes.wait_ms for n in (2, 4, 8)
    ]
    assert 0 < waits[0] < waits[1] < waits[2]


@pytest.mark.parametrize(("count", "mean"), [(1, 0.0), (2, 0.564), (4, 1.029), (8, 1.424), (100, 2.508)])
def test_the_latest_of_n(count: int, mean: float):
    assert expected_maximum(count) == pytest.approx(mean, abs=0.03)


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 8), st.sampled_from(["ps", "allreduce"]), st.floats(1.0, 50.0))
def test_a_faster_link_never_predicts_less(workers: int, backend: str, factor: float):
    slow = at(backend, workers, place="apart", link=GBIT)
    fast = replace(slow, link=replace(GBIT, bytes_per_s=GBIT.bytes_per_s * factor))
    assert predict(PROFILE, fast).samples_per_s >= predict(PROFILE, slow).samples_per_s * (1 - 1e-6)


def test_a_record_has_the_boxes_and_the_interval():
    row = predict(PROFILE, at("ps", 2, place="apart", link=GBIT)).record()
    assert row["link"] == "a link"
    parts = [row[f"{name}_ms"] for name in ("data", "forward", "backward", "optimizer", "rest", "exposed_comm")]
    assert sum(parts) == pytest.approx(row["step_ms"])
    assert row["samples_per_s"] == pytest.approx(64 / row["step_ms"] * 1e3)
    json.dumps(row)


@pytest.mark.parametrize(
    "wrong",
    [{"workers": 0}, {"batch": 0}, {"servers": 0}, {"place": "beside", "servers": 3}, {"update": "sharded"}],
    ids=str,
)
def test_settings_that_cannot_be(wrong: dict[str, object]):
    with pytest.raises(UsageError):
        at(**{"backend": "ps", "workers": 2, **wrong})  # type: ignore[arg-type]


def test_a_link_that_was_not_measured_is_asked_for():
    with pytest.raises(UsageError, match="no link for ps sockets: give --hardware"):
        predict(replace(PROFILE, links={"ps": HERE}), at("ps", 2, sockets=True))


def test_sharded_steps_have_a_link_and_buckets_of_their_own():
    slower = replace(HERE, bytes_per_s=HERE.bytes_per_s / 3)
    packed = tuple(replace(bucket, nbytes=2 * bucket.nbytes) for bucket in PROFILE.buckets)
    profile = replace(PROFILE, links={"allreduce": HERE, "allreduce sharded": slower}, packed=packed)
    setting = at("allreduce", 2, update="sharded")
    assert work_of(profile, setting).buckets == packed
    wiring = wiring_of(profile, setting)
    assert (wiring.sharded, wiring.bytes_per_s) == (True, slower.bytes_per_s)
    assert not wiring_of(profile, replace(setting, update="worker")).sharded
    with pytest.raises(UsageError, match="no link for allreduce sharded"):
        predict(PROFILE, setting)


# --- the file


def test_a_profile_survives_its_file(tmp_path: Path):
    file = tmp_path / "profile.json"
    PROFILE.save(file)
    assert load(file) == PROFILE


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "cannot be read"),
        ("[]", "is of version None"),
        ('{"version": 99}', "is of version 99, and this is 1: probe again"),
        ('{"version": 1, "recipe": "x"}', "is no profile"),
        ('{"version": 1, "forward": {"slope": 1}}', "is no profile"),
    ],
)
def test_files_that_are_no_profiles(tmp_path: Path, content: str, said: str):
    file = tmp_path / "profile.json"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=said):
        load(file)
    with pytest.raises(DataError, match="cannot be read"):
        load(tmp_path / "nowhere.json")


# --- words, of predictions made by a formula


def answer(step_ms: float, exposed_ms: float, setting: Setting, doubt: float = 0.01) -> Prediction:
    parts = dict.fromkeys(("data_ms", "optimizer_ms", "rest_ms", "hidden_comm_ms", "wait_ms"), 0.0)
    computing_ms = step_ms - exposed_ms
    boxes = Boxes(
        step_ms=step_ms,
        forward_ms=computing_ms / 3,
        backward_ms=computing_ms * 2 / 3,
        exposed_comm_ms=exposed_ms,
        transfer_ms=exposed_ms,
        **parts,
    )
    rate = setting.batch * setting.workers / step_ms * 1e3
    low_ms, high_ms = step_ms * (1 - doubt), step_ms * (1 + doubt)
    return Prediction(setting=setting, boxes=boxes, low_ms=low_ms, high_ms=high_ms, samples_per_s=rate, scaling=1.0)


def formula(backend: str, workers: int, servers: int, batch: float) -> Prediction:
    """1 ms a sample; the ring costs 6 ms a worker, servers 40 ms divided among them up to 8."""
    exposed_ms = 6.0 * (workers - 1) if backend == "allreduce" else 40.0 / min(servers, 8)
    return answer(batch + exposed_ms, exposed_ms, at(backend, workers, batch, servers=servers))


def question(**more: object) -> advice.Question:
    given_ = {"backends": ("ps", "allreduce"), "workers": [1, 2, 4, 8, 16], "servers": [1, 2, 4]}
    return advice.Question(
        **{**given_, "batch": lambda n: 512 / n, "most_servers": lambda n: 4 * n, **more}  # type: ignore[arg-type]
    )


def test_the_fastest_backend_is_named_with_where_it_begins():
    text = advice.which_backend(formula, question(), [2, 4, 8, 16])
    assert text.startswith("Backend: from 4 workers on, ps is the fastest")
    assert "2 workers: allreduce (1.02 times" in text
    assert "16 workers: ps with 4 servers (2.9" in text


def test_servers_are_added_until_they_no_longer_bind():
    text = advice.how_many_servers(formula, question(), 16)
    assert "with 16 workers the servers bind up to 8 of them" in text
    enough = advice.how_many_servers(formula, question(batch=lambda n: 1e5), 16)
    assert "one server is enough" in enough
    few = advice.how_many_servers(formula, question(most_servers=lambda n: 4), 16)
    assert "more would help still" in few


def test_the_batch_for_enough_efficiency():
    # allreduce, 2 workers: 6 ms exposed, so 54 ms of computing.
    assert advice.batch_for(formula, question(), "allreduce", 2, 1) == pytest.approx(54, abs=2)
    assert advice.batch_for(formula, question(fits=lambda b: b < 32), "allreduce", 2, 1) is None


def test_where_more_workers_stop_paying():
    text = advice.how_many_workers(formula, question(backends=("allreduce",)))
    # 2 workers: 262 ms, 4: 146 ms (+79 %), 8: 106 ms (+38 %).
    assert text == (
        "Workers: up to 4 each doubling adds 50% of the samples per second or more (allreduce); going on to 8 adds 38%."
    )
    assert "that double" in advice.how_many_workers(formula, question(workers=[3, 5]))
    early = advice.how_many_workers(formula, question(batch=lambda n: 1.0, backends=("allreduce",)))
    assert early == "Workers: from 1 to 2 takes away 71% of the samples per second (allreduce)."
    assert "up to 16 each doubling adds more" in advice.how_many_workers(formula, question(batch=lambda n: 1e6))


def test_one_worker_has_nothing_to_choose():
    assert advice.words(formula, question(workers=[1])) == ["One worker sends nothing: there is nothing to choose."]
