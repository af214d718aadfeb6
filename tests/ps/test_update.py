"""Optimizers on ranges: the same bits for any number of servers, and what torch's own optimizer does."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from dtrain.errors import ProtocolError, UsageError
from dtrain.ps import update
from dtrain.ps.placement import grain, place
from dtrain.ps.update import (
    ELEMENTWISE,
    WHOLE,
    OptimizerSpec,
    Piece,
    ShardOptimizer,
    chunks,
    cut,
    decode_hyper,
    decode_spec,
    encode_spec,
    hyper,
    merge_states,
    numbering,
    spec_of,
    split_state,
    squares,
    total_norm,
)

SHAPES = [
    (150, 131),
    (131,),
    (1,),
    (),
    (0, 3),
    (77, 9),
    (128, 2),
    (20_011,),
]  # two buckets of more than 64 KiB, one less
BUCKETS = [[7, 6], [5, 4, 3, 2, 1], [0]]
MATRICES = [(150, 131), (131, 1), (1, 1), (64, 7), (77, 9), (128, 2), (40, 500)]
MATRIX_BUCKETS = [[6, 5], [4, 3, 2, 1], [0]]
STEPS = 4

CASES: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01, "maximize": True}),
    ("Adam", {"lr": 0.01, "weight_decay": 0.1}),
    ("Adam", {"lr": 0.01, "amsgrad": True, "betas": (0.8, 0.95)}),
    ("AdamW", {"lr": 0.01, "weight_decay": 0.1, "maximize": True}),
    ("Adamax", {"lr": 0.01, "weight_decay": 0.1}),
    ("NAdam", {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    ("RAdam", {"lr": 0.01, "weight_decay": 0.1}),
    ("RMSprop", {"lr": 0.01, "momentum": 0.9, "centered": True, "weight_decay": 0.1}),
    ("RMSprop", {"lr": 0.01}),
    ("Rprop", {"lr": 0.01}),
    ("Adagrad", {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.5}),
    ("Adadelta", {"lr": 1.0, "weight_decay": 0.1}),
    ("ASGD", {"lr": 0.01, "t0": 1.0, "weight_decay": 0.1}),
    ("Adafactor", {"lr": 0.01, "weight_decay": 0.1}),
    ("Muon", {"lr": 0.01}),
]
IDS = [f"{name}-{'-'.join(list(kw)[1:])}" for name, kw in CASES]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Model:
    """Parameters in two groups, an optimizer of them, and gradients that depend on the step only."""

    def __init__(self, name: str, kw: dict[str, Any], dtype: torch.dtype = torch.float64, **flags: Any) -> None:
        self.shapes, self.buckets = (MATRICES, MATRIX_BUCKETS) if name == "Muon" else (SHAPES, BUCKETS)
        generator = torch.Generator().manual_seed(1)
        values = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in self.shapes]
        if len(self.shapes) > 5:
            values[5] = values[5].t().contiguous().t()  # as channels_last: strides that are not those of its shape
        self.parameters = [Parameter(v) for v in values]
        self.dtype = dtype
        last = dict(kw, lr=kw["lr"] / 2, **({"betas": (0.7, 0.9)} if "betas" in kw else {}))
        groups = [{"params": self.parameters[:4]}, {"params": self.parameters[4:], **last}]
        groups[1].pop("initial_accumulator_value", None)
        self.optimizer: torch.optim.Optimizer = getattr(torch.optim, name)(groups, **kw, **flags)

    def gradients(self, step: int) -> list[Tensor | None]:
        generator = torch.Generator().manual_seed(100 + step)
        found = [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(self.dtype) for p in self.parameters]
        unused = {0: {0, 2}, 1: {5}, 2: set(), 3: {0, 7}}[step]
        if type(self.optimizer).__name__ in ("SGD", "Adafactor"):  # torch's own fail where a tensor has no element
            unused |= {4}
        return [
            None if i in unused else torch.empty_like(p).copy_(g)
            for i, (p, g) in enumerate(zip(self.parameters, found, strict=True))
        ]

    def schedule(self, step: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] *= 0.5 if step == 2 else 1.0

    def run(self, steps: range) -> None:
        for step in steps:
            self.schedule(step)
            for p, g in zip(self.parameters, self.gradients(step), strict=True):
                p.grad = g
            self.optimizer.step()

    def like(self) -> dict[int, Tensor]:
        return {i: p.detach().to("meta") for i, p in enumerate(self.parameters)}


def flat(tensor: Tensor) -> Tensor:
    """Its elements in the order of memory."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


