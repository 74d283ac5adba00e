"""
MBPO (arXiv:2506.08022): GRPO on a mix of pairs mined with an attack on the image and of closed-ended questions that
the policy answers itself and a rule rewards.

    laptop   torchrun train_mbpo.py
    8 GPUs   torchrun --standalone --nproc_per_node=8 train_mbpo.py --model <hf id or folder> --data <folder> \
                 --groups_per_gpu 2 --learning_rate 1e-6 --recompute True

reads    <data>/mbpo.jsonl and <data>/mbpo_closed.jsonl with their images (format: data.py)
writes   out/<run>/{config.json, metrics.jsonl, step_00050/, final/, eval.json}; continue with --resume out/<run>
expect   laptop: CHAIR_s .51 -> .20, yes/no about partners .59 -> .95 in 1 to 2 minutes (README.md)
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist

import build_data
import data
import eval
import hub
import model
import rewards
import runtime
from losses import group_advantages, grpo_loss
from runtime import Mistake, knob, say


@dataclass
class Config:
    # What is trained on what
    model: str = knob("toy", "'toy' (<data>/base, built here if missing) or a Hugging Face LLaVA folder or id")
    data: str = knob("data/toy", "folder with mbpo.jsonl, or a JSONL file; the built-in world is built if missing")
    questions: str = knob("", "JSONL of closed-ended questions; empty: <data>_closed.jsonl, beside the records")
    convention: Literal["", "original", "hub"] = knob("", "how the model sees and is asked; empty: its folder's own")
    out: str = knob("", "folder of this run; empty: the next free out/mbpo-<n>")
    resume: str = knob("", "folder of a run to continue; all settings come from it")
    max_length: int = knob(2048, "tokens of image, question and answer; a longer record is an error, never cut")
    # The method
    online_fraction: float = knob(0.5, "share of a step's groups that are questions; 0: mined pairs only, 1: none")
    group: int = knob(8, "answers sampled for each question, G; peers use 8")
    format_reward: float = knob(0.5, "reward for an answer in the asked form, nothing else; a right one has 1; ours")
    answer_words: int = knob(0, "words of an answer that still has the form; 0: those asked for, no more (limit: ours)")
    clip: float = knob(0.2, "how far the ratio to the sampling policy may count; a usual value")
    kl: float = knob(0.2, "weight of the KL term; ours: on the toy the usual 0.04 costs 12 points of recall")
    updates_per_rollout: int = knob(1, "optimizer steps on the same groups; with 1 the ratio is 1, never clipped")
    max_new_tokens: int = knob(16, "tokens of a sampled answer")
    steps: int = knob(300, "rollouts, each with its updates")
    # The optimiser
    learning_rate: float = knob(1e-4, "peak, then a half cosine to a tenth; our choice for the toy (7B: 1e-6)")
    warmup_steps: int = knob(10, "linear warm-up")
    weight_decay: float = knob(0.0, "on matrices only")
    clip_norm: float = knob(1.0, "largest global gradient norm; a usual value")
    train_vision: bool = knob(False, "train the vision tower too")
    lora_rank: int = knob(0, "train adapters of this rank, not the weights (one GPU of 24 to 48 GB); 0: weights")
    recompute: bool = knob(False, "keep few activations and compute them again: a third more time, far less memory")
    groups_per_step: int = knob(16, "groups (pairs and questions) per rollout over all processes")
    groups_per_gpu: int = knob(0, "groups per forward pass, fewer when memory runs out; 0: a process's share")
    # Keeping
    seed: int = knob(0, "seed of order and samples, and, where they are built, of the toy's scenes and base model")
    save_every: int = knob(50, "steps between checkpoints")
    eval_split: Literal["test", "val", "none"] = knob("test", "toy scenes for the table; tune on val only")

    def __post_init__(self):
        positive = "clip updates_per_rollout max_new_tokens steps learning_rate clip_norm groups_per_step save_every"
        zero = "answer_words format_reward kl weight_decay warmup_steps lora_rank groups_per_gpu seed online_fraction"
        runtime.check(self, positive=f"{positive} max_length", not_negative=zero)
        if self.lora_rank and self.train_vision:
            raise Mistake("--train_vision and --lora_rank: adapters leave the tower as it is. Drop one of them")
        if self.online_fraction > 1:
            raise Mistake(f"--online_fraction {self.online_fraction}: a share in [0, 1]")
        if self.group < 2:
            raise Mistake(f"--group {self.group}: an answer is judged against the others of its group: at least 2")
        online = self.online_fraction * self.groups_per_step
        if abs(online - round(online)) > 1e-9:
            near = " and ".join(f"{n / self.groups_per_step:g}" for n in (math.floor(online), math.ceil(online)))
            makes = f"of --groups_per_step {self.groups_per_step} makes no integer number of groups"
            raise Mistake(f"--online_fraction {self.online_fraction} {makes}; the nearest fractions are {near}")


@dataclass
class Group:
    """Some answers to one question about one image, with what the update needs to know of them."""

    row: data.Row
    pixels: torch.Tensor  # (3, H, W) in [0, 1]
    rewards: torch.Tensor  # (G,)
    ref_logp: list  # G lists of log-probabilities of the answers' tokens under the frozen reference, float32 nats
    mined: bool  # a pair, which no policy of ours said
    said_logp: list  # the same as the sampler computed them; of a pair, those of the reference again


# MBPO's fixed rewards of a mined pair: the paper has 2 for the chosen answer, the 0 is ours. In a normalised
# group of two the 2 has no effect: the advantages are +1 and -1 whatever it is.
PAIR_REWARDS = (2.0, 0.0)


def reward(text, ended, question, config):
    """The verified rewards of a sampled answer, not yet weighted: {"correct", "format"}, each 0 or 1. The paper's term
    is for format and length: an answer that is longer than asked for, or that was cut off, has no format reward.
    """
    correct = rewards.is_right(text, question)
    form = ended and rewards.in_form(text, question, config.answer_words)
    return {"correct": float(correct), "format": float(form)}


def mbpo(token_logp, old, ref, rewards, mask, config):
    """MBPO's loss of N groups with A answers together, one value a group; the loop alone averages.

        A_i = (r_i - mean(r)) / std(r),   loss = 1/G sum_i grpo_loss_i        (losses.py)

    token_logp, old, ref   (A, T) float32 nats under the policy, the policy before the update, the reference
    rewards                N tensors (G_n,), a mined pair being a group of two;   mask  (A, T) bool
    returns                loss (N,), and named parts (N,) for the log: share of clipped tokens, KL (nats a token)
    """
    sizes = [len(r) for r in rewards]
    advantages = torch.cat([group_advantages(r[None])[0] for r in rewards]).to(mask.device)  # (A,)
    answers = grpo_loss(token_logp, old, ref, advantages, mask, config.clip, config.kl)  # three (A,)
    # The mean over the answers of a group, so that a pair weighs as much as a question.
    loss, clipped, kl = (torch.stack([v.mean() for v in values.split(sizes)]) for values in answers)
    return loss, {"clipped": clipped, "kl": kl}


def update(policy, groups, old, config):
    """One forward and backward pass over some groups: pack them, one row a group, and call `mbpo`.

    old      (A, T), what the policy said of these answers before the first update on them; None: that is now
    returns  old, and named sums over the groups for the log
    """
    packed = pack_groups(groups, policy)
    token_logp, mask = policy.logps(packed), packed.answer_mask  # (A, T)
    now = token_logp.detach()
    # The policy that said an answer is the one before the update, and stands for it with pairs too. DEVIATION from
    # GRPO's letter: not the sampler's own numbers, which in bfloat16 differ by up to 0.2 nats and would be clipped.
    old = now if old is None else old
    ref, scores = padded([answer for g in groups for answer in g.ref_logp], mask), [g.rewards for g in groups]
    loss, parts = mbpo(token_logp, old, ref, scores, mask, config)
    # The mean over the groups of the step. FSDP averages over the ranks, so each multiplies by their number.
    (loss.sum() * runtime.world() / config.groups_per_step).backward()
    parts |= {"loss": loss, "expected": mbpo(ref, ref, ref, scores, mask, config)[0]}
    sums = {name: part.detach().sum() for name, part in parts.items()}
    shifts = (now - ref).sum(1).split([len(g.rewards) for g in groups])  # h of the answers of each group
    pairs = torch.stack([now.new_zeros(2), *(h for h, g in zip(shifts, groups, strict=True) if g.mined)])
    said = padded([answer for g in groups for answer in g.said_logp], mask)
    sums |= {"chosen_shift": pairs[:, 0].sum(), "pair_margin": (pairs[:, 0] - pairs[:, 1]).sum()}
    return old, sums | {"sampler_gap": (now - said).abs().max(), "passes": torch.ones_like(sums["loss"])}


def reference_pass(policy, records, rows, path, batch):
    """One pass without gradients over the mined pairs, cached in the file `path`. Returns for each record [chosen,
    rejected], each a list of log-probabilities of its tokens, float32 nats.
    """

    def load(pick):
        pixels = model.load_pixels(policy, path.parent, [records[i]["image"] for i in pick])
        return data.pack([rows[i] for i in pick], pixels).to(policy.mean.device)

    def score(packed):
        answers = listed(policy.logps(packed), packed.answer_mask)
        return [answers[k : k + 2] for k in range(0, len(answers), 2)]

    if not runtime.first_alone(path.is_file):
        with runtime.summoned(policy):
            values = runtime.over_records("reference", range(len(records)), batch, load, score)
        lines = [{"id": r["id"], "logp": v} for r, v in zip(records, values, strict=True)]
        runtime.first_alone(lambda: runtime.write_jsonl(path, lines))
    say(f"reference log-probabilities of {len(records)} records: {path}")
    return [line["logp"] for line in data.read_lines(path)]


def listed(values, mask):
    """(A, T) and mask (A, T) -> A lists without the padding."""
    return [row[:n] for row, n in zip(values.tolist(), mask.sum(1).tolist(), strict=True)]


def padded(lists, mask):
    """The reverse of `listed`: (A, T) float32 on the mask's device, 0 where the mask is False."""
    flat = torch.tensor([v for answer in lists for v in answer], dtype=torch.float32, device=mask.device)
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, flat)


