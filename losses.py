"""
Every equation of both papers, once, on tensors only: nothing here knows a model or a file.

Notation (as in the papers): m image, m' distorted image, x question, y_w chosen answer, y_l rejected answer,
pi the policy, ref the policy before training. A log-probability ("logp") is summed over the tokens of an answer,
its end-of-sequence token included, in nats. The log-ratio is h(y|x,m) = log pi(y|x,m) - log ref(y|x,m);
beta * h is the implicit reward. Each loss returns one value per record: the training loop alone averages.
"""

import torch
import torch.nn.functional as F


def _check(*tensors):
    """All (B,) or all (B, T), and at least float32: bfloat16 resolves 100 nats only to 0.5, more than most margins."""
    assert all(t.shape == tensors[0].shape for t in tensors), [tuple(t.shape) for t in tensors]
    assert all(t.dtype in (torch.float32, torch.float64) for t in tensors), [t.dtype for t in tensors]


# ------------------------------------------------------------------------------------------------------- MFPO


def dpo_loss(policy_w, policy_l, ref_w, ref_l, beta):
    """L_text of MFPO (arXiv:2410.15334), which is DPO, Eq. 7 of Rafailov et al. 2023 (arXiv:2305.18290).

        L_text = -log sigmoid(beta * h(y_w|x,m) - beta * h(y_l|x,m))

    policy_w, policy_l, ref_w, ref_l   (B,) float32 nats, log-probabilities of the answers
    beta                               > 0; larger keeps pi closer to ref
    returns  loss (B,) and the reward margin beta * [h(y_w) - h(y_l)] (B,), detached, for the log

    With pi == ref the loss is ln 2 = 0.6931: the trainer checks this at step 0.
    """
    _check(policy_w, policy_l, ref_w, ref_l)
    margin = beta * (policy_w - ref_w) - beta * (policy_l - ref_l)  # (B,)
    return -F.logsigmoid(margin), margin.detach()


def image_loss(policy_w, policy_w_distorted, ref_w, ref_w_distorted, beta):
    """L_image of MFPO: the same answer y_w is preferred on the image m over the distorted image m'.

        L_image = -log sigmoid(beta * h(y_w|x,m) - beta * h(y_w|x,m'))

    policy_w, ref_w                       (B,) float32 nats, log-probabilities of y_w given m
    policy_w_distorted, ref_w_distorted   (B,) float32 nats, log-probabilities of y_w given m'
    returns  loss (B,) and the reward margin (B,), detached

    It is DPO's equation with the image in the place of the answer, so the arithmetic is DPO's.
    """
    return dpo_loss(policy_w, policy_w_distorted, ref_w, ref_w_distorted, beta)


def margin_loss(policy_w, ref_w, beta, eta):
    """L_margin of MFPO: holds up the likelihood of the chosen answer, which DPO alone lets fall.

        L_margin = -log sigmoid(beta * h(y_w|x,m) - eta)

    policy_w, ref_w   (B,) float32 nats;   eta   nats of reward, the paper's best is 0
    returns  loss (B,) and the reward beta * h(y_w) - eta (B,), detached

    With eta = 0 the sum of the three losses is mDPO's (arXiv:2406.11839).
    """
    _check(policy_w, ref_w)
    margin = beta * (policy_w - ref_w) - eta  # (B,)
    return -F.logsigmoid(margin), margin.detach()


def fairness(text_margin, image_margin):
    """How evenly a model was tuned on its two modalities: 1 is even, 0 or less means one of them was ignored.

        fairness = min(mean R_text, mean R_image) / max(mean R_text, mean R_image)

    text_margin    (...) nats, the mean of h(y_w|m) - h(y_l|m) over held-out records
    image_margin   (...) nats, the mean of h(y_w|m) - h(y_w|m'); a common factor such as beta cancels
    returns  (...) in (-inf, 1]; nan where the larger mean is not positive (an untrained policy prefers nothing)

    DEVIATION: MFPO shows a bar chart of both mean rewards; the ratio is ours.
    """
    _check(text_margin, image_margin)
    low, high = torch.minimum(text_margin, image_margin), torch.maximum(text_margin, image_margin)
    return torch.where(high > 0, low / high, torch.full_like(high, torch.nan))


# ------------------------------------------------------------------------------------------------------- MBPO


