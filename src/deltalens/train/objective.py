"""A step's loss from the student's hidden states and the teachers' views of the same tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from trl.kernels.chunked_logprob import _use_triton

from deltalens.train import losses
from deltalens.train.losses import Head, chunked_loss, chunks, compute_dtype, select_tokens
from deltalens.train.measures import Measures
from deltalens.train.teachers import LocalRows

__all__ = ["Objective", "head_of"]

_FULL = {"reverse_kl": losses.reverse_kl, "forward_kl": losses.forward_kl, "jsd": losses.jsd}
_FEW = 64


class Objective:
    """The loss that an `OPDConfig` asks for."""

    def __init__(self, args: Any) -> None:
        self.args = args

    def __call__(
        self,
        hidden: Tensor,
        head: Head,
        views: list[tuple[Tensor, Any]],
        tokens: Tensor,
        measures: Measures,
        sampling: Tensor | None = None,
        reward: Tensor | None = None,
    ) -> Tensor:
        """Sum of the loss over N response tokens.

        Args:
            hidden: the student's states before each token, shape (N, H). head: the student's.
            views: for each teacher, which of the N tokens are its, and its view of them.
            tokens: that were sampled, shape (N,).
            measures: takes in what is logged, of all tokens, also where the loss takes some.
            sampling: log-probability that each token was sampled with. reward: advantage by a verifier. Shapes (N,).

        Returns:
            a scalar; its gradient reaches the student alone.
        """
        args = self.args
        # On a GPU the full divergences are TRL's fused kernels. Elsewhere those fall back to products in float32 and
        # project twice, forward and backward, also padding: `chunked_loss` takes a third of the time on a CPU.
        fused = args.loss in _FULL and _use_triton(hidden.device)
        weights: Tensor | None = None
        if args.token_share < 1:
            ratios = self._ratios(hidden, head, views, tokens, measures)
            weights = select_tokens(ratios, args.token_share, args.token_selection)
        elif fused:
            rows = torch.arange(0, len(tokens), max(1, len(tokens) // _FEW), device=tokens.device)
            few = [
                (places[p], view.take(p))
                for places, view in views
                if len(p := torch.isin(places, rows).nonzero()[:, 0])
            ]
            self._ratios(hidden, head, few, tokens, measures)
        total = hidden.sum() * 0  # a batch without tokens still has a gradient, of zero
        for places, view in views:
            weight = None
            if weights is not None:
                chosen = weights[places].nonzero()[:, 0]
                places, view = places[chosen], view.take(chosen)
                weight = weights[places]
            if len(places) == 0:
                continue
            states = hidden if len(places) == len(tokens) else hidden[places]
            if fused:
                total = total + self._fused(states, head, view, weight)
                continue
            seen = None if weights is not None else measures

            def loss(
                logits: Tensor, part: slice, places: Tensor = places, view: Any = view, seen: Any = seen
            ) -> Tensor:
                at = places[part]
                teacher = view.chunk(part)
                if seen is not None:
                    seen.add(logits, teacher, tokens[at])
                constants = {"sampling": sampling, "reward": reward}
                return self._losses(
                    logits, teacher, tokens[at], {n: v[at] for n, v in constants.items() if v is not None}
                )

            total = total + chunked_loss(states, head, loss, weight)
        return total

    def _losses(self, logits: Tensor, teacher: Any, tokens: Tensor, constants: dict[str, Tensor]) -> Tensor:
        args = self.args
        if args.loss == "topk_forward_kl":
            return losses.topk_forward_kl(logits, *teacher.top(args.topk))
        if args.loss == "topk_reverse_kl":
            return losses.topk_reverse_kl(logits, teacher.logits, args.topk)
        if args.loss == "k1":
            own = logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
            return losses.k1(
                own,
                teacher.logprob(tokens),
                log_ratio_clip=args.log_ratio_clip,
                importance_clip=args.importance_clip,
                reward_mix=args.reward_mix,
                **constants,
            )
        return _FULL[args.loss](logits, teacher.logits)

    @torch.no_grad()
    def _ratios(
        self, hidden: Tensor, head: Head, views: list[tuple[Tensor, Any]], tokens: Tensor, measures: Measures
    ) -> Tensor:
        """log π_θ − log π_T of the sampled tokens, shape (N,); 0 where no view looks."""
        dtype = compute_dtype(hidden)
        ratios = torch.zeros(len(tokens), device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            narrow = head.cast(dtype)
            for places, view in views:
                for part in chunks(len(places), head.weight.shape[0]):
                    at = places[part]
                    logits = narrow.finish(narrow.project(hidden[at], dtype))
                    ratios[at] = measures.add(logits, view.chunk(part), tokens[at]).float()
        return ratios

    def _fused(self, hidden: Tensor, head: Head, view: LocalRows, weight: Tensor | None) -> Tensor:
        teacher = view.head
        divergence, _ = ChunkedDivergenceFunction.apply(
            hidden,
            head.weight,
            head.bias,
            view.hidden,
            teacher.weight,
            teacher.bias,
            self.args.beta,
            head.temperature,
            head.scale,
            head.softcap,
            teacher.scale,
            teacher.softcap,
        )
        return (divergence if weight is None else divergence * weight).sum()


def head_of(model: Any, hidden: Tensor, temperature: float) -> Head:
    """A model's head; with FSDP2 its matrix is gathered once, here."""
    layer, config = model.get_output_embeddings(), model.config.get_text_config()
    weight, bias = layer.weight, layer.bias
    if isinstance(weight, torch.distributed.tensor.DTensor):
        weight = weight.full_tensor().to(compute_dtype(hidden))
        bias = None if bias is None else bias.full_tensor()
    # Architectures name the factor on their logits differently, and Granite divides by it.
    names = ("logit_scale", "output_multiplier", "lm_head_multiplier")
    scale = next((value for name in names if (value := getattr(config, name, None)) is not None), None)
    if scale is None and (divisor := getattr(config, "logits_scaling", None)) is not None:
        scale = divisor if config.model_type == "hyperclovax" else 1 / divisor
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(weight, bias, 1.0 if scale is None else float(scale), softcap, temperature)
