"""Each loss and its gradient against plain floats, derived by hand. Nothing here needs transformers."""

import math

import pytest
import torch

import losses

ROWS = [(-5.0, -9.0, -6.0, -8.0), (-80.0, -3.0, -70.0, -4.0), (-1.0, -1.0, -1.0, -1.0)]


def columns():
    return [torch.tensor(c, requires_grad=True) for c in zip(*ROWS, strict=True)]


@pytest.mark.parametrize("loss_of", [losses.dpo_loss, losses.image_loss])
@pytest.mark.parametrize("beta", [0.1, 0.3])
def test_preference_losses_and_gradients(loss_of, beta):
    policy_w, policy_l, ref_w, ref_l = columns()
    loss, margin = loss_of(policy_w, policy_l, ref_w, ref_l, beta)
    loss.sum().backward()
    for i, (pw, pl, rw, rl) in enumerate(ROWS):
        z = beta * ((pw - rw) - (pl - rl))
        assert math.isclose(loss[i].item(), math.log1p(math.exp(-z)), rel_tol=1e-5)
        assert math.isclose(margin[i].item(), z, rel_tol=1e-5, abs_tol=1e-7)
        assert math.isclose(policy_w.grad[i].item(), -beta / (1 + math.exp(z)), rel_tol=1e-5)
        assert math.isclose(policy_l.grad[i].item(), beta / (1 + math.exp(z)), rel_tol=1e-5)
    assert not margin.requires_grad


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_margin_loss_and_gradient(eta):
    beta = 0.3
    policy_w, _, ref_w, _ = columns()
    loss, margin = losses.margin_loss(policy_w, ref_w, beta, eta)
    loss.sum().backward()
    for i, (pw, _, rw, _) in enumerate(ROWS):
        z = beta * (pw - rw) - eta
        assert math.isclose(loss[i].item(), math.log1p(math.exp(-z)), rel_tol=1e-5)
        assert math.isclose(margin[i].item(), z, rel_tol=1e-5, abs_tol=1e-7)
        assert math.isclose(policy_w.grad[i].item(), -beta / (1 + math.exp(z)), rel_tol=1e-5)
    assert not margin.requires_grad


def test_policy_equal_to_reference_gives_three_ln_two():
    w, rejected, distorted = torch.tensor([-3.0]), torch.tensor([-7.0]), torch.tensor([-9.0])
    total = losses.dpo_loss(w, rejected, w, rejected, 0.3)[0]
    total = total + losses.image_loss(w, distorted, w, distorted, 0.3)[0]
    total = total + losses.margin_loss(w, w, 0.3, 0.0)[0]
    assert math.isclose(total.item(), 2.0794415, rel_tol=1e-6)


def test_losses_stay_finite_far_out():
    far = torch.tensor([-1e4], requires_grad=True)
    loss, _ = losses.dpo_loss(far, torch.zeros(1), torch.zeros(1), torch.zeros(1), 1.0)
    loss.sum().backward()
    assert loss.item() == pytest.approx(1e4) and far.grad.item() == pytest.approx(-1.0)


def test_half_precision_is_refused():
    with pytest.raises(AssertionError):
        losses.dpo_loss(*[torch.zeros(2, dtype=torch.bfloat16)] * 4, 0.1)


EVEN = 0.35 / 2.03
FAIR = [(2.03, 0.35, EVEN), (0.35, 2.03, EVEN), (2.0, 4.0, 0.5), (1.0, -2.0, -2.0), (3.0, 3.0, 1.0)]
# Fairness is undefined where no mean margin is positive.
NOBODY_PREFERS = [(0.0, 0.0), (-1.0, -2.0), (0.0, -1.0)]


@pytest.mark.parametrize(("text", "image", "expected"), FAIR)
def test_fairness_of_two_mean_margins(text, image, expected):
    fair = losses.fairness(torch.tensor(text), torch.tensor(image))
    assert fair.shape == () and fair.item() == pytest.approx(expected)


@pytest.mark.parametrize(("text", "image"), NOBODY_PREFERS)
def test_fairness_is_undefined_where_nothing_is_preferred(text, image):
    assert math.isnan(losses.fairness(torch.tensor(text), torch.tensor(image)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fairness_of_many_resamples_is_that_of_each(dtype):
    cases = [*FAIR, *((*pair, math.nan) for pair in NOBODY_PREFERS)]
    text, image, expected = torch.tensor(cases, dtype=dtype).T.reshape(3, 2, 4)
    fair = losses.fairness(text, image)
    assert fair.dtype == dtype and torch.allclose(fair, expected, equal_nan=True)
    # beta cancels: margins in nats and rewards say the same
    assert torch.allclose(losses.fairness(0.1 * text, 0.1 * image), expected, equal_nan=True)
    with pytest.raises(AssertionError):
        losses.fairness(text, image[0])


def test_information_gain_is_a_mean_over_answer_tokens_only():
    with_image = torch.tensor([[-1.0, -2.0, -9.0], [-0.5, -0.5, -0.5]])
    blank = torch.tensor([[-3.0, -3.0, -1.0], [-1.0, -1.5, -2.0]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    gain = losses.information_gain(with_image, blank, mask)
    assert gain.tolist() == pytest.approx([((3 - 1) + (3 - 2)) / 2, (0.5 + 1.0 + 1.5) / 3])


# ------------------------------------------------------------------------------------------------------- GRPO


def test_advantages_by_hand():
    rewards = torch.tensor([[2.0, 0.0], [1.5, 1.5]])
    expected = [1 / 1.0001, -1 / 1.0001, 0.0, 0.0]
    assert losses.group_advantages(rewards).flatten().tolist() == pytest.approx(expected)
    group = [1.5, 0.5, 0.0, 1.0]
    mean = sum(group) / 4
    std = (sum((r - mean) ** 2 for r in group) / 4) ** 0.5  # over n, not n - 1
    advantages = losses.group_advantages(torch.tensor([group]))[0].tolist()
    assert advantages == pytest.approx([(r - mean) / (std + 1e-4) for r in group], rel=1e-5)


def test_a_group_of_equal_rewards_has_no_advantage_at_all():
    tenths = torch.full((1, 7), 0.1)
    assert tenths.mean() != tenths[0, 0], "this mean is exact here: take another number of rewards"
    assert losses.group_advantages(tenths).tolist() == [[0.0] * 7]
    nearly = losses.group_advantages(torch.tensor([[0.1, 0.1, 0.2]]))
    assert nearly.abs().min() > 0.5


@pytest.mark.parametrize("d", [-2.0, -1e-4, 0.0, 1e-4, 0.5, 3.0])
def test_k3_and_its_gradient(d):
    logp = torch.tensor([[-1.0]], dtype=torch.float64, requires_grad=True)
    k3 = losses.kl_k3(logp, logp.detach() + d)
    k3.sum().backward()
    assert k3.item() == pytest.approx(math.exp(d) - d - 1, abs=1e-15) and k3.item() >= 0
    assert logp.grad.item() == pytest.approx(1 - math.exp(d), abs=1e-12)


def test_k3_averages_to_the_true_kl():
    p, q = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]], dtype=torch.float64)
    true = sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True))
    assert (p * losses.kl_k3(p.log(), q.log())).sum().item() == pytest.approx(true, rel=1e-9)


