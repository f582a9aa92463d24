"""Squared gradients of a task's answers: the diagonal of the empirical Fisher information, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np

from deltalens.errors import ConfigError

__all__ = ["squared_gradients"]


def squared_gradients(
    source: str | Path,
    task: str,
    wanted: Collection[str],
    *,
    examples: int = 64,
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, np.ndarray]:
    """Σ over examples of (∂ −log p(answer | prompt) / ∂w)², for each weight of the tensors asked for.

    One example a backward pass, since the square of a batch's gradient is not the sum of the squares. A hook squares
    each gradient as soon as it is whole and frees it, so that memory holds the float32 model, the float32 sums, and
    one tensor's gradient. Weights are read in float32, on the CPU.

    Args:
        source: a model folder or Hub id with a chat template.
        task: name of a task (`deltalens.train.tasks`); its training examples are used, never the held-out ones.
        wanted: names of the tensors.
        examples: how many examples.
        seed: of the examples' order.
        progress: called after each example with how many are done, how many in all, and "".

    Returns:
        name → float32 array, flat, row-major.

    Raises:
        ConfigError: the model cannot be loaded, the task is unknown, or the model has no parameter of that name.
    """
    from deltalens.train.models import load_model, load_tokenizer, quiet_libraries, resolve_model
    from deltalens.train.tasks import get_task

    problems = get_task(task).train(examples, seed)
    with quiet_libraries():
        folder = resolve_model(source)
        tokenizer, model = load_tokenizer(folder), load_model(folder, "float32")
        model.eval()
        sums = _watch(model, wanted, folder)
        for done, problem in enumerate(problems, 1):
            _loss(model, tokenizer, problem.prompt, problem.answer).backward()
            if progress is not None:
                progress(done, examples, "")
    return {name: total.numpy().reshape(-1) for name, total in sums.items()}


def _watch(model: Any, wanted: Collection[str], folder: Path) -> dict[str, Any]:
    """Zeroed sums, to which each backward pass adds the squared gradients; other parameters ask for no gradient."""
    import torch

    sums: dict[str, Any] = {}
    for name, parameter in model.named_parameters():  # a tied weight comes once
        parameter.requires_grad_(name in wanted)
        if name not in wanted:
            continue
        total = sums[name] = torch.zeros_like(parameter, requires_grad=False)

        def square(parameter: Any, total: Any = total) -> None:
            total.addcmul_(parameter.grad, parameter.grad)
            parameter.grad = None

        parameter.register_post_accumulate_grad_hook(square)
    if missing := next((name for name in wanted if name not in sums), None):
        raise ConfigError(
            f"{folder}: the loaded model has no parameter {missing!r}, so that fisher has no gradient for it; leave it "
            "out by --roles or --layers, or save the checkpoint with transformers first"
        )
    return sums


def _loss(model: Any, tokenizer: Any, prompt: str, answer: str) -> Any:
    """−log p(answer and end of turn | prompt), summed over tokens."""
    import torch

    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"]
    reply = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    logits = model(input_ids=torch.tensor([asked + reply])).logits[0, len(asked) - 1 : -1]
    return torch.nn.functional.cross_entropy(logits.float(), torch.tensor(reply), reduction="sum")