def uniforms(seed, step, question, group, tokens):
    """(G, T) numbers in [0, 1) for a question in a step: the same on any number of processes and after a resume."""
    return torch.from_numpy(np.random.default_rng([seed, 1, step, question]).random((group, tokens)))


def pack_groups(groups, policy):
    """One row a group: its image and question, then all its answers."""
    return data.pack([g.row for g in groups], torch.stack([g.pixels for g in groups])).to(policy.mean.device)


def rollout(policy, ref, questions, rows, picked, pixels, config, step):
    """Let the policy answer the questions `picked` (indices), reward the answers by rule and score them under `ref`.

    pixels   (N, 3, H, W) in [0, 1], their images
    returns  a Group for each, and sums over the answers for the log
    """
    per_pass = runtime.per_pass(config.groups_per_step, config.groups_per_gpu, "groups")
    groups, sums = [], dict.fromkeys(("reward", "correct", "format", "unparsed", "length", "equal"), 0.0)
    with runtime.summoned(policy):
        for i in range(0, len(picked), per_pass):
            pick = picked[i : i + per_pass]
            draws = torch.stack([uniforms(config.seed, step, j, config.group, config.max_new_tokens) for j in pick])
            prompts = [rows[j].prefix for j in pick]
            answers, said_logp = policy.sample(pixels[i : i + per_pass], prompts, draws)  # N * G each
            for k, j in enumerate(pick):
                share = slice(k * config.group, (k + 1) * config.group)
                texts = policy.texts(answers[share])
                ended = [answer[-1] == policy.tokenizer.eos_token_id for answer in answers[share]]
                parts = [reward(t, e, questions[j], config) for t, e in zip(texts, ended, strict=True)]
                scores = torch.tensor([p["correct"] + config.format_reward * p["format"] for p in parts])  # (G,)
                row = data.Row(rows[j].prefix, answers[share], rows[j].id)
                groups.append(Group(row, pixels[i + k], scores, [], False, said_logp[share]))
                sums["reward"] += scores.sum().item()
                for name in ("correct", "format"):
                    sums[name] += sum(p[name] for p in parts)
                sums["unparsed"] += sum(rewards.closed_answer(text, questions[j]) is None for text in texts)
                sums["length"] += sum(map(len, answers[share]))
                sums["equal"] += config.group * float((scores == scores[0]).all())  # once an answer, as the others
    with torch.no_grad(), runtime.summoned(ref), model.without_lora(ref):
        for i in range(0, len(groups), per_pass):
            packed = pack_groups(groups[i : i + per_pass], ref)
            scored = iter(listed(ref.logps(packed), packed.answer_mask))
            for group in groups[i : i + per_pass]:
                group.ref_logp = [next(scored) for _ in group.row.answers]
    return groups, sums


