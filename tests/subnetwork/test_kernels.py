"""The compiled loops against torch and NumPy: gathering, writing back, and AdamW in place."""

import copy
from unittest import mock

import numpy as np
import pytest
import torch
from compact_fixtures import off_mask_is_untouched, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deltalens import CompactAdamW, SubnetworkMask
from deltalens.subnetwork import kernels, threads


@pytest.fixture(autouse=True, scope="module", params=["torch's threads", "a pool", "one"])
def many_pieces_and_threads(request):
    """Pieces so short that a small tensor has several, on two threads (or one), and gradients in each way."""
    small = mock.patch.multiple(kernels, PIECE=200, CACHED=1000)
    count = mock.patch.object(torch, "get_num_threads", return_value=1 if request.param == "one" else 2)
    if request.param == "a pool":
        with small, count, mock.patch.object(threads, "_openmp", return_value=None):
            yield
    else:
        with small, count:
            yield


def positions(size, density, rng):
    return np.flatnonzero(rng.random(size) < density).astype(np.int32)


@settings(max_examples=40, deadline=None)
@given(
    size=st.sampled_from([1, 7, 128, 900, 5000]),
    density=st.sampled_from([0.0, 0.002, 0.05, 0.175, 0.9, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**16),
)
def test_gather_and_scatter(size, density, dtype, seed):
    rng = np.random.default_rng(seed)
    index = torch.from_numpy(positions(size, density, rng))
    dense = torch.from_numpy(rng.standard_normal(size, np.float32)).to(dtype)
    before = torch.from_numpy(rng.standard_normal(len(index), np.float32))
    out = before.clone()
    rows, double, twice = kernels.gatherer(index, out, size), dense + dense, torch.empty_like(out)
    kernels.gather([rows(dense, True), kernels.gatherer(index, twice, size)(double, False)])
    assert torch.equal(out, before + dense[index.long()].float())
    assert torch.equal(twice, 2 * dense[index.long()].float())
    kernels.gather([rows(dense, False)])
    assert torch.equal(out, dense[index.long()].float())

    for width in (dtype, torch.float64, torch.float16):
        target, wanted = dense.to(width), dense.to(width)
        version = target._version
        wanted[index.long()] = before.to(width)
        kernels.scatter(target, index, before.to(width))
        assert torch.equal(target, wanted)
        assert target._version > version


@pytest.mark.parametrize("way", [kernels.IN_ORDER, kernels.FETCHED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_processor_chooses_between_ways_that_give_the_same(way, dtype):
    """One position in twenty: both ways of reaching memory serve there, and which one is tried once."""
    assert kernels._faster_way() in (kernels.IN_ORDER, kernels.FETCHED)
    rng = np.random.default_rng(way)
    index = torch.from_numpy(positions(40_000, 0.05, rng))
    dense = torch.from_numpy(rng.standard_normal(40_000, np.float32)).to(dtype)
    out, values = torch.empty(len(index)), torch.from_numpy(rng.standard_normal(len(index), np.float32)).to(dtype)
    with mock.patch.object(kernels, "_faster_way", return_value=way) as asked:
        kernels.gather([kernels.gatherer(index, out, dense.numel())(dense, False)])
        assert torch.equal(out, dense[index.long()].float())
        wanted = dense.clone()
        wanted[index.long()] = values
        kernels.scatter(dense, index, values)
    assert asked.called
    assert torch.equal(dense, wanted)


class Two(nn.Module):
    """A tensor with a mask as drawn, and one that is trained whatever is drawn."""

    def __init__(self, shape, dtype, rng):
        super().__init__()
        self.drawn = nn.Parameter(torch.from_numpy(rng.standard_normal(shape, np.float32)).to(dtype))
        self.always = nn.Parameter(torch.from_numpy(rng.standard_normal(5, np.float32)).to(dtype))


def push(model, gradients):
    sum((g * p.float()).sum() for g, p in zip(gradients, model.parameters(), strict=True)).backward()


def dense_step(masters, optimizer, bits, gradients):
    """torch's, on masked gradients; what is off the mask is put back."""
    kept = [master.detach().clone() for master in masters]
    for master, bit, gradient in zip(masters, bits, gradients, strict=True):
        master.grad = gradient * bit
    optimizer.step()
    with torch.no_grad():
        for master, bit, old in zip(masters, bits, kept, strict=True):
            master.copy_(torch.where(bit, master, old))


@settings(max_examples=25, deadline=None)
@given(
    shape=st.sampled_from([(1,), (33,), (40, 50), (3, 5, 7), (1, 2000), (64, 64)]),
    density=st.sampled_from([0.0, 0.004, 0.08, 0.175, 0.6, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    decay=st.sampled_from([0.0, 0.1]),
    betas=st.sampled_from([(0.9, 0.999), (0.0, 0.95)]),
    size=st.sampled_from([1e-6, 1.0, 1e4]),
    seed=st.integers(0, 2**16),
)
def test_adamw_equals_dense_torch(shape, density, dtype, decay, betas, size, seed):
    rng = np.random.default_rng(seed)
    model = Two(shape, dtype, rng)
    start = weights(model)
    dense = {"drawn": rng.random(shape) < density, "always": np.arange(5) < 3}
    mask = SubnetworkMask.from_dense(dense, rule="drawn", source_hash="0" * 64)
    arguments = {"lr": 3e-3, "weight_decay": decay, "betas": betas}
    optimizer = CompactAdamW(model, mask, **arguments)
    masters = [nn.Parameter(p.detach().float()) for p in model.parameters()]
    twin = torch.optim.AdamW(masters, **arguments)
    bits = [torch.from_numpy(dense[name]) for name in ("drawn", "always")]
    for _ in range(5):
        gradients = [torch.from_numpy(rng.standard_normal(p.shape, np.float32) * size).to(dtype).float()
                     for p in masters]  # fmt: skip
        push(model, gradients)
        optimizer.step()
        dense_step(masters, twin, bits, gradients)
    for tensor in optimizer.tensors:
        master = masters[["drawn", "always"].index(tensor.name)].detach().reshape(-1)[tensor.positions()]
        ours = tensor.values.detach() if tensor.has_master else tensor.weights[tensor.positions()]
        torch.testing.assert_close(ours.reshape(-1), master, rtol=0, atol=1e-6)
        written = tensor.weights[tensor.positions()]
        assert torch.equal(written, ours.reshape(-1).to(dtype))
    assert off_mask_is_untouched(model, start, mask)


def test_steps_of_other_tensors_and_of_weights_that_were_moved():
    """What is kept of the last step's tensors is not used for others, nor for an address that they have left."""
    rng = np.random.default_rng(4)
    model = Two((30, 50), torch.float32, rng)
    dense = {"drawn": rng.random((30, 50)) < 0.1, "always": np.arange(5) < 3}
    mask = SubnetworkMask.from_dense(dense, rule="drawn", source_hash="0" * 64)
    optimizer = CompactAdamW(model, mask, lr=1e-2)
    masters = [nn.Parameter(p.detach().clone()) for p in model.parameters()]
    twin = torch.optim.AdamW(masters, lr=1e-2)
    bits = [torch.from_numpy(dense[name]) for name in ("drawn", "always")]
    left = []
    for i in range(8):
        gradients = [torch.from_numpy(rng.standard_normal(p.shape, np.float32)) for p in masters]
        alone = i in (2, 3, 6)
        (gradients[0] * model.drawn).sum().backward() if alone else push(model, gradients)
        if i in (4, 6):
            left.append((model.drawn.data, model.drawn.detach().clone()))
            model.drawn.data = model.drawn.detach().clone()
        optimizer.step()
        kept = masters[1].detach().clone()
        state = copy.deepcopy(twin.state.get(masters[1]))
        dense_step(masters, twin, bits, gradients)
        if alone:
            masters[1].data = kept
            twin.state[masters[1]] = state
    for parameter, master in zip(model.parameters(), masters, strict=True):
        torch.testing.assert_close(parameter, master, rtol=0, atol=1e-6)
    assert all(torch.equal(old, then) for old, then in left)


def test_masters_of_weights_that_someone_else_wrote():
    """Where a weight was written since the last step it counts; elsewhere the master goes on as it was."""
    rng = np.random.default_rng(5)
    model = Two((30, 50), torch.bfloat16, rng)
    dense = {"drawn": rng.random((30, 50)) < 0.3, "always": np.arange(5) < 3}
    optimizer = CompactAdamW(model, SubnetworkMask.from_dense(dense, rule="drawn", source_hash="0" * 64), lr=1e-3)
    masters = [nn.Parameter(p.detach().float()) for p in model.parameters()]
    twin = torch.optim.AdamW(masters, lr=1e-3)
    bits = [torch.from_numpy(dense[name]) for name in ("drawn", "always")]
    for i in range(6):
        if i == 3:
            with torch.no_grad():
                model.drawn[:10] = 2.0
                masters[0][:10] = 2.0
        gradients = [torch.from_numpy(rng.standard_normal(p.shape, np.float32)).bfloat16().float() for p in masters]
        push(model, gradients)
        optimizer.step()
        dense_step(masters, twin, bits, gradients)
    (drawn,) = [tensor for tensor in optimizer.tensors if tensor.name == "drawn"]
    expected = masters[0].detach().reshape(-1)[drawn.positions()]
    torch.testing.assert_close(drawn.values.detach(), expected, rtol=0, atol=1e-6)
    assert torch.equal(drawn.weights[drawn.positions()], drawn.values.detach().bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_bit_equal_and_torch_can_go_on(dtype):
    rng = np.random.default_rng(0)
    shape = (30, 70)
    mask = SubnetworkMask.from_dense(
        {"drawn": rng.random(shape) < 0.2, "always": np.arange(5) < 3}, rule="drawn", source_hash="0" * 64
    )
    drawn = [[torch.from_numpy(rng.standard_normal(s, np.float32)) for s in (shape, (5,))] for _ in range(6)]

    def train(model, optimizer, steps):
        for gradients in steps:
            push(model, gradients)
            optimizer.step()

    arguments = {"lr": 1e-2, "weight_decay": 0.1}
    through = Two(shape, dtype, np.random.default_rng(1))
    optimizer = CompactAdamW(through, mask, **arguments)
    train(through, optimizer, drawn[:3])
    at_three, saved = weights(through), copy.deepcopy(optimizer.state_dict())
    train(through, optimizer, drawn[3:])
    for variant in ({}, {"foreach": True, "fused": False}):
        model = Two(shape, dtype, np.random.default_rng(2))
        model.load_state_dict(at_three)
        again = CompactAdamW(model, mask, **arguments, **variant)
        again.load_state_dict({**saved, "param_groups": [{**g, **variant} for g in saved["param_groups"]]})
        train(model, again, drawn[3:])
        for parameter, other in zip(model.parameters(), through.parameters(), strict=True):
            if variant and dtype == torch.float32:
                torch.testing.assert_close(parameter, other, rtol=0, atol=1e-6)
            elif not variant:
                assert torch.equal(parameter, other)


def test_autograd_notices_the_step():
    model = Two((6, 6), torch.float32, np.random.default_rng(0))
    mask = SubnetworkMask.from_dense(
        {"drawn": np.eye(6, dtype=np.bool_), "always": np.zeros(5, np.bool_)}, rule="drawn", source_hash="0" * 64
    )
    optimizer = CompactAdamW(model, mask, lr=1e-2)
    kept = (model.drawn @ model.drawn).sum()
    model.drawn.sum().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()


@pytest.mark.parametrize("variant", [{"amsgrad": True}, {"maximize": True}])
def test_variants_stay_torchs(variant):
    rng = np.random.default_rng(3)
    model = Two((9, 9), torch.float32, rng)
    dense = {"drawn": rng.random((9, 9)) < 0.4, "always": np.arange(5) < 3}
    mask = SubnetworkMask.from_dense(dense, rule="drawn", source_hash="0" * 64)
    optimizer = CompactAdamW(model, mask, lr=1e-2, **variant)
    masters = [nn.Parameter(p.detach().clone()) for p in model.parameters()]
    twin = torch.optim.AdamW(masters, lr=1e-2, **variant)
    for _ in range(4):
        gradients = [torch.from_numpy(rng.standard_normal(p.shape, np.float32)) for p in masters]
        push(model, gradients)
        optimizer.step()
        dense_step(masters, twin, [torch.from_numpy(dense[n]) for n in ("drawn", "always")], gradients)
    for parameter, master in zip(model.parameters(), masters, strict=True):
        torch.testing.assert_close(parameter, master, rtol=0, atol=1e-6)
