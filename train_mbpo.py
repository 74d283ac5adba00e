"""
MBPO (arXiv:2506.08022): GRPO on a mix of pairs mined with an attack on the image and of closed-ended questions that
the policy answers itself and a rule rewards.

    laptop   torchrun train_mbpo.py
    8 GPUs   torchrun --standalone --nproc_per_node=8 train_mbpo.py --model <hf id or folder> --data <folder> \
                 --groups_per_gpu 2 --learning_rate 1e-6 --recompute True

reads    <data>/mbpo.jsonl and <data>/mbpo_closed.jsonl with their images (format: data.py)
writes   out/<run>/{config.json, metrics.jsonl, step_00050/, final/, eval.json}; continue with --resume out/<run>
expect   laptop: CHAIR_s .51 -> .18, yes/no about partners .54 -> .89 in under 2 minutes (README.md)
"""

import functools
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import build_data
import data
import eval
import model
import runtime
import scores
from losses import group_advantages, grpo_loss
from runtime import knob, say


@dataclass
class Config:
    # What is trained on what
    model: str = knob("toy", "'toy' (<data>/base, built here if missing) or a Hugging Face LLaVA folder or id")
    data: str = knob("data/toy", "folder with mbpo.jsonl, or a JSONL file; the toy world is built here if missing")
    questions: str = knob("", "JSONL of closed-ended questions; empty: <data>_closed.jsonl, beside the records")
    convention: str = knob("", "how the model sees and is asked: original | hub; empty: what its folder says")
    out: str = knob("", "folder of this run; empty: the next free out/mbpo-<n>")
    resume: str = knob("", "folder of a run to continue; all settings come from it")
    max_length: int = knob(2048, "tokens of image, question and answer; a longer record is an error, never cut")
    skip_bad: bool = knob(False, "drop bad records, counted by reason, instead of stopping at the first")
    # The method
    online_fraction: float = knob(0.5, "share of a step's groups that are questions; 0: mined pairs only, 1: none")
    group: int = knob(8, "answers sampled for each question, G; peers use 8")
    format_reward: float = knob(0.5, "reward for an answer in the asked form and nothing else; a right one has 1; ours")
    clip: float = knob(0.2, "how far the ratio to the sampling policy may count; a usual value")
    kl: float = knob(
        0.2, "weight of the KL term; our choice on the toy, where the usual 0.04 costs 12 points of recall"
    )
    updates_per_rollout: int = knob(1, "optimizer steps on the same groups; with 1 the ratio is 1 and never clipped")
    max_new_tokens: int = knob(16, "tokens of a sampled answer")
    steps: int = knob(300, "rollouts, each with its updates")
    # The optimiser
    learning_rate: float = knob(1e-4, "peak, then a half cosine to a tenth; our choice for the toy (7B: 1e-6)")
    warmup_steps: int = knob(10, "linear warm-up")
    weight_decay: float = knob(0.0, "on matrices only")
    clip_norm: float = knob(1.0, "largest global gradient norm; a usual value")
    train_vision: bool = knob(False, "train the vision tower too")
    lora_rank: int = knob(0, "train adapters of this rank instead of the weights (one GPU of 24 to 48 GB); 0: weights")
    recompute: bool = knob(False, "keep few activations and compute them again: a third more time, far less memory")
    groups_per_step: int = knob(16, "groups (pairs and questions) per rollout over all processes")
    groups_per_gpu: int = knob(0, "groups per forward pass, fewer when memory runs out; 0: a process's whole share")
    # Keeping
    seed: int = knob(0, "seed of order and samples, and, where they are built, of the toy's scenes and base model")
    save_every: int = knob(50, "steps between checkpoints")
    keep: int = knob(2, "checkpoints to keep")
    log_every: int = knob(10, "steps between printed lines; metrics.jsonl has every step")
    eval_split: str = knob("test", "test | val | none: toy scenes for the table before and after; tune on val only")

    def __post_init__(self):
        model.check_convention(self.convention)
        if self.lora_rank and self.train_vision:
            raise ValueError(
                "--train_vision and --lora_rank: adapters leave the vision tower as it is. Drop one of them"
            )
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"--{name} must be a finite number, got {value}")
        for name in ("clip", "updates_per_rollout", "max_new_tokens", "steps", "learning_rate", "clip_norm", "keep",
                     "groups_per_step", "save_every", "log_every", "max_length"):  # fmt: skip
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name} must be positive, got {getattr(self, name)}")
        for name in ("seed", "format_reward", "kl", "weight_decay", "warmup_steps", "lora_rank", "groups_per_gpu"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"--{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.online_fraction <= 1:
            raise ValueError(f"--online_fraction {self.online_fraction}: a share in [0, 1]")
        if self.group < 2:
            raise ValueError(f"--group {self.group}: an answer is judged against the others of its group: at least 2")
        if self.eval_split not in ("test", "val", "none"):
            raise ValueError(f"--eval_split {self.eval_split!r}: use one of test, val, none")
        whole = self.online_fraction * self.groups_per_step
        if abs(whole - round(whole)) > 1e-9:
            raise ValueError(
                f"--online_fraction {self.online_fraction} of --groups_per_step {self.groups_per_step} makes no whole "
                f"number of groups; the nearest fractions are {math.floor(whole) / self.groups_per_step:g} and "
                f"{math.ceil(whole) / self.groups_per_step:g}"
            )


@dataclass
class Group:
    """Some answers to one question about one image, with what the update needs to know of them."""

    row: data.Row
    pixels: torch.Tensor  # (3, H, W) in [0, 1]
    advantages: torch.Tensor  # (G,)
    ref_logp: list  # G lists of log-probabilities of the answers' tokens under the frozen reference, float32 nats
    said_logp: list  # the same as the sampler computed them; None for a pair, which no policy of ours said


def reference_pass(policy, records, rows, folder, name, batch):
    """
    One pass without gradients over the mined pairs, cached in ref_mbpo_<name>.jsonl beside them.

    returns  for each record [chosen, rejected], each a list of log-probabilities of its tokens, float32 nats
    """
    path = folder / f"ref_mbpo_{name}.jsonl"
    if not runtime.first_alone(path.is_file):
        mine, found = runtime.my_share(range(len(records))), []
        with torch.no_grad(), runtime.summoned(policy):
            picks = [mine[i : i + batch] for i in range(0, len(mine), batch)]
            images = runtime.ahead(
                lambda pick: model.load_pixels(policy, folder, [records[i]["image"] for i in pick]),
                picks,
                policy.mean.device,
            )
            bar = tqdm(picks, "reference", leave=False, disable=runtime.rank() > 0)
            for pick, pixels in zip(bar, images, strict=True):
                packed = data.pack([rows[i] for i in pick], pixels).to(policy.mean.device)
                answers = listed(policy("logps", packed), packed.answer_mask)
                found += [answers[k : k + 2] for k in range(0, len(answers), 2)]
        lines = [{"id": r["id"], "logp": v} for r, v in zip(records, runtime.gather(found), strict=True)]
        runtime.first_alone(lambda: runtime.write_jsonl(path, lines))
        say(f"wrote {path}: reference log-probabilities of {len(records)} records")
    else:
        say(f"reference log-probabilities: {path}")
    return [line["logp"] for _, line in data.read_jsonl(path)]


def listed(values, mask):
    """(A, T) and mask (A, T) -> A lists without the padding."""
    return [row[:n] for row, n in zip(values.tolist(), mask.sum(1).tolist(), strict=True)]


def padded(lists, mask):
    """The reverse of `listed`: (A, T) float32 on the mask's device, 0 where the mask is False."""
    flat = torch.tensor([v for answer in lists for v in answer], dtype=torch.float32, device=mask.device)
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, flat)


