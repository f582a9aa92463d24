"""How well a model does at a task: mean@k and pass@k with intervals, and the generations to look at."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from deltalens.errors import ConfigError
from deltalens.files import whole_file
from deltalens.train.models import load_for_generation, load_processor, quiet_libraries, resolve_model, sees_images
from deltalens.train.statistics import mean_at_k, pass_at_k
from deltalens.train.tasks import Example, Task, get_task, reply_limit

__all__ = ["Accuracy", "Evaluation", "Generation", "evaluate", "generate"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """A share of right answers and its 95 % interval, as fractions."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.1%} ({self.low:.1%} to {self.high:.1%})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One reply. `problem` and `sample` count from 0; `tokens` counts the reply's tokens, its end included;
    `truncated`: it was cut at the limit; `images`: the paths of the example's images, empty for those without one."""

    problem: int
    sample: int
    prompt: str
    answer: str
    reply: str
    correct: bool
    tokens: int
    truncated: bool
    images: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The result of `evaluate`; `truncated` is the share of replies that were cut at `max_new_tokens`, `dtype` that of
    the weights."""

    task: str
    problems: int
    samples: int
    temperature: float
    max_new_tokens: int
    privileged: bool
    mean_at_k: Accuracy
    pass_at_k: Accuracy
    truncated: float
    dtype: str = "bfloat16"
    generations: tuple[Generation, ...] = ()

    def summary(self) -> dict[str, Any]:
        """Everything but the generations, as JSON takes it."""
        plain = asdict(self)
        del plain["generations"]
        return plain

    @classmethod
    def from_summary(cls, plain: dict[str, Any]) -> Evaluation:
        """The evaluation that `summary` described, without its generations."""
        accuracies = {name: Accuracy(**plain[name]) for name in ("mean_at_k", "pass_at_k")}
        return cls(**{**plain, **accuracies})

    def save(self, path: Path) -> None:
        """Write the generations as JSON lines, one a reply, in order of problem and sample."""
        with whole_file(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
            for generation in self.generations:
                row = asdict(generation)
                if not row["images"]:
                    del row["images"]
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def evaluate(
    model: str | Path,
    task: str | Task,
    *,
    samples: int = 1,
    problems: int = 300,
    temperature: float | None = None,
    max_new_tokens: int | None = None,
    privileged: bool = False,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    batch_size: int = 64,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Let a model answer a task's held-out problems and score its replies.

    The random state of the caller is left as it was.

    Args:
        model: a folder or Hub id of a language model, or of an image-text model with its processor.
        task: a task or the name of one.
        samples: replies to each problem (k).
        problems: number of held-out problems.
        temperature: 0 for greedy decoding; None: 0 for one sample and 1 for more.
        max_new_tokens: a longer reply is cut there, and scored as it stands; None for the task's own limit.
        privileged: append the task's privileged context to each prompt (how a self-distillation teacher does).
        dtype: of the weights: "bfloat16", as inference uses them, or "float32", of a master that has not been rounded.
        batch_size: replies generated at a time.
        seed: of the sampling.
        on_progress: called with replies done and in all.

    Raises:
        ConfigError: the task is unknown, the model cannot be loaded or sees no images where the task has them, or a
            number makes no sense.
    """
    task = get_task(task) if isinstance(task, str) else task
    limit = reply_limit(task) if max_new_tokens is None else max_new_tokens
    for name, number in {"samples": samples, "problems": problems, "max_new_tokens": limit}.items():
        if number < 1:
            raise ConfigError(f"{name} must be at least 1, not {number}")
    heat = (0.0 if samples == 1 else 1.0) if temperature is None else temperature
    if heat < 0 or (heat == 0 and samples > 1):
        raise ConfigError(f"temperature {heat} with {samples} samples: greedy replies are all the same")
    if dtype not in ("bfloat16", "float32"):
        raise ConfigError(f"dtype {dtype!r}: choose bfloat16 or float32")
    examples = task.test(problems)
    with quiet_libraries():
        folder = resolve_model(model)
        if any(example.images for example in examples) and not sees_images(folder):
            raise ConfigError(f"{folder}: is a text model, and {task.name} asks about images; use an image-text model")
        processor = load_processor(folder)
        network = load_for_generation(folder, dtype)
        prompts = [e.prompt + e.context if privileged else e.prompt for e in examples for _ in range(samples)]
        replies = generate(
            network,
            processor,
            prompts,
            images=[example.images for example in examples for _ in range(samples)],
            temperature=heat,
            max_new_tokens=limit,
            batch_size=batch_size,
            seed=seed,
            on_progress=on_progress,
        )
    generations = tuple(
        _scored(task, examples[index // samples], index // samples, index % samples, prompts[index], *reply)
        for index, reply in enumerate(replies)
    )
    return _summarize(task.name, generations, samples, heat, limit, privileged, dtype)


def _scored(
    task: Task, example: Example, problem: int, sample: int, prompt: str, reply: str, tokens: int, truncated: bool
) -> Generation:
    return Generation(
        problem=problem,
        sample=sample,
        prompt=prompt,
        answer=example.answer,
        reply=reply,
        correct=task.score(reply, example),
        tokens=tokens,
        truncated=truncated,
        images=tuple(str(image) if isinstance(image, str | Path) else "" for image in example.images),
    )


def _summarize(
    task: str,
    generations: tuple[Generation, ...],
    samples: int,
    temperature: float,
    limit: int,
    privileged: bool,
    dtype: str,
) -> Evaluation:
    problems = len(generations) // samples
    correct = [0] * problems
    for generation in generations:
        correct[generation.problem] += generation.correct
    mean, solved = mean_at_k(correct, samples), pass_at_k(correct, samples)
    return Evaluation(
        task=task,
        problems=problems,
        samples=samples,
        temperature=temperature,
        max_new_tokens=limit,
        privileged=privileged,
        mean_at_k=Accuracy(value=mean[0], low=mean[1], high=mean[2]),
        pass_at_k=Accuracy(value=solved[0], low=solved[1], high=solved[2]),
        truncated=sum(g.truncated for g in generations) / len(generations),
        dtype=dtype,
        generations=generations,
    )


def generate(
    model: Any,
    processor: Any,
    prompts: Sequence[str],
    *,
    images: Sequence[Sequence[Any]] | None = None,
    temperature: float,
    max_new_tokens: int,
    batch_size: int = 64,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[tuple[str, int, bool]]:
    """Reply to each prompt as a user message: the text, its number of tokens, and whether it was cut at the limit.

    Args:
        model: a causal language model, or an image-text model.
        processor: its tokenizer, or its processor, padding on the left (`load_processor`).
        prompts: the users' messages.
        images: for each prompt the paths or PIL images before it; None for none.
        temperature: 0 for greedy decoding.
        max_new_tokens: a longer reply is cut there.
        batch_size: prompts at a time.
        seed: of the sampling.
        on_progress: called with replies done and in all.
    """
    import torch
    from transformers import GenerationConfig

    tokenizer = getattr(processor, "tokenizer", processor)
    # The model's own end-of-turn tokens end a reply too; a base model's config may not know the chat's.
    ends = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    image_token = getattr(model.config, "image_token_id", None)
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        temperature=temperature if temperature > 0 else 1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=sorted(ends),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        suppress_tokens=None if image_token is None else [image_token],  # a reply has no image behind such a token
    )
    replies: list[tuple[str, int, bool]] = []
    with _evaluating(model), torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for start in range(0, len(prompts), batch_size):
            stop = start + batch_size
            shown = images[start:stop] if images is not None else [()] * len(prompts[start:stop])
            batch = _inputs(model, processor, prompts[start:stop], shown)
            output = model.generate(**batch, generation_config=settings)
            for row in output[:, batch["input_ids"].shape[1] :].tolist():
                length = next((i for i, token in enumerate(row) if token in ends), None)
                kept = row if length is None else row[: length + 1]
                text = tokenizer.decode(kept, skip_special_tokens=True)
                replies.append((text, len(kept), length is None))
            if on_progress is not None:
                on_progress(len(replies), len(prompts))
    return replies


def _inputs(model: Any, processor: Any, prompts: Sequence[str], images: Sequence[Sequence[Any]]) -> Any:
    """The model's inputs for a batch of user messages, each behind its images."""
    if not hasattr(processor, "image_processor"):
        batch = processor.apply_chat_template(
            [[{"role": "user", "content": prompt}] for prompt in prompts],
            add_generation_prompt=True,
            tokenize=True,
            padding=True,
            return_dict=True,
            return_tensors="pt",
        ).to(model.device)
        return {name: batch[name] for name in ("input_ids", "attention_mask")}
    chats = [
        # Templates of image-text models expect parts, also where there is only text.
        [{"role": "user", "content": [*({"type": "image"} for _ in shown), {"type": "text", "text": prompt}]}]
        for prompt, shown in zip(prompts, images, strict=True)
    ]
    texts = processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    start = processor.tokenizer.bos_token
    return processor(
        text=texts,
        images=[[_opened(image) for image in shown] for shown in images] if any(images) else None,
        padding=True,
        return_tensors="pt",
        add_special_tokens=not (start and texts[0].startswith(start)),  # most templates write the first token
    ).to(model.device, dtype=model.dtype)


def _opened(image: Any) -> Any:
    """The PIL image, in RGB.

    Raises:
        ConfigError: the file holds none.
    """
    from PIL import Image

    if not isinstance(image, str | Path):
        return image.convert("RGB")
    try:
        with Image.open(image) as opened:
            return opened.convert("RGB")
    except OSError as error:
        raise ConfigError(f"{image}: is not an image that can be read ({error})") from None


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
