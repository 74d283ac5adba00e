"""
How fast our steps are beside plain code and TRL's (pip install trl), on a tiny LLaVA with random weights.

    python -m extras.contest
    python -m extras.contest --tokens 576 --batch 2 --questions 2 --repeats 5

prints the median seconds of a step, how many times as long the others take (median of the ratios in one turn,
quartiles), answer tokens a second, share of the FLOPs that plain matrix products reach, and peak memory. All
start from the same weights and train on the same pairs, read from the same files; the losses of the first
turn, which is not timed, must agree (DPO and MFPO). They take turns: a machine that is busy for a while slows all.
"""

import importlib.metadata
import json
import os
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import transformers
from PIL import Image
from tqdm import tqdm

import bench
import build_data
import data
import hub
import model
import runtime
import train_mbpo
import train_mfpo
import warmup
from runtime import knob

MFPO = train_mfpo.Config(beta=0.1)  # TRL's own, as, once, its GRPO's 0.04
TEXT = train_mfpo.Config(beta=0.1, image_weight=0, margin_weight=0)
KL, EPS = 0.04, 4 / 255
# As model.CONVENTIONS["hub"] has it, for TRL, which asks by messages: of an image and a text.
CHAT = "<s> USER: <image>\n{{ messages[0]['content'][-1]['text'] }} ASSISTANT:"


@dataclass
class Config:
    tokens: Literal[16, 576] = knob(16, "image tokens: of 64 pixels, or of 336 as LLaVA-1.5")
    batch: int = knob(8, "pairs a step")
    words: int = knob(40, "longest answer of a pair; the shortest has half")
    questions: int = knob(4, "questions of a GRPO step")
    group: int = knob(8, "sampled answers a question")
    repeats: int = knob(7, "turns that count")
    json: str = knob("", "also write the numbers here")

    def __post_init__(self):
        runtime.check(self, positive="batch words questions group repeats")


