"""
What a run will need, computed before anything is rented; and how fast our steps are beside those of others.

    python bench.py --plan --model 7b --gpus 8            LLaVA-1.5-7B, all weights trained, on 8 GPUs
    python bench.py --plan --model 13b --gpus 8 --per_gpu 2
    python bench.py --plan --model 7b --gpus 1 --lora_rank 64
    python bench.py --speed                               our steps beside plain code and TRL (pip install trl)
    python bench.py --speed --tokens 576 --batch 2 --questions 2
    python bench.py --step --model 7b --lora_rank 64      an MFPO step of that size, random weights; also under torchrun

--plan   memory of one GPU in GB, part by part, FLOPs a record and records a second, for both methods
--speed  seconds a step, how many times as long the others take (median of ratios in one turn, quartiles), peak memory
--step   seconds, records and tokens a second, utilisation of the device's own matrix rate, peak memory

Parameters are counted on the model itself, built without memory. The rest are formulas, each written where it is used;
allocator slack, NCCL buffers and kernels' workspace come on top (plan for a tenth more).
"""

import importlib.metadata
import json
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import build_data
import data
import losses
import model
import runtime
import toy
import train_mbpo
from runtime import knob

GB = 1e9


@dataclass
class Config:
    plan: bool = knob(False, "print the plan")
    speed: bool = knob(False, "time our steps beside plain code and, if it is installed, TRL, on a tiny LLaVA")
    step: bool = knob(False, "time the MFPO step of --model on this machine, with random weights and records")
    profile: bool = knob(False, "step: also print which operations take the time")
    tokens: int = knob(16, "speed: image tokens, 16 (64 pixels) or 576 (336 pixels, as LLaVA-1.5)")
    batch: int = knob(8, "speed: pairs a step")
    words: int = knob(40, "speed: longest answer of a pair; the shortest has half")
    questions: int = knob(4, "speed: questions of a GRPO step")
    repeats: int = knob(7, "speed, step: turns that count")
    json: str = knob("", "speed: also write the numbers here")
    model: str = knob("7b", "7b | 13b (LLaVA-1.5), or a LLaVA folder or hub id")
    gpus: int = knob(8, "GPUs")
    per_gpu: int = knob(2, "records (MFPO) or groups (MBPO) per forward pass, --pairs_per_gpu and --groups_per_gpu")
    lora_rank: int = knob(0, "adapters of this rank instead of the weights; 0: weights")
    recompute: bool = knob(True, "recompute activations")
    question: int = knob(60, "tokens of a prompt, but for the image")
    answer: int = knob(164, "tokens of an answer of a pair; RLHF-V has about so many with LLaVA's tokenizer (guess)")
    group: int = knob(8, "sampled answers a question")
    sampled: int = knob(16, "tokens of a sampled answer")
    tflops: float = knob(989.0, "peak of the GPU in bfloat16, TFLOP/s; an H100's data sheet says 989")
    utilisation: float = knob(0.4, "share of the peak that is reached; a guess until measured")

    def __post_init__(self):
        if self.question < 10:
            raise ValueError(f"--question {self.question}: a prompt has 10 tokens at least")
        for name, value in vars(self).items():
            if isinstance(value, int | float) and not isinstance(value, bool) and name != "lora_rank" and value <= 0:
                raise ValueError(f"--{name} must be positive, got {value}")
        if self.tokens not in (16, 576):
            raise ValueError(f"--tokens {self.tokens}: use 16 or 576")


def llava(name):
    """The architecture of LLaVA-1.5-7B or 13B, or that of a folder."""
    if name not in ("7b", "13b"):
        return model.read_config(name, model.local_folder(name))
    width, layers, inner, heads = (4096, 32, 11008, 32) if name == "7b" else (5120, 40, 13824, 40)
    text = LlamaConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        intermediate_size=inner,
        num_attention_heads=heads,
        vocab_size=32064,
    )
    vision = CLIPVisionConfig(
        hidden_size=1024, num_hidden_layers=24, intermediate_size=4096, num_attention_heads=16, image_size=336,
        patch_size=14, projection_dim=768,
    )  # fmt: skip
    return LlavaConfig(vision_config=vision, text_config=text, image_token_index=32000, vision_feature_layer=-2)


