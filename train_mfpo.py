"""
MFPO (arXiv:2410.15334): preference tuning on pairs that differ in the answer or in the image, easy pairs first.

    laptop   torchrun train_mfpo.py
    8 GPUs   torchrun --standalone --nproc_per_node=8 train_mfpo.py --model <hf id or folder> --data <folder> \
                 --pairs_per_gpu 2 --learning_rate 1e-6 --recompute True

reads    <data>/mfpo.jsonl and its images (format: data.py)
writes   out/<run>/{config.json, metrics.jsonl, step_00050/, final/, eval.json}; continue with --resume out/<run>
expect   laptop: CHAIR_s .51 -> .11, recall .94 -> .93 in 2 to 3 minutes (README.md)
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

import build_data
import data
import eval
import hub
import model
import runtime
from losses import dpo_loss, image_loss, margin_loss
from runtime import Mistake, knob, say


@dataclass
class Config:
    # What is trained on what
    model: str = knob("toy", "'toy' (<data>/base, built here if missing) or a Hugging Face LLaVA folder or id")
    data: str = knob("data/toy", "folder with mfpo.jsonl, or a JSONL file; the built-in world is built if missing")
    convention: Literal["", "original", "hub"] = knob("", "how the model sees and is asked; empty: its folder's own")
    out: str = knob("", "folder of this run; empty: the next free out/mfpo-<n>")
    resume: str = knob("", "folder of a run to continue; all settings come from it")
    max_length: int = knob(2048, "tokens of image, question and answer; a longer record is an error, never cut")
    # The method
    beta: float = knob(0.3, "inverse temperature; our choice on the toy's validation scenes (DPO papers: 0.1 to 0.5)")
    text_weight: float = knob(1.0, "weight of L_text; the paper's best sweep is 1 : 1 : 1")
    image_weight: float = knob(1.0, "weight of L_image; 0: no pass over m' in training (the reference pass has one)")
    margin_weight: float = knob(1.0, "weight of L_margin")
    eta: float = knob(0.0, "offset of L_margin in nats of reward; the paper's best")
    curriculum: Literal["easy_to_hard", "hard_to_easy", "none"] = knob("easy_to_hard", "the paper: easy_to_hard")
    epochs: int = knob(2, "passes over the records (over each third with a curriculum)")
    steps: int = knob(0, "only the first so many steps of the order; 0: all")
    # The optimiser
    learning_rate: float = knob(2e-4, "peak, then a half cosine to a tenth; our choice for the toy (7B: 1e-6 or less)")
    warmup_steps: int = knob(10, "linear warm-up")
    weight_decay: float = knob(0.0, "on matrices only")
    clip_norm: float = knob(1.0, "largest global gradient norm; a usual value")
    train_vision: bool = knob(False, "train the vision tower too")
    lora_rank: int = knob(0, "train adapters of this rank, not the weights (one GPU of 24 to 48 GB); 0: weights")
    recompute: bool = knob(False, "keep few activations and compute them again: a third more time, far less memory")
    pairs_per_step: int = knob(16, "records per optimizer step over all processes; accumulation is derived")
    pairs_per_gpu: int = knob(0, "records per forward pass, fewer when memory runs out; 0: a process's share")
    # Keeping
    seed: int = knob(0, "seed of the order of records, and, where they are built, of the toy's scenes and base model")
    save_every: int = knob(50, "steps between checkpoints")
    eval_split: Literal["test", "val", "none"] = knob("test", "toy scenes for the table; tune on val only")

    def __post_init__(self):
        positive = "beta learning_rate epochs pairs_per_step save_every max_length clip_norm"
        weights = "text_weight image_weight margin_weight"
        zero = f"{weights} weight_decay warmup_steps lora_rank pairs_per_gpu steps seed"
        runtime.check(self, positive=positive, not_negative=zero)
        if not any(getattr(self, name) for name in weights.split()):
            raise Mistake("--text_weight, --image_weight and --margin_weight are all 0: nothing to train")
        if self.lora_rank and self.train_vision:
            raise Mistake("--train_vision and --lora_rank: adapters leave the tower as it is. Drop one of them")


def mfpo(logp, ref, config):
    """MFPO's loss of B pairs, one value a pair; the loop alone averages.

        L = w_text L_text(y_w, y_l | m) + w_image L_image(y_w | m, m') + w_margin L_margin(y_w | m)

    logp, ref   (B, 3) float32 nats under policy and reference: y_w given m, y_l given m, y_w given m' (with
                image_weight 0 the last is not looked at)
    returns     loss (B,), and named parts (B,) for the log
    """
    text, text_margin = dpo_loss(logp[:, 0], logp[:, 1], ref[:, 0], ref[:, 1], config.beta)
    margin, chosen_reward = margin_loss(logp[:, 0], ref[:, 0], config.beta, config.eta)
    loss = config.text_weight * text + config.margin_weight * margin
    parts = {"text_loss": text, "text_acc": text_margin > 0, "text_margin": text_margin}
    parts |= {"margin_loss": margin, "chosen_reward": chosen_reward}
    if config.image_weight > 0:
        image, image_margin = image_loss(logp[:, 0], logp[:, 2], ref[:, 0], ref[:, 2], config.beta)
        loss = loss + config.image_weight * image
        parts |= {"image_loss": image, "image_acc": image_margin > 0, "image_margin": image_margin}
    return loss, parts


def reference_pass(policy, records, rows, path, batch):
    """One pass without gradients over all records, cached in the file `path`: no reference model has to sit in memory
    while training, and the curriculum knows each record's entropy.

    returns  logp (N, 3) float32 nats: y_w, y_l, y_w given the distorted image;   entropy (N,) nats per token
    """
    keys = ("chosen", "rejected", "chosen_distorted", "entropy")

    def load(pick):
        return model.pair_batch(policy, [records[i] for i in pick], [rows[i] for i in pick], path.parent)

    def score(packed):
        token_logp, token_entropy = policy.logps(packed, entropy=True)  # (3B, T)
        # H of MFPO's curriculum. DEVIATION: a token entropy, the mean over the chosen answer's tokens of that of
        # the next token. "Semantic entropy" in its own literature samples answers and groups them by meaning.
        entropy = (token_entropy.sum(1) / packed.answer_mask.sum(1)).view(-1, 3)[:, :1]
        return torch.cat([token_logp.sum(1).view(-1, 3), entropy], 1).tolist()

    if not runtime.first_alone(path.is_file):
        with runtime.summoned(policy):
            values = runtime.over_records("reference", range(len(records)), batch, load, score)
        lines = [{"id": r["id"], **dict(zip(keys, v, strict=True))} for r, v in zip(records, values, strict=True)]
        runtime.first_alone(lambda: runtime.write_jsonl(path, lines))
    say(f"reference log-probabilities of {len(records)} records: {path}")
    table = torch.tensor([[line[key] for key in keys] for line in data.read_lines(path)])  # (N, 4)
    return table[:, :3], table[:, 3]


def line_of(values):
    """The part of the log line that is MFPO's; docs/log.md defines each word. text/image where that is trained."""

    def both(name, form):
        return "/".join(format(values[k], form) for k in (f"text_{name}", f"image_{name}") if k in values)

    line = f"loss {values['loss']:.4f} | acc {both('acc', '.2f')} | margin {both('margin', '+.2f')}"
    line += f" | chosen {values['chosen_reward']:+.2f} | gnorm {values['gnorm']:.2f} | lr {values['lr']:.1e}"
    return f"{line} | {values['pairs_per_s']:.1f} pairs/s"