GRPO_CASES = [  # logp, old, ref, advantage, one token each: on both sides of the clip, with either sign
    (-1.0, -1.0, -1.0, 1.0),
    (-1.0, -1.0, -1.5, -1.0),
    (-0.5, -1.0, -0.7, 1.0),  # ratio 1.65, clipped: no gradient but the KL's
    (-0.5, -1.0, -0.7, -1.0),  # ratio 1.65, not clipped: a likelier wrong answer is pushed down in full
    (-1.5, -1.0, -0.7, 1.0),  # ratio 0.61, not clipped
    (-1.5, -1.0, -0.7, -1.0),  # ratio 0.61, clipped
    (-1.1, -1.0, -2.0, 0.7),
]


@pytest.mark.parametrize("kl", [0.0, 0.04])
@pytest.mark.parametrize(("logp", "old", "ref", "advantage"), GRPO_CASES)
def test_grpo_of_one_token_and_its_gradient(logp, old, ref, advantage, kl):
    e, token_logp = 0.2, torch.tensor([[logp]], requires_grad=True)
    tensors = torch.tensor([[old]]), torch.tensor([[ref]]), torch.tensor([advantage]), torch.tensor([[True]])
    loss, clipped, k3 = losses.grpo_loss(token_logp, *tensors, e, kl)
    loss.sum().backward()
    ratio = math.exp(logp - old)
    is_clipped = ratio > 1 + e if advantage > 0 else ratio < 1 - e
    bounded = (1 + e if advantage > 0 else 1 - e) if is_clipped else ratio
    by_hand = -(bounded * advantage) + kl * (math.exp(ref - logp) - (ref - logp) - 1)
    gradient = -(0.0 if is_clipped else ratio * advantage) + kl * (1 - math.exp(ref - logp))
    assert loss.item() == pytest.approx(by_hand, rel=1e-5, abs=1e-7)
    assert token_logp.grad.item() == pytest.approx(gradient, rel=1e-5, abs=1e-7)
    assert clipped.item() == float(is_clipped) and not clipped.requires_grad and not k3.requires_grad
    assert k3.item() == pytest.approx(math.exp(ref - logp) - (ref - logp) - 1, rel=1e-4)


def grpo_batch(seed=0):
    """Four answers of unequal length, ratios on both sides of the clip, rubbish where the mask is False."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(5) < torch.tensor([[5], [2], [3], [1]])
    token_logp = -2 * torch.rand(4, 5, generator=g)
    old, ref = (token_logp + 0.4 * torch.randn(4, 5, generator=g) for _ in range(2))
    return token_logp, old, ref, torch.tensor([1.2, -0.8, 0.5, -1.5]), mask


def test_grpo_is_a_mean_over_the_tokens_of_each_answer():
    token_logp, old, ref, advantage, mask = grpo_batch()
    loss, clipped, k3 = losses.grpo_loss(token_logp, old, ref, advantage, mask, 0.2, 0.04)
    for i, length in enumerate([5, 2, 3, 1]):
        tokens = []
        for t in range(length):
            one = [x[i : i + 1, t : t + 1] for x in (token_logp, old, ref)]
            parts = losses.grpo_loss(*one, advantage[i : i + 1], torch.tensor([[True]]), 0.2, 0.04)
            tokens.append([part.item() for part in parts])
        by_hand = [sum(column) / length for column in zip(*tokens, strict=True)]
        assert [loss[i].item(), clipped[i].item(), k3[i].item()] == pytest.approx(by_hand, rel=1e-4, abs=1e-6)


def test_one_update_per_rollout_starts_at_minus_the_advantage():
    token_logp, _, _, advantage, mask = grpo_batch()
    same = token_logp.detach().clone()
    loss, clipped, k3 = losses.grpo_loss(token_logp.requires_grad_(), same, same, advantage, mask, 0.2, 0.04)
    loss.sum().backward()
    assert torch.allclose(loss, -advantage) and clipped.sum() == 0 and k3.sum() == 0
    # d rho = d logp where rho = 1
    by_hand = torch.where(mask, -advantage[:, None] / mask.sum(1, keepdim=True), 0.0)
    assert torch.allclose(token_logp.grad, by_hand)
