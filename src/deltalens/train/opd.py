"""On-policy distillation: TRL's `DistillationTrainer` with the losses, rollouts and teachers of the OPD papers.

"Dense Supervision, Sparse Updates" (arXiv 2606.13657) and the papers that it compares with train by these. TRL's
trainer (checked against 1.16.0) tokenizes, samples, batches and saves; the loss, where the rollouts come from and what
is logged are ours.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from trl import DistillationTrainer
from trl.models import prepare_deepspeed
from trl.trainer.utils import (
    RepeatSampler,
    maybe_gather_lm_head_ctx,
    split_pixel_values_by_grid,
    unsplit_pixel_values_by_grid,
)

from deltalens.errors import ConfigError
from deltalens.train.guard import Guarded
from deltalens.train.losses import Head
from deltalens.train.measures import MEASURES, Measures
from deltalens.train.objective import Objective, head_of
from deltalens.train.opd_config import OPDConfig
from deltalens.train.rollouts import SamplingLogprobs, group_advantage, in_place_of_student, recorded, teacher_samples
from deltalens.train.teachers import EndpointTeacher, LocalTeachers, check_names

__all__ = ["OPDConfig", "OPDTrainer"]

_SERVED = ("topk_forward_kl", "k1")
_MULTIMODAL = (
    "pixel_values",
    "image_grid_thw",
    "pixel_attention_mask",
    "spatial_shapes",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)


class OPDTrainer(Guarded, DistillationTrainer):
    """Distil one or several teachers into a student on rollouts of the student, the teacher, or both.

    Args:
        model: the student; its weights are trained in the dtype that they have.
        teacher_model: a model with the student's vocabulary, several by name (then `args.teacher_column` says which
            teaches a row), or an endpoint.
        args: see `OPDConfig`.
        train_dataset: has a column `prompt`, and `image` or `images` where there are any.
        processing_class: the student's tokenizer or processor, padding on the left.
        reward: of a completion and its row of the dataset; needed where `args.reward_mix` is below 1, else logged.
        callbacks, optimizers, peft_config: as TRL's trainer takes them.

    Raises:
        ConfigError: arguments, dataset and teacher do not fit together.
        DeltalensError: while training: the loss is not finite, or the endpoint fails.
    """

    args: OPDConfig
    model: Any
    model_wrapped: Any

    def __init__(
        self,
        model: Any,
        teacher_model: Any,
        args: OPDConfig,
        train_dataset: Any,
        processing_class: Any = None,
        reward: Callable[[str, dict[str, Any]], float] | None = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = None,
    ) -> None:
        _check_data(train_dataset, teacher_model, args)
        if args.reward_mix < 1 and reward is None:
            raise ConfigError("reward_mix is below 1 and there is no reward; give a scorer, or reward_mix 1")
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
        )
        sequences = args.per_device_train_batch_size * self.accelerator.num_processes * args.gradient_accumulation_steps
        if sequences % args.samples_per_prompt:
            raise ConfigError(
                f"a step's {sequences} rollouts are no multiple of samples_per_prompt {args.samples_per_prompt}"
            )
        self._endpoint: EndpointTeacher | None = None
        self._teachers = LocalTeachers({})
        if isinstance(teacher_model, EndpointTeacher):
            self._use_endpoint(teacher_model)
        else:
            models = teacher_model if isinstance(teacher_model, dict) else {"teacher": teacher_model}
            self._teachers = LocalTeachers({name: self._prepare(name, teacher) for name, teacher in models.items()})
        if len(self._teachers.names) > 1 and self._is_vlm and args.rollout_teacher_share > 0:
            raise ConfigError("rollouts sampled by several teachers are for text only; set rollout_teacher_share to 0")
        self._reward = reward
        self._objective = Objective(args)
        self._rows: list[dict[str, Any]] = []
        self._drawn: list[Tensor] | None = None
        self._measures = Measures(1)
        self._generating = 0.0
        self._trained_tokens = 0
        if self.use_vllm and args.importance_clip is not None:
            engine: Any = self.vllm_generation
            engine.logprobs = 0  # of the sampled token only
            engine.generate = self._keep_logprobs(engine.generate)

    def _prepare(self, name: str, teacher: Any) -> Any:
        sizes = [m.config.get_text_config().vocab_size for m in (self.accelerator.unwrap_model(self.model), teacher)]
        if sizes[0] != sizes[1]:
            raise ConfigError(
                f"the student's vocabulary has {sizes[0]} tokens and that of {name} {sizes[1]}; distillation compares "
                "distributions over tokens, so choose a teacher with the student's tokenizer"
            )
        teacher.requires_grad_(False)
        if self.is_deepspeed_enabled:
            prepared = prepare_deepspeed(teacher, self.accelerator)
        else:
            prepared = self.accelerator.prepare_model(teacher, evaluation_mode=True)
        prepared.eval()
        return prepared

    def _use_endpoint(self, teacher: EndpointTeacher) -> None:
        args = self.args
        where = f"the teacher is an endpoint ({teacher.url})"
        if args.loss not in _SERVED:
            raise ConfigError(f"{where} and gives only its likeliest tokens; loss must be one of {', '.join(_SERVED)}")
        if self._is_vlm:
            raise ConfigError(f"{where}, which sees no images; use a local teacher for vision-language models")
        if args.temperature != 1:
            raise ConfigError(
                f"{where} at temperature 1; set temperature to 1 (generation_kwargs may sharpen sampling)"
            )
        if args.rollout_teacher_share > 0:
            raise ConfigError(f"{where} and samples no rollouts; set rollout_teacher_share to 0")
        teacher.check(self.processing_class)
        self._endpoint = teacher

    @property
    def _rollouts(self) -> int:
        """Rollouts of a step, over all processes."""
        args = self.args
        return args.per_device_train_batch_size * self.accelerator.num_processes * args.gradient_accumulation_steps

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        args = self.args
        source: Any = self.train_dataset if dataset is None else dataset
        return RepeatSampler(
            data_source=source,
            mini_repeat_count=args.samples_per_prompt,
            batch_size=self._rollouts // args.samples_per_prompt,
            repeat_count=args.gradient_accumulation_steps,
            shuffle=bool(self.shuffle_dataset),
            seed=args.seed,
        )

    # ---- rollouts

    def _generate_single_turn(
        self, prompt_ids: Any, images: Any, multimodal_fields: Any, has_tool_images: bool = False
    ) -> Any:
        start = time.perf_counter()
        by_teacher = self.model.training and teacher_samples(
            self.args.rollout_teacher_share, self.args.seed, self.state.global_step
        )
        # One autocast around the whole rollout. `generate` enters and leaves accelerate's in every forward, and leaving
        # the outermost one drops the bfloat16 copies of the float32 weights: they were cast anew for each token.
        with self.accelerator.autocast():
            if not by_teacher:
                out = self._sample(self.model_wrapped, prompt_ids, images, multimodal_fields)
            else:
                out = [[] for _ in prompt_ids]
                drawn: list[Tensor] = [torch.empty(0) for _ in prompt_ids]
                for name, model in self._teachers.models.items():
                    mine = [i for i, owner in enumerate(self._owners()) if owner == name]
                    if not mine:
                        continue
                    with in_place_of_student(self, model):
                        part = self._sample(model, [prompt_ids[i] for i in mine], images, multimodal_fields)
                    for place, i in enumerate(mine):
                        out[i] = part[place]
                        if self._drawn is not None:
                            drawn[i] = self._drawn[place]
                self._drawn = None if self._drawn is None else drawn
        self._generating += time.perf_counter() - start
        mode = "train" if self.model.training else "eval"
        tokens = sum(len(ids) for ids in out)
        self._metrics[mode]["generation_tokens_per_s"].append(tokens / (time.perf_counter() - start))
        self._metrics[mode]["rollouts_by_teacher"].append(float(by_teacher))
        return out

    def _sample(self, model: Any, prompts: Any, images: Any, fields: Any) -> Any:
        recorder = None
        if self.args.importance_clip is not None and not self.use_vllm:
            recorder = SamplingLogprobs(float(self.generation_config.temperature or 1.0))
        with recorded(self.accelerator.unwrap_model(model), recorder):
            completions = super()._generate_single_turn(prompts, images, fields)
        if recorder is not None:
            self._drawn = recorder.finish(completions)
        return completions

    def _keep_logprobs(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        def keep(*args: Any, **kwargs: Any) -> Any:
            answer = generate(*args, **kwargs)
            self._drawn = [torch.tensor([token[0] for token in sequence]) for sequence in answer[2]]
            return answer

        return keep

    def _owners(self) -> list[str]:
        if self.args.teacher_column is None or len(self._teachers.names) < 2:
            return [self._teachers.names[0]] * len(self._rows)
        return [str(row[self.args.teacher_column]) for row in self._rows]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._rows = inputs
        output = super()._generate_and_score_completions(inputs)
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["truncation_rate"].append(self._metrics[mode]["completions/clipped_ratio"][-1])
        mask = output["completion_mask"]
        if len(self._teachers.names) > 1:
            index = [self._teachers.names.index(name) for name in self._owners()]
            output["teacher"] = torch.tensor(index, device=mask.device)
        if self._drawn is not None:
            table = torch.zeros(mask.shape, device=mask.device)
            for row, values in zip(table, self._drawn, strict=True):
                row[: len(values)] = values.to(row)
            output["sampling"] = table
        if self._reward is not None:
            tokenizer = self._tokenizer
            texts = tokenizer.batch_decode(
                [ids[keep.bool()] for ids, keep in zip(output["completion_ids"], mask, strict=True)],
                skip_special_tokens=True,
            )
            scores = [float(self._reward(text, row)) for text, row in zip(texts, inputs, strict=True)]
            everywhere = self.accelerator.gather(torch.tensor(scores, device=mask.device))
            self._metrics[mode]["reward"].append(everywhere.mean().item())
            if self.args.reward_mix < 1 and self.model.training:
                first = self.accelerator.process_index * len(inputs)
                advantage = group_advantage(everywhere, self.args.samples_per_prompt)
                output["reward"] = advantage[first : first + len(inputs)]
        return output

    # ---- loss

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's, with the speed of training logged apart from that of the rollouts."""
        start, self._generating = time.perf_counter(), 0.0
        loss = super().training_step(*args, **kwargs)
        elapsed = time.perf_counter() - start - self._generating
        self._metrics["train"]["training_tokens_per_s"].append(self._trained_tokens / elapsed)
        return loss

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's, with more of the batch logged."""
        answer = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        device = inputs["completion_ids"].device
        values = self.accelerator.gather(self._measures.values(device)[None]).nanmean(0).tolist()
        mode = "train" if self.model.training else "eval"
        for name, value in zip(MEASURES, values, strict=True):
            if value == value:
                self._metrics[mode][name].append(value)
        self._trained_tokens = int((inputs["prompt_mask"].sum() + inputs["completion_mask"].sum()).item())
        return answer

    def _compute_loss(self, unwrapped_student: Any, inputs: Any, num_items_in_batch: Any) -> Any:
        # TRL calls the student's backbone, past the forward that accelerate has wrapped in autocast: with `bf16` set,
        # student and head then run in float32. On a CPU with bfloat16 arithmetic that is most of a step.
        with self.accelerator.autocast():
            keep = inputs["completion_mask"].bool()
            hidden, head = self._states(unwrapped_student, inputs)
            device = head.weight.device
            keep = keep.to(device)
            tokens = inputs["completion_ids"].to(device)[keep]
            self._measures = Measures(len(tokens))
            constants = {
                name: inputs[name].to(device)[keep] if name == "sampling" else _spread(inputs[name].to(device), keep)
                for name in ("sampling", "reward")
                if name in inputs
            }
            parameters: Any = head.weight, head.bias
            with maybe_gather_lm_head_ctx(*parameters):
                loss = self._objective(
                    hidden.to(device)[keep], head, self._views(inputs, keep), tokens, self._measures, **constants
                )
        total = len(tokens) if num_items_in_batch is None else num_items_in_batch
        total = total.to(device) if isinstance(total, Tensor) else max(total, 1)
        entropy, counted = self._measures.entropy(device)
        return loss / total, entropy, counted

    def _views(self, inputs: Any, keep: Tensor) -> list[tuple[Tensor, Any]]:
        """Each teacher's view of its response tokens."""
        if self._endpoint is not None:
            prompts, masks = inputs["prompt_ids"].tolist(), inputs["prompt_mask"].tolist()
            prompts = [[i for i, m in zip(*row, strict=True) if m] for row in zip(prompts, masks, strict=True)]
            replies = [ids[mask].tolist() for ids, mask in zip(inputs["completion_ids"], keep, strict=True)]
            sequences = [prompt + reply for prompt, reply in zip(prompts, replies, strict=True)]
            k = self.args.topk if self.args.loss == "topk_forward_kl" else 1
            view = self._endpoint.rows(sequences, [len(prompt) for prompt in prompts], k, keep.device)
            return [(torch.arange(int(keep.sum()), device=keep.device), view)]

        @torch.no_grad()
        def states(teacher: Any, sequences: list[int] | None) -> tuple[Tensor, Head]:
            inner = self.accelerator.unwrap_model(teacher)
            batch = inputs if sequences is None else _some(inputs, sequences)
            hidden, head = self._forward_redirection(teacher, inner, self._states, inner, batch)
            if hasattr(head.weight, "ds_id"):  # ZeRO-3 has it sharded again outside of its module's forward
                parameters: Any = head.weight, head.bias
                with maybe_gather_lm_head_ctx(*parameters):
                    bias = None if head.bias is None else head.bias.clone()
                    head = replace(head, weight=head.weight.clone(), bias=bias)
            return hidden.to(keep.device), head

        return self._teachers.rows(keep, inputs.get("teacher"), states)

    def _states(self, model: Any, inputs: Any) -> tuple[Tensor, Head]:
        """Hidden states (B, T, H) before each completion token, and the model's head."""
        hidden = self._get_last_hidden_state(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            inputs["completion_ids"].size(1),
            **{name: inputs[name] for name in _MULTIMODAL if inputs.get(name) is not None},
        )
        return hidden, head_of(model, hidden, self.temperature)