def uniforms(seed, step, question, group, tokens):
    """(G, T) numbers in [0, 1) for one question in one step: the same on any number of processes and after a resume."""
    return torch.from_numpy(np.random.default_rng([seed, 1, step, question]).random((group, tokens)))


def pack_groups(groups, policy):
    """One row a group: its image and question, then all its answers."""
    return data.pack([g.row for g in groups], torch.stack([g.pixels for g in groups])).to(policy.mean.device)


def rollout(policy, ref, questions, rows, picked, pixels, config, step):
    """
    Let the policy answer the questions `picked` (indices), reward the answers by rule and score them under `ref`.

    pixels   (N, 3, H, W) in [0, 1], their images
    returns  a Group for each, and sums over the answers for the log
    """
    per_pass = runtime.per_pass(config.groups_per_step, config.groups_per_gpu, "groups")
    groups, sums = [], dict.fromkeys(("reward", "correct", "format", "unparsed", "length", "equal"), 0.0)
    with runtime.summoned(policy):
        for i in range(0, len(picked), per_pass):
            pick = picked[i : i + per_pass]
            draws = torch.stack([uniforms(config.seed, step, j, config.group, config.max_new_tokens) for j in pick])
            answers, said_logp = policy(
                "sample", pixels[i : i + per_pass], [rows[j].prefix for j in pick], draws
            )  # N * G each
            for k, j in enumerate(pick):
                mine = slice(k * config.group, (k + 1) * config.group)
                texts = policy.texts(answers[mine])
                # Rules read the text; an answer that was cut off has no form.
                correct = torch.tensor([float(scores.is_right(text, questions[j])) for text in texts])
                ended = [answer[-1] == policy.tokenizer.eos_token_id for answer in answers[mine]]
                form = [
                    float(scores.in_form(text, questions[j]) and end) for text, end in zip(texts, ended, strict=True)
                ]
                rewards = correct + config.format_reward * torch.tensor(form)  # (G,)
                row = data.Row(rows[j].prefix, answers[mine], rows[j].id)
                groups.append(Group(row, pixels[i + k], group_advantages(rewards[None])[0], None, said_logp[mine]))
                sums["reward"] += rewards.sum().item()
                sums["correct"] += correct.sum().item()
                sums["format"] += sum(form)
                sums["unparsed"] += sum(scores.closed_answer(text, questions[j]) is None for text in texts)
                sums["length"] += sum(map(len, answers[mine]))
                sums["equal"] += config.group * float((rewards == rewards[0]).all())  # once an answer, as the others
    with torch.no_grad(), runtime.summoned(ref), model.without_lora(ref):
        for i in range(0, len(groups), per_pass):
            some = groups[i : i + per_pass]
            packed = pack_groups(some, ref)
            scored = iter(listed(ref("logps", packed), packed.answer_mask))
            for group in some:
                group.ref_logp = [next(scored) for _ in group.row.answers]
    return groups, sums


