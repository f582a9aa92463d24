"""Hooks, buffers, masters, saved state and changes of the mask."""

import copy
import io
from unittest import mock

import numpy as np
import pytest
import torch
from compact_fixtures import (
    batch,
    compact_training,
    loss_of,
    off_mask_is_untouched,
    on_mask_has_moved,
    random_mask,
    small,
    weights,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deltalens import SubnetworkMask
from deltalens.errors import ConfigError
from deltalens.subnetwork import compact
from deltalens.subnetwork.optimizers import CompactAdamW, CompactRMSprop, CompactSGD, CompactSGDMomentum


def mask_of(**bits):
    dense = {name.replace("__", "."): np.asarray(value, np.bool_) for name, value in bits.items()}
    return SubnetworkMask.from_dense(dense, rule="test", source_hash="0" * 64)


@pytest.mark.parametrize("threads", [1, 2])
def test_dense_gradients_are_freed_and_empty_tensors_ask_for_none(threads):
    """At once on one thread; on more some wait for the others, but no more than a few bytes."""
    model = small()
    mask = random_mask(model, 0.2)
    optimizer = CompactAdamW(model, mask)
    alive, waiting = [], []
    compact_bytes = 4 * sum(mask.count(name) for name in mask.names())

    def look(_):  # runs after ours
        alive.append(sum(p.grad is not None for p in model.parameters()))
        waiting.append(optimizer.held_bytes()["gradients"] - compact_bytes)

    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (mask.count(name) > 0)
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(look)
    with mock.patch.object(compact, "TOGETHER", 500), mock.patch.object(torch, "get_num_threads", return_value=threads):
        loss_of(model, batch(0)).backward()
        assert len(alive) == sum(mask.count(name) > 0 for name in mask.names())
        assert not any(alive)
        assert all(0 <= size < 500 for size in waiting)
        assert any(waiting) == (threads > 1)
        optimizer.clip_grad_norm(1.0)
        assert optimizer.held_bytes()["gradients"] == compact_bytes


@pytest.mark.parametrize("together", [1, 500, 1 << 30])
def test_gradients_that_wait_are_those_that_do_not(together):
    """Accumulated over backward passes, so that a tensor's second gradient comes while its first one waits."""
    norms = []
    for threads in (1, 2):
        model = small()
        optimizer = CompactAdamW(model, random_mask(model, 0.2), lr=1e-2)
        lend = mock.patch.object(torch, "get_num_threads", return_value=threads)
        with lend, mock.patch.object(compact, "TOGETHER", together):
            loss_of(model, batch(3)).backward()
            optimizer.zero_grad()  # forgets those that wait, too
            for i in range(3):
                loss_of(model, batch(i)).backward()
            norms.append(optimizer.clip_grad_norm(1.0))
            optimizer.step()
            norms.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    assert torch.equal(norms[0], norms[2])
    assert torch.equal(norms[1], norms[3])


def test_the_mask_stays_while_gradients_wait():
    model = nn.Linear(20, 20, bias=False)
    masks = [mask_of(weight=np.random.default_rng(i).random((20, 20)) < 0.3) for i in range(2)]
    optimizer = CompactAdamW(model, masks[0])
    with mock.patch.object(torch, "get_num_threads", return_value=2):
        model.weight.square().sum().backward()
        assert optimizer._waiting
        with pytest.raises(ConfigError, match="after a step"):
            optimizer.change_mask(masks[1])
        optimizer.step()
        optimizer.change_mask(masks[1])


def test_detach_gives_the_gradients_back():
    model = small()
    optimizer = CompactAdamW(model, random_mask(model, 0.2))
    optimizer.detach()
    loss_of(model, batch(0)).backward()
    assert model.up.weight.grad is not None


@settings(max_examples=30, deadline=None)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    density=st.floats(0, 1),
    seed=st.integers(0, 2**16),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
)
def test_one_sgd_step_by_hand(shape, density, seed, dtype):
    rng = np.random.default_rng(seed)
    bits = rng.random(shape) < density
    bits.reshape(-1)[rng.integers(bits.size)] = True
    model = nn.Module()
    model.w = nn.Parameter(torch.from_numpy(rng.standard_normal(shape)).to(dtype))
    before = model.w.detach().clone()
    gradients = [torch.from_numpy(rng.standard_normal(shape)).to(dtype) for _ in range(2)]
    optimizer = CompactSGD(model, mask_of(w=bits), lr=0.5)
    for gradient in gradients:
        (model.w * gradient).sum().backward()
    optimizer.step()
    wide = torch.promote_types(dtype, torch.float32)
    expected = (before.to(wide) - 0.5 * sum(gradient.to(wide) for gradient in gradients)).to(dtype)
    on = torch.from_numpy(bits)
    torch.testing.assert_close(model.w.detach()[on], expected[on], rtol=1e-6, atol=1e-7)
    assert torch.equal(model.w.detach()[~on], before[~on])


