"""What a training run is: one YAML file, validated before anything is loaded.

Every key that changes the result is here, under one name for all methods. Whatever else TRL's trainers can do (vLLM,
gradient checkpointing, FSDP options, …) is reached under `trainer:` by TRL's own argument names.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from deltalens.errors import ConfigError

__all__ = [
    "METHODS",
    "GRPORun",
    "LoRA",
    "OPDRun",
    "OPSDRun",
    "ProjectTo",
    "Run",
    "SFTRun",
    "SeqKDRun",
    "TeacherEndpoint",
    "TrainConfig",
    "load_config",
]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LoRA(_Strict):
    """Train a PEFT LoRA adapter instead of the weights; the run then saves the adapter and the merged weights."""

    r: int = Field(default=16, ge=1)
    alpha: int = Field(default=32, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: str | list[str] = "all-linear"


class ProjectTo(_Strict):
    """Train with gradients projected on the top right subspace of an early update, as [G] does.

    Attributes:
        update: an early checkpoint of a run from the same model.
        k: dimension of the subspace.
    """

    update: str
    k: int = Field(default=16, ge=1)


class Run(_Strict):
    """Keys that every method has.

    Attributes:
        model: what training starts from: a folder, a Hub id, or `embedded` (SmolLM2-135M-Instruct from PyPI).
        task: prompts, answers and scorer; see `deltalens.train.tasks`.
        output: folder of the run; `-o` on the command line wins.
        steps: optimizer steps.
        prompts_per_step: different prompts in an optimizer step, over all processes.
        micro_batch: sequences a process takes through the model at a time; None: all of its share at once.
        learning_rate, schedule, warmup_steps, weight_decay, max_grad_norm: the optimizer's, after a linear
            warm-up.
        optimizer: AdamW unless told; `muon` trains the matrices alone.
        mask: a mask file (`deltalens mask`): only its coordinates are trained.
        project: train only a subspace of each matrix.
        weights: dtype that the weights are trained in. bfloat16 loses updates smaller than half a unit in the last
            place at every step; float32 rounds once, when the model is saved.
        bf16: run the forward passes under bfloat16 autocast.
        seed: of the prompts' order, of sampling and of dropout.
        lora: train an adapter.
        train_vision: whether a vision-language model's vision tower is trained too.
        save_master: keep the final float32 weights beside the bfloat16 model (the rounding null can use them).
        snapshot_every: steps between bfloat16 snapshots, for trajectories.
        checkpoint_every: steps between checkpoints that a killed run resumes from.
        geometry_every: steps between measurements of the update's geometry (`UpdateGeometryCallback`).
        report_to: TRL's and transformers' trackers (trackio, wandb, tensorboard, …).
        trainer: more arguments of the method's TRL config class, by their TRL names.
    """

    model: str = "embedded"
    task: str = "sums"
    output: Path | None = None
    steps: int = Field(default=60, ge=1)
    prompts_per_step: int = Field(default=32, ge=1)
    micro_batch: int | None = Field(default=None, ge=1)
    learning_rate: float = Field(default=2e-5, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(default=5, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    optimizer: Literal["adamw", "adamw-no-momentum", "sgd", "momentum", "rmsprop", "lion", "muon"] = "adamw"
    mask: str | None = None
    project: ProjectTo | None = None
    weights: Literal["float32", "bfloat16"] = "float32"
    bf16: bool = True
    seed: int = Field(default=0, ge=0)
    lora: LoRA | None = None
    train_vision: bool = True
    save_master: bool = False
    snapshot_every: int | None = Field(default=None, ge=1)
    checkpoint_every: int = Field(default=20, ge=1)
    geometry_every: int | None = Field(default=None, ge=1)
    report_to: list[str] = []
    trainer: dict[str, Any] = {}

    @property
    def sequences_per_prompt(self) -> int:
        """Sequences that one prompt brings into a step."""
        return 1


class _Rollouts(Run):
    """Keys of the methods whose student samples.

    Attributes:
        max_new_tokens: longest reply.
        temperature: of the sampling; losses are always taken at temperature 1.
        samples_per_prompt: replies sampled to each prompt.
    """

    max_new_tokens: int = Field(default=12, ge=1)
    temperature: float = Field(default=1.0, gt=0)
    samples_per_prompt: int = Field(default=1, ge=1)

    @property
    def sequences_per_prompt(self) -> int:
        """Sequences that one prompt brings into a step."""
        return self.samples_per_prompt


class SFTRun(Run):
    """Supervised fine-tuning on the task's answers."""

    method: Literal["sft"]


class SeqKDRun(Run):
    """Sequence-level distillation: supervised fine-tuning on replies that the teacher generates first, once.

    Attributes:
        teacher: a model folder or Hub id.
        max_new_tokens, temperature: of the teacher's replies; temperature 0 is greedy.
    """

    method: Literal["seqkd"]
    teacher: str
    max_new_tokens: int = Field(default=12, ge=1)
    temperature: float = Field(default=1.0, ge=0)


class TeacherEndpoint(_Strict):
    """A vLLM or OpenAI-compatible server that returns prompt logprobs. The key comes from an environment variable."""

    url: str
    model: str
    api_key_variable: str | None = None


