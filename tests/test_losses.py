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
    total = losses.dpo_loss(w, rejected, w, rejected, 0.3)[0] + losses.image_loss(w, distorted, w, distorted, 0.3)[0]
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


@pytest.mark.parametrize(
    ("text", "image", "expected"),
    [([2.0, 2.06], [0.3, 0.4], 0.35 / 2.03), ([1.0, 3.0], [4.0, 4.0], 0.5), ([1.0], [-2.0], -2.0), ([3.0], [3.0], 1.0)],
)
def test_fairness(text, image, expected):
    assert losses.fairness(torch.tensor(text), torch.tensor(image)).item() == pytest.approx(expected)


def test_fairness_is_undefined_where_nothing_is_preferred():
    assert math.isnan(losses.fairness(torch.zeros(3), torch.zeros(3)))
    assert math.isnan(losses.fairness(torch.tensor([-1.0]), torch.tensor([-2.0])))


def test_information_gain_is_a_mean_over_answer_tokens_only():
    with_image = torch.tensor([[-1.0, -2.0, -9.0], [-0.5, -0.5, -0.5]])
    blank = torch.tensor([[-3.0, -3.0, -1.0], [-1.0, -1.5, -2.0]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    gain = losses.information_gain(with_image, blank, mask)
    assert gain.tolist() == pytest.approx([((3 - 1) + (3 - 2)) / 2, (0.5 + 1.0 + 1.5) / 3])