def line_of(values):
    """The part of the log line that is MBPO's; README.md defines each word. What is not trained is left out."""
    parts = [f"loss {values['loss']:+.4f}"]
    if "reward" in values:
        parts += [
            f"reward {values['reward']:.2f} (correct {values['correct']:.2f}, format {values['format']:.2f})",
            f"equal {values['equal']:.2f} | len {values['length']:.1f}",
        ]
    if "pair_margin" in values:
        parts += [f"pair {values['pair_margin']:+.2f} chosen {values['chosen_shift']:+.2f}"]
    return " | ".join(
        [
            *parts,
            f"kl {values['kl']:.4f} | clip {values['clipped']:.2f} | gnorm {values['gnorm']:.2f}",
            f"lr {values['lr']:.1e}",
            f"{values['tokens_per_s']:.0f} tok/s (sample {values['sample_s']:.2f}s, update {values['update_s']:.2f}s)",
        ]
    )


def main():
    argv = sys.argv[1:]
    config = runtime.parse_config(Config, argv, description=__doc__)
    if config.resume:
        config = runtime.resumed_config(Config, config, argv)
    device = runtime.start()
    per_pass = runtime.per_pass(config.groups_per_step, config.groups_per_gpu, "groups")
    run = Path(runtime.first_alone(lambda: runtime.name_run(config, "mbpo")))

    # ------------------------------------------------------------------ data, base model, reference
    data_path = Path(config.data) if config.data.endswith(".jsonl") else Path(config.data) / "mbpo.jsonl"
    questions_path = Path(config.questions or data_path.with_name(f"{data_path.stem}_closed.jsonl"))
    folder, base = data_path.parent, config.model
    online = round(config.online_fraction * config.groups_per_step)
    offline = config.groups_per_step - online

    def read_questions():
        return data.read_records(questions_path, data.QUESTION_FIELDS, config.skip_bad) if online else []

    questions = read_questions() if config.questions else None  # mistakes in a file of the user's come before long work
    if base == "toy":
        build_data.check_toy("mbpo", config, data_path)
        base = build_data.prepare_toy(folder, config.seed)
        if not runtime.first_alone(data_path.is_file):
            source = str(folder / "preference.jsonl")
            build_data.build_mbpo(
                build_data.MbpoConfig(source=source, out=str(data_path), model=base, seed=config.seed)
            )
    questions = read_questions() if questions is None else questions
    place = functools.partial(runtime.shard, device=device, recompute=config.recompute)
    policy = model.load(base, config.train_vision, config.convention, True, config.lora_rank, place).train()
    policy.decoded = {}
    encoding = (policy.tokenizer, policy.template, policy.image_tokens, config.max_length, config.skip_bad)
    records, rows, question_rows = [], [], []
    if offline:
        records = data.read_records(data_path, data.MBPO_FIELDS, config.skip_bad)
        records, rows = data.encode_records(data.pair_row, records, data_path, *encoding)
    if online:
        questions, question_rows = data.encode_records(data.question_row, questions, questions_path, *encoding)
    reference = runtime.first_alone(lambda: model.fingerprint(policy, device, folder, records))
    if offline:
        ref_logp = reference_pass(policy, records, rows, folder, reference, per_pass)
    # What is sampled cannot be scored beforehand: the weights that the run starts from stay at hand, frozen. With
    # adapters these are the policy's own.
    ref = None
    if online:
        ref = policy if config.lora_rank else model.load(base, convention=config.convention, trained=False, place=place)
    measured = {}
    scenes = config.eval_split != "none" and (folder / f"mfpo_{config.eval_split}.jsonl").is_file()
    if scenes:
        measured["base"] = eval.measure(policy, folder, config.eval_split)
    elif config.eval_split != "none":
        say(f"no table: {folder} holds no mfpo_{config.eval_split}.jsonl, held-out pairs of the toy world")

    # ------------------------------------------------------------------ order, optimiser, resume
    def order(count, per_step, seed):  # as many passes over `count` items as the run needs, each in an order of its own
        passes = math.ceil(config.steps * per_step / max(1, count))
        return data.epoch_order(np.zeros(count), passes, "none", [config.seed, seed]) if per_step else []

    pair_order, question_order = order(len(records), offline, 2), order(len(questions), online, 3)
    runtime.first_alone(lambda: runtime.open_run(run, config))
    say(
        f"run {run}: {config.steps} steps of {offline} pairs (of {len(records)}) and {online} questions "
        f"(of {len(questions)}) x {config.group} answers; {runtime.world()} process(es) on {device.type}"
    )
    optimizer = runtime.adamw(policy, config.weight_decay)
    identity = runtime.first_alone(lambda: f"{reference}-{model.digest(questions_path.parent, questions)}")
    first_step = 0
    if config.resume:
        found = runtime.checkpoints(run)
        if found:
            first_step = runtime.load_checkpoint(found[-1], policy, optimizer, identity)
        say(f"resumed from {found[-1] if found else 'the beginning: no checkpoint was complete'}")
    log = runtime.Log(run, config.steps, first_step, config.log_every)

    def shares(step):  # the pairs and the questions of this process in a step
        pairs = [("pair", int(i)) for i in pair_order[step * offline : (step + 1) * offline]]
        asked = [("question", int(i)) for i in question_order[step * online : (step + 1) * online]]
        mine = runtime.my_share(pairs + asked)
        return [[i for kind, i in mine if kind == which] for which in ("pair", "question")]

    def images(step):  # of both, on the device, (N, 3, H, W)
        sides = zip(shares(step), (records, questions), (folder, questions_path.parent), strict=True)
        found = [model.load_pixels(policy, at, [items[i]["image"] for i in mine]) for mine, items, at in sides if mine]
        return torch.cat(found).to(device)

    ahead = runtime.ahead(images, range(first_step, config.steps), device)

    # ================================================================== the loop
    runtime.heed_sigterm(True)
    clock = runtime.Clock()
    for step, pixels in enumerate(ahead, first_step):
        waited_s = clock("waiting for images")
        lr = runtime.cosine(step, config.steps, config.learning_rate, config.warmup_steps, floor=0.1)
        for param_group in optimizer.param_groups:
            param_group["lr"] = lr

        # ------------------------------------------------ rollout: pairs as they are, answers to questions
        pairs, asked = shares(step)
        # The paper's fixed rewards: 2 for the chosen answer, 0 for the mined one, so advantages of +1 and -1.
        advantages, sums = group_advantages(torch.tensor([[2.0, 0.0]]))[0], {}
        groups = [Group(rows[i], pixels[k], advantages, ref_logp[i], None) for k, i in enumerate(pairs)]
        if online:
            new, sums = rollout(policy, ref, questions, question_rows, asked, pixels[len(pairs) :], config, step)
            groups += new
        tokens = sum(len(answer) for g in groups for answer in g.row.answers)
        sample_s = clock("sampling and scoring") if online else 0.0

        # ------------------------------------------------ update: GRPO on all groups
        totals, gap, gnorms, old_logps = 0, torch.zeros((), device=device), [], []
        update_s = 0.0
        for update in range(config.updates_per_rollout):
            for micro in range(len(groups) // per_pass):
                some = groups[micro * per_pass : (micro + 1) * per_pass]
                packed = pack_groups(some, policy)
                token_logp, mask = policy("logps", packed), packed.answer_mask  # (A, T), A answers of all groups
                now = token_logp.detach()
                if update == 0:
                    # The policy that said an answer is the one before the update, and stands for it with pairs too,
                    # which nobody of ours said. DEVIATION from GRPO's letter: not the sampler's own numbers, which in
                    # bfloat16 differ by up to 0.2 nats and would be clipped as if the policy had moved.
                    old_logps.append(now)
                fixed = padded([answer for g in some for answer in g.ref_logp], mask)
                advantage = torch.cat([g.advantages for g in some]).to(device)  # (A,)
                loss, clipped, kl = grpo_loss(
                    token_logp, old_logps[micro], fixed, advantage, mask, config.clip, config.kl
                )
                # The mean over the answers of a group, then over the groups of the step: a pair weighs as much as a
                # question. FSDP averages over the ranks, so each multiplies by their number.
                weight = torch.cat([torch.full_like(g.advantages, 1 / len(g.advantages)) for g in some]).to(device)
                loss, clipped, kl = ((v * weight).sum() / config.groups_per_step for v in (loss, clipped, kl))
                (loss * runtime.world()).backward()
                shift = (now - fixed).sum(1).split([len(g.advantages) for g in some])  # h of the answers of each group
                of_pairs = [h for h, g in zip(shift, some, strict=True) if g.said_logp is None] or [now.new_zeros(2)]
                sampled = torch.tensor([g.said_logp is not None for g in some for _ in g.row.answers])
                if update == 0 and sampled.any():
                    said = padded([answer for g in some for answer in g.said_logp or []], mask[sampled])
                    gap = torch.maximum(gap, (now[sampled] - said).abs().max())
                totals += torch.stack([loss.detach(), clipped, kl, *torch.stack(of_pairs).sum(0)])
            if device.type == "cuda":
                torch.cuda.synchronize()  # the clock's parts; clipping waits for the gradients anyway
            update_s += clock("forward and backward")
            gnorms.append(runtime.clip_gradients(policy, config.clip_norm))
            if not math.isfinite(gnorms[-1]):  # the norm is over all ranks, so all of them stop
                ids = [records[i]["id"] for i in pair_order[step * offline :][:offline]]
                ids += [questions[i]["id"] for i in question_order[step * online :][:online]]
                raise ValueError(
                    f"step {step + 1}: gradient norm {gnorms[-1]}: stopped before the update. Groups of this step: "
                    f"{', '.join(ids)}. Lower --learning_rate, or look at these"
                )
            optimizer.step()
            optimizer.zero_grad()
            update_s += clock("optimizer")
        # Sums first, one division last: the log shows the whole batch, not the last part of the first rank.
        totals = torch.cat([totals / config.updates_per_rollout, torch.tensor([tokens, *sums.values()], device=device)])
        dist.all_reduce(totals)
        dist.all_reduce(gap, dist.ReduceOp.MAX)
        totals = totals.tolist()
        values = dict(zip(("loss", "clipped", "kl"), totals[:3], strict=True))
        if offline:
            values |= {"chosen_shift": totals[3] / offline, "pair_margin": (totals[3] - totals[4]) / offline}
        if online:
            values |= {name: total / online / config.group for name, total in zip(sums, totals[6:], strict=True)}
            values["sampler_gap"] = gap.item()
        if step == 0:
            # Nothing has moved yet: ratios are 1, KL is 0, and the advantages of a group sum to 0.
            exact = 1e-3 if device.type == "cpu" else 5e-2  # bfloat16 kernels depend on the shape of the batch
            assert abs(values["loss"]) < exact or config.updates_per_rollout > 1, f"first loss {values['loss']}"
            assert device.type != "cpu" or gap < exact, f"sampler and update differ by {gap} nats on the same answers"
            say(f"first loss {values['loss']:.4f}, as it must be; sampler and update agree to {gap:.1e} nats")
        update_s += clock("optimizer")
        values |= {"gnorm": sum(gnorms) / len(gnorms), "lr": lr, "time_s": waited_s + sample_s + update_s}
        values |= {"sample_s": sample_s, "update_s": update_s, "tokens_per_s": totals[5] / values["time_s"]}
        log(step + 1, line_of(values), **values)
        stop = runtime.stopping()
        if stop or (step + 1) % config.save_every == 0 or step + 1 == config.steps:
            runtime.save_checkpoint(run, step + 1, policy, optimizer, identity, config.keep)
        if stop:
            say(f"stopped by SIGTERM after step {step + 1}, which is saved. Continue with --resume {run}")
            return
        clock("log and checkpoints")
    runtime.heed_sigterm(False)
    say(f"the loop took {clock.summary()}")
    # ==================================================================

    policy.eval()
    model.save(policy, run / "final")
    dist.barrier()  # rank 0 has written
    say(f"wrote {run}/final")
    if scenes:
        measured["final"] = eval.measure(policy, folder, config.eval_split)
        summaries = {name: eval.summarise(found, measured["base"]) for name, found in measured.items()}
        say(f"\n{eval.samples_text(measured)}\n\n{eval.table_text(summaries)}\n")
        runtime.first_alone(lambda: runtime.write_text(run / "eval.json", json.dumps(summaries, indent=2)))
        say(f"wrote {run}/eval.json ({config.eval_split} scenes of {folder})")
    if (folder / "mfpo_val.jsonl").is_file():
        say(
            "next: torchrun train_mbpo.py --online_fraction 0   (the mined pairs alone)\n"
            "      bash runs/mbpo_ablation.sh\n"
            f"      python eval.py --model {run}/final --base {base} --data {folder} --split val"
        )
    else:
        say(
            f"next: python eval.py --bench pope --model {run}/final --answers {run}/pope.jsonl "
            "--questions <POPE's lines> --images <COCO's val2014>"
        )


if __name__ == "__main__":
    runtime.run(main)
