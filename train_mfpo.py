"""
MFPO (arXiv:2410.15334): preference tuning on pairs that differ in the answer or in the image, easy pairs first.

    laptop   torchrun train_mfpo.py
    8 GPUs   torchrun --standalone --nproc_per_node=8 train_mfpo.py --model <hf id or folder> --data <folder> \
                 --pairs_per_gpu 2 --learning_rate 1e-6 --recompute True

reads    <data>/mfpo.jsonl and its images (format: data.py)
writes   out/<run>/{config.json, metrics.jsonl, step_00050/, final/, eval.json}; continue with --resume out/<run>
expect   laptop: CHAIR_s .51 -> .10, recall .94 -> .91 in about 3 minutes (README.md)
"""

import functools
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import build_data
import data
import eval
import model
import runtime
from losses import dpo_loss, image_loss, margin_loss
from runtime import knob, say


@dataclass
class Config:
    # What is trained on what
    model: str = knob("toy", "'toy' (<data>/base, built here if missing) or a Hugging Face LLaVA folder or id")
    data: str = knob("data/toy", "folder with mfpo.jsonl, or a JSONL file; the toy world is built here if missing")
    convention: str = knob("", "how the model sees and is asked: original | hub; empty: what its folder says")
    out: str = knob("", "folder of this run; empty: the next free out/mfpo-<n>")
    resume: str = knob("", "folder of a run to continue; all settings come from it")
    max_length: int = knob(2048, "tokens of image, question and answer; a longer record is an error, never cut")
    skip_bad: bool = knob(False, "drop bad records, counted by reason, instead of stopping at the first")
    # The method
    beta: float = knob(0.3, "inverse temperature; our choice on the toy's validation scenes (DPO papers: 0.1 to 0.5)")
    text_weight: float = knob(1.0, "weight of L_text; the paper's best sweep is 1 : 1 : 1")
    image_weight: float = knob(1.0, "weight of L_image; 0 drops the distorted image's forward pass too")
    margin_weight: float = knob(1.0, "weight of L_margin")
    eta: float = knob(0.0, "offset of L_margin in nats of reward; the paper's best")
    curriculum: str = knob("easy_to_hard", "easy_to_hard (the paper) | hard_to_easy | none")
    epochs: int = knob(2, "passes over the records (over each third with a curriculum)")
    # The optimiser
    learning_rate: float = knob(2e-4, "peak, then a half cosine to a tenth; our choice for the toy (7B: 1e-6 or less)")
    warmup_steps: int = knob(10, "linear warm-up")
    weight_decay: float = knob(0.0, "on matrices only")
    clip_norm: float = knob(1.0, "largest global gradient norm; a usual value")
    train_vision: bool = knob(False, "train the vision tower too")
    lora_rank: int = knob(0, "train adapters of this rank instead of the weights (one GPU of 24 to 48 GB); 0: weights")
    recompute: bool = knob(False, "keep few activations and compute them again: a third more time, far less memory")
    pairs_per_step: int = knob(16, "records per optimizer step over all processes; accumulation is derived")
    pairs_per_gpu: int = knob(0, "records per forward pass, fewer when memory runs out; 0: a process's whole share")
    # Keeping
    seed: int = knob(0, "seed of the order of records, and, where they are built, of the toy's scenes and base model")
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
        if self.seed < 0:
            raise ValueError(f"--seed must not be negative, got {self.seed}")
        for name in ("beta", "learning_rate", "epochs", "pairs_per_step", "save_every", "keep",
                     "log_every", "max_length", "clip_norm"):  # fmt: skip
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name} must be positive, got {getattr(self, name)}")
        for name in (
            "text_weight",
            "image_weight",
            "margin_weight",
            "weight_decay",
            "warmup_steps",
            "lora_rank",
            "pairs_per_gpu",
        ):
            if not getattr(self, name) >= 0:
                raise ValueError(f"--{name} must not be negative, got {getattr(self, name)}")
        if self.text_weight + self.image_weight + self.margin_weight == 0:
            raise ValueError("--text_weight, --image_weight and --margin_weight are all 0: nothing to train")
        for name, choices in (
            ("curriculum", ("easy_to_hard", "hard_to_easy", "none")),
            ("eval_split", ("test", "val", "none")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"--{name} {getattr(self, name)!r}: use one of {', '.join(choices)}")


def reference_pass(policy, records, rows, data_path, name, batch):
    """
    One pass without gradients over all records, cached in ref_<name>.jsonl beside them: no reference model has to
    sit in memory while training, and the curriculum knows each record's entropy.

    name     the fingerprint
    returns  logp (N, 3) float32 nats: y_w, y_l, y_w given the distorted image;   entropy (N,) nats per token
    """
    path = data_path.parent / f"ref_{name}.jsonl"
    keys = ("chosen", "rejected", "chosen_distorted", "entropy")
    if not runtime.first_alone(path.is_file):
        mine, found = runtime.my_share(range(len(records))), []
        with torch.no_grad(), runtime.summoned(policy):
            picks = [mine[i : i + batch] for i in range(0, len(mine), batch)]
            batches = runtime.ahead(
                lambda pick: model.pair_batch(
                    policy, [records[i] for i in pick], [rows[i] for i in pick], data_path.parent
                ),
                picks,
                policy.mean.device,
            )
            for packed in tqdm(batches, "reference", len(picks), leave=False, disable=runtime.rank() > 0):
                token_logp, token_entropy = policy("logps", packed, entropy=True)  # (3B, T)
                logp = token_logp.sum(1).view(-1, 3)  # (B, 3)
                # H of MFPO's curriculum. DEVIATION: the paper does not say over what; ours is the mean over the
                # chosen answer's tokens of the entropy of the next-token distribution.
                entropy = (token_entropy.sum(1) / packed.answer_mask.sum(1)).view(-1, 3)[:, :1]
                found += torch.cat([logp, entropy], 1).tolist()
        found = runtime.gather(found)
        lines = [{"id": r["id"], **dict(zip(keys, v, strict=True))} for r, v in zip(records, found, strict=True)]
        runtime.first_alone(lambda: runtime.write_jsonl(path, lines))
        say(f"wrote {path}: reference log-probabilities of {len(records)} records")
    else:
        say(f"reference log-probabilities: {path}")
    table = torch.tensor([[line[key] for key in keys] for _, line in data.read_jsonl(path)])  # (N, 4)
    return table[:, :3], table[:, 3]


def line_of(values):
    """The part of the log line that is MFPO's; README.md defines each word. text/image where the image is trained."""

    def both(name, form):
        return "/".join(
            format(values[f"{side}_{name}"], form) for side in ("text", "image") if f"{side}_{name}" in values
        )

    return (
        f"loss {values['loss']:.4f} | acc {both('acc', '.2f')} | margin {both('margin', '+.2f')} | "
        f"chosen {values['chosen_reward']:+.2f} | gnorm {values['gnorm']:.2f} | lr {values['lr']:.1e} | "
        f"{values['pairs_per_s']:.1f} pairs/s"
    )


def main():
    argv = sys.argv[1:]
    config = runtime.parse_config(Config, argv, description=__doc__)
    if config.resume:
        config = runtime.resumed_config(Config, config, argv)
    device = runtime.start()
    per_pass = runtime.per_pass(config.pairs_per_step, config.pairs_per_gpu, "pairs")
    run = Path(runtime.first_alone(lambda: runtime.name_run(config, "mfpo")))

    # ------------------------------------------------------------------ data, base model, reference
    folder = Path(config.data)
    data_path = folder if folder.suffix == ".jsonl" else folder / "mfpo.jsonl"
    folder, base = data_path.parent, config.model
    if base == "toy":
        build_data.check_toy("mfpo", config, data_path)
        base = build_data.prepare_toy(folder, config.seed)
        if not runtime.first_alone(data_path.is_file):
            source = str(folder / "preference.jsonl")
            build_data.build_mfpo(
                build_data.MfpoConfig(source=source, out=str(data_path), model=base, seed=config.seed)
            )
    records = data.read_records(data_path, data.MFPO_FIELDS, config.skip_bad)
    place = functools.partial(runtime.shard, device=device, recompute=config.recompute)
    policy = model.load(base, config.train_vision, config.convention, True, config.lora_rank, place).train()
    policy.decoded = {}
    records, rows = data.encode_records(
        data.mfpo_rows,
        records,
        data_path,
        policy.tokenizer,
        policy.template,
        policy.image_tokens,
        config.max_length,
        config.skip_bad,
    )
    steps, left = divmod(len(records) * config.epochs, config.pairs_per_step)
    if steps == 0:
        raise ValueError(
            f"{data_path}: {len(records)} records make no step of --pairs_per_step {config.pairs_per_step}. Lower it"
        )
    reference = runtime.first_alone(lambda: model.fingerprint(policy, device, folder, records))
    ref_logp, entropy = reference_pass(policy, records, rows, data_path, reference, per_pass)
    measured = {}
    scenes = config.eval_split != "none" and (folder / f"mfpo_{config.eval_split}.jsonl").is_file()
    if scenes:
        measured["base"] = eval.measure(policy, folder, config.eval_split)
    elif config.eval_split != "none":
        say(f"no table: {folder} holds no mfpo_{config.eval_split}.jsonl, held-out pairs of the toy world")

    # ------------------------------------------------------------------ order, optimiser, resume
    order = data.epoch_order(entropy, config.epochs, config.curriculum, config.seed)
    runtime.first_alone(lambda: runtime.open_run(run, config))
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    say(
        f"run {run}: {len(records)} records, {steps} steps of {config.pairs_per_step} pairs"
        + (f" (the last {left} of the order do not fill a step and are left out)" if left else "")
        + f"; {trained:,} parameters trained, {runtime.world()} process(es) on {device.type}"
    )
    optimizer = runtime.adamw(policy, config.weight_decay)
    first_step = 0
    if config.resume:
        found = runtime.checkpoints(run)
        if found:
            first_step = runtime.load_checkpoint(found[-1], policy, optimizer, reference)
        say(f"resumed from {found[-1] if found else 'the beginning: no checkpoint was complete'}")
    log = runtime.Log(run, steps, first_step, config.log_every)

    def passes(step):  # the records of this process in a step, those of each forward pass
        mine = runtime.my_share(order[step * config.pairs_per_step : (step + 1) * config.pairs_per_step])
        return [mine[start : start + per_pass] for start in range(0, len(mine), per_pass)]

    def packed_batch(pick):
        picked = [records[i] for i in pick], [rows[i] for i in pick]
        return model.pair_batch(policy, *picked, folder, config.image_weight > 0)

    picks = (pick for step in range(first_step, steps) for pick in passes(step))
    batches = runtime.ahead(packed_batch, picks, device)

    # ================================================================== the loop
    runtime.heed_sigterm(True)
    clock = runtime.Clock()
    for step in range(first_step, steps):
        # DEVIATION: the paper does not say how its stages are scheduled; ours share one warm-up and one cosine.
        lr = runtime.cosine(step, steps, config.learning_rate, config.warmup_steps, floor=0.1)
        for group in optimizer.param_groups:
            group["lr"] = lr
        totals, seconds = 0, 0.0
        for pick in passes(step):
            packed = next(batches)
            seconds += clock("waiting for images")
            logp = policy("logps", packed).sum(1).view(len(pick), -1)  # (B, 3): y_w | m, y_l | m, y_w | m'
            ref = ref_logp[pick].to(device)  # (B, 3), the same
            text, text_margin = dpo_loss(logp[:, 0], logp[:, 1], ref[:, 0], ref[:, 1], config.beta)
            anchor, chosen_reward = margin_loss(logp[:, 0], ref[:, 0], config.beta, config.eta)
            loss = config.text_weight * text + config.margin_weight * anchor  # (B,)
            parts = {"text_loss": text, "text_acc": text_margin > 0, "text_margin": text_margin}
            parts |= {"margin_loss": anchor, "chosen_reward": chosen_reward}
            if config.image_weight > 0:
                image, image_margin = image_loss(logp[:, 0], logp[:, 2], ref[:, 0], ref[:, 2], config.beta)
                loss = loss + config.image_weight * image
                parts |= {"image_loss": image, "image_acc": image_margin > 0, "image_margin": image_margin}
            parts["loss"] = loss
            # The mean over the pairs of the whole step: FSDP averages over the ranks, so each multiplies by them.
            (loss.sum() * runtime.world() / config.pairs_per_step).backward()
            totals += torch.stack([part.detach().float().sum() for part in parts.values()])
            seconds += clock("forward and backward")
        # Sums first, one division last: the log shows the whole batch, not the last part of the first rank.
        dist.all_reduce(totals)
        values = dict(zip(parts, (totals / config.pairs_per_step).tolist(), strict=True))  # waits for a GPU
        seconds += clock("forward and backward")
        values["gnorm"] = runtime.clip_gradients(policy, config.clip_norm)
        if not (math.isfinite(values["loss"]) and math.isfinite(values["gnorm"])):
            ids = [records[i]["id"] for i in order[step * config.pairs_per_step :][: config.pairs_per_step]]
            raise ValueError(
                f"step {step + 1}: loss {values['loss']}, gradient norm {values['gnorm']}: stopped before the update. "
                f"Records of this step: {', '.join(ids)}. Lower --learning_rate, or look at these records"
            )
        if step == 0:
            # Policy and reference are the same model, so every margin is 0 and every loss is known.
            expected = (config.text_weight + config.image_weight) * math.log(2)
            expected += config.margin_weight * (max(config.eta, 0) + math.log1p(math.exp(-abs(config.eta))))
            exact = 1e-3 if device.type == "cpu" else 5e-2  # bfloat16 kernels depend on the shape of the batch
            assert abs(values["loss"] - expected) < exact * max(1, expected), (
                f"first loss {values['loss']}, expected {expected}"
            )
            say(f"first loss {values['loss']:.4f}, as it must be with policy = reference: {expected:.4f}")
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds += clock("optimizer")
        values |= {"lr": lr, "time_s": seconds}
        values["pairs_per_s"] = config.pairs_per_step / values["time_s"]
        log(step + 1, line_of(values), **values)
        stop = runtime.stopping()
        if stop or (step + 1) % config.save_every == 0 or step + 1 == steps:
            runtime.save_checkpoint(run, step + 1, policy, optimizer, reference, config.keep)
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
            "next: torchrun train_mfpo.py --image_weight 0 --margin_weight 0   (text-only DPO, the contrast)\n"
            "      bash runs/mfpo_ablation.sh\n"
            f"      python eval.py --model {run}/final --base {base} --data {folder} --split val"
        )
    else:
        say(
            f"next: python eval.py --bench pope --model {run}/final --answers {run}/pope.jsonl "
            "--questions <POPE's lines> --images <COCO's val2014>"
        )


if __name__ == "__main__":
    runtime.run(main)