def information_gain(token_logp, blank_token_logp, mask):
    """Image information gain of MBPO (arXiv:2506.08022): how much the image helps to say the answer.

        IIG = 1/T * sum_t [log pi(y_t|x,m,y_<t) - log pi(y_t|x,blank,y_<t)]

    token_logp, blank_token_logp   (B, T) float32 nats, with the image and with the image blanked
    mask                           (B, T) bool, True at the answer's tokens
    returns  (B,) nats per token

    DEVIATION: this form is ours: the paper's could not be found. Blank is the processor's mean colour.
    """
    _check(token_logp, blank_token_logp)
    gain = torch.where(mask, token_logp - blank_token_logp, 0.0)  # (B, T)
    return gain.sum(1) / mask.sum(1)


def group_advantages(rewards):
    """How much better each answer is than the others to the same question, MBPO's GRPO (Shao et al. 2024,
    arXiv:2402.03300, Section 4.1.2).

        A_i = (r_i - mean(r)) / (std(r) + 1e-4)

    rewards   (N, G) float32, G answers to each of N questions
    returns   (N, G), no unit; zeros for a group of equal rewards, from which nothing can be learnt

    The standard deviation is over n, so that a pair with rewards {2, 0} gets {+1, -1}; over n - 1, as some public
    codes have it, these would be {+0.71, -0.71}.
    """
    _check(rewards)
    assert rewards.ndim == 2, tuple(rewards.shape)
    centred = rewards - rewards.mean(1, keepdim=True)
    advantages = centred / (rewards.std(1, correction=0, keepdim=True) + 1e-4)
    equal = (rewards == rewards[:, :1]).all(1, keepdim=True)  # asked exactly: the mean of equal numbers is rounded
    return torch.where(equal, 0.0, advantages)


def kl_k3(token_logp, ref_token_logp):
    """An estimate of KL(pi || ref) from the tokens that were said, GRPO Eq. 4; never negative ("k3", Schulman 2020).

        k3 = exp(d) - d - 1,   d = log ref(y_t) - log pi(y_t)

    token_logp, ref_token_logp   (A, T) float32 nats
    returns  (A, T) nats; its gradient with respect to token_logp is 1 - exp(d)
    """
    _check(token_logp, ref_token_logp)
    d = ref_token_logp - token_logp
    return torch.expm1(d) - d  # exp(d) - 1 in one step: near d = 0 the subtraction would leave only rounding


def grpo_loss(token_logp, old_token_logp, ref_token_logp, advantage, mask, clip, kl):
    """The loss of MBPO (arXiv:2506.08022), which is GRPO, Eq. 3 of Shao et al. 2024, for each answer of a group.

        loss_i = -mean_t { min[rho_t A_i, clip(rho_t, 1 - e, 1 + e) A_i] - kl * k3_t },   rho_t = exp(logp - logp_old)

    token_logp       (A, T) float32 nats, of the A answers of some groups under the policy
    old_token_logp   (A, T) the same when the answers were said, a constant. DEVIATION: no policy of ours said
                     the offline answers; what stands for them here is ours, the policy before the update
    ref_token_logp   (A, T) the same under the frozen reference
    advantage        (A,)   from `group_advantages`;   mask  (A, T) bool, True at the answer's tokens
    clip             e, how far the ratio rho may count;   kl  weight of the KL term
    returns  loss (A,); for the log, detached: the share of tokens that are clipped (A,) and the mean KL (A,),
             nats

    With one update per rollout rho is 1, the loss is -A_i, and clipping never acts: only the KL term and the learning
    rate then bound how far offline answers, whose advantages never shrink, push the policy.
    """
    _check(token_logp, old_token_logp, ref_token_logp)
    assert mask.shape == token_logp.shape and advantage.shape == mask.shape[:1]

    def mean(values):  # over the answer's tokens
        return torch.where(mask, values, 0.0).sum(1) / mask.sum(1)

    ratio = torch.exp(token_logp - old_token_logp)  # (A, T)
    A = advantage[:, None]
    k3 = kl_k3(token_logp, ref_token_logp)
    gain = torch.minimum(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A)
    clipped = ((ratio > 1 + clip) & (A > 0)) | ((ratio < 1 - clip) & (A < 0))
    return -mean(gain - kl * k3), mean(clipped.float()).detach(), mean(k3).detach()