def main():
    """Train with MFPO: records, reference, loop, export, table."""
    config = runtime.parse_config(Config, description=__doc__)
    config = runtime.resumed(config, sys.argv[1:])
    device = runtime.start()
    per_pass = runtime.per_pass(config.pairs_per_step, config.pairs_per_gpu, "pairs")
    run = runtime.first_alone(lambda: runtime.name_run(config, "mfpo"))

    # ------------------------------------------------------------------ data, base model, reference
    data_path = Path(config.data) if config.data.endswith(".jsonl") else Path(config.data) / "mfpo.jsonl"
    folder, base = data_path.parent, build_data.ready("mfpo", config, data_path)
    records = data.read_records(data_path, data.MFPO_FIELDS)
    # Records may be changed here: all that follows names, scores and trains them as they are now.
    policy = hub.load(base, config.train_vision, config.convention, True, config.lora_rank, config.recompute)
    policy.encoding.max_length = config.max_length
    rows, images = policy.encoding.rows(records, data_path, "chosen", "rejected"), {}
    steps, left = divmod(len(records) * config.epochs, config.pairs_per_step)
    if steps < max(1, config.steps):
        makes = f"{len(records)} records make {steps} steps of --pairs_per_step {config.pairs_per_step}"
        raise Mistake(f"{data_path}: {makes}, not {max(1, config.steps)}. Lower it")
    steps = config.steps or steps
    reference = runtime.first_alone(lambda: hub.fingerprint(policy, folder, records))
    ref_path = folder / f"ref_{reference}.jsonl"
    ref_logp, entropy = reference_pass(policy, records, rows, ref_path, per_pass)
    yardstick = eval.yardstick(data_path, config.eval_split)
    before = eval.measure(policy, yardstick)

    # ------------------------------------------------------------------ order, optimiser, resume
    order = data.epoch_order(entropy, config.epochs, config.curriculum, config.seed)
    runtime.open_run(run, config)
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    rest = f" (the last {left} of the order do not fill a step)" if left and not config.steps else ""
    say(f"run {run}: {len(records)} records, {steps} steps of {config.pairs_per_step} pairs{rest}; "
        f"{trained:,} parameters trained, {runtime.world()} process(es) on {device.type}")  # fmt: skip
    optimizer = runtime.adamw(policy, config.weight_decay)
    first_step = runtime.restore(run, config, policy, optimizer, reference)
    log = runtime.Log(run, steps, first_step)

    def passes(step):  # the records of this process in a step, those of each forward pass
        share = runtime.my_share(order[step * config.pairs_per_step : (step + 1) * config.pairs_per_step])
        return [share[start : start + per_pass] for start in range(0, len(share), per_pass)]

    def packed_batch(pick):
        picked = [records[i] for i in pick], [rows[i] for i in pick]
        return model.pair_batch(policy, *picked, folder, config.image_weight > 0, images)

    batches = runtime.ahead(packed_batch, (pick for step in range(first_step, steps) for pick in passes(step)))

    # ================================================================== the loop
    runtime.heed_sigterm(True)
    clock = runtime.Clock()
    for step in range(first_step, steps):
        # DEVIATION: how the paper schedules its stages could not be found; ours share one warm-up and one cosine. Its
        # alignment is "iterative": here the reference stays that of the start (runs/curriculum.sh renews it).
        lr = runtime.cosine(step, steps, config.learning_rate, config.warmup_steps, floor=0.1)
        for group in optimizer.param_groups:
            group["lr"] = lr
        totals, seconds = 0, 0.0
        for pick in passes(step):
            packed = next(batches)
            seconds += clock("waiting for images")
            logp = policy.logps(packed).sum(1).view(len(pick), -1)  # (B, 3): y_w | m, y_l | m, y_w | m'
            ref = ref_logp[pick].to(device)  # (B, 3), the same
            loss, parts = mfpo(logp, ref, config)
            # The mean over the pairs of the whole step: FSDP averages over the ranks, so each multiplies by them.
            (loss.sum() * runtime.world() / config.pairs_per_step).backward()
            parts |= {"loss": loss, "expected": mfpo(ref, ref, config)[0]}
            totals += torch.stack([part.detach().float().sum() for part in parts.values()])
            seconds += clock("forward and backward")
        # Sums first, one division last: the log shows the complete batch, not the last part of the first rank.
        dist.all_reduce(totals)
        values = dict(zip(parts, (totals / config.pairs_per_step).tolist(), strict=True))  # waits for a GPU
        seconds += clock("forward and backward")
        values["gnorm"], expected = runtime.clip_gradients(policy, config.clip_norm), values.pop("expected")
        ids = [records[i]["id"] for i in order[step * config.pairs_per_step :][: config.pairs_per_step]]
        runtime.check_step(step, {"loss": values["loss"], "gradient norm": values["gnorm"]}, ids)
        if step == 0:
            runtime.check_first(values["loss"], expected, ref_path)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds += clock("optimizer")
        values |= {"lr": lr, "time_s": seconds, "pairs_per_s": config.pairs_per_step / seconds}
        log(step + 1, line_of(values), values)
        stop = runtime.stopping()
        if stop or (step + 1) % config.save_every == 0 or step + 1 == steps:
            runtime.save_checkpoint(run, step + 1, policy, optimizer, reference)
        if stop:
            say(f"stopped by SIGTERM after step {step + 1}, which is saved. Continue with --resume {run}")
            return
        clock("log and checkpoints")
    runtime.heed_sigterm(False)
    say(f"the loop took {clock.summary()}")
    # ==================================================================

    hub.export(policy, run / "final")
    eval.finish(
        policy, run, before, yardstick, base, "train_mfpo.py --image_weight 0 --margin_weight 0   (text-only DPO)"
    )


if __name__ == "__main__":
    runtime.run(main)
