"""Memory of a step: predictions from two small micro-batches against what there really is."""

from __future__ import annotations

import gc
import math
import mmap

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.data import default_collate

import dtrain
from dtrain import recipes
from dtrain.errors import UsageError
from dtrain.measure import memory
from dtrain.measure.footprint import footprint
from dtrain.measure.memory import Footprint, Line, Memory, largest_micro_batch, measured, parse_bytes
from tests.conftest import everywhere
from tests.recipes.idx_files import write_fashion

RECIPES = {
    "digits": ("digits", {}),
    "fashion": ("fashion", {"width": 8}),
    "lstm": ("synthetic", {"model": "lstm", "hidden": 96, "length": 12, "classes": 64}),
    "transformer": ("synthetic", {"model": "transformer", "hidden": 64, "layers": 2, "length": 16, "classes": 64}),
    "mlp": ("synthetic", {"hidden": 1100, "layers": 2, "classes": 100}),  # its gradients travel by themselves
    "resnet": ("synthetic", {"model": "resnet", "image": 32, "classes": 10}),
}
"""What the recipes train, small."""


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("idx")
    write_fashion(folder)
    return str(folder)


@pytest.fixture(params=list(RECIPES))
def recipe(request, data):
    name, options = RECIPES[request.param]
    return recipes.build(name, data=data if name == "fashion" else None, **options)


def batch_of(recipe, samples):
    return default_collate([recipe.train[i % len(recipe.train)] for i in range(samples)])


def predicted(recipe, **more):
    return footprint(recipe.model, recipe.loss, batch_of(recipe, 4), recipe.optimizer, **more)


def really_saved(recipe, batch):
    """Bytes of all memory that a forward saves, but the model's and the batch's own."""
    own = {t.untyped_storage().data_ptr() for t in [*recipe.model.parameters(), *recipe.model.buffers(), *batch]}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = recipe.loss(recipe.model, batch)
    loss.backward()
    return sum(found.values())


# --- against what there really is


