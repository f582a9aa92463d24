"""Two processes (gloo, CPU) equal one on the joined batch, under DDP and FSDP2, with clipping at work."""

import os
import socket
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).parent))  # spawned processes import the fixtures too
from compact_fixtures import batch, loss_of, random_mask, small

from deltalens.subnetwork.distributed import keep_out_of_ddp
from deltalens.subnetwork.optimizers import CompactAdamW

KINDS = ("ddp", "ddp-small", "fsdp2")
STEPS, CLIP, SETTINGS = 4, 0.3, {"lr": 1e-2, "weight_decay": 0.1, "max_grad_norm": 0.3}


def halves(step):
    tokens, targets = batch(step)
    return [(tokens[:6], targets[:6]), (tokens[6:], targets[6:])]


def train(model, optimizer, rank=None, other_mask=None):
    """Two micro-batches a step; `rank` None takes both halves of each."""
    norms = []
    for step in range(STEPS):
        if step == 1:
            optimizer.load_state_dict(optimizer.state_dict())
        if step == STEPS // 2 and other_mask is not None:
            optimizer.change_mask(other_mask)
        for part in range(2):
            parts = halves(2 * step + part)
            for data in parts if rank is None else [parts[rank]]:
                (loss_of(model, data) / (4 if rank is None else 2)).backward()
        optimizer.step()
        norms.append(float(optimizer.grad_norm))
    return norms


def process(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    for kind in KINDS:
        try:
            result = two_runs(kind, rank)
        except Exception as error:  # the other kinds are still of interest
            result = {"error": repr(error)}
        torch.save(result, f"{folder}/{kind}-{rank}.pt")
    dist.barrier()  # rank 0 keeps the store: it must not leave first
    dist.destroy_process_group()


def two_runs(kind, rank):
    model = small(seed=rank if kind == "ddp-small" else 0)
    masks = random_mask(model, 0.3, seed=1), random_mask(model, 0.3, seed=2, without="norm")
    if kind == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model)
        optimizer = CompactAdamW(wrapped, masks[0], **SETTINGS)
    elif kind == "ddp-small":  # made before the model is wrapped, as a Trainer does; the ranks start apart
        optimizer = CompactAdamW(model, masks[0], **SETTINGS)
        keep_out_of_ddp(model, [tensor.parameter for tensor in optimizer.tensors])
        wrapped = nn.parallel.DistributedDataParallel(model)
        assert sum(p.numel() for p in wrapped._module_parameters) <= 17
    else:
        for layer in (model.up, model.down):
            fully_shard(layer)
        wrapped = fully_shard(model)
        optimizer = CompactAdamW(wrapped, masks[0], **SETTINGS)
        held = sum(tensor.count for tensor in optimizer.tensors)
        assert held < 0.7 * sum(masks[0].count(name) for name in masks[0].names())
    norms = train(wrapped, optimizer, rank, masks[1])
    full = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in model.named_parameters()}
    return {"weights": {n: p.detach() for n, p in full.items()}, "norms": norms}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Of every kind and rank; one pair of processes, since starting them is what takes the time."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(process, args=(port, str(folder)), nprocs=2)
    return {(k, r): torch.load(folder / f"{k}-{r}.pt", weights_only=True) for k in KINDS for r in range(2)}


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_equal_one_process(results, kind):
    model = small()
    masks = random_mask(model, 0.3, seed=1), random_mask(model, 0.3, seed=2, without="norm")
    optimizer = CompactAdamW(model, masks[0], **SETTINGS)
    norms = train(model, optimizer, other_mask=masks[1])
    assert min(norms) > CLIP  # clipping was at work in every step
    for rank in range(2):
        got = results[kind, rank]
        assert "error" not in got, got["error"]
        torch.testing.assert_close(got["norms"], norms, rtol=1e-4, atol=0)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(got["weights"][name], parameter.detach(), rtol=0, atol=2e-6, msg=name)


def test_clipping_changes_the_result():
    """Were it not at work above, the ranks would agree all the same."""
    model, free = small(), small()
    mask = random_mask(model, 0.3, seed=1)
    train(model, CompactAdamW(model, mask, lr=1e-2, eps=1e-2, max_grad_norm=CLIP))
    train(free, CompactAdamW(free, mask, lr=1e-2, eps=1e-2, max_grad_norm=1e9))
    assert not torch.allclose(model.up.weight, free.up.weight, atol=1e-4)