def test_non_contiguous_gradients():
    model = nn.Module()
    model.w = nn.Parameter(torch.zeros(3, 4))
    given_gradient = torch.arange(12.0).view(4, 3)
    bits = np.eye(3, 4, dtype=np.bool_)
    optimizer = CompactSGD(model, mask_of(w=bits), lr=1.0)
    (model.w.T * given_gradient).sum().backward()
    optimizer.step()
    torch.testing.assert_close(model.w.detach(), -given_gradient.T * torch.from_numpy(bits))


def test_masters_carry_what_bf16_cannot():
    model = small(dtype=torch.bfloat16)
    single = small(dtype=torch.bfloat16).float()
    mask, start = random_mask(model, 0.3), weights(model)
    optimizer = CompactSGD(model, mask, lr=1e-4, weight_decay=0.1)
    twin = CompactSGD(single, mask, lr=1e-4, weight_decay=0.1)
    for step in range(40):
        gradients = [torch.randn(p.shape, generator=torch.Generator().manual_seed(step)) for p in model.parameters()]
        for other in (model, single):
            loss = sum((p.float() * g).sum() for p, g in zip(other.parameters(), gradients, strict=True))
            loss.backward()
        optimizer.step(), twin.step()
    for parameter, exact in zip(model.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(parameter.float(), exact.bfloat16().float(), rtol=0, atol=4e-3)
    masters = {tensor.name: tensor.values for tensor in optimizer.tensors}
    assert masters["up.weight"].dtype == torch.float32
    assert masters["up.weight"].numel() == mask.count("up.weight")
    exact = single.up.weight.detach()[torch.from_numpy(mask.dense("up.weight"))]
    torch.testing.assert_close(masters["up.weight"].detach(), exact, rtol=0, atol=2e-6)
    assert off_mask_is_untouched(model, start, mask)
    assert optimizer.held_bytes()["masters"] == 4 * sum(tensor.count for tensor in optimizer.tensors)


def test_weights_loaded_after_the_optimizer_was_made_are_seen():
    model, other = small(dtype=torch.bfloat16), small(seed=9, dtype=torch.bfloat16)
    optimizer = CompactSGD(model, random_mask(model, 0.5), lr=0.0)
    model.load_state_dict(other.state_dict())
    loss_of(model, batch(0)).backward()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_others_write_between_steps_count(dtype):
    model = nn.Module()
    model.w = nn.Parameter(torch.ones(4, dtype=dtype))
    optimizer = CompactSGD(model, mask_of(w=[1, 1, 1, 0]), lr=2.0**-12)

    def step():
        model.w.float().sum().backward()
        optimizer.step()

    step()
    with torch.no_grad():
        model.w[1] = 5.0
    step()
    values = optimizer.tensors[0].values.detach()
    assert torch.equal(values, torch.tensor([1 - 2.0**-11, 5 - 2.0**-12, 1 - 2.0**-11]))
    assert torch.equal(model.w.detach()[:3], values.to(dtype))
    assert model.w[3] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [CompactAdamW, CompactSGDMomentum, CompactRMSprop])
