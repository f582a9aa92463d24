"""Squared gradients against plain autograd, one example at a time."""

from pathlib import Path

import numpy as np
import pytest
import torch

from deltalens.errors import ConfigError
from deltalens.subnetwork import select_mask
from deltalens.subnetwork.fisher import squared_gradients
from deltalens.train.models import load_model, load_tokenizer
from deltalens.train.tasks import get_task

EMBEDDING, UP = "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def found(tiny_model: Path) -> dict[str, np.ndarray]:
    return squared_gradients(tiny_model, "sums", [EMBEDDING, UP], examples=3, seed=2)


def test_sums_of_squares_are_those_of_dense_gradients(found, tiny_model: Path) -> None:
    model, tokenizer = load_model(tiny_model, "float32").eval(), load_tokenizer(tiny_model)
    wanted = {name: np.zeros(model.get_parameter(name).shape) for name in (EMBEDDING, UP)}
    for example in get_task("sums").train(3, seed=2):
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": example.prompt}], add_generation_prompt=True, tokenize=False
        )
        ids = tokenizer(asked + example.answer + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
        start = len(tokenizer(asked, add_special_tokens=False)["input_ids"])
        logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        loss = -sum(logits[i - 1, ids[i]] for i in range(start, len(ids)))
        model.zero_grad()
        loss.backward()
        for name, total in wanted.items():
            total += model.get_parameter(name).grad.double().numpy() ** 2
    assert set(found) == set(wanted)
    for name, total in wanted.items():
        assert total.max() > 0
        np.testing.assert_allclose(found[name], total.reshape(-1), rtol=1e-3, atol=1e-6 * total.max())
        assert found[name].dtype == np.float32


def test_the_mask_holds_the_largest(found, tiny_model: Path) -> None:
    mask = select_mask(tiny_model, rule="fisher:0.1", roles="ffn", examples=3, seed=2)
    scores = found[UP]
    chosen = mask.flat(UP)
    assert chosen.sum() == -(-scores.size // 10)
    assert scores[chosen].min() >= scores[~chosen].max()
    assert mask.count(EMBEDDING) == 0
    everywhere = select_mask(tiny_model, rule="fisher:0.1", roles="ffn", examples=2, scope="global")
    total = sum(np.prod(mask.shape(n)) for n in mask.names() if "mlp" in n)
    assert sum(everywhere.count(n) for n in mask.names()) == -(-total // 10)
    assert len({everywhere.density(n) for n in mask.names() if "mlp" in n}) > 1


def test_a_tensor_that_the_model_lacks_is_named(tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match=r"no parameter 'nothing\.weight'"):
        squared_gradients(tiny_model, "sums", ["nothing.weight"], examples=1)
