"""Losses of on-policy distillation: pure functions of logits, and their evaluation in chunks of tokens.

Every function takes logits or log-probabilities of N tokens over V words and returns one loss a token. `chunked_loss`
evaluates one of them from hidden states, so that the (N, V) logits never exist whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = [
    "Head",
    "chunked_loss",
    "chunks",
    "compute_dtype",
    "forward_kl",
    "jsd",
    "k1",
    "reverse_kl",
    "select_tokens",
    "teacher_top",
    "topk_forward_kl",
    "topk_reverse_kl",
]

# Elements of one chunk of logits. A handful of float32 tensors of this size exist at a time (64 MiB each).
_CHUNK = 1 << 24


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(π_θ ‖ π_T) from logits of shape (N, V); returns nats, shape (N,)."""
    p, q = student.log_softmax(-1), teacher.log_softmax(-1)
    return _expected(p, p - q).sum(-1)


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(π_T ‖ π_θ) from logits of shape (N, V); returns nats, shape (N,)."""
    p, q = student.log_softmax(-1), teacher.log_softmax(-1)
    return _expected(q, q - p).sum(-1)


def jsd(student: Tensor, teacher: Tensor, beta: float = 0.5) -> Tensor:
    """Generalised Jensen-Shannon divergence, β KL(π_T ‖ m) + (1 − β) KL(π_θ ‖ m) with m = β π_T + (1 − β) π_θ.

    Agarwal et al. 2023, arXiv 2306.13649, equation 5. Logits of shape (N, V); returns nats, shape (N,).
    """
    p, q = student.log_softmax(-1), teacher.log_softmax(-1)
    share = torch.tensor([beta, 1 - beta], dtype=p.dtype, device=p.device).log()
    m = torch.logaddexp(q + share[0], p + share[1])
    return (beta * _expected(q, q - m) + (1 - beta) * _expected(p, p - m)).sum(-1)


def teacher_top(teacher: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """The teacher's k most likely words: ids (N, k), log-probabilities (N, k), log-probability of all others (N,).

    The last is None if there are no others (k ≥ V).
    """
    k = min(k, teacher.shape[-1])
    ids = teacher.topk(k, dim=-1).indices
    log_z = teacher.logsumexp(-1)
    return ids, teacher.gather(-1, ids) - log_z[:, None], _tail(teacher, ids, log_z)


def topk_forward_kl(student: Tensor, ids: Tensor, teacher: Tensor, tail: Tensor | None) -> Tensor:
    """Forward KL over the teacher's k words and one bucket for all others.

    A divergence of two distributions over k + 1 outcomes, so at most the full one, and equal to it at k = V.

    Args:
        student: logits, shape (N, V).
        ids, teacher, tail: as `teacher_top` returns them.

    Returns:
        nats, shape (N,).
    """
    log_z = student.logsumexp(-1)
    loss = _expected(teacher, teacher - (student.gather(-1, ids) - log_z[:, None])).sum(-1)
    rest = _tail(student, ids, log_z)
    if rest is not None and tail is not None:
        loss = loss + _expected(tail, tail - rest)
    return loss


def topk_reverse_kl(student: Tensor, teacher: Tensor, k: int) -> Tensor:
    """Reverse KL over the student's k words and one bucket for all others; logits (N, V), returns nats, shape (N,).

    A divergence of two distributions over k + 1 outcomes, so at most the full one, and equal to it at k = V.
    """
    ids = student.detach().topk(min(k, student.shape[-1]), dim=-1).indices
    log_z, teacher_z = student.logsumexp(-1), teacher.logsumexp(-1)
    p, q = student.gather(-1, ids) - log_z[:, None], teacher.gather(-1, ids) - teacher_z[:, None]
    loss = _expected(p, p - q).sum(-1)
    rest, tail = _tail(student, ids, log_z), _tail(teacher, ids, teacher_z)
    if rest is not None and tail is not None:
        loss = loss + _expected(rest, rest - tail)
    return loss


def k1(
    student: Tensor,
    teacher: Tensor,
    *,
    log_ratio_clip: float | None = None,
    sampling: Tensor | None = None,
    importance_clip: float | None = None,
    reward: Tensor | None = None,
    reward_mix: float = 1.0,
) -> Tensor:
    """Policy gradient on the sampled token with the advantage log π_T − log π_θ, held constant.

    Its gradient, averaged over tokens drawn from π_θ, is that of the reverse KL. The value is minus the advantage,
    times the importance ratio where there is one.

    Args:
        student, teacher: log-probability of each sampled token, shape (N,).
        log_ratio_clip: the advantage is clipped to ± this, in nats.
        sampling: log-probability under the policy that drew the token. None: that policy is the student.
        importance_clip: with `sampling`, the ratio π_θ / π_sampling is clipped to 1 ± this as in PPO
            (Schulman et al. 2017, arXiv 1707.06347, equation 7).
        reward: advantage of a verifier's reward, shape (N,).
        reward_mix: α of A = α A_OPD + (1 − α) A_reward.

    Returns:
        shape (N,).
    """
    advantage = (teacher - student).detach()
    if log_ratio_clip is not None:
        advantage = advantage.clamp(-log_ratio_clip, log_ratio_clip)
    if reward is not None:
        advantage = reward_mix * advantage + (1 - reward_mix) * reward
    ratio = (student - (student.detach() if sampling is None else sampling)).exp()
    gain = ratio * advantage
    if importance_clip is not None:
        gain = torch.minimum(gain, ratio.clamp(1 - importance_clip, 1 + importance_clip) * advantage)
    return -gain


def select_tokens(log_ratio: Tensor, share: float, how: Literal["log_ratio", "random"]) -> Tensor:
    """Weights that keep a share of N tokens and let the sum of a loss over them stand for the sum over all.

    Args:
        log_ratio: log π_θ − log π_T of the sampled tokens, shape (N,); "random" reads only its shape and device.
        share: of the tokens, at least one is kept.
        how: the largest |log_ratio|, or tokens drawn from torch's generator.

    Returns:
        N / (tokens kept) where a token is kept and 0 elsewhere, shape (N,), float32.
    """
    count = log_ratio.shape[0]
    kept = max(1, round(share * count))
    if kept >= count:
        return torch.ones(count, device=log_ratio.device)
    order = log_ratio.abs() if how == "log_ratio" else torch.rand(count).to(log_ratio.device)
    weights = torch.zeros(count, device=log_ratio.device)
    weights[order.topk(kept).indices] = count / kept
    return weights


def _expected(log_p: Tensor, value: Tensor) -> Tensor:
    """p · value, and 0 where p is 0, even if the value is infinite there."""
    return torch.where(log_p == -torch.inf, 0.0, log_p.exp() * value)


def _tail(logits: Tensor, ids: Tensor, log_z: Tensor) -> Tensor | None:
    """Log-probability of all words but `ids`; summed directly, since 1 − Σp loses a small tail to cancellation."""
    if ids.shape[-1] >= logits.shape[-1]:
        return None
    return logits.scatter(-1, ids, -torch.inf).logsumexp(-1) - log_z


@dataclass(frozen=True, eq=False)
class Head:
    """A language-model head, and what its model does to logits after it.

    Attributes:
        weight: shape (V, H). bias: shape (V,) or None.
        scale: factor on the logits (Cohere, Granite). softcap: bound of a tanh after it (Gemma).
        temperature: divides the logits last.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def project(self, hidden: Tensor, dtype: torch.dtype) -> Tensor:
        """Output of the head's matrix for hidden states (n, H), in float32 or better, shape (n, V)."""
        weight = self.weight.to(dtype)
        if dtype in (torch.bfloat16, torch.float16) and hidden.device.type == "cuda":
            logits = torch.mm(hidden.to(dtype), weight.t(), out_dtype=torch.float32)
        else:
            logits = hidden.to(dtype) @ weight.t()
        if dtype != torch.float64:
            logits = logits.float()
        return logits if self.bias is None else logits + self.bias

    def finish(self, logits: Tensor) -> Tensor:
        """Scale, soft cap and temperature."""
        if self.scale != 1:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * (logits / self.softcap).tanh()
        return logits if self.temperature == 1 else logits / self.temperature

    def cast(self, dtype: torch.dtype) -> Head:
        """The head with its matrix in a dtype, without gradient: cast once and not in every chunk."""
        bias = None if self.bias is None else self.bias.detach()
        return Head(self.weight.detach().to(dtype), bias, self.scale, self.softcap, self.temperature)


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype that a matrix product of these hidden states runs in: autocast's where it is on."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def chunks(count: int, words: int) -> list[slice]:
    """Slices of `count` tokens, each of about 2²⁴ logits over `words` words, as even as possible."""
    parts = -(-count * words // _CHUNK)
    size = -(-count // parts) if parts else 1
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def chunked_loss(
    hidden: Tensor, head: Head, loss: Callable[[Tensor, slice], Tensor], weights: Tensor | None = None
) -> Tensor:
    """Σ wᵢ · lossᵢ over tokens, from the student's hidden states.

    The gradient is computed with the value, chunk by chunk, while a chunk's logits are there: they are computed once,
    not again in the backward pass, and no more than one chunk of them exists.

    Args:
        hidden: shape (N, H).
        head: the student's; gradients flow to its weight and bias.
        loss: of a chunk of finished logits (n, V) and the slice of the N tokens that they are; returns shape (n,).
        weights: shape (N,), constants. None: all 1.

    Returns:
        a scalar, float32 or better.
    """
    return _ChunkedLoss.apply(hidden, head.weight, head.bias, head, loss, weights)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        loss: Callable[[Tensor, slice], Tensor],
        weights: Tensor | None,
    ) -> Tensor:
        dtype = compute_dtype(hidden)
        wide = torch.promote_types(dtype, torch.float32)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if needs_bias and bias is not None else None
        total = torch.zeros((), dtype=wide, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            narrow = head.cast(dtype)
            for part in chunks(hidden.shape[0], weight.shape[0]):
                states = hidden[part].to(dtype)
                logits = narrow.project(states, dtype).requires_grad_()
                with torch.enable_grad():
                    losses = loss(narrow.finish(logits), part)
                    value = (losses if weights is None else losses * weights[part]).sum()
                total += value.detach()
                if not (needs_hidden or needs_weight or needs_bias):
                    continue
                (grad,) = torch.autograd.grad(value, logits)
                if grad_bias is not None:
                    grad_bias += grad.sum(0)
                # float16 has too few exponents for a gradient that the scaler has not scaled yet.
                narrow_grad = grad if dtype == torch.float16 else grad.to(dtype)
                del losses, value, logits, grad
                if grad_hidden is not None:
                    grad_hidden[part] = narrow_grad @ narrow.weight.to(narrow_grad.dtype)
                if grad_weight is not None:
                    grad_weight += narrow_grad.t() @ states.to(narrow_grad.dtype)
        ctx.grads = grad_hidden, grad_weight, grad_bias
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> tuple[Tensor | None, ...]:
        (grad,) = outputs
        hidden, weight, bias = ctx.grads
        del ctx.grads
        return (
            None if hidden is None else hidden.mul_(grad),
            None if weight is None else weight.mul_(grad).to(ctx.dtypes[0]),
            None if bias is None else bias.mul_(grad).to(ctx.dtypes[1]),
            None,
            None,
            None,
        )
