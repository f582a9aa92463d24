"""Every compact optimizer against torch's dense one on masked gradients (Lion against a naive float64 twin)."""

import numpy as np
import pytest
import torch
from compact_fixtures import (
    STEPS,
    batch,
    compact_training,
    dense_training,
    loss_of,
    off_mask_is_untouched,
    on_mask_has_moved,
    random_mask,
    small,
    weights,
)

from deltalens import SubnetworkMask
from deltalens.errors import ConfigError
from deltalens.subnetwork.optimizers import (
    CompactAdamW,
    CompactAdamWNoMomentum,
    CompactLion,
    CompactRMSprop,
    CompactSGD,
    CompactSGDMomentum,
    Lion,
    WholeMatrixMuon,
)

PAIRS = {
    "adamw": (CompactAdamW, torch.optim.AdamW, {"lr": 3e-3, "weight_decay": 0.1}, {}),
    "adamw-foreach": (CompactAdamW, torch.optim.AdamW, {"lr": 3e-3, "weight_decay": 0.1, "foreach": True}, {}),
    "adamw-no-momentum": (
        CompactAdamWNoMomentum,
        torch.optim.AdamW,
        {"lr": 3e-3, "weight_decay": 0.1},
        {"betas": (0.0, 0.999)},
    ),
    "sgd": (CompactSGD, torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.01}, {}),
    # Not 0.1: at the largest density one gradient nearly vanished, and its norm was the rounding of what cancelled.
    "momentum": (CompactSGDMomentum, torch.optim.SGD, {"lr": 0.05, "weight_decay": 0.01}, {"momentum": 0.9}),
    "nesterov": (CompactSGDMomentum, torch.optim.SGD, {"lr": 0.1, "nesterov": True}, {"momentum": 0.9}),
    "rmsprop": (CompactRMSprop, torch.optim.RMSprop, {"lr": 1e-3, "weight_decay": 0.01}, {}),
}


@pytest.mark.parametrize(("dtype", "rtol", "atol"), [(torch.float32, 1e-5, 1e-6), (torch.float64, 1e-12, 1e-14)])
@pytest.mark.parametrize("density", [0.03, 0.175, 0.8])
@pytest.mark.parametrize("name", PAIRS)
def test_equals_torch(name, density, dtype, rtol, atol):
    ours, theirs, settings, only_theirs = PAIRS[name]
    dense, compact = small(dtype=dtype), small(dtype=dtype)
    mask, start = random_mask(dense, density), weights(dense)
    norms = dense_training(dense, mask, lambda p: theirs(p, **settings, **only_theirs))
    optimizer = ours(compact, mask, max_grad_norm=0.3, **settings)
    got = compact_training(compact, optimizer)
    np.testing.assert_allclose(got, norms, rtol=rtol)
    assert min(norms[:3]) > 0.3  # clipping was at work
    for (tensor, parameter), twin in zip(compact.named_parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(parameter, twin, rtol=0, atol=atol, msg=lambda m, t=tensor: f"{t}: {m}")
    assert off_mask_is_untouched(compact, start, mask)
    assert on_mask_has_moved(compact, start, mask) > 0.9


@pytest.mark.parametrize("density", [0.03, 0.5])
def test_lion_equals_a_naive_twin(density):
    lr, (beta1, beta2), decay = 1e-3, (0.9, 0.99), 0.1
    model, twin = small(), small(dtype=torch.float64)
    twin.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    mask, start = random_mask(model, density), weights(model)
    momenta = {name: torch.zeros_like(p) for name, p in twin.named_parameters()}
    optimizer = CompactLion(model, mask, lr=lr, betas=(beta1, beta2), weight_decay=decay)
    # Gradients are drawn, not computed: the sign of one near zero would depend on the model's rounding.
    generator = torch.Generator().manual_seed(5)
    for _ in range(STEPS):
        loss = 0.0
        for name, parameter in model.named_parameters():
            gradient = torch.randn(parameter.shape, generator=generator)
            loss = loss + (gradient * parameter).sum()
            old = twin.get_parameter(name).detach().numpy()
            m, g = momenta[name].numpy(), gradient.double().numpy()
            new = old - lr * (np.sign(beta1 * m + (1 - beta1) * g) + decay * old)
            momenta[name] = torch.from_numpy(beta2 * m + (1 - beta2) * g)
            twin.get_parameter(name).data = torch.from_numpy(np.where(mask.dense(name), new, old))
        loss.backward()
        optimizer.step()
    for (_, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter.double(), other, rtol=0, atol=1e-6)
    assert off_mask_is_untouched(model, start, mask)
    assert on_mask_has_moved(model, start, mask) == 1


def test_lion_refuses():
    with pytest.raises(ConfigError, match="betas"):
        Lion([torch.zeros(1, requires_grad=True)], betas=(0.9, 1.0))


def whole(model, names):
    dense = {n: np.full(tuple(p.shape), n in names, np.bool_) for n, p in model.named_parameters()}
    return SubnetworkMask.from_dense(dense, rule="whole", source_hash="0" * 64)


def test_muon_on_whole_matrices():
    dense, compact = small(), small()
    names = {"up.weight", "down.weight"}
    for name, parameter in dense.named_parameters():
        parameter.requires_grad_(name in names)
    theirs = torch.optim.Muon([p for p in dense.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    ours = WholeMatrixMuon(compact, whole(compact, names), lr=0.01, weight_decay=0.1)
    for step in range(20):
        loss_of(dense, batch(step)).backward()
        theirs.step()
        theirs.zero_grad()
        loss_of(compact, batch(step)).backward()
        ours.step()
    for parameter, twin in zip(compact.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(parameter, twin, rtol=0, atol=1e-6)
    saved = ours.state_dict()
    again = WholeMatrixMuon(compact, whole(compact, names), lr=0.01, weight_decay=0.1)
    again.load_state_dict(saved)
    assert again.state[again.tensors[0].values]["momentum_buffer"].shape == (17, 6)


@pytest.mark.parametrize("names", [{"up.bias"}, {"up.weight"}])
def test_muon_refuses_parts(names):
    model = small()
    mask = whole(model, names) if "up.bias" in names else random_mask(model, 0.3)
    with pytest.raises(ConfigError, match="whole matrices"):
        WholeMatrixMuon(model, mask)