def test_resume_is_bit_equal(kind, dtype):
    model = small(dtype=dtype)
    mask = random_mask(model, 0.3)
    optimizer = kind(model, mask, lr=1e-2, weight_decay=0.1, max_grad_norm=0.5)
    compact_training(model, optimizer, steps=8)
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "model": model.state_dict()}, file)
    compact_training(model, optimizer, steps=range(8, 14))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = small(seed=3, dtype=dtype)
    again.load_state_dict(saved["model"])
    resumed = kind(again, mask, lr=1.0, max_grad_norm=0.5)
    resumed.load_state_dict(saved["optimizer"])
    assert resumed.param_groups[0]["lr"] == 1e-2
    compact_training(again, resumed, steps=range(8, 14))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_change_of_the_mask_keeps_the_state_of_kept_coordinates(dtype):
    model = small(dtype=dtype)
    first, second = random_mask(model, 0.5, seed=1), random_mask(model, 0.4, seed=2, without="up.bias")
    optimizer = CompactAdamW(model, first, lr=1e-2)
    compact_training(model, optimizer, steps=5)
    key = {tensor.name: tensor for tensor in optimizer.tensors}
    moments, masters = {}, {}
    for name, tensor in key.items():
        dense = torch.zeros(tensor.size)
        dense[tensor.positions()] = optimizer.state[tensor.values]["exp_avg"].reshape(-1)
        moments[name] = dense
        if tensor.has_master:
            kept = tensor.weights.float()
            kept[tensor.positions()] = tensor.values.detach().reshape(-1)
            masters[name] = kept
    before = weights(model)
    optimizer.change_mask(second)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.values(), strict=True))
    after = {tensor.name: tensor for tensor in optimizer.tensors}
    assert after.keys() == {name for name in second.names() if second.count(name)}
    for name, tensor in after.items():
        assert torch.equal(tensor.positions(), torch.from_numpy(second.indices(name)))
        if name in moments:
            got = optimizer.state[tensor.values]["exp_avg"].reshape(-1)
            torch.testing.assert_close(got, moments[name][tensor.positions()], rtol=0, atol=0)
        if name in masters:
            assert torch.equal(tensor.values.detach().reshape(-1), masters[name][tensor.positions()])
    assert not model.up.bias.requires_grad
    assert model.frozen.weight.requires_grad
    compact_training(model, optimizer, steps=5)
    assert off_mask_is_untouched(model, before, second)
    assert on_mask_has_moved(model, before, second) > 0.3


def test_narrowing_equals_dense_masking_from_there():
    """All coordinates for five steps, a mask for five more: as the dense twin that starts masking at step five."""
    model, twin = small(), small()
    everything = random_mask(model, 1.0, without="")
    mask = random_mask(model, 0.3, seed=4)
    optimizer = CompactAdamW(model, everything, lr=1e-2, weight_decay=0.1)
    dense = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(10):
        if step == 5:
            optimizer.change_mask(mask)
            held = weights(twin)
        loss_of(model, batch(step)).backward()
        optimizer.step()
        dense.zero_grad()
        loss_of(twin, batch(step)).backward()
        dense.step()
        if step >= 5:
            with torch.no_grad():
                for name, parameter in twin.named_parameters():
                    parameter.copy_(torch.where(torch.from_numpy(mask.dense(name)), parameter, held[name]))
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=0, atol=1e-6)


def test_a_mask_does_not_change_amid_an_accumulation():
    model = small()
    optimizer = CompactAdamW(model, random_mask(model, 0.5))
    loss_of(model, batch(0)).backward()
    with pytest.raises(ConfigError, match="after a step"):
        optimizer.change_mask(random_mask(model, 0.2))
    optimizer.zero_grad()
    optimizer.change_mask(random_mask(model, 0.2))