def _spread(per_sequence: Tensor, keep: Tensor) -> Tensor:
    """A value a sequence (B,) as a value a response token (N,)."""
    return per_sequence[:, None].expand(keep.shape)[keep]


def _some(inputs: Any, sequences: list[int]) -> dict[str, Any]:
    """The inputs of some sequences of a batch."""
    split = split_pixel_values_by_grid(inputs)
    chosen = {
        name: value[sequences] if isinstance(value, Tensor) else [value[i] for i in sequences]
        for name, value in split.items()
        if value is not None and not (isinstance(value, Tensor) and value.ndim == 0)
    }
    return unsplit_pixel_values_by_grid(chosen)


def _check_data(dataset: Any, teacher: Any, args: OPDConfig) -> None:
    columns = getattr(dataset, "column_names", None)
    if columns is None:
        return
    if "prompt" not in columns:
        raise ConfigError(f"the dataset has no column 'prompt'; it has {sorted(columns)}")
    if isinstance(teacher, dict) and not teacher:
        raise ConfigError("there is no teacher")
    if not isinstance(teacher, dict) or (len(teacher) == 1 and args.teacher_column is None):
        return
    if args.teacher_column is None:
        raise ConfigError(f"there are several teachers ({sorted(teacher)}); teacher_column must say which a row has")
    if args.teacher_column not in columns:
        raise ConfigError(
            f"the dataset has no column {args.teacher_column!r} (teacher_column); it has {sorted(columns)}"
        )
    if hasattr(dataset, "unique"):
        check_names(dataset.unique(args.teacher_column), teacher, args.teacher_column)