def line_of(values):
    """The part of the log line that is MBPO's; docs/log.md defines each word. What is not trained is left out."""
    parts = [f"loss {values['loss']:+.4f}"]
    if "reward" in values:
        rule = f"(correct {values['correct']:.2f}, format {values['format']:.2f})"
        parts += [f"reward {values['reward']:.2f} {rule}", f"equal {values['equal']:.2f} | len {values['length']:.1f}"]
    if "pair_margin" in values:
        parts += [f"pair {values['pair_margin']:+.2f} chosen {values['chosen_shift']:+.2f}"]
    parts += [f"kl {values['kl']:.4f} | clip {values['clipped']:.2f} | gnorm {values['gnorm']:.2f}"]
    spent = f"(sample {values['sample_s']:.2f}s, update {values['update_s']:.2f}s)"
    return " | ".join([*parts, f"lr {values['lr']:.1e}", f"{values['tokens_per_s']:.0f} tok/s {spent}"])


def main():
    """Train with MBPO: records, reference, loop, export, table."""
    config = runtime.parse_config(Config, description=__doc__)
    config = runtime.resumed(config, sys.argv[1:])
    device = runtime.start()
    per_pass = runtime.per_pass(config.groups_per_step, config.groups_per_gpu, "groups")
    run = runtime.first_alone(lambda: runtime.name_run(config, "mbpo"))

    # ------------------------------------------------------------------ data, base model, reference
    data_path = Path(config.data) if config.data.endswith(".jsonl") else Path(config.data) / "mbpo.jsonl"
    questions_path = Path(config.questions or data_path.with_stem(f"{data_path.stem}_closed"))
    folder, online = data_path.parent, round(config.online_fraction * config.groups_per_step)
    offline = config.groups_per_step - online
    if online and config.questions:  # mistakes in a file of the user's come before long work
        data.read_records(questions_path, data.QUESTION_FIELDS)
    base = build_data.ready("mbpo", config, data_path)
    records = data.read_records(data_path, data.PAIR_FIELDS) if offline else []
    questions = data.read_records(questions_path, data.QUESTION_FIELDS) if online else []
    # Records may be changed here: all that follows names, scores and trains them as they are now.
    policy = hub.load(base, config.train_vision, config.convention, True, config.lora_rank, config.recompute)
    policy.encoding.max_length = config.max_length
    rows = policy.encoding.rows(records, data_path, "chosen", "rejected")
    question_rows, decoded = policy.encoding.rows(questions, questions_path), {}
    reference = runtime.first_alone(lambda: hub.fingerprint(policy, folder, records))
    ref_path = folder / f"ref_mbpo_{reference}.jsonl"
    ref_logp = reference_pass(policy, records, rows, ref_path, per_pass) if offline else []
    # What is sampled cannot be scored beforehand: the weights that the run starts from stay at hand, frozen.
    # With adapters these are the policy's own.
    ref = None
    if online:
        ref = policy if config.lora_rank else hub.load(base, convention=config.convention, trained=False)
    yardstick = eval.yardstick(data_path, config.eval_split)
    before = eval.measure(policy, yardstick)

    # ------------------------------------------------------------------ order, optimiser, resume
    def order(count, per_step, seed):  # as many passes over `count` items as the run needs, each in an order of its own
        passes = math.ceil(config.steps * per_step / max(1, count))
        return data.epoch_order(np.zeros(count), passes, "none", [config.seed, seed]) if per_step else []

    pair_order, question_order = order(len(records), offline, 2), order(len(questions), online, 3)
    runtime.open_run(run, config)
    say(f"run {run}: {config.steps} steps of {offline} pairs (of {len(records)}) and {online} questions (of "
        f"{len(questions)}) x {config.group} answers; {runtime.world()} process(es) on {device.type}")  # fmt: skip
    optimizer = runtime.adamw(policy, config.weight_decay)
    identity = runtime.first_alone(lambda: f"{reference}-{hub.digest(questions_path.parent, questions)}")
    first_step = runtime.restore(run, config, policy, optimizer, identity)
    log = runtime.Log(run, config.steps, first_step)

    def shares(step):  # the pairs and the questions of this process in a step
        pairs = [(True, int(i)) for i in pair_order[step * offline : (step + 1) * offline]]
        asked = [(False, int(i)) for i in question_order[step * online : (step + 1) * online]]
        share = runtime.my_share(pairs + asked)
        return [i for mined, i in share if mined], [i for mined, i in share if not mined]

    def images(step):  # of both, on the device, (N, 3, H, W)
        sides = zip(shares(step), (records, questions), (folder, questions_path.parent), strict=True)
        some = [(at, [items[i]["image"] for i in pick]) for pick, items, at in sides if pick]
        return torch.cat([model.load_pixels(policy, at, names, decoded) for at, names in some]).to(device)

    # ================================================================== the loop
    runtime.heed_sigterm(True)
    clock = runtime.Clock()
    for step, pixels in enumerate(runtime.ahead(images, range(first_step, config.steps)), first_step):
        waited_s = clock("waiting for images")
        lr = runtime.cosine(step, config.steps, config.learning_rate, config.warmup_steps, floor=0.1)
        for param_group in optimizer.param_groups:
            param_group["lr"] = lr

        # ------------------------------------------------ rollout: pairs as they are, answers to questions
        (pairs, asked), answered = shares(step), {}
        fixed = torch.tensor(PAIR_REWARDS)
        groups = [Group(rows[i], pixels[k], fixed, ref_logp[i], True, ref_logp[i]) for k, i in enumerate(pairs)]
        if online:
            new, answered = rollout(policy, ref, questions, question_rows, asked, pixels[len(pairs) :], config, step)
            groups += new
        sample_s = clock("sampling and scoring") if online else 0.0

        # ------------------------------------------------ update: GRPO on all groups
        sums, gnorms, update_s = {}, [], 0.0
        old = [None] * (len(groups) // per_pass)
        for _ in range(config.updates_per_rollout):
            for micro in range(len(old)):
                some = groups[micro * per_pass : (micro + 1) * per_pass]
                old[micro], part = update(policy, some, old[micro], config)
                sums = {name: sums.get(name, 0) + value for name, value in part.items()}
            if device.type == "cuda":
                torch.cuda.synchronize()  # the clock's parts; clipping waits for the gradients anyway
            update_s += clock("forward and backward")
            gnorms.append(runtime.clip_gradients(policy, config.clip_norm))
            ids = [records[i]["id"] for i in pair_order[step * offline :][:offline]]
            ids += [questions[i]["id"] for i in question_order[step * online :][:online]]
            runtime.check_step(step, {"gradient norm": gnorms[-1]}, ids)
            optimizer.step()
            optimizer.zero_grad()
            update_s += clock("optimizer")
        # Sums first, one division last: the log shows the complete batch, not the last part of the first rank.
        sums = {name: value / config.updates_per_rollout for name, value in sums.items()}
        sums |= answered | {"tokens": sum(len(answer) for g in groups for answer in g.row.answers)}
        totals = [torch.as_tensor(value, dtype=torch.float32, device=device) for value in sums.values()]
        dist.all_reduce(totals := torch.stack(totals))
        sums = dict(zip(sums, totals.tolist(), strict=True))
        values = {name: sums[name] / config.groups_per_step for name in ("loss", "clipped", "kl")}
        if offline:
            values |= {name: sums[name] / offline for name in ("chosen_shift", "pair_margin")}
        values |= {name: sums[name] / online / config.group for name in answered}
        if step == 0 and config.updates_per_rollout == 1:  # policy, reference and who answered are one model
            runtime.check_first(values["loss"], sums["expected"] / config.groups_per_step, ref_path)
            gap = values["sampler_gap"] = sums["sampler_gap"] / sums["passes"]  # a mean of each pass's largest
            assert device.type != "cpu" or gap < 1e-3, f"sampler and update differ by {gap} nats on an answer"
        update_s += clock("optimizer")
        values |= {"gnorm": sum(gnorms) / len(gnorms), "lr": lr, "time_s": waited_s + sample_s + update_s}
        values |= {"sample_s": sample_s, "update_s": update_s, "tokens_per_s": sums["tokens"] / values["time_s"]}
        log(step + 1, line_of(values), values)
        stop = runtime.stopping()
        if stop or (step + 1) % config.save_every == 0 or step + 1 == config.steps:
            runtime.save_checkpoint(run, step + 1, policy, optimizer, identity)
        if stop:
            say(f"stopped by SIGTERM after step {step + 1}, which is saved. Continue with --resume {run}")
            return
        clock("log and checkpoints")
    runtime.heed_sigterm(False)
    say(f"the loop took {clock.summary()}")
    # ==================================================================

    hub.export(policy, run / "final")
    eval.finish(policy, run, before, yardstick, base, "train_mbpo.py --online_fraction 0   (the mined pairs alone)")


if __name__ == "__main__":
    runtime.run(main)