def trained(comm, name, options, data):
    """(predicted, measured after two steps) on a worker."""
    recipe = recipes.build(name, data=data if name == "fashion" else None, **options)
    expected = predicted(recipe, packs=comm.packs).at(4)
    replica = dtrain.replicate(recipe.model, comm)
    optimizer = recipe.optimizer(recipe.model.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        replica.backward(recipe.loss(recipe.model, batch_of(recipe, 4)))
        optimizer.step()
    found = measured(recipe.model, optimizer, replica)
    replica.close()
    return {name: getattr(expected, name) for name in found if name != "peak_bytes"}, found


@pytest.mark.parametrize("case", list(RECIPES))
def test_parameters_gradients_state_and_messages_are_predicted_to_the_byte(case, data):
    (expected, found), *_ = everywhere(trained, *RECIPES[case], data, backend="solo")
    assert found.pop("peak_bytes") > found["parameters_bytes"]
    assert found == expected
    assert found["gradients_bytes"] == found["parameters_bytes"]
    assert found["optimizer_bytes"] >= found["parameters_bytes"]
    assert 0 < found["buckets_bytes"] < 1000  # flags, that say whose gradients there are


def test_over_a_parameter_server_too():
    for expected, found in everywhere(trained, *RECIPES["mlp"], None, backend="ps"):
        found.pop("peak_bytes")
        assert found == expected


def rounded(comm):
    """The same, where gradients travel as halves."""
    recipe = recipes.build("digits")
    expected = predicted(recipe, packs=comm.packs, send_as=torch.bfloat16).at(4)
    replica = dtrain.replicate(recipe.model, comm, send_as=torch.bfloat16)
    optimizer = recipe.optimizer(recipe.model.parameters())
    replica.backward(recipe.loss(recipe.model, batch_of(recipe, 4)))
    optimizer.step()
    found = measured(recipe.model, optimizer, replica)
    return {name: getattr(expected, name) for name in found if name != "peak_bytes"}, found


@pytest.mark.parametrize("backend", ["ps", "allreduce"])
def test_halves_are_kept_beside_the_gradients(backend):
    for expected, found in everywhere(rounded, backend=backend):
        found.pop("peak_bytes")
        assert found == expected
        assert found["gradients_bytes"] == found["parameters_bytes"]
        assert found["parameters_bytes"] // 2 < found["buckets_bytes"] < found["parameters_bytes"]


def hosted(comm):
    recipe = recipes.build("digits")
    expected = predicted(recipe, update="server").at(4)
    optimizer = recipe.optimizer(recipe.model.parameters())
    replica = dtrain.replicate(recipe.model, comm, update=dtrain.ServerUpdate(optimizer=optimizer))
    replica.backward(recipe.loss(recipe.model, batch_of(recipe, 4)))
    replica.publish()
    found = measured(recipe.model, optimizer, replica)
    return {name: getattr(expected, name) for name in found if name != "peak_bytes"}, found


def test_where_servers_step_a_worker_has_no_state_and_its_gradients_are_in_buckets():
    for expected, found in everywhere(hosted, backend="ps"):
        found.pop("peak_bytes")
        assert found == expected
        assert found["optimizer_bytes"] == found["gradients_bytes"] == 0
        assert found["buckets_bytes"] == found["parameters_bytes"]


def test_saved_activations_are_predicted_at_another_batch(recipe):
    seen = predicted(recipe)
    for samples in (9, 16, 24):
        really = really_saved(recipe, batch_of(recipe, samples))
        assert seen.activations.at(samples) == pytest.approx(really, rel=0.02)


def test_saved_activations_lie_on_a_line(recipe):
    sizes = [2, 5, 9, 16]
    saved = [really_saved(recipe, batch_of(recipe, n)) for n in sizes]
    mean = sum(saved) / len(saved)
    line = Line.through((sizes[0], saved[0]), (sizes[-1], saved[-1]))
    rest = sum((line.at(n) - b) ** 2 for n, b in zip(sizes, saved, strict=True))
    assert 1 - rest / sum((b - mean) ** 2 for b in saved) > 0.999


def test_the_model_is_left_as_it_was(recipe):
    recipe.model.eval()
    before = {name: tensor.clone() for name, tensor in recipe.model.state_dict().items()}
    state = torch.get_rng_state()
    predicted(recipe)
    assert all(torch.equal(tensor, before[name]) for name, tensor in recipe.model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in recipe.model.parameters())
    assert not any(module.training for module in recipe.model.modules())


# --- cases worked out by hand


def linear_loss(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def example(samples, width):
    return torch.zeros(samples, width), torch.zeros(samples, width)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


@pytest.mark.parametrize(
    ("make", "states"),
    [
        (sgd, 0),
        (lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9), 1),
        (lambda ps: torch.optim.Adam(ps), 2),
        (lambda ps: torch.optim.Adam(ps, amsgrad=True), 3),
        (lambda ps: torch.optim.Adagrad(ps), 1),
    ],
    ids=["SGD", "momentum", "Adam", "AMSGrad", "Adagrad"],
)
def test_the_state_of_an_optimizer(make, states):
    model = nn.Linear(8, 8)
    found = footprint(model, linear_loss, example(2, 8), make).at(1)
    counters = 0 if states in (0,) or "SGD" in type(make(list(model.parameters()))).__name__ else 2 * 4  # of steps
    assert found.optimizer_bytes == states * 4 * (64 + 8) + counters


def test_an_optimizer_that_needs_a_closure_is_refused():
    with pytest.raises(UsageError, match="LBFGS cannot be stepped without a closure"):
        footprint(nn.Linear(2, 2), linear_loss, example(2, 2), torch.optim.LBFGS)


def test_frozen_parameters_have_no_gradient_and_unused_ones_none_either():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].requires_grad_(False)
    seen = footprint(model, lambda m, b: linear_loss(m[:2], b), example(2, 8), lambda ps: torch.optim.SGD(ps, 0.1))
    assert seen.parameters_bytes == 3 * 4 * 72
    assert seen.gradients_bytes == 4 * 72


def test_a_shared_parameter_counts_once():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 8, bias=False))
    model[2].weight = model[0].weight
    seen = footprint(model, linear_loss, example(2, 8), lambda ps: torch.optim.SGD(ps, 0.1, momentum=0.9))
    assert seen.parameters_bytes == seen.gradients_bytes == seen.optimizer_bytes == 4 * 64


def test_what_a_layer_without_parameters_saves():
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    found = footprint(model, linear_loss, example(4, 8), sgd).at(10)
    assert found.batch_bytes == 2 * 4 * 8 * 10
    assert found.activations_bytes == 4 * 8 * 10  # tanh's output, which the loss saves as well; the input is the batch
    assert found.workspace_bytes >= 4 * 8 * 10  # gradients of both, one after the other


def test_dropout_leaves_random_numbers_alone_and_counts_its_mask():
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)).eval()
    state = torch.get_rng_state()
    found = footprint(model, linear_loss, example(4, 8), sgd).at(10)
    assert torch.equal(torch.get_rng_state(), state)
    # The mask, of bytes or of floats, and the output for the loss; the linear layer's input is the batch.
    assert found.activations_bytes in ((1 + 4) * 8 * 10, (4 + 4) * 8 * 10)