def test_unused_parameters_stay_and_keep_their_state():
    model = small()
    optimizer = CompactAdamW(model, random_mask(model, 0.5), lr=0.1, weight_decay=0.5)
    compact_training(model, optimizer, steps=2)
    before = copy.deepcopy(model.up.weight.detach())
    model.embed.weight.square().sum().backward()
    optimizer.step()
    assert torch.equal(model.up.weight, before)


def test_no_decay_and_schedulers():
    model = small()
    mask = random_mask(model, 0.5)
    optimizer = CompactSGD(model, mask, lr=0.1, weight_decay=1.0, no_decay=["up.weight"])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    before = weights(model)
    (sum(p.sum() for p in model.parameters()) * 0).backward()
    optimizer.step()
    scheduler.step()
    assert torch.equal(model.up.weight, before["up.weight"])
    on = torch.from_numpy(mask.dense("embed.weight"))
    torch.testing.assert_close(model.embed.weight.detach()[on], 0.9 * before["embed.weight"][on])
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.05]


def test_closure_and_step_hooks_run_once():
    model = small()
    torch.optim.SGD([nn.Parameter(torch.zeros(1))])  # torch then wraps SGD.step too
    optimizer = CompactSGD(model, random_mask(model, 0.5), lr=0.1)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))

    def closure():
        loss = loss_of(model, batch(0))
        loss.backward()
        return loss

    first = optimizer.step(closure)
    second = optimizer.step(closure)
    assert second < first
    assert len(calls) == 2


def test_names_of_tied_and_wrapped_parameters():
    model = small()
    model.head = nn.Linear(6, 11, bias=False)
    model.head.weight = model.embed.weight
    bits = np.ones((11, 6), np.bool_)
    wrapped = nn.Sequential()
    wrapped.module = model
    assert [t.name for t in CompactSGD(wrapped, mask_of(head__weight=bits)).tensors] == ["head.weight"]
    assert [t.name for t in CompactSGD(model, mask_of(model__language_model__up__bias=np.ones(17))).tensors] == [
        "model.language_model.up.bias"
    ]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (mask_of(up__weight=np.zeros((17, 6))), "selects no coordinate"),
        (mask_of(other__weight=np.ones((17, 6))), r"other\.weight: .*no such parameter"),
        (mask_of(up__weight=np.ones((6, 17))), r"up\.weight: .*shape"),
    ],
)
def test_refuses_what_does_not_fit(mask, message):
    with pytest.raises(ConfigError, match=message):
        CompactAdamW(small(), mask)


def test_refuses_another_optimizers_state():
    model = small()
    optimizer = CompactAdamW(model, random_mask(model, 0.5))
    with pytest.raises(ConfigError, match="another optimizer"):
        optimizer.load_state_dict(torch.optim.AdamW(model.parameters()).state_dict())


def test_diagnostics():
    model = small()
    mask = random_mask(model, 0.5)
    optimizer = CompactAdamW(model, mask, lr=1e-3)
    loss_of(model, batch(0)).backward()
    assert optimizer.diagnostics() == {"momentum_gradient_cosine": None, "rms_variation": None}
    optimizer.step()
    loss_of(model, batch(1)).backward()
    told = optimizer.diagnostics()
    states = [(optimizer.state[t.values], t.grad.reshape(-1)) for t in optimizer.tensors]
    m = torch.cat([state["exp_avg"].reshape(-1) for state, _ in states]).double()
    g = torch.cat([grad for _, grad in states]).double()
    roots = torch.cat([state["exp_avg_sq"].reshape(-1) for state, _ in states]).double().sqrt()
    assert told["momentum_gradient_cosine"] == pytest.approx(float(m @ g / (m.norm() * g.norm())), rel=1e-4)
    assert told["rms_variation"] == pytest.approx(float(roots.std(correction=0) / roots.mean()), rel=1e-4)
