"""Our GRPO against TRL's own method on our tensors, where TRL is installed (pip install trl)."""

from types import SimpleNamespace

import pytest
import torch
from test_losses import grpo_batch

import losses

trl = pytest.importorskip("trl", reason="TRL is not installed: pip install trl to compare with its GRPO loss")


def trl_trainer(clip, kl):
    """What `GRPOTrainer._compute_loss` reads of its trainer, without its model, data and accelerator."""
    accelerator = SimpleNamespace(
        gather=lambda x: x,
        gather_for_metrics=lambda x: x,
        reduce=lambda x, reduction: x,
        num_processes=1,
        sync_gradients=True,
    )
    return SimpleNamespace(
        beta=kl, epsilon_low=clip, epsilon_high=clip, loss_type="grpo", importance_sampling_level="token",
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False,
        vllm_importance_sampling_correction=False, use_liger_kernel=False, _entropy_bonus_enabled=False,
        model=SimpleNamespace(training=True), current_gradient_accumulation_steps=1, accelerator=accelerator,
        _metrics={"train": _Lists()}, max_completion_length=5,
    )  # fmt: skip


class _Lists(dict):
    def __missing__(self, key):
        self[key] = []
        return self[key]


@pytest.mark.parametrize("kl", [0.0, 0.04, 0.2])
@pytest.mark.parametrize("clip", [0.1, 0.2])
def test_loss_gradient_clipped_share_and_kl_equal_trls(clip, kl):
    token_logp, old, ref, advantage, mask = grpo_batch()
    ours, theirs = token_logp.clone().requires_grad_(), token_logp.clone().requires_grad_()
    loss, clipped, k3 = losses.grpo_loss(ours, old, ref, advantage, mask, clip, kl)
    loss.mean().backward()

    trainer = trl_trainer(clip, kl)
    trainer._get_per_token_logps_and_entropies = lambda *a, **k: (theirs, torch.zeros_like(theirs), None)
    ids = torch.zeros(4, 5, dtype=torch.long)
    inputs = {
        "prompt_ids": ids, "prompt_mask": ids + 1, "completion_ids": ids, "completion_mask": mask.long(),
        "advantages": advantage, "old_per_token_logps": old, "ref_per_token_logps": ref,
    }  # fmt: skip
    expected = trl.GRPOTrainer._compute_loss(trainer, None, inputs)
    expected.backward()

    assert loss.mean().item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-6) and ours.grad.abs().max() > 0.01
    # TRL's log is a mean over tokens, ours over answers.
    logged, weight = trainer._metrics["train"], mask.sum(1) / mask.sum()
    assert (clipped * weight).sum().item() == pytest.approx(logged["clip_ratio/region_mean"][0], rel=1e-5)
    if kl:
        assert (k3 * weight).sum().item() == pytest.approx(logged["kl"][0], rel=1e-4)


def test_advantages_differ_from_trls_only_in_the_standard_deviation():
    rewards = torch.tensor([[2.0, 0.0, 0.5, 1.5]])
    n = rewards.shape[1]
    std = trl.trainer.utils.nanstd(rewards, dim=1, keepdim=True)
    theirs = (rewards - rewards.mean(1, keepdim=True)) / (std + 1e-4)
    assert torch.allclose(losses.group_advantages(rewards), theirs * (n / (n - 1)) ** 0.5, rtol=1e-3)
