"""The losses of on-policy distillation against naive float64 twins, and what must hold of them exactly."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deltalens.train import losses
from deltalens.train.losses import (
    Head,
    chunked_loss,
    forward_kl,
    jsd,
    k1,
    reverse_kl,
    select_tokens,
    teacher_top,
    topk_forward_kl,
    topk_reverse_kl,
)

N, V = 7, 23


def logits(seed: int, *, scale: float = 2.0, words: int = V) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(N, words, generator=generator, dtype=torch.float64) * scale for _ in range(2))
    return student.requires_grad_(), teacher


def kl(p: list[float], q: list[float]) -> float:
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def softmax(row: Tensor) -> list[float]:
    powers = [math.exp(x) for x in row.tolist()]
    total = math.fsum(powers)
    return [x / total for x in powers]


def bucketed(p: list[float], ids: list[int]) -> list[float]:
    return [p[i] for i in ids] + [math.fsum(x for i, x in enumerate(p) if i not in ids)]


def naive(name: str, student: Tensor, teacher: Tensor, k: int = 5) -> list[float]:
    """One token at a time, in Python numbers."""
    found = []
    for s, t in zip(student.detach(), teacher, strict=True):
        p, q = softmax(s), softmax(t)
        mixed = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
        best = {"topk_forward_kl": q, "topk_reverse_kl": p}.get(name, p)
        ids = sorted(range(len(p)), key=best.__getitem__, reverse=True)[:k]
        found.append(
            {
                "reverse_kl": lambda p=p, q=q: kl(p, q),
                "forward_kl": lambda p=p, q=q: kl(q, p),
                "jsd": lambda p=p, q=q, m=mixed: (kl(p, m) + kl(q, m)) / 2,
                "topk_forward_kl": lambda p=p, q=q, i=ids: kl(bucketed(q, i), bucketed(p, i)),
                "topk_reverse_kl": lambda p=p, q=q, i=ids: kl(bucketed(p, i), bucketed(q, i)),
            }[name]()
        )
    return found


def ours(name: str, student: Tensor, teacher: Tensor, k: int = 5) -> Tensor:
    if name == "topk_forward_kl":
        return topk_forward_kl(student, *teacher_top(teacher, k))
    if name == "topk_reverse_kl":
        return topk_reverse_kl(student, teacher, k)
    return {"reverse_kl": reverse_kl, "forward_kl": forward_kl, "jsd": jsd}[name](student, teacher)


DIVERGENCES = ["reverse_kl", "forward_kl", "jsd", "topk_forward_kl", "topk_reverse_kl"]


@pytest.mark.parametrize("name", DIVERGENCES)
def test_value_and_gradient_are_the_naive_ones(name: str) -> None:
    student, teacher = logits(0)
    value = ours(name, student, teacher)
    assert value.tolist() == pytest.approx(naive(name, student, teacher), abs=1e-12)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    step = 1e-6
    for place in range(0, V, 4):
        moved = torch.zeros(V, dtype=torch.float64)
        moved[place] = step
        with torch.no_grad():
            high, low = naive(name, student + moved, teacher), naive(name, student - moved, teacher)
        slope = [(a - b) / (2 * step) for a, b in zip(high, low, strict=True)]
        assert gradient[:, place].tolist() == pytest.approx(slope, abs=1e-8)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_an_equal_student_has_no_loss_and_no_gradient(name: str) -> None:
    student, _ = logits(1)
    value = ours(name, student, student.detach().clone())
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert value.abs().max() < 1e-14
    assert gradient.abs().max() < 1e-14


@pytest.mark.parametrize(("name", "full"), [("topk_forward_kl", forward_kl), ("topk_reverse_kl", reverse_kl)])
def test_top_k_rises_to_the_full_divergence(name: str, full: object) -> None:
    """Merging outcomes cannot raise a divergence (data processing); nothing is merged at k = V."""
    student, teacher = logits(2)
    whole = full(student, teacher)  # type: ignore[operator]
    before = torch.zeros(N, dtype=torch.float64)
    for k in range(1, V):
        value = ours(name, student, teacher, k).detach()
        assert (value >= before - 1e-13).all(), "a finer partition sees at least as much"
        assert (value <= whole + 1e-13).all()
        before = value
    for k in (V, V + 5):
        assert torch.allclose(ours(name, student, teacher, k), whole, rtol=0, atol=1e-13)
    gradients = [
        torch.autograd.grad(v.sum(), student)[0]
        for v in (ours(name, student, teacher, V), full(student, teacher))  # type: ignore[operator]
    ]
    assert torch.allclose(*gradients, rtol=0, atol=1e-13)


def test_a_tiny_tail_keeps_its_digits() -> None:
    """1 − Σp of a distribution this peaked is 0 in float32; the bucket is still there, and so is its gradient."""
    teacher = torch.full((1, V), -40.0)
    teacher[0, 3] = 0.0
    student = torch.zeros(1, V, requires_grad=True)
    *_, tail = teacher_top(teacher, 1)
    assert tail is not None
    assert tail.item() == pytest.approx(math.log(V - 1) - 40, rel=1e-6)
    value = topk_forward_kl(student, *teacher_top(teacher, 1))
    value.sum().backward()
    assert value.item() == pytest.approx(math.log(V), rel=1e-6)
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_an_empty_tail_counts_for_nothing() -> None:
    """An endpoint's k log-probabilities may sum to one: no mass is left, and log 0 must not become NaN."""
    student, teacher = logits(3)
    ids, values, _ = teacher_top(teacher, 4)
    certain = values.log_softmax(-1)
    value = topk_forward_kl(student, ids, certain, torch.full((N,), -torch.inf, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert value.isfinite().all()
    assert gradient.isfinite().all()


def test_k1_averaged_over_every_sample_has_the_gradient_of_reverse_kl() -> None:
    student, teacher = logits(4)
    (wanted,) = torch.autograd.grad(reverse_kl(student, teacher).sum(), student)
    logp, logq = student.log_softmax(-1), teacher.log_softmax(-1)
    average = torch.zeros(N, V, dtype=torch.float64)
    for word in range(V):
        loss = k1(logp[:, word], logq[:, word])
        weights = logp[:, word].exp().detach()
        average += torch.autograd.grad((weights * loss).sum(), student, retain_graph=True)[0]
    assert torch.allclose(average, wanted, rtol=0, atol=1e-14)


def test_k1_on_the_teachers_samples_is_corrected_by_the_importance_ratio() -> None:
    """Drawn from any policy μ, the ratio π/μ makes the average that of π; a wide clip changes nothing."""
    student, teacher = logits(5, scale=0.3)
    (wanted,) = torch.autograd.grad(reverse_kl(student, teacher).sum(), student)
    logp, logq = student.log_softmax(-1), teacher.log_softmax(-1)
    average = torch.zeros(N, V, dtype=torch.float64)
    for word in range(V):
        loss = k1(logp[:, word], logq[:, word], sampling=logq[:, word], importance_clip=100.0)
        average += torch.autograd.grad((logq[:, word].exp() * loss).sum(), student, retain_graph=True)[0]
    assert torch.allclose(average, wanted, rtol=0, atol=1e-13)


def test_k1_clips_and_mixes_as_written() -> None:
    own = torch.tensor([-1.0, -1.0, -1.0, -1.0], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([-0.5, -4.0, -0.5, -4.0], dtype=torch.float64)
    sampling = own.detach() - torch.tensor([0.5, 0.5, -0.5, -0.5], dtype=torch.float64)
    reward = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    loss = k1(own, teacher, log_ratio_clip=2.0, sampling=sampling, importance_clip=0.2, reward=reward, reward_mix=0.25)
    advantage = [0.25 * a + 0.75 * r for a, r in zip([0.5, -2.0, 0.5, -2.0], [1, 1, -1, -1], strict=True)]
    ratio = [math.exp(0.5)] * 2 + [math.exp(-0.5)] * 2
    wanted = [-min(r * a, min(max(r, 0.8), 1.2) * a) for r, a in zip(ratio, advantage, strict=True)]
    assert loss.tolist() == pytest.approx(wanted)
    loss.sum().backward()
    # Where the clipped term is the smaller one, the token has no gradient: the first moved too far already.
    assert own.grad is not None
    assert (own.grad == 0).tolist() == [advantage[0] > 0, advantage[1] > 0, advantage[2] < 0, advantage[3] < 0]


@given(st.integers(1, 60), st.floats(0.01, 1.0), st.sampled_from(["log_ratio", "random"]), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_selection_keeps_its_share_and_rescales(count: int, share: float, how: str, seed: int) -> None:
    torch.manual_seed(seed)
    ratio = torch.randn(count)
    weights = select_tokens(ratio, share, how)  # type: ignore[arg-type]
    kept = weights > 0
    assert int(kept.sum()) == max(1, round(share * count))
    assert weights.sum().item() == pytest.approx(count, rel=1e-5)
    if how == "log_ratio" and not kept.all():
        assert ratio[kept].abs().min() >= ratio[~kept].abs().max()


def test_a_random_selection_is_unbiased() -> None:
    """Over many draws the weighted sum is the plain one: within five standard errors of the mean, computed exactly."""
    torch.manual_seed(0)
    values, draws, count, kept = torch.randn(12), 4000, 12, 3
    sums = torch.stack([(select_tokens(values, kept / count, "random") * values).sum() for _ in range(draws)])
    # Variance of count × the mean of `kept` values drawn without replacement.
    spread = count * math.sqrt(values.var(correction=1).item() / kept * (1 - kept / count))
    assert abs(sums.mean().item() - values.sum().item()) < 5 * spread / math.sqrt(draws)
    assert sums.std().item() == pytest.approx(spread, rel=0.1)


@pytest.mark.parametrize("chunk", [5 * V, 1 << 24])
def test_chunks_give_the_loss_and_gradients_of_the_whole(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With everything a head can have: bias, scale, soft cap, temperature; and weights on the tokens."""
    monkeypatch.setattr(losses, "_CHUNK", chunk)
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, 6, dtype=torch.float64).requires_grad_() for n in (N, V))
    bias = torch.randn(V, dtype=torch.float64).requires_grad_()
    teacher, weights = torch.randn(N, V, dtype=torch.float64), torch.rand(N, dtype=torch.float64)
    head = Head(weight, bias, scale=0.7, softcap=3.0, temperature=1.5)
    seen: list[int] = []

    def loss(finished: Tensor, part: slice) -> Tensor:
        seen.append(len(finished))
        return reverse_kl(finished, teacher[part])

    value = 3 * chunked_loss(hidden, head, loss, weights)
    found = torch.autograd.grad(value, (hidden, weight, bias))
    assert seen == ([4, 3] if chunk == 5 * V else [7])
    whole = 3.0 * (0.7 * (hidden @ weight.t() + bias) / 3.0).tanh() / 1.5
    plain = 3 * (reverse_kl(whole, teacher) * weights).sum()
    wanted = torch.autograd.grad(plain, (hidden, weight, bias))
    assert value.item() == pytest.approx(plain.item(), abs=1e-12)
    for a, b in zip(found, wanted, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


def test_a_frozen_head_gets_no_gradient_and_no_tokens_give_zero() -> None:
    hidden = torch.randn(4, 6, requires_grad=True)
    head = Head(torch.randn(V, 6))
    chunked_loss(hidden, head, lambda x, _: x.logsumexp(-1)).backward()
    assert head.weight.grad is None
    assert hidden.grad is not None
    assert hidden.grad.abs().sum() > 0
    none = torch.zeros(0, 6, requires_grad=True)
    assert chunked_loss(none, head, lambda x, _: x.logsumexp(-1)).item() == 0