class Servers:
    """What `num_servers` servers do with a model's buckets; each in chunks."""

    def __init__(self, model: Model, num_servers: int, limit: int = 2048) -> None:
        self.model = model
        spec = decode_spec(json.loads(json.dumps(encode_spec(spec_of(model.optimizer)))))
        self.spec = spec
        numels = [[model.parameters[i].numel() for i in b] for b in model.buckets]
        size = model.parameters[0].element_size()
        placement = place(numels, [size] * len(numels), num_servers, whole=spec.whole)
        self.grain = grain(sum(map(sum, numels)))
        self.shards: list[tuple[int, int, Tensor, ShardOptimizer]] = []
        for b, (members, ranges) in enumerate(zip(model.buckets, placement, strict=True)):
            buffer = torch.cat([flat(model.parameters[i]) for i in members])
            tensors = []
            for i in members:
                p = model.parameters[i]
                tensors.append(Piece(i, int(i >= 4), 0, p.numel(), tuple(p.shape), p.stride()))
            for r in ranges:
                held = buffer[r.start : r.stop].clone()
                for chunk in chunks(cut(tensors, r.start, r.stop), limit, self.grain, whole=spec.whole):
                    shard = ShardOptimizer(spec, chunk.pieces, held[chunk.start : chunk.stop])
                    self.shards.append((b, r.start + chunk.start, held[chunk.start : chunk.stop], shard))

    def run(self, steps: range) -> None:
        for step in steps:
            self.model.schedule(step)
            now = decode_hyper(self.spec, json.loads(json.dumps(hyper(self.model.optimizer))))
            gradients = self.model.gradients(step)
            filled = [
                torch.zeros_like(p) if g is None else g for p, g in zip(self.model.parameters, gradients, strict=True)
            ]
            buffers = [torch.cat([flat(filled[i]) for i in members]) for members in self.model.buckets]
            for b, start, values, shard in self.shards:
                used = [gradients[p.parameter] is not None for p in shard.pieces]
                shard.step(buffers[b][start : start + values.numel()], used, now)

    def parameters(self) -> list[Tensor]:
        buffers = [
            torch.empty(sum(self.model.parameters[i].numel() for i in m), dtype=self.model.dtype)
            for m in self.model.buckets
        ]
        for b, start, values, _ in self.shards:
            buffers[b][start : start + values.numel()] = values
        found = list(self.model.parameters)
        for buffer, members in zip(buffers, self.model.buckets, strict=True):
            for part, i in zip(buffer.split([found[j].numel() for j in members]), members, strict=True):
                found[i] = part.as_strided(found[i].shape, found[i].stride())
        return found

    def state(self) -> dict[int, dict[str, Any]]:
        parts = [
            (p, s) for *_, shard in reversed(self.shards) for p, s in zip(shard.pieces, shard.state(), strict=True)
        ]
        return merge_states(parts, self.model.like())

    def load(self, state: dict[int, dict[str, Any]]) -> None:
        for *_, shard in self.shards:
            shard.load(split_state(state, shard.pieces, self.model.like()))