def tiny(tokens, seed=0):
    """A LLaVA of 4 + 4 layers of width 256 with random weights, that sees an image as 16 or 576 patches."""
    size, patch = (64, 16) if tokens == 16 else (336, 14)
    config, processor = warmup.build_policy(0).hf.config, warmup.build_processor()
    images = processor.image_processor
    images.size, images.crop_size = {"shortest_edge": size}, {"height": size, "width": size}
    processor.patch_size, processor.chat_template = patch, CHAT
    for part in (config.text_config, config.vision_config):
        part.update({"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8})
    config.text_config.update({"num_key_value_heads": 8, "head_dim": 32, "intermediate_size": 688})
    config.vision_config.update({"intermediate_size": 1024, "image_size": size, "patch_size": patch})
    torch.manual_seed(seed)
    return model.Policy(transformers.LlavaForConditionalGeneration(config), processor)


def made_up(folder, policy, count, words):
    """Random images and `count` pairs, answers of words // 2 to `words` words that the tokenizer knows."""
    rng, records, size = np.random.default_rng(0), [], policy.image_size
    known = sorted(word for word in policy.tokenizer.get_vocab() if word.isalpha() and len(word) > 2)

    def text(low, high):
        return " ".join(rng.choice(known, rng.integers(low, high + 1)))

    for i in range(count):
        record = {"id": str(i), "question": text(10, 30), "kind": "word", "answer": "cup"}
        for name in ("image", "image_rejected"):
            record[name] = f"{i}_{name}.png"
            Image.fromarray(rng.integers(0, 255, (size, size, 3), dtype=np.uint8)).save(folder / record[name])
        records.append(record | {name: text(words // 2, words) for name in ("chosen", "rejected")})
    return records


class World:
    """What all contenders share: weights, pairs, and the stored reference."""

    def __init__(self, config, folder):
        self.config, self.folder, self.device = config, folder, runtime.device()
        policy, reference = self.models()
        self.records = made_up(folder, policy, 4 * config.batch, config.words)
        self.rows = policy.encoding.rows(self.records, folder, "chosen", "rejected")
        scored = self.records, self.rows, folder / "reference.jsonl", config.batch
        self.ref_logp, _ = train_mfpo.reference_pass(reference, *scored)  # (N, 3)

    def models(self):
        """A policy, and as its reference another model, so that no loss is log 2 by itself."""
        policy, reference = (tiny(self.config.tokens, seed).to(self.device) for seed in (0, 1))
        return policy.train(), reference.eval().requires_grad_(False)

    def pixels(self, policy, pick, side="image"):
        return model.load_pixels(policy, self.folder, [self.records[i][side] for i in pick]).to(self.device)


class Runner:
    """One who takes part: a policy of its own, and what trains it. Its step is one of the functions below."""

    def __init__(self, world):
        self.world, (self.policy, self.reference) = world, world.models()
        self.optimizer, self.trainer = runtime.adamw(self.policy, 0.0), None


def pairs(runner, settings, own, pick):
    """Our `own`, train_mfpo.py's, or as one writes it first: a pass an answer, all logits, no stored reference."""
    world, image = runner.world, settings.image_weight > 0
    records, rows = ([items[i] for i in pick] for items in (world.records, world.rows))
    if own:
        packed = model.pair_batch(runner.policy, records, rows, world.folder, image)
        logp = runner.policy.logps(packed).sum(1).view(len(pick), -1)
        both = logp, world.ref_logp[pick].to(world.device)
    else:
        sides, both = [("image", 0), ("image", 1)] + [("image_rejected", 0)] * image, []
        for scorer in (runner.policy, runner.reference):
            columns = [plain_logp(scorer, world.pixels(scorer, pick, side), rows, k) for side, k in sides]
            both.append(torch.stack(columns, 1))
    loss = train_mfpo.mfpo(*both, settings)[0].mean()
    loss.backward()
    bench.descend(runner.policy, runner.optimizer)
    return loss


def plain_logp(policy, pixels, rows, which):
    """(B,) log-probability of each row's answer number `which`, right-padded, the usual causal way."""
    texts = {"input_ids": [row.prefix + row.answers[which] for row in rows]}
    inputs = policy.tokenizer.pad(texts, padding_side="right", return_tensors="pt").to(pixels.device)
    pixels = (pixels - policy.mean) / policy.std
    logits = policy.hf(**inputs, pixel_values=pixels, use_cache=False).logits[:, :-1]
    logp = logits.float().log_softmax(-1).gather(2, inputs["input_ids"][:, 1:, None])[..., 0]
    spans = [(len(row.prefix) - 1, len(row.prefix) - 1 + len(row.answers[which])) for row in rows]
    return torch.stack([line[start:end].sum() for line, (start, end) in zip(logp, spans, strict=True)])


def ours_grpo(runner, pick):
    """A step of train_mbpo.py on questions alone: rollout, rewards, reference, update."""
    world, config = runner.world, runner.world.config
    sizes = {"groups_per_step": config.questions, "group": config.group}
    settings = train_mbpo.Config(online_fraction=1.0, kl=KL, **sizes)
    asked = world.records, world.rows, pick, world.pixels(runner.policy, pick)
    groups, _ = train_mbpo.rollout(runner.policy, runner.reference, *asked, settings, 0)
    for group in groups:  # by rule a random model's are all alike: others, so that there is a gradient
        group.rewards = torch.tensor([float(len(answer) + answer[0]) for answer in group.row.answers])
    _, sums = train_mbpo.update(runner.policy, groups, None, settings)
    bench.descend(runner.policy, runner.optimizer)
    return sums["loss"] / len(pick)


def theirs(runner, kind, best, pick):
    """A step of TRL's trainer, DPO or GRPO. `best` spares it the recomputation of activations and, DPO, the reference's
    forward pass: TRL stores no reference of image data; what it would do with one is done here.
    """
    runner.trainer = trainer = runner.trainer or trl_trainer(runner, kind, best)  # in the turn that does not count
    examples = [trl_example(runner.world, kind, i) for i in pick]
    if kind == "GRPO":
        inputs = [example for example in examples for _ in range(runner.world.config.group)]
    else:
        chosen, rejected, _ = runner.world.ref_logp[pick].T
        stored = {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected} if best else {}
        inputs = trainer.data_collator(examples) | stored
    loss = trainer.training_step(trainer.model, inputs, None)
    bench.descend(trainer.model, trainer.optimizer)
    return loss


def trl_example(world, kind, i):
    """A record as TRL's trainer takes it."""
    record = world.records[i]
    image = Image.open(world.folder / record["image"]).convert("RGB")
    if kind == "GRPO":
        return {"image": image, "prompt": [{"role": "user", "content": record["question"]}]}
    prompt = "<s> " + model.CONVENTIONS["hub"].template.format(question=record["question"])
    answers = {name: f" {record[name]} </s>" for name in ("chosen", "rejected")}
    return {"images": [image], "prompt": prompt, **answers}


def trl_trainer(runner, kind, best):
    """TRL's trainer, ready for a step."""
    import trl
    from datasets import Dataset

    hf, config, folder = runner.policy.hf, runner.world.config, runner.world.folder
    if kind == "GRPO":
        hub.save_new(runner.reference, folder / "reference")  # TRL reads it from where the model is from
        hf.config._name_or_path = str(folder / "reference")
        batch, options = config.questions * config.group, {"beta": KL, "num_generations": config.group}
        options |= {"max_completion_length": bench.SAMPLED, "steps_per_generation": 1}
        parts = {"reward_funcs": lambda completions, **_: [float(len(str(text))) for text in completions]}
    else:
        batch, options = config.batch, {"beta": MFPO.beta, "max_length": None}
        parts = {"ref_model": runner.reference.hf}
    options |= {"per_device_train_batch_size": batch, "report_to": [], "bf16": False}
    options |= {"gradient_checkpointing": False} if best else {}
    parts["args"] = getattr(trl, f"{kind}Config")(str(folder / "trl"), **options)
    parts["train_dataset"] = Dataset.from_list([trl_example(runner.world, kind, 0)] * batch)
    trainer = getattr(trl, f"{kind}Trainer")(model=hf, processing_class=runner.policy.processor, **parts)
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    trainer.precompute_ref_logps = best
    return trainer


@torch.no_grad()
def sampling(runner, own, pick):
    """Answers only: our sampler, or transformers'. Both stop when all answers have ended."""
    policy, group, most = runner.policy, runner.world.config.group, bench.SAMPLED
    pixels, prompts = runner.world.pixels(policy, pick), [runner.world.rows[i].prefix for i in pick]
    if own:
        return policy.sample(pixels, prompts, torch.rand(len(pick), group, most, dtype=torch.float64))
    inputs = policy.tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    inputs = {**inputs.to(pixels.device), "pixel_values": (pixels - policy.mean) / policy.std}
    options = {"do_sample": True, "top_k": 0, "num_return_sequences": group, "max_new_tokens": most}
    return policy.hf.generate(**inputs, **options)


def attack(runner, own, pick):
    """Three steps on the image: ours, or as one writes it first, with gradients of all weights, all logits."""
    rows = [data.Row(runner.world.rows[i].prefix, runner.world.rows[i].answers[:1]) for i in pick]
    pixels, policy = runner.world.pixels(runner.policy, pick), runner.policy.requires_grad_(not own)
    noise = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, pixels.shape)).to(pixels)
    if own:
        return build_data.attack_images(policy, rows, pixels, noise, EPS, 1 / 255, 3)
    delta = EPS * noise
    for _ in range(3):
        attacked = (pixels + delta).clamp(0, 1).requires_grad_()
        plain_logp(policy, attacked, rows, 0).sum().backward()  # the mean over its tokens has the same sign
        delta = (delta - 1 / 255 * attacked.grad.sign()).clamp(-EPS, EPS)
        policy.zero_grad()
    return build_data.attack_images(policy, rows, pixels, delta / EPS, EPS, 0, 0)  # in 8 bits


# {contest: {contender: (step, its settings)}}; the others are compared to "ours"
CONTESTS = {
    "text-only DPO step": {"ours": (pairs, TEXT, True), "plain": (pairs, TEXT, False)},
    "MFPO step": {"ours": (pairs, MFPO, True), "plain, three sequences": (pairs, MFPO, False)},
    "GRPO step": {"ours": (ours_grpo,)},
    "sampling": {"ours": (sampling, True), "num_return_sequences": (sampling, False)},
    "attack, 3 steps": {"ours": (attack, True), "parameter gradients, all logits": (attack, False)},
}
TRL = "".join(package.version for package in importlib.metadata.distributions(name="trl"))
for title, best in (("TRL", False), ("TRL at its best", True)) if TRL else ():
    CONTESTS["text-only DPO step"][title] = (theirs, "DPO", best)
    CONTESTS["MFPO step"][f"{title}, DPO of two"] = (theirs, "DPO", best)
    CONTESTS["GRPO step"][title] = (theirs, "GRPO", best)


def peak_bytes(device, work, *args):
    """The most that torch has allocated at any time of work(*args), beyond what was allocated before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work(*args)
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # the profiler would print that it starts and stops
    with torch.profiler.profile(profile_memory=True) as profiler:
        work(*args)
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    return int(np.cumsum([e.nbytes() for e in events if e.name() == "[memory]"]).max(initial=0))


def compete(world, contest, steps, rate):
    """Time the contenders of a contest and print it; returns {contender: its numbers}."""
    config, times, first, report = world.config, {name: [] for name in steps}, {}, {}
    asked = contest in ("GRPO step", "sampling")
    batch = config.questions if asked else config.batch
    answers = {"text-only DPO step": 2, "MFPO step": 3}.get(contest, 1)
    lengths = [sum(map(len, (row.answers * 2)[:answers])) for row in world.rows]
    tokens = batch * (config.group * bench.SAMPLED if asked else float(np.mean(lengths)))
    turns = {name: partial(step, Runner(world), *of) for name, (step, *of) in steps.items()}
    for number in tqdm(range(config.repeats + 1), "turns", leave=False):  # the first warms up
        pick = [(number * batch + k) % len(world.records) for k in range(batch)]
        for name in list(steps)[:: 1 if number % 2 else -1]:
            began = bench.synchronized(world.device)
            result = turns[name](pick)
            times[name].append(bench.synchronized(world.device) - began)
            if number == 0 and torch.is_tensor(result) and result.numel() == 1:
                first[name] = result.item()
    same = [loss for name, loss in first.items() if contest != "GRPO step" and "DPO of two" not in name]
    assert not same or max(same) - min(same) <= 1e-3 * abs(same[0]), f"{contest}: different losses, {first}"
    for name, turn in turns.items():
        took, work = float(np.median(times[name][1:])), (turn, range(batch))
        low, middle, high = np.quantile(np.divide(times[name], times["ours"])[1:], [0.25, 0.5, 0.75])
        mb, rated = peak_bytes(world.device, *work) / 1e6, bench.flops_of(*work) / took / rate
        report[name] = {"seconds": took, "ratio": middle, "quartiles": [low, high], "mb": mb}
        report[name] |= {"tokens_per_s": tokens / took, "utilisation": rated, "first_loss": first.get(name)}
        print(
            f"{contest:19} {name:31} {took:7.3f} s  {middle:5.2f} x [{low:.2f}, {high:.2f}]  "
            f"{tokens / took:6.0f} tokens/s  {100 * rated:3.0f} %  {mb:6.1f} MB"
            + (f"  first loss {first[name]:.4f}" if name in first else "")
        )
    return report


def main():
    """Hold all contests, a line a contender."""
    config = runtime.parse_config(Config, description=__doc__)
    with tempfile.TemporaryDirectory() as folder:
        world = World(config, Path(folder))
        rate, trl = bench.matrix_rate(world.device), TRL or "not installed (pip install trl)"
        print(
            f"torch {torch.__version__}, transformers {transformers.__version__}, TRL {trl}; {world.device.type}, "
            f"{torch.get_num_threads()} threads, {rate / 1e9:.0f} GFLOP/s in plain matrix products; {config}"
        )
        report = {name: compete(world, name, steps, rate) for name, steps in CONTESTS.items()}
        if config.json:
            runtime.write_text(config.json, json.dumps(report, indent=2))
            print(f"wrote {config.json}")


if __name__ == "__main__":
    runtime.run(main)