def counted(config, lora_rank):
    """Parameters by part: {name: number}, the largest FSDP unit, and how many are trained."""
    with torch.device("meta"):
        hf = LlavaForConditionalGeneration(config)
        hf.model.vision_tower.requires_grad_(False)
        if lora_rank:
            model.add_lora(hf, lora_rank)
    language = hf.model.language_model
    parts = {
        "vision": hf.model.vision_tower,
        "projector": hf.model.multi_modal_projector,
        "layers": language.layers,
        "layer": language.layers[0],
        "embedding": language.embed_tokens,
        "head": hf.lm_head,
        "all": hf,
    }
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    return sizes | {"trained": sum(p.numel() for p in hf.parameters() if p.requires_grad)}


def plan(config):
    """{method: {"memory": {part: bytes of one GPU}, "flops": of a record or group, "per_s": on all GPUs}}"""
    architecture = llava(config.model)
    text, vision = architecture.text_config, architecture.vision_config
    size, sharded = counted(architecture, config.lora_rank), config.gpus > 1
    patches = (vision.image_size // vision.patch_size) ** 2
    prefix = patches + config.question
    width, layers, vocabulary = text.hidden_size, text.num_hidden_layers, text.vocab_size
    frozen, root = size["all"] - size["trained"], size["embedding"] + size["head"]
    found = {}
    for method in ("MFPO", "MBPO"):
        # MFPO: a record is two rows, [image, question, chosen, rejected] and [distorted image, question, chosen].
        # MBPO: half of the groups are a pair, half a question with its group of answers. Only attention pads them.
        pair, asked = prefix + 2 * config.answer, prefix + config.group * config.sampled
        tokens = pair + prefix + config.answer if method == "MFPO" else (pair + asked) / 2
        held = config.per_gpu * (tokens if method == "MFPO" else max(pair, asked))  # in one forward pass, at most
        rows = config.per_gpu * (2 if method == "MFPO" else 1)
        length = pair if method == "MFPO" else max(pair, asked)
        answers = 3 * config.answer if method == "MFPO" else max(2 * config.answer, config.group * config.sampled)
        memory = {
            # Float32 weight, gradient and two moments of AdamW; what is frozen has its weight only, on one GPU in
            # bfloat16.
            "weights": (4 * size["trained"] + (4 if sharded else 2) * frozen) / config.gpus,
            "gradients": 4 * size["trained"] / config.gpus,
            "optimiser": 8 * size["trained"] / config.gpus,
            # Embedding and head stay gathered in bfloat16, and two layers (one in use, one on its way). Their gradients
            # leave in float32: the root's, and one layer's at a time.
            "gathered": 2 * (root + 2 * size["layer"]) * sharded,
            "gradients in flight": 4 * (root + size["layer"]) * sharded * (not config.lora_rank),
            # One GPU computes in bfloat16 from float32 weights: autocast keeps a copy of those that are trained.
            "casts": 2 * size["trained"] * (not sharded),
        }
        # Per token and layer, in bfloat16: its input alone, or all that a Llama layer keeps (8 of its width, 3 of the
        # MLP's).
        kept = 2 * held * (8 * width + 3 * text.intermediate_size)
        inputs = 2 * held * width
        memory["activations"] = layers * inputs + kept if config.recompute else layers * kept
        memory["logits"] = (
            3 * 4 * config.per_gpu * answers * vocabulary
        )  # float32: logits, their log-softmax, the gradient
        memory["mask"] = rows * length**2 * (1 + 2)  # bool, and as numbers inside attention
        if method == "MBPO":
            # All weights at once in bfloat16, and keys and values of all layers for a prompt and its G answers. That is
            # freed before the update, so only the larger of the two counts. The frozen reference stays, its slice.
            cache = 2 * 2 * layers * width * config.per_gpu * (prefix + config.group * config.sampled)
            memory["reference"] = 0 if config.lora_rank else 2 * size["all"] / config.gpus
            update = sum(memory[name] for name in ("gathered", "gradients in flight", "activations", "logits", "mask"))
            memory["sampling beyond the update"] = max(0, (2 * size["all"] * sharded + cache) - update)
        # 2 FLOPs a weight and token forward, twice that backward (for frozen weights only the half that leads to the
        # inputs), once more to recompute; attention 4 x length x width a token and layer; the head at answers only.
        passes = 3 if size["trained"] > size["all"] / 2 else 2
        passes += config.recompute
        forward = tokens * (2 * size["layers"] + 4 * layers * width * length) + 2 * size["head"] * answers
        flops = passes * forward + 2 * size["vision"] * patches * (rows / config.per_gpu)
        if method == "MBPO":  # questions are answered, and scored under the reference
            flops += (2 * size["layers"] * (asked + prefix + config.group * config.sampled)) / 2
        per_s = config.gpus * config.utilisation * config.tflops * 1e12 / flops
        found[method] = {"memory": memory, "flops": flops, "per_s": per_s}
    return size, found


# --------------------------------------------------------------------------------------------------- the contest
#
# Every contender starts from the same weights and trains on the same pairs, read from the same files; their losses are
# compared before they are timed. They take turns, so that a machine that is busy for a while slows all of them.


def tiny(tokens):
    """A LLaVA of 4 + 4 layers of width 256 with random weights, that sees an image as `tokens` patches (16 or 576)."""
    processor = toy.build_processor()
    size, patch = {16: (64, 16), 576: (336, 14)}[tokens]
    processor.image_processor.size = {"shortest_edge": size}
    processor.image_processor.crop_size = {"height": size, "width": size}
    processor.patch_size = patch
    processor.chat_template = CHAT
    tokenizer, sizes = processor.tokenizer, {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, intermediate_size=1024, image_size=size, patch_size=patch),
        text_config=LlamaConfig(
            **sizes,
            intermediate_size=688,
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    config.dtype = torch.float32
    torch.manual_seed(0)
    return model.Policy(LlavaForConditionalGeneration(config), processor, train_vision=False, convention="hub")


# As model.CONVENTIONS["hub"] has it, for TRL, which asks by messages.
CHAT = (
    "<s> {% for m in messages %}{% if m['role'] == 'user' %}USER: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }}{% endif %}{% endfor %} ASSISTANT:"
    "{% else %} {% for c in m['content'] %}{{ c['text'] }}{% endfor %} </s>{% endif %}{% endfor %}"
)


def made_up(folder, policy, config):
    """Random images and pairs with answers of unequal length, in words that the tokenizer knows."""
    rng = np.random.default_rng(0)
    words = sorted(word for word in policy.tokenizer.get_vocab() if word.isalpha() and len(word) > 2)
    size, records = policy.image_size, []

    def text(low, high):
        return " ".join(rng.choice(words, rng.integers(low, high + 1)))

    for i in range(4 * config.batch):
        for name in (f"{i}.png", f"{i}_noised.png"):
            Image.fromarray(rng.integers(0, 255, (size, size, 3), dtype=np.uint8)).save(folder / name)
        record = {"id": str(i), "image": f"{i}.png", "image_rejected": f"{i}_noised.png", "question": text(10, 30)}
        lengths = (config.words // 2, config.words)
        records.append(record | {"chosen": text(*lengths), "rejected": text(*lengths), "kind": "word", "answer": "cup"})
    return records


def adamw(policy):
    """The trainers' optimizer at a small constant learning rate."""
    optimizer = runtime.adamw(policy, 0.0)
    for group in optimizer.param_groups:
        group["lr"] = 1e-5
    return optimizer


class Ours:
    """The step of train_mfpo.py: packed rows, stored reference. Without `image` it is text-only DPO."""

    def __init__(self, world, image):
        self.world, self.image = world, image
        self.policy = world.policy()
        self.rows = world.rows
        self.optimizer = adamw(self.policy)
        self.ref = world.ref_logp

    def loss(self, pick):
        records, rows = [self.world.records[i] for i in pick], [self.rows[i] for i in pick]
        packed = model.pair_batch(self.policy, records, rows, self.world.folder, self.image)
        logp = self.policy("logps", packed).sum(1).view(len(pick), -1)  # (B, 3) or (B, 2)
        return world_loss(logp, self.ref[pick].to(logp.device), self.image)

    def step(self, pick):
        loss = self.loss(pick)
        loss.backward()
        runtime.clip_gradients(self.policy, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss


def world_loss(logp, ref, image, beta=0.1):
    """Mean loss of a batch from (B, 3) log-probabilities: text DPO, with `image` all of MFPO."""
    loss, _ = losses.dpo_loss(logp[:, 0], logp[:, 1], ref[:, 0], ref[:, 1], beta)
    if image:
        loss = loss + losses.image_loss(logp[:, 0], logp[:, 2], ref[:, 0], ref[:, 2], beta)[0]
        loss = loss + losses.margin_loss(logp[:, 0], ref[:, 0], beta, 0.0)[0]
    return loss.mean()


class Plain(Ours):
    """The same as one would write it first: a forward pass for each answer, full logits, the reference in the loop."""

    def __init__(self, world, image):
        super().__init__(world, image)
        self.reference = world.reference()

    def logp(self, policy, pixels, rows, which):
        """(B,) log-probability of each row's answer number `which`, right-padded, the usual causal way."""
        texts = [row.prefix + row.answers[which] for row in rows]
        length = max(map(len, texts))
        ids = torch.tensor([text + [policy.pad_id] * (length - len(text)) for text in texts], device=pixels.device)
        mask = torch.arange(length) < torch.tensor([[len(text)] for text in texts])
        labels = ids.clone()
        for i, row in enumerate(rows):
            labels[i, : len(row.prefix)] = -100
            labels[i, len(texts[i]) :] = -100
        logits = policy.hf(
            input_ids=ids,
            attention_mask=mask.long().to(pixels.device),
            pixel_values=(pixels - policy.mean) / policy.std,
            use_cache=False,
        ).logits[:, :-1]
        logp = logits.float().log_softmax(-1).gather(2, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
        return (logp * (labels[:, 1:] >= 0)).sum(1)

    def loss(self, pick):
        """As Ours has it, from 2 x 2 or 2 x 3 forward passes."""
        records, rows = [self.world.records[i] for i in pick], [self.rows[i][0] for i in pick]
        sides = [("image", 0), ("image", 1)] + [("image_rejected", 0)] * self.image
        found = []
        for policy, graph in ((self.policy, True), (self.reference, False)):
            with torch.set_grad_enabled(graph):
                columns = []
                for side, which in sides:
                    pixels = model.load_pixels(policy, self.world.folder, [r[side] for r in records])
                    columns.append(self.logp(policy, pixels.to(policy.mean.device), rows, which))
                found.append(torch.stack(columns, 1))
        return world_loss(*found, self.image)


class Trl:
    """TRL's DPOTrainer; `best` spares it the reference's forward pass and the recomputation of activations."""

    def __init__(self, world, best):
        from trl import DPOConfig, DPOTrainer

        self.world, self.best, policy = world, best, world.policy()
        options = {"gradient_checkpointing": False} if best else {}
        args = DPOConfig(
            output_dir=str(world.folder / "trl"), beta=0.1, per_device_train_batch_size=world.config.batch,
            report_to=[], max_length=None, bf16=False, **options,
        )  # fmt: skip
        quiet = [self.example(0)]
        self.trainer = DPOTrainer(
            model=policy.hf, ref_model=world.reference().hf, args=args, processing_class=policy.processor,
            train_dataset=datasets_of(quiet),
        )  # fmt: skip
        self.policy = policy
        self.trainer.create_optimizer()
        self.trainer.current_gradient_accumulation_steps = 1
        # TRL refuses to store the reference of image data; what it would do with it is done here, in its favour.
        self.trainer.precompute_ref_logps = best

    def example(self, i):
        record = self.world.records[i]
        image = Image.open(self.world.folder / record["image"]).convert("RGB")
        prompt = model.CONVENTIONS["hub"].template.format(question=record["question"])
        answers = {name: f" {record[name]} </s>" for name in ("chosen", "rejected")}
        return {"images": [image], "prompt": f"<s> {prompt}", **answers}

    def loss(self, pick):
        inputs = self.trainer.data_collator([self.example(i) for i in pick])
        if self.best:
            ref = self.world.ref_logp[pick]
            inputs |= {"ref_chosen_logps": ref[:, 0], "ref_rejected_logps": ref[:, 1]}
        return inputs

    def step(self, pick):
        trainer = self.trainer
        loss = trainer.training_step(trainer.model, self.loss(pick))
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        return loss


def datasets_of(examples):
    from datasets import Dataset

    return Dataset.from_list(examples)


class OursGrpo:
    """A step of train_mbpo.py on questions alone: rollout, rewards, reference, update."""

    def __init__(self, world):
        self.world, self.policy, self.ref = world, world.policy(), world.reference()
        self.optimizer = adamw(self.policy)
        self.settings = train_mbpo.Config(
            group=world.config.group, groups_per_step=world.config.questions, online_fraction=1.0, kl=0.04,
            max_new_tokens=world.config.sampled,
        )  # fmt: skip
        settings = (self.policy.tokenizer, self.policy.template, self.policy.image_tokens, 10**6)
        self.rows = [data.question_row(record, *settings) for record in world.records]
        self.seconds = 0.0, 0.0  # sampling and scoring, update

    def step(self, pick, number=0):
        """Rollout, then one update on it; returns the loss, a scalar."""
        began = time.perf_counter()
        with torch.no_grad():
            images = [self.world.records[i]["image"] for i in pick]
            pixels = model.load_pixels(self.policy, self.world.folder, images).to(self.policy.mean.device)
            groups, _ = train_mbpo.rollout(
                self.policy, self.ref, self.world.records, self.rows, pick, pixels, self.settings, number
            )
        for group in groups:  # rewards by rule are all alike for a random model: others, so that there is a gradient
            group.advantages = losses.group_advantages(
                torch.tensor([[float(len(answer) + answer[0]) for answer in group.row.answers]])
            )[0]
        sampled = time.perf_counter()
        packed = train_mbpo.pack_groups(groups, self.policy)
        token_logp, mask = self.policy("logps", packed), packed.answer_mask
        fixed = train_mbpo.padded([answer for g in groups for answer in g.ref_logp], mask)
        advantage = torch.cat([g.advantages for g in groups]).to(token_logp.device)
        loss, _, _ = losses.grpo_loss(token_logp, token_logp.detach(), fixed, advantage, mask, 0.2, 0.04)
        loss.mean().backward()
        runtime.clip_gradients(self.policy, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds = sampled - began, time.perf_counter() - sampled
        return loss.mean()


class TrlGrpo:
    """TRL's GRPOTrainer with transformers' generation; `best` spares it the recomputation of activations."""

    def __init__(self, world, best):
        from trl import GRPOConfig, GRPOTrainer

        self.world, policy = world, world.policy()
        options = {"gradient_checkpointing": False} if best else {}
        size = world.config.questions * world.config.group
        model.save(
            world.reference(), world.folder / "reference"
        )  # TRL reads its reference from where the model is from
        policy.hf.config._name_or_path = str(world.folder / "reference")
        args = GRPOConfig(
            output_dir=str(world.folder / "trl"), beta=0.04, per_device_train_batch_size=size, report_to=[],
            num_generations=world.config.group, max_completion_length=world.config.sampled, temperature=1.0,
            steps_per_generation=1, bf16=False, **options,
        )  # fmt: skip

        def reward(completions, **kwargs):
            return [float(len(str(completion))) for completion in completions]

        self.trainer = GRPOTrainer(
            model=policy.hf, reward_funcs=reward, args=args, processing_class=policy.processor,
            train_dataset=datasets_of([self.example(0)] * size),
        )  # fmt: skip
        self.trainer.create_optimizer()
        self.trainer.current_gradient_accumulation_steps = 1

    def example(self, i):
        record = self.world.records[i]
        image = Image.open(self.world.folder / record["image"]).convert("RGB")
        return {"image": image, "prompt": [{"role": "user", "content": record["question"]}]}

    def step(self, pick):
        trainer = self.trainer
        inputs = [example for i in pick for example in [self.example(i)] * self.world.config.group]
        loss = trainer.training_step(trainer.model, inputs, None)
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        return loss


class Sampling:
    """Answers only: our sampler, or transformers' with num_return_sequences. Both stop when all answers have ended."""

    def __init__(self, world, ours):
        self.world, self.ours, self.policy = world, ours, world.policy()
        settings = (self.policy.tokenizer, self.policy.template, self.policy.image_tokens, 10**6)
        self.rows = [data.question_row(record, *settings) for record in world.records]

    def step(self, pick):
        """Answers to the questions `pick`; no gradients."""
        policy, config = self.policy, self.world.config
        pixels = model.load_pixels(policy, self.world.folder, [self.world.records[i]["image"] for i in pick])
        pixels, prompts = pixels.to(policy.mean.device), [self.rows[i].prefix for i in pick]
        if self.ours:
            draws = torch.rand(len(pick), config.group, config.sampled, dtype=torch.float64)
            return policy.sample(pixels, prompts, draws)
        ids, mask = policy.left_padded(prompts)
        with torch.no_grad():
            return policy.hf.generate(
                input_ids=ids, attention_mask=mask.long(), pixel_values=(pixels - policy.mean) / policy.std,
                max_new_tokens=config.sampled, num_return_sequences=config.group, do_sample=True, temperature=1.0,
                top_k=0, pad_token_id=policy.pad_id, eos_token_id=policy.tokenizer.eos_token_id,
            )  # fmt: skip


class Attack:
    """PGD on the image: ours, or as one writes it first, with gradients of all weights and all logits."""

    def __init__(self, world, ours):
        self.world, self.ours, self.policy = world, ours, world.policy()
        self.rows = [data.Row(row[0].prefix, row[0].answers[:1], row[0].id) for row in world.rows]
        self.policy.requires_grad_(not ours)

    def step(self, pick):
        """Three steps of the attack on the images `pick`; returns the attacked images."""
        policy, rows = self.policy, [self.rows[i] for i in pick]
        pixels = model.load_pixels(policy, self.world.folder, [self.world.records[i]["image"] for i in pick])
        pixels = pixels.to(policy.mean.device)
        noise = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, pixels.shape)).float().to(pixels.device)
        if self.ours:
            return build_data.attack_images(policy, rows, pixels, noise, "pgd", 4 / 255, 1 / 255, 3)
        delta = 4 / 255 * noise
        lengths = torch.tensor([len(row.answers[0]) for row in rows], device=pixels.device)
        for _ in range(3):
            attacked = (pixels + delta).clamp(0, 1).requires_grad_()
            (Plain.logp(self, policy, attacked, rows, 0) / lengths).sum().backward()
            delta = (delta - 1 / 255 * attacked.grad.sign()).clamp(-4 / 255, 4 / 255)
            policy.zero_grad()
        change = (delta * 255).round().clamp(-4, 4)
        return ((pixels * 255).round() + change).clamp(0, 255) / 255


class World:
    """What all contenders share: weights, pairs, and the stored reference."""

    def __init__(self, config, folder):
        self.config, self.folder, self.device = config, folder, runtime.device()
        base = tiny(config.tokens).to(self.device)
        self.records = made_up(folder, base, config)
        settings = (base.tokenizer, base.template, base.image_tokens, 10**6)
        self.rows = [data.mfpo_rows(record, *settings) for record in self.records]
        reference, found = self.reference(), []
        with torch.no_grad():
            for i in range(0, len(self.records), config.batch):
                some = slice(i, i + config.batch)
                packed = model.pair_batch(reference, self.records[some], self.rows[some], folder)
                found.append(reference("logps", packed).sum(1).view(-1, 3).cpu())
        self.ref_logp = torch.cat(found)

    def answer_tokens(self, contest):
        """
        Mean answer tokens of one of our steps, by which all contenders' tokens a second are counted; where answers are
        sampled, the most that they can have.
        """
        config = self.config
        if contest in ("GRPO step", "sampling"):
            return config.questions * config.group * config.sampled
        answers = {"text-only DPO step": 2, "MFPO step": 3}.get(contest, 1)
        lengths = [sum(map(len, (row.answers + row.answers[:1])[:answers])) for row, _ in self.rows]
        return config.batch * float(np.mean(lengths))

    def policy(self):
        return tiny(self.config.tokens).to(self.device).train()

    def reference(self):
        """Another model than the policy, so that no loss is log 2 by itself."""
        other = tiny(self.config.tokens).to(self.device).eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in other.hf.model.language_model.parameters():
                p.add_(0.02 * torch.randn(p.shape, generator=generator).to(p.device))
        return other.requires_grad_(False)


def has_trl():
    try:
        return importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        return ""


def contests(config):
    """{contest: {contender: how to make it}}; the first of each is ours, to which the others are compared."""
    trl = has_trl()
    text = {"ours": lambda w: Ours(w, False), "plain": lambda w: Plain(w, False)}
    mfpo = {"ours": lambda w: Ours(w, True), "plain, three sequences": lambda w: Plain(w, True)}
    grpo = {"ours": OursGrpo}
    if trl:
        text |= {"TRL": lambda w: Trl(w, False), "TRL at its best": lambda w: Trl(w, True)}
        mfpo |= {"TRL, DPO of two": lambda w: Trl(w, False), "TRL at its best, DPO of two": lambda w: Trl(w, True)}
        grpo |= {"TRL": lambda w: TrlGrpo(w, False), "TRL at its best": lambda w: TrlGrpo(w, True)}
    return {
        "text-only DPO step": text,
        "MFPO step": mfpo,
        "GRPO step": grpo,
        "sampling": {"ours": lambda w: Sampling(w, True), "num_return_sequences": lambda w: Sampling(w, False)},
        "attack, 3 steps": {
            "ours": lambda w: Attack(w, True),
            "parameter gradients, all logits": lambda w: Attack(w, False),
        },
    }


def synchronized(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def race(world, makers, batch, repeats):
    """Seconds of each contender, `repeats` of them, taking turns; the first round warms up and does not count."""
    contenders = {name: make(world) for name, make in makers.items()}
    seconds, first = {name: [] for name in contenders}, {}
    for turn in tqdm(range(repeats + 1), "turns", leave=False):
        pick = [(turn * batch + k) % len(world.records) for k in range(batch)]
        order = list(contenders) if turn % 2 else list(contenders)[::-1]
        for name in order:
            began = synchronized(world.device)
            result = contenders[name].step(pick)
            seconds[name].append(synchronized(world.device) - began)
            if turn == 0 and torch.is_tensor(result) and result.numel() == 1:
                first[name] = result.item()
    return {name: times[1:] for name, times in seconds.items()}, first, contenders


def peak_bytes(device, work, *args):
    """The most that torch has allocated at any time of work(*args), beyond what was allocated before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work(*args)
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # the profiler would print that it starts and stops
    kinds = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds, profile_memory=True) as profiler:
        work(*args)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return int(np.cumsum([event.nbytes() for event in events]).max(initial=0))


def matrix_rate(device, dtype=torch.float32):
    """FLOPs a second that this device reaches in plain matrix products."""
    size = 8192 if device.type == "cuda" else 1024
    a, seconds = torch.randn(size, size, device=device, dtype=dtype), []
    for _ in range(10):
        began = synchronized(device)
        a @ a
        seconds.append(synchronized(device) - began)
    return 2 * size**3 / min(seconds)


def flops_of(work, *args):
    """FLOPs of work(*args) as torch counts them: matrix products and convolutions, and attention on a GPU only."""
    with FlopCounterMode(display=False) as counter:
        work(*args)
    return counter.get_total_flops()


def random_policy(config, device):
    """A LLaVA of --model's architecture with random weights, placed as the trainers place theirs."""
    architecture, processor = llava(config.model), toy.build_processor()
    with torch.device("meta"):
        hf = LlavaForConditionalGeneration(architecture).float()
    if config.lora_rank:
        model.add_lora(hf, config.lora_rank)
    policy = model.Policy(hf, processor, train_vision=False, convention="hub")
    runtime.shard(policy, device, config.recompute)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            p.normal_(0, 0.02) if p.ndim > 1 else p.fill_(float(name.endswith("weight")))  # norms 1, biases 0
    model.fill_anew(policy)
    return policy.train()


def full_step(config):
    """Time the MFPO step of a real size; its rows are as long as the plan's."""
    device = runtime.start()
    policy, rng = random_policy(config, device), np.random.default_rng(runtime.rank())
    optimizer, vocabulary = adamw(policy), len(policy.tokenizer)

    def words(count):  # token ids of no special meaning
        return rng.integers(vocabulary // 2, vocabulary, count).tolist()

    rows = []
    for _ in range(config.per_gpu):
        prefix = words(5) + [policy.image_id] * policy.image_tokens + words(config.question - 5)
        chosen = words(config.answer)
        rows += [data.Row(prefix, [chosen, words(config.answer)]), data.Row(prefix, [chosen])]
    pixels = torch.rand(len(rows), 3, policy.image_size, policy.image_size)
    packed = data.pack(rows, pixels).to(device)

    def step():
        logp = policy("logps", packed).sum(1).view(config.per_gpu, 3)
        world_loss(logp, logp.detach() - 1, image=True).backward()
        runtime.clip_gradients(policy, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    # What is computed again is no gain: of 8 FLOPs a weight and token (6 with adapters) 6 (4) are the step's own. Right
    # for the layers; vision tower and head, which are not computed again, are a hundredth of a model of 7B.
    flops, seconds = flops_of(step), []
    flops *= 3 / 4 if config.recompute and not config.lora_rank else 2 / 3 if config.recompute else 1
    for _ in tqdm(range(config.repeats + 1), "steps", leave=False, disable=runtime.rank() > 0):
        began = synchronized(device)
        step()
        seconds.append(synchronized(device) - began)
    took = float(np.median(seconds[1:]))
    rate = matrix_rate(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    runtime.say(
        f"{config.model} on {runtime.world()} {device.type}, {config.per_gpu} pairs each, {len(packed.ids)} tokens: "
        f"{took:.3f} s a step, {runtime.world() * config.per_gpu / took:.2f} pairs/s, "
        f"{runtime.world() * len(packed.ids) / took:.0f} tokens/s\n"
        f"{flops / took / 1e12:.3g} TFLOP/s each of {rate / 1e12:.3g} in plain matrix products: "
        f"{100 * flops / took / rate:.1f} % utilisation; peak memory {runtime.memory_gb():.1f} GB"
    )
    if config.profile and runtime.rank() == 0:
        kinds = [torch.profiler.ProfilerActivity.CPU]
        kinds += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
        with torch.profiler.profile(activities=kinds) as profiler:
            step()
        order = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
        print(profiler.key_averages().table(sort_by=order, row_limit=15, max_name_column_width=50))


def speed(config):
    """Run all contests; print them, and write them to --json."""
    with tempfile.TemporaryDirectory() as folder:
        world = World(config, Path(folder))
        sizes = {"GRPO step": config.questions, "sampling": config.questions}
        rate = matrix_rate(world.device)
        trl = has_trl() or "not installed (pip install trl)"
        print(
            f"torch {torch.__version__}, transformers {transformers.__version__}, TRL {trl}; {world.device.type}, "
            f"{torch.get_num_threads()} threads; {config.tokens} image tokens, batch {config.batch}, answers of "
            f"{config.words // 2} to {config.words} words, G {config.group}; medians of {config.repeats} turns. Tokens "
            f"are those of the answers; % is the share of {rate / 1e9:.0f} GFLOP/s in plain matrix products"
        )
        report = {}
        for contest, makers in contests(config).items():
            seconds, first, contenders = race(world, makers, sizes.get(contest, config.batch), config.repeats)
            parts = getattr(contenders["ours"], "seconds", None)  # of the last turn
            same = [value for name, value in first.items() if contest != "GRPO step" and "DPO of two" not in name]
            if same and max(same) - min(same) > 1e-3 * abs(same[0]):
                raise ValueError(f"{contest}: the contenders compute different losses, {first}: not timed")
            report[contest] = {}
            for name, times in seconds.items():
                ratios = [other / mine for other, mine in zip(times, seconds["ours"], strict=True)]
                low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
                found = {"seconds": float(np.median(times)), "ratio": middle, "quartiles": [low, high]}
                step, pick = contenders[name].step, list(range(sizes.get(contest, config.batch)))
                found["mb"] = peak_bytes(world.device, step, pick) / 1e6
                found["tokens_per_s"] = world.answer_tokens(contest) / found["seconds"]
                found["utilisation"] = flops_of(step, pick) / found["seconds"] / rate
                report[contest][name] = found | {"first_loss": first.get(name)}
                print(
                    f"{contest:19} {name:31} {found['seconds']:7.3f} s  {middle:5.2f} x [{low:.2f}, {high:.2f}]  "
                    f"{found['tokens_per_s']:6.0f} tokens/s  {100 * found['utilisation']:3.0f} %  {found['mb']:6.1f} MB"
                    + (f"  first loss {first[name]:.4f}" if name in first else "")
                )
            if parts:
                print(f"{'':19} of ours: sampling and scoring {parts[0]:.3f} s, update {parts[1]:.3f} s (last turn)")
        if config.json:
            runtime.write_text(config.json, json.dumps(report, indent=2))
            print(f"wrote {config.json}")


def main():
    config = runtime.parse_config(Config, description=__doc__)
    if config.speed:
        speed(config)
        return
    if config.step:
        full_step(config)
        return
    if not config.plan:
        raise ValueError(
            "say what to do: --speed times our steps beside others', --step one of real size, --plan computes what a "
            "run needs"
        )
    size, found = plan(config)
    what = f"adapters of rank {config.lora_rank}" if config.lora_rank else "all weights but the vision tower's"
    print(
        f"{config.model}: {size['all'] / GB:.2f} billion parameters, {size['trained'] / GB:.3f} trained ({what}), on "
        f"{config.gpus} GPU(s), {config.per_gpu} a forward pass, recompute {config.recompute}\n"
    )
    print(f"{'GB of one GPU':30}" + "".join(f"{method:>10}" for method in found))
    for part in dict.fromkeys(part for method in found.values() for part in method["memory"]):
        cells = [f"{method['memory'].get(part, 0) / GB:10.1f}" for method in found.values()]
        print(f"{part:30}" + "".join(cells))
    print(f"{'together':30}" + "".join(f"{sum(m['memory'].values()) / GB:10.1f}" for m in found.values()))
    print(f"{'TFLOP a record (or group)':30}" + "".join(f"{m['flops'] / 1e12:10.1f}" for m in found.values()))
    title = f"a second, {config.utilisation:.0%} of peak"
    print(f"{title:30}" + "".join(f"{m['per_s']:10.1f}" for m in found.values()))


if __name__ == "__main__":
    runtime.run(main)
