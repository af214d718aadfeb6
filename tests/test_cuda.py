"""On CUDA: gradients, batch norm and the update on the first device. Skipped where there is none."""

import copy
import time

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import dtrain
import dtrain.comm.solo
import dtrain.measure
from dtrain.data import cut
from dtrain.measure import Stopwatch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
several = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL needs a CUDA device for each worker")


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(1), nn.Linear(144, 10)).double()


def train(comm, model, device, update="worker"):
    model = dtrain.norm.convert(model.to(device), comm=comm)
    replica = dtrain.replicate(model, comm, bucket_mb=0.001, update=update)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        x = torch.randn(13, 1, 8, 8, generator=generator, dtype=torch.float64).to(device)
        y = torch.randint(0, 10, (13,), generator=generator).to(device)
        mine = cut(13, comm.rank, comm.world_size)
        optimizer.zero_grad()
        replica.backward(F.cross_entropy(model(x[mine]), y[mine]), samples=len(y[mine]), total=13)
        if replica.updates:
            optimizer.step()
        replica.publish()
    replica.check()
    return [p.detach().cpu() for p in model.parameters()]


def on_first_device(comm):
    return train(comm, make_model(), "cuda:0")


def on_own_device(comm):
    return train(comm, make_model(), f"cuda:{comm.rank}")


def assert_like_one(results):
    alone = dtrain.run(on_first_device, workers=1, backend="solo")[0]
    for weights in results:
        for here, there in zip(weights, alone, strict=True):
            torch.testing.assert_close(here, there, rtol=0, atol=1e-10)


@pytest.mark.parametrize("backend", ["threads", "ps"])
def test_two_workers_on_one_device_equal_one(backend):
    assert_like_one(dtrain.run(on_first_device, workers=2, backend=backend))


@several
def test_nccl_equals_one():
    assert_like_one(dtrain.run(on_own_device, workers=2, backend="allreduce"))


def test_update_on_the_first_device_equals_one():
    devices = [f"cuda:{i % torch.cuda.device_count()}" for i in range(2)]
    model = make_model()

    def body(comm):
        return train(comm, copy.deepcopy(model), comm.device, update="first")

    assert_like_one(dtrain.run(body, workers=2, backend="threads", devices=devices))


def against_torchs(comm, folder):
    """Largest difference of outputs, input gradients and buffers from torch's SyncBatchNorm, and both times."""
    dist.init_process_group(
        "nccl", store=dist.FileStore(f"{folder}/store", comm.world_size), rank=comm.rank, world_size=comm.world_size
    )
    device = torch.device(f"cuda:{comm.rank}")
    torch.cuda.set_device(device)
    ours = dtrain.norm.convert(nn.BatchNorm2d(64).to(device), comm=comm)
    theirs = nn.SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm2d(64).to(device))
    found, times = [], []
    for layer in (ours, theirs):
        generator = torch.Generator().manual_seed(comm.rank)
        for number in range(30):
            if number == 10:
                torch.cuda.synchronize()
                start_s = time.perf_counter()
            x = torch.randn(16, 64, 28, 28, generator=generator).to(device).requires_grad_()
            y = layer(x)
            (y * torch.arange(28.0, device=device)).sum().backward()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start_s)
        found.append([y.detach(), x.grad, *layer.buffers()])
    dist.destroy_process_group()
    return max((a - b).abs().max().item() for a, b in zip(*found, strict=True)), times


@several
def test_synchronised_batch_norm_is_torchs(tmp_path):
    for difference, (ours_s, theirs_s) in dtrain.run(against_torchs, str(tmp_path), workers=2, backend="allreduce"):
        assert difference < 1e-4
        print(f"20 layers: {ours_s * 1e3:.1f} ms, torch's {theirs_s * 1e3:.1f} ms")


def test_the_meter_reads_the_devices_clock():
    """Phases are as long as the device took for them, also where the program has long gone on."""
    device = torch.device("cuda:0")
    meter = dtrain.measure.metered(dtrain.comm.solo.Solo())
    watch = Stopwatch(meter, device)
    x = torch.randn(4096, 4096, device=device)
    for _ in range(3):  # the first ones make kernels
        watch.begin()
        host_s = time.perf_counter()
        with watch.phase("forward"):
            for _ in range(20):
                y = x @ x
        host_s = time.perf_counter() - host_s
        with watch.phase("optimizer"):
            y.add_(1.0)
        watch.end()
    record = watch.take()[-1].record()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(20):
        y = x @ x
    end.record()
    torch.cuda.synchronize()
    assert record["forward_ms"] == pytest.approx(start.elapsed_time(end), rel=0.2)
    assert record["forward_ms"] > host_s * 1e3
    assert record["step_ms"] == pytest.approx(record["forward_ms"] + record["optimizer_ms"], rel=0.2)