def test_the_peak_of_a_deep_chain_is_where_backward_begins():
    wide = [module for _ in range(8) for module in (nn.Linear(16, 16), nn.Tanh())]
    model = nn.Sequential(*wide)
    found = footprint(model, linear_loss, example(4, 16), sgd).at(1000)
    saved = 8 * 4 * 16 * 1000
    assert found.activations_bytes == saved
    kept = found.parameters_bytes + found.gradients_bytes + found.buckets_bytes + found.batch_bytes
    assert kept + saved < found.peak_bytes <= kept + saved + found.workspace_bytes
    assert found.workspace_bytes <= 3 * 4 * 16 * 1000 + found.parameters_bytes


def test_an_example_of_one_sample_is_refused():
    with pytest.raises(UsageError, match="the example batch has 1 samples: give 2 or more"):
        footprint(nn.Linear(2, 2), linear_loss, example(1, 2), sgd)


# --- arithmetic


def made(**more):
    fields = {"parameters_bytes": 100, "buffers_bytes": 0, "gradients_bytes": 100, "direct_bytes": 60}
    fields |= {"optimizer_bytes": 200, "buckets_bytes": 4, "batch": Line(0, 2), "activations": Line(0, 8)}
    fields |= {"workspace": (Line(5, 1),), "live": ((Line(10, 8), 0), (Line(0, 4), 60))}
    return Footprint(**{**fields, **more})


def test_the_peak_is_the_largest_moment():
    assert made().kept_bytes == 100 + 200 + 40 + 4
    assert made().at(1).peak_bytes == 344 + 2 + max(10 + 8, 4 + 60)
    assert made().at(100).peak_bytes == 344 + 200 + max(10 + 800, 400 + 60)


def test_with_several_micro_batches_all_gradients_are_there():
    assert made().at(100, accumulate=True).peak_bytes == 344 + 200 + 60 + 10 + 800


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("memory_bytes", [600, 1000, 12345, 10**9])
def test_the_largest_micro_batch_fits_and_one_more_does_not(memory_bytes, accumulate):
    most = largest_micro_batch(made(), memory_bytes, accumulate=accumulate)
    assert made().at(most, accumulate=accumulate).peak_bytes <= memory_bytes
    assert made().at(most + 1, accumulate=accumulate).peak_bytes > memory_bytes


def test_the_largest_micro_batch_of_a_recipe(recipe):
    seen = predicted(recipe)
    memory_bytes = seen.at(40).peak_bytes
    assert largest_micro_batch(seen, memory_bytes) in (39, 40)  # a byte is lost to rounding
    assert largest_micro_batch(seen, memory_bytes + 12345, overhead_bytes=12345) in (39, 40)


def test_where_not_one_sample_fits_the_error_says_what_it_needs():
    with pytest.raises(UsageError, match=r"memory is 300 bytes, and a micro-batch of one sample needs 410 bytes"):
        largest_micro_batch(made(), 300)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("24GiB", 24 * 2**30), ("512 MiB", 2**29), ("8GB", 8 * 10**9), ("1.5kib", 1536), ("100", 100), ("2B", 2)],
)
def test_sizes(text, nbytes):
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "GiB", "24 gigs", "-1GiB", "0GiB", "1e9", "1.2.3MB"])
def test_a_size_that_cannot_be_meant(text):
    with pytest.raises(UsageError, match="give a size such as 24GiB"):
        parse_bytes(text)


def test_the_table_names_every_part():
    text = made().at(10).table()
    for word in ("parameters", "gradients", "optimizer", "activations", "most at one moment"):
        assert word in text
    assert text.splitlines()[-1].split()[-2:] == ["464", "bytes"]
    assert [memory.show(n) for n in (12, 2048, 3 * 2**20, 1.5 * 2**30)] == [
        "12 bytes",
        "2.00 KiB",
        "3.00 MiB",
        "1.50 GiB",
    ]


def test_a_memory_adds_up_where_nothing_comes_and_goes():
    assert isinstance(made().at(1), Memory)
    assert made(live=((Line(0, 0), 60),)).at(0).peak_bytes == 100 + 100 + 200 + 4


def test_the_peak_of_this_process_grows_with_what_it_holds():
    device = torch.device("cpu")
    gc.collect()
    if not memory.forget_peak(device):
        pytest.skip("this system does not let a process forget its peak")
    before = memory.peak_bytes(device)
    # Memory of its own: what malloc kept of earlier tests is this process's already.
    held = torch.frombuffer(mmap.mmap(-1, 64 * 2**20), dtype=torch.uint8).fill_(1)
    assert memory.peak_bytes(device) - before > 0.9 * held.nbytes
    del held
    assert memory.peak_bytes(device) - before > 0.9 * 64 * 2**20  # it is the most that there was
    assert memory.forget_peak(device)
    assert memory.peak_bytes(device) - before < 0.5 * 64 * 2**20
    assert math.isfinite(memory.process_bytes())