def same_state(a: dict[int, dict[str, Any]], b: dict[int, dict[str, Any]], **tolerance: float) -> None:
    def nonempty(state: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
        return {i: {k: t.detach() for k, t in s.items()} for i, s in state.items() if s and i != 4}

    a, b = nonempty(a), nonempty(b)
    assert {i: s.keys() for i, s in a.items()} == {i: s.keys() for i, s in b.items()}
    for i in a:
        for k in a[i]:
            torch.testing.assert_close(
                a[i][k], b[i][k], **(tolerance or {"rtol": 0, "atol": 0}), check_dtype=not tolerance
            )


def flags_of(name: str) -> dict[str, Any]:
    return update._CLASSES[name][1]


@pytest.mark.parametrize(("name", "kw"), CASES, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_any_number_of_servers_computes_the_same_bits_and_what_torch_does(name, kw, dtype):
    own = Model(name, kw, dtype)
    own.run(range(STEPS))
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    one = None
    for num_servers in (1, 2, 3, 5):
        servers = Servers(Model(name, kw, dtype), num_servers, limit=2048 * num_servers)
        servers.run(range(STEPS))
        parameters = servers.parameters()
        if one is None:
            one = parameters, servers.state()
        assert all(torch.equal(a, b) for a, b in zip(parameters, one[0], strict=True)), num_servers
        same_state(servers.state(), one[1])
    for a, b in zip(one[0], own.parameters, strict=True):
        torch.testing.assert_close(a, b.detach(), **tolerance)
    same_state(one[1], own.optimizer.state_dict()["state"], **tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", sorted(ELEMENTWISE))
def test_half_precision_does_not_depend_on_the_number_of_servers(name, dtype):
    kw = {"lr": 0.01, **({"momentum": 0.9} if name in ("SGD", "RMSprop") else {})}
    found = []
    for num_servers in (1, 3):
        servers = Servers(Model(name, kw, dtype), num_servers)
        servers.run(range(STEPS))
        found.append(servers.parameters())
    assert all(torch.equal(a.view(torch.int16), b.view(torch.int16)) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(("name", "kw"), CASES, ids=IDS)
def test_states_round_trip_and_training_goes_on(name, kw):
    """Servers -> torch's own optimizer, servers of another number -> as if nothing had been."""
    dtype = torch.float32
    undisturbed = Servers(Model(name, kw, dtype), 2)
    undisturbed.run(range(2))
    state, parameters = undisturbed.state(), [p.clone() for p in undisturbed.parameters()]
    undisturbed.run(range(2, STEPS))

    def resumed(flags: dict[str, Any]) -> Model:
        model = Model(name, kw, dtype, **flags)
        with torch.no_grad():
            for p, value in zip(model.parameters, parameters, strict=True):
                p.copy_(value)
        return model

    servers = Servers(resumed({}), 3)
    servers.load(state)
    same_state(servers.state(), state)
    servers.run(range(2, STEPS))
    assert all(torch.equal(a, b) for a, b in zip(servers.parameters(), undisturbed.parameters(), strict=True))
    same_state(servers.state(), undisturbed.state())

    plain = resumed(flags_of(name))
    full = plain.optimizer.state_dict()
    plain.optimizer.load_state_dict(
        {**full, "state": {i: {k: v.clone() for k, v in s.items()} for i, s in state.items()}}
    )
    same_state(plain.optimizer.state_dict()["state"], state)
    plain.run(range(2, STEPS))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters, undisturbed.parameters(), strict=True))


def test_what_torch_has_kept_comes_back_from_servers():
    own = Model("Adam", {"lr": 0.1, "amsgrad": True})
    own.run(range(STEPS))
    state = own.optimizer.state_dict()["state"]
    servers = Servers(Model("Adam", {"lr": 0.1, "amsgrad": True}), 5)
    servers.load(state)
    same_state(servers.state(), state)
    assert sum(shard.state_bytes for *_, shard in servers.shards) >= 3 * 8 * sum(map(math.prod, SHAPES))


def test_every_optimizer_of_torch_is_known():
    classes = {n for n in torch.optim.__all__ if isinstance(getattr(torch.optim, n), type)} - {"Optimizer"}
    assert classes - {"LBFGS", "SparseAdam"} == ELEMENTWISE | WHOLE
    assert {name for name, _ in CASES} == ELEMENTWISE | WHOLE


# -- what is refused


class Mine(torch.optim.SGD):
    pass


def parameter() -> list[Parameter]:
    return [Parameter(torch.zeros(3, 3))]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: torch.optim.LBFGS(parameter()), "several times"),
        (lambda: torch.optim.SparseAdam(parameter()), "sparse"),
        (lambda: Mine(parameter()), "not a class of torch.optim"),
        (lambda: type("Adam", (torch.optim.Adam,), {})(parameter()), "not a class of torch.optim"),
        (lambda: torch.optim.Adam(parameter(), differentiable=True), "differentiable=True"),
        (lambda: torch.optim.Adam([{"params": parameter(), "capturable": True}]), "capturable=True in group 0"),
        (lambda: torch.optim.SGD(parameter(), lr=math.inf), "lr is inf"),
        (lambda: _with("momentum", "x"), "momentum is 'x'"),
        (lambda: _with("nesterov", 1), "nesterov is 1"),
    ],
)
def test_an_optimizer_that_servers_cannot_step_is_refused(make, said):
    with pytest.raises(UsageError, match=said):
        spec_of(make())


def _with(key: str, value: Any) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(parameter(), lr=0.1)
    optimizer.param_groups[0][key] = value
    return optimizer


def test_tensors_become_numbers_and_the_keys_of_schedulers_stay_behind():
    optimizer = torch.optim.Adam(parameter(), lr=torch.tensor(0.5), betas=(torch.tensor(0.5), torch.tensor(0.75)))
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    [group] = hyper(optimizer)
    assert group["lr"] == 0.5
    assert type(group["lr"]) is float
    assert group["betas"] == [0.5, 0.75]
    assert not {"initial_lr", "params", "foreach", "fused", "capturable"} & group.keys()
    assert spec_of(optimizer).groups[0]["betas"] == (0.5, 0.75)