class OPDRun(_Rollouts):
    """On-policy distillation; the loss keys are those of `deltalens.train.opd.OPDConfig`.

    Attributes:
        teacher: a model folder or Hub id, or an endpoint.
        teachers: instead, several models by name; a row's `teacher_column` says which one teaches it.
        teacher_dtype: dtype of a local teacher's weights.
    """

    method: Literal["opd"]
    teacher: str | TeacherEndpoint | None = None
    teachers: dict[str, str] | None = None
    teacher_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    teacher_column: str | None = None
    loss: Literal["reverse_kl", "forward_kl", "jsd", "topk_forward_kl", "topk_reverse_kl", "k1"] = "reverse_kl"
    topk: int = Field(default=32, ge=1)
    token_share: float = Field(default=1.0, gt=0, le=1)
    token_selection: Literal["log_ratio", "random"] = "log_ratio"
    rollout_teacher_share: float = Field(default=0.0, ge=0, le=1)
    log_ratio_clip: float | None = Field(default=None, gt=0)
    importance_clip: float | None = Field(default=None, gt=0)
    reward_mix: float = Field(default=1.0, ge=0, le=1)

    @model_validator(mode="after")
    def _routed(self) -> OPDRun:
        if (self.teacher is None) == (self.teachers is None):
            raise ValueError("give either teacher (one) or teachers (several, by name)")
        if (self.teachers is None) != (self.teacher_column is None):
            raise ValueError("teachers and teacher_column need each other")
        return self


class OPSDRun(_Rollouts):
    """On-policy self-distillation: the teacher is the student, shown the task's privileged context.

    Attributes:
        divergence: of student and teacher, over the full vocabulary.
        teacher: `base` (the model before training), `ema` (a moving average) or `live` (the student itself).
        ema_rate: share of the student in the moving average at each step.
        teacher_dtype: dtype of a `base` teacher's weights.
    """

    method: Literal["opsd"]
    divergence: Literal["reverse_kl", "forward_kl", "jsd"] = "reverse_kl"
    teacher: Literal["base", "ema", "live"] = "base"
    ema_rate: float = Field(default=0.05, gt=0, le=1)
    teacher_dtype: Literal["float32", "bfloat16"] = "bfloat16"


class GRPORun(_Rollouts):
    """GRPO with the task's scorer as reward.

    Attributes:
        kl_weight: weight of the KL to the reference model (TRL's `beta`); 0 loads no reference.
    """

    method: Literal["grpo"]
    samples_per_prompt: int = Field(default=8, ge=2)
    prompts_per_step: int = Field(default=8, ge=1)
    kl_weight: float = Field(default=0.0, ge=0)


TrainConfig = Annotated[SFTRun | SeqKDRun | OPDRun | OPSDRun | GRPORun, Field(discriminator="method")]
METHODS: dict[str, type[Run]] = {"sft": SFTRun, "seqkd": SeqKDRun, "opd": OPDRun, "opsd": OPSDRun, "grpo": GRPORun}
_ADAPTER: TypeAdapter[Any] = TypeAdapter(TrainConfig)


def load_config(source: Path | dict[str, Any], overrides: list[str] | None = None) -> Any:
    """The validated config of a run.

    Args:
        source: a YAML file, or its content.
        overrides: `key=value` or `key.inner=value`, the value read as YAML.

    Raises:
        ConfigError: the file is not there or not YAML, a key is unknown (the nearest known one is named), or a value
            is not one it can take.
    """
    where = str(source) if isinstance(source, Path) else "config"
    content = _read(source) if isinstance(source, Path) else dict(source)
    for override in overrides or []:
        _set(content, override)
    method = content.get("method")
    if method not in METHODS:
        raise ConfigError(f"{where}: method is {method!r}; choose one of {', '.join(sorted(METHODS))}")
    try:
        return _ADAPTER.validate_python(content)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_said(error, METHODS[method])}") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must hold keys and values such as `method: opd`")
    return content


def _set(content: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {override}: must be key=value, for example --set learning_rate=1e-5")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"--set {override}: {text!r} is not a YAML value") from None
    *outer, last = key.split(".")
    place = content
    for name in outer:
        inner = place.get(name)
        place[name] = dict(inner) if isinstance(inner, dict) else {}
        place = place[name]
    place[last] = value


def _said(error: ValidationError, kind: type[Run]) -> str:
    """One clear line a mistake."""
    lines = []
    for mistake in error.errors():
        path = [str(part) for part in mistake["loc"][1:]]  # the first is the method that chose the class
        if mistake["type"] == "extra_forbidden":
            near = difflib.get_close_matches(path[-1], list(kind.model_fields), n=1) if len(path) == 1 else []
            hint = f"; did you mean {near[0]}?" if near else ""
            lines.append(f"unknown key {'.'.join(path)!r}{hint}")
        elif mistake["type"] == "missing":
            lines.append(f"{'.'.join(path)} is missing")
        else:
            given = "" if not path else f" (it is {mistake['input']!r})"
            lines.append(
                f"{''.join(f'{part}: ' for part in path)}{mistake['msg'].removeprefix('Value error, ')}{given}"
            )
    return "; ".join(lines)
