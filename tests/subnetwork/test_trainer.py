"""Masked training through the Hugging Face Trainer: clipping, norm, saving, resuming, a change of the mask."""

import numpy as np
import pytest
import torch
from compact_fixtures import off_mask_is_untouched, on_mask_has_moved, weights
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from deltalens import SubnetworkMask
from deltalens.errors import ConfigError
from deltalens.subnetwork.callback import SubnetworkCallback, discover_visible
from deltalens.subnetwork.optimizers import CompactAdamW, CompactSGD

STEPS = 6


def load(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def rows(count=48):
    tokens = np.random.default_rng(0).integers(3, 200, (count, 12))
    return [{"input_ids": row, "labels": row} for row in torch.from_numpy(tokens)]


def mask_for(model, density=0.3, seed=0):
    rng = np.random.default_rng(seed)
    dense = {
        name: (rng.random(tuple(p.shape)) < density) & ("layers.0" not in name) for name, p in model.named_parameters()
    }
    return SubnetworkMask.from_dense(dense, rule="random", source_hash="0" * 64)


def arguments(folder, **changes):
    return TrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": STEPS,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
            "weight_decay": 0.1,
            "max_grad_norm": 0.5,
            "logging_steps": 1,
            "save_steps": 3,
            "save_strategy": "steps",
            "report_to": [],
            "use_cpu": True,
            "dataloader_pin_memory": False,
            "disable_tqdm": True,
            "seed": 0,
        }
        | changes
    )


def norms_of(trainer):
    return [record["grad_norm"] for record in trainer.state.log_history if "grad_norm" in record]


class DenseMasked(Trainer):
    """The paper's way in the Trainer: masked gradients, restored coordinates."""

    bits: dict
    start: dict

    def training_step(self, model, *args, **kwargs):
        loss = super().training_step(model, *args, **kwargs)
        for name, parameter in model.named_parameters():
            parameter.grad.mul_(self.bits[name])
        return loss

    def create_optimizer(self, model=None):
        optimizer = super().create_optimizer(model)
        optimizer.register_step_post_hook(lambda *_: self.restore())
        return optimizer

    @torch.no_grad()
    def restore(self):
        for name, parameter in self.model.named_parameters():
            parameter.copy_(torch.where(self.bits[name], parameter, self.start[name]))


def test_callback_equals_the_dense_way(tiny_model, tmp_path):
    model, twin = load(tiny_model), load(tiny_model)
    mask, start = mask_for(model), weights(model)
    callback = SubnetworkCallback(mask)
    trainer = Trainer(model, arguments(tmp_path / "a"), train_dataset=rows(), callbacks=[callback])
    trainer.train()
    assert isinstance(callback.optimizer, CompactAdamW)
    dense = DenseMasked(twin, arguments(tmp_path / "b"), train_dataset=rows())
    dense.bits = {name: torch.from_numpy(mask.dense(name)) for name in mask.names()}
    dense.start = start
    dense.train()
    assert min(norms_of(dense)) > 0.5  # clipping was at work
    np.testing.assert_allclose(norms_of(trainer), norms_of(dense), rtol=1e-4)
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=0, atol=1e-5, msg=name)
    assert off_mask_is_untouched(model, start, mask)
    assert on_mask_has_moved(model, start, mask) > 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_bit_equal(tiny_model, tmp_path, dtype):
    def run(folder, model, resume=None, **changes):
        trainer = Trainer(
            model,
            arguments(folder, **changes),
            train_dataset=rows(),
            callbacks=[SubnetworkCallback(mask_for(model))],
        )
        trainer.train(resume_from_checkpoint=resume)
        return model

    whole = run(tmp_path / "whole", load(tiny_model, dtype))
    resumed = run(tmp_path / "again", load(tiny_model, dtype), resume=str(tmp_path / "whole" / "checkpoint-3"))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_a_given_optimizer_with_and_without_the_callback(tiny_model, tmp_path):
    models = load(tiny_model), load(tiny_model)
    norms = []
    for number, model in enumerate(models):
        optimizer = CompactSGD(model, mask_for(model), lr=0.1, max_grad_norm=0.5 if number else None)
        trainer = Trainer(
            model,
            arguments(tmp_path / f"{number}", weight_decay=0.0),
            train_dataset=rows(),
            optimizers=(optimizer, None),
            callbacks=[] if number else [SubnetworkCallback()],
        )
        trainer.train()
        norms.append(norms_of(trainer))
    assert min(norms[0]) > 0.5  # logged from the compact gradients, before clipping
    for parameter, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=0, atol=1e-6)


def test_native_optimizer_class(tiny_model, tmp_path):
    model = load(tiny_model)
    mask, start = mask_for(model), weights(model)
    Trainer(
        model,
        arguments(tmp_path, max_steps=2, save_strategy="no"),
        train_dataset=rows(),
        optimizer_cls_and_kwargs=(CompactAdamW, {"model": model, "mask": mask, "lr": 1e-2, "max_grad_norm": 0.5}),
        callbacks=[SubnetworkCallback()],
    ).train()
    assert off_mask_is_untouched(model, start, mask)
    assert on_mask_has_moved(model, start, mask) > 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_discover_then_go_on_masked(tiny_model, tmp_path, dtype):
    def run(folder, resume=None):
        model = load(tiny_model, dtype)
        everything = mask_for(model, density=1.1)
        callback = SubnetworkCallback(
            everything, CompactSGD, after=2, then=discover_visible(tiny_model, threshold=4e-3), lr=1.0
        )
        states = {}
        trainer = Trainer(model, arguments(folder, save_steps=2), train_dataset=rows(), callbacks=[callback])
        if resume is not None:
            (folder / "subnetwork.safetensors").write_bytes((resume.parent / "subnetwork.safetensors").read_bytes())
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        states["counts"] = {tensor.name: tensor.count for tensor in callback.optimizer.tensors}
        return model, states

    model, states = run(tmp_path / "a")
    found = SubnetworkMask.load(tmp_path / "a" / "subnetwork.safetensors", source=tiny_model)
    assert 0 < found.total_density() < 0.9
    assert states["counts"] == {name: found.count(name) for name in found.names() if found.count(name)}
    at_change = dict(load(tmp_path / "a" / "checkpoint-2", dtype).named_parameters())
    assert off_mask_is_untouched(model, at_change, found)
    assert on_mask_has_moved(model, at_change, found) > 0.1
    (tmp_path / "b").mkdir()
    again, _ = run(tmp_path / "b", resume=tmp_path / "a" / "checkpoint-4")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_refuses(tiny_model, tmp_path):
    model = load(tiny_model)
    with pytest.raises(ConfigError, match="after"):
        SubnetworkCallback(mask_for(model), after=3)
    with pytest.raises(ConfigError, match="constructor"):
        SubnetworkCallback(mask_for(model)).on_init_end(None, None, None)
    trainer = Trainer(model, arguments(tmp_path), train_dataset=rows(), callbacks=[SubnetworkCallback()])
    with pytest.raises(ConfigError, match="trains everything"):
        trainer.train()
    trainer = Trainer(
        model,
        arguments(tmp_path),
        train_dataset=rows(),
        optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None),
        callbacks=[SubnetworkCallback(mask_for(model))],
    )
    with pytest.raises(ConfigError, match="trains everything"):
        trainer.train()