def adam(**changes: Any) -> list[Any]:
    spec = encode_spec(spec_of(torch.optim.Adam(parameter())))
    spec[1][0].update(changes)
    return spec


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        ["Adam"],
        ["Optimizer", []],
        ["LBFGS", [{}]],
        ["__init__", [{}]],
        [["Adam"], [{}]],
        ["Adam", []],
        ["Adam", {}],
        ["Adam", [[]]],
        ["SGD", adam()[1]],
        adam(lr="0.1"),
        adam(lr=True),
        adam(lr=None),
        adam(lr=math.nan),
        adam(lr=-1.0),
        adam(lr=10**400),
        adam(betas=[0.9]),
        adam(betas=[0.9, 2.0]),
        adam(betas=0.9),
        adam(betas=[0.9, None]),
        adam(amsgrad=0),
        adam(fused=True),
        adam(params=[]),
        ["Muon", [{**encode_spec(spec_of(torch.optim.Muon(parameter())))[1][0], "ns_steps": 10**6}]],
        ["Muon", [{**encode_spec(spec_of(torch.optim.Muon(parameter())))[1][0], "adjust_lr_fn": "x"}]],
    ],
    ids=repr,
)
def test_a_spec_that_cannot_be_meant_is_refused(data):
    with pytest.raises(ProtocolError):
        decode_spec(data)


@pytest.mark.parametrize(
    ("name", "kw", "changes", "said"),
    [
        ("Adam", {}, {"amsgrad": True}, "amsgrad of group 0 was False"),
        ("RMSprop", {}, {"momentum": 0.9}, "momentum of group 0"),
        ("Adam", {}, {"lr": math.inf}, "lr is inf"),
        ("Adam", {}, {"extra": 1}, "exactly"),
    ],
)
def test_hyperparameters_that_cannot_be_meant_are_refused(name, kw, changes, said):
    optimizer = getattr(torch.optim, name)(parameter(), **kw)
    spec, data = spec_of(optimizer), hyper(optimizer)
    assert decode_hyper(spec, data) == spec.groups
    with pytest.raises(ProtocolError, match=said):
        decode_hyper(spec, [{**data[0], **changes}])
    with pytest.raises(ProtocolError, match="2 groups"):
        decode_hyper(spec, data * 2)


