"""`project:K`: gradients in the right subspace of an early update."""

import numpy as np
import pytest
import torch
from compact_fixtures import batch, loss_of, small, weights

from deltalens.errors import CheckpointError, ConfigError
from deltalens.subnetwork.optimizers import CompactAdamW, CompactSGD
from deltalens.subnetwork.projection import Projection


def pair(write_checkpoint, early):
    rng = np.random.default_rng(0)
    source = {name: rng.standard_normal(values.shape).astype(np.float32) for name, values in early.items()}
    return write_checkpoint(source), write_checkpoint({name: source[name] + early[name] for name in early})


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6), (9, 2)])
def test_directions_are_the_svds(write_checkpoint, shape):
    delta = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    found = Projection.from_update(*pair(write_checkpoint, {"w": delta, "bias": delta[0]}), 2)
    assert found.names() == ["w"]
    assert found.count("w") == delta.size
    _, _, right = np.linalg.svd(delta.astype(np.float64))
    expected = right[:2].T
    basis = found.basis("w")
    np.testing.assert_allclose(basis @ basis.T, expected @ expected.T, atol=1e-4)


def test_no_more_directions_than_the_update_has(write_checkpoint):
    rank_one = np.outer(np.arange(1, 7), [1, 2, 0, -1]).astype(np.float32) * 2.0**-6
    still = np.zeros((3, 3), np.float32)
    rng = np.random.default_rng(0)
    source = {"w": np.round(rng.standard_normal((6, 4)) * 64).astype(np.float32) / 64, "still": still}
    early = {"w": source["w"] + rank_one, "still": still}
    found = Projection.from_update(write_checkpoint(source), write_checkpoint(early), 3)
    assert found.names() == ["w"]
    assert found.basis("w").shape == (4, 1)


def test_gradients_are_projected_and_a_full_basis_changes_nothing():
    model, twin = small(), small()
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((6, 2)))[0]
    names = {"up.weight": (17, 6), "down.weight": (6, 17)}
    bases = {"up.weight": basis, "down.weight": np.linalg.qr(rng.standard_normal((17, 17)))[0]}
    before = weights(model)
    optimizer = CompactSGD(model, Projection(names, bases, rule="project:2"), lr=0.5)
    for part in range(2):
        (loss_of(model, batch(part)) / 2).backward()
        (loss_of(twin, batch(part)) / 2).backward()
    optimizer.step()
    projector = torch.from_numpy(basis @ basis.T).float()
    expected = before["up.weight"] - 0.5 * twin.up.weight.grad @ projector
    torch.testing.assert_close(model.up.weight.detach(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        model.down.weight.detach(), before["down.weight"] - 0.5 * twin.down.weight.grad, rtol=0, atol=1e-6
    )
    assert torch.equal(model.embed.weight, before["embed.weight"])
    assert optimizer.held_bytes()["indices"] == 4 * (6 * 2 + 17 * 17)


def test_state_carries_over():
    model = small()
    projection = Projection({"up.weight": (17, 6)}, {"up.weight": np.eye(6, 2)}, rule="project:2")
    optimizer = CompactAdamW(model, projection, lr=1e-2)
    loss_of(model, batch(0)).backward()
    optimizer.step()
    moment = optimizer.state[optimizer.tensors[0].values]["exp_avg"]
    assert not moment[:, 2:].any()
    again = CompactAdamW(model, projection)
    again.load_state_dict(optimizer.state_dict())
    assert torch.equal(again.state[again.tensors[0].values]["exp_avg"], moment)


def test_refuses(write_checkpoint):
    source, early = pair(write_checkpoint, {"w": np.zeros((3, 4), np.float32)})
    with pytest.raises(CheckpointError, match="no matrix differs"):
        Projection.from_update(source, early, 1)
    other = write_checkpoint({"w": np.zeros((4, 3), np.float32)})
    with pytest.raises(CheckpointError, match="'w'"):
        Projection.from_update(source, other, 1)
    with pytest.raises(ConfigError, match="positive"):
        Projection.from_update(source, early, 0)