def shard(name: str = "Adam", numel: int = 6, **kw: Any) -> ShardOptimizer:
    spec = spec_of(getattr(torch.optim, name)(parameter(), **kw))
    return ShardOptimizer(spec, [Piece(0, 0, 0, numel, (2, numel // 2))], torch.zeros(numel))


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("Adam", {"exp_avg": torch.zeros(5)}, "exp_avg"),
        ("Adam", {"exp_avg": torch.zeros(6, dtype=torch.float64)}, "float64"),
        ("Adam", {"step": torch.zeros(1)}, "step"),
        ("Adam", {"step": torch.zeros((), dtype=torch.int64)}, "step"),
        ("Adam", {"mine": torch.zeros(6)}, "mine"),
        ("Adafactor", {"row_var": torch.zeros(3)}, "row_var"),
        ("Adafactor", {"variance": torch.zeros(6)}, "variance"),
        ("Muon", {"momentum_buffer": torch.zeros(2, 3)}, "momentum_buffer"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(name, changes, said):
    optimizer = shard(name)
    optimizer.step(torch.ones(6), [True])
    [state] = optimizer.state()
    with pytest.raises(ProtocolError, match=said):
        optimizer.load([{**state, **changes}])
    with pytest.raises(ProtocolError, match="2 pieces"):
        optimizer.load([state, state])
    if name == "Adam":
        with pytest.raises(ProtocolError, match="keeps"):
            optimizer.load([{"step": torch.tensor(1.0)}])


def test_pieces_that_do_not_fit_are_refused():
    spec = OptimizerSpec("Muon", spec_of(torch.optim.Muon(parameter())).groups)
    for pieces in ([], [Piece(0, 0, 0, 5, (5,))], [Piece(0, 1, 0, 6, (2, 3))], [Piece(0, 0, 0, 6)]):
        with pytest.raises(UsageError):
            ShardOptimizer(spec, pieces, torch.zeros(6))


def test_states_that_do_not_make_up_a_parameter_are_refused():
    like = {0: torch.empty(6)}

    def part(start: int, step: float, **more: Tensor) -> tuple[Piece, dict[str, Tensor]]:
        return Piece(0, 0, start, 3), {"step": torch.tensor(step), "exp_avg": torch.zeros(3), **more}

    assert merge_states([part(3, 1.0), part(0, 1.0)], like)[0]["exp_avg"].shape == (6,)
    for parts, said in [
        ([part(3, 1.0)], "begins at 3"),
        ([part(0, 1.0)], "3 elements of 6"),
        ([part(0, 1.0), part(3, 2.0)], "differ in step"),
        ([part(0, 1.0), part(3, 1.0, x=torch.zeros(3))], "differ"),
    ]:
        with pytest.raises(ProtocolError, match=said):
            merge_states(parts, like)
    with pytest.raises(UsageError, match="another model"):
        split_state({0: {"exp_avg": torch.zeros(5)}}, [Piece(0, 0, 0, 6)], like)


def test_parameters_are_numbered_as_in_the_state_dict():
    a, b, c = (Parameter(torch.zeros(n)) for n in (1, 2, 3))
    optimizer = torch.optim.SGD([{"params": [c]}, {"params": [a]}], lr=0.1)
    assert numbering(optimizer, [("a", a), ("b", b), ("c", c)]) == {"c": (0, 0), "a": (1, 1)}
    with pytest.raises(UsageError, match="does not train"):
        numbering(optimizer, [("a", a)])


# -- chunks and norms


@pytest.mark.parametrize("limit", [128, 200, 1000, 4096, 10**6])
@pytest.mark.parametrize("whole", [False, True])
def test_chunks_are_small_and_cut_at_grains(limit, whole):
    pieces = [Piece(0, 0, 256, 1000), Piece(1, 0, 0, 5, (5,)), Piece(2, 0, 0, 3000, (3000,)), Piece(3, 0, 0, 130)]
    found = chunks(pieces, limit, 128, whole=whole)
    assert [c.start for c in found] + [4135] == [0, *(c.stop for c in found)]
    assert all(sum(p.numel for p in c.pieces) == c.stop - c.start for c in found)
    assert all(c.stop - c.start <= limit or (whole and len(c.pieces) == 1) for c in found)
    assert all(p.start % 128 == 0 for c in found for p in c.pieces)
    if whole:
        assert [p for c in found for p in c.pieces] == pieces


def test_a_chunk_below_the_grain_is_refused():
    with pytest.raises(UsageError, match="limit_elements"):
        chunks([Piece(0, 0, 0, 9)], 127, 128)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_norm_has_the_same_bits_for_any_cuts(dtype):
    model = Model("Adam", {"lr": 0.1}, dtype)
    gradients = [g for g in model.gradients(2) if g is not None]
    buffer = torch.cat([flat(g) for g in gradients])
    tensors = [Piece(i, 0, 0, g.numel(), tuple(g.shape)) for i, g in enumerate(gradients)]
    norms, sums = set(), []
    for num_servers in (1, 2, 3, 5):
        [ranges] = place([[p.numel for p in tensors]], [dtype.itemsize], num_servers)
        sums = []
        for r in ranges:
            pieces = cut(tensors, r.start, r.stop)
            for c in chunks(pieces, 3000 * num_servers, 128):
                sums.append(squares(buffer[r.start + c.start : r.start + c.stop], c.pieces, 128))
        norms.add(total_norm(sums))
    one = [squares(buffer[o : o + 128], cut(tensors, o, o + 128), 128) for o in range(0, 19_968, 128)]
    first = 19_650 // 128  # full blocks of the first tensor
    assert torch.equal(torch.cat(one)[:first], torch.cat(sums)[:first])
    [norm] = norms
    expected = torch.linalg.vector_norm(buffer.double())
    assert norm == pytest.approx(float(expected), rel=1e-14)
    for p, g in zip(model.parameters, gradients, strict=True):
        p.grad = g
    clipped = torch.nn.utils.clip_grad_norm_(model.parameters, 1.0)
    assert norm == pytest.approx(float(clipped), rel=1e-2 if dtype == torch.bfloat16 else 1e-6)


def test_a_norm_that_is_not_finite_says_so():
    for value in (math.nan, math.inf):
        gradient = torch.tensor([1.0, value])
        assert not math.isfinite(total_norm([squares(gradient, [Piece(0, 0, 0, 2)], 128)]))
    assert total_norm([]) == 0.0
