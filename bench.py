"""
What a run will need, computed before anything is rented; and how fast a step of that size is.

    python bench.py plan --model 7b --gpus 8         LLaVA-1.5-7B, all weights trained, on 8 GPUs
    python bench.py step --model 7b --lora_rank 64   an MFPO step with random weights; also under torchrun

plan   memory of one GPU in GB, part by part, FLOPs a record and records a second, for both methods
step   seconds, records and tokens a second, utilisation of the device's own matrix rate, peak memory

Parameters are counted on the model itself, built without memory. The rest are formulas; allocator slack, NCCL
buffers and kernels' workspace come on top (plan for a tenth more).
"""

import functools
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import data
import hub
import model
import runtime
import train_mbpo
import train_mfpo
import warmup
from runtime import Mistake, knob

GB = 1e9
TFLOPS = 989  # peak of a GPU in bfloat16, TFLOP/s: an H100's data sheet
UTILISATION = 0.4  # share of the peak that is reached; a guess until measured
SAMPLED = train_mbpo.Config.max_new_tokens  # tokens of a sampled answer


@dataclass
class Config:
    model: str = knob("7b", "7b | 13b (LLaVA-1.5), or a LLaVA folder or hub id")
    per_gpu: int = knob(2, "records (MFPO) or groups (MBPO) in a forward pass")
    lora_rank: int = knob(0, "adapters of this rank instead of the weights; 0: weights")
    recompute: bool = knob(True, "recompute activations")
    question: int = knob(60, "tokens of a prompt, but for the image")
    answer: int = knob(164, "tokens of an answer of a pair; a guess at RLHF-V with LLaVA's tokenizer")

    def __post_init__(self):
        if self.question < 10:
            raise Mistake(f"--question {self.question}: a prompt has 10 tokens at least")
        positive = "per_gpu question answer gpus group repeats"
        runtime.check(self, positive=positive, not_negative="lora_rank")


@dataclass
class PlanConfig(Config):
    gpus: int = knob(8, "GPUs")
    group: int = knob(train_mbpo.Config.group, "sampled answers a question")


@dataclass
class StepConfig(Config):
    repeats: int = knob(7, "steps that count")


def llava(name):
    """The architecture of LLaVA-1.5-7B or 13B, or that of a folder."""
    if name not in ("7b", "13b"):
        return hub.read_config(name, hub.local_folder(name))
    text = LlamaConfig(vocab_size=32064)  # transformers' defaults are LLaVA-1.5-7B
    if name == "13b":
        text.hidden_size, text.num_hidden_layers, text.intermediate_size = 5120, 40, 13824
        text.num_attention_heads = text.num_key_value_heads = 40
    return LlavaConfig(text_config=text)


def counted(architecture, lora_rank):
    """Parameters by part: {name: number}, the largest FSDP unit, and how many are trained."""
    with torch.device("meta"):
        hf = LlavaForConditionalGeneration(architecture)
    hf.model.vision_tower.requires_grad_(False)
    if lora_rank:
        model.add_lora(hf, lora_rank)
    language = hf.model.language_model
    parts = {"vision": hf.model.vision_tower, "layers": language.layers, "layer": language.layers[0]}
    parts |= {"embedding": language.embed_tokens, "head": hf.lm_head, "all": hf}
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    return sizes | {"trained": sum(p.numel() for p in hf.parameters() if p.requires_grad)}


def plan(config):
    """What a PlanConfig needs: `counted`, and for each method {"memory": {part: bytes of a GPU}, "flops": of
    a record or group, "per_s": records or groups on all GPUs}.
    """
    architecture = llava(config.model)
    text, vision = architecture.text_config, architecture.vision_config
    width, layers = text.hidden_size, text.num_hidden_layers
    size, sharded, count = counted(architecture, config.lora_rank), config.gpus > 1, config.per_gpu
    patches = (vision.image_size // vision.patch_size) ** 2
    prefix, said = patches + config.question, config.group * SAMPLED
    pair, asked = prefix + 2 * config.answer, prefix + said
    # Float32 weight, gradient and two moments of AdamW; of what is frozen the weight, on one GPU in bfloat16.
    frozen, root = size["all"] - size["trained"], size["embedding"] + size["head"]
    state = {
        "weights": (4 * size["trained"] + (4 if sharded else 2) * frozen) / config.gpus,
        "gradients": 4 * size["trained"] / config.gpus,
        "optimiser": 8 * size["trained"] / config.gpus,
        # Embedding and head stay gathered in bfloat16, and two layers (one in use, one on its way). Their
        # gradients leave in float32: the root's, and one layer's at a time.
        "gathered": 2 * (root + 2 * size["layer"]) * sharded,
        "gradients in flight": 4 * (root + size["layer"]) * sharded * (not config.lora_rank),
        # One GPU computes in bfloat16 from float32 weights: autocast keeps a copy of those that are trained.
        "casts": 2 * size["trained"] * (not sharded),
    }
    # A record of MFPO is a row with both answers and one of the distorted image with the chosen one. Half of
    # MBPO's groups are a pair, half a question and its answers. Only attention pads rows.
    both, longer = pair + prefix + config.answer, max(pair, asked)
    methods = {  # rows, tokens of the longest, all tokens, at most in a forward pass, answer tokens
        "MFPO": (2, pair, both, both, 3 * config.answer),
        "MBPO": (1, longer, (pair + asked) / 2, longer, max(2 * config.answer, said)),
    }
    plans = {}
    for method, (rows, length, tokens, most, answers) in methods.items():
        # In bfloat16: the inputs of all layers, and all that a layer keeps (8 of its width, 3 of the MLP's).
        inputs = layers * 2 * count * most * width
        layer = 2 * count * most * (8 * width + 3 * text.intermediate_size)
        memory = state | {
            "activations": inputs + layer if config.recompute else layers * layer,
            "logits": 3 * 4 * count * answers * text.vocab_size,  # float32: they, log-softmax, the gradient
            "mask": count * rows * length**2 * (1 + 2),  # bool, and as numbers inside attention
        }
        # 2 FLOPs a weight and token forward, twice that backward (of frozen weights the half that leads to
        # inputs), once more to recompute; attention 4 x length x width; the head at answers only.
        passes = (3 if size["trained"] > size["all"] / 2 else 2) + config.recompute
        forward = tokens * (2 * size["layers"] + 4 * layers * width * length) + 2 * size["head"] * answers
        flops = passes * forward + 2 * size["vision"] * patches * rows
        if method == "MBPO":
            # All weights at once in bfloat16, and keys and values for prompts and answers: freed before the
            # update, so only the larger of the two counts. The frozen reference stays, its slice.
            sampling = 2 * size["all"] * sharded + 2 * 2 * layers * width * count * asked
            update = ("gathered", "gradients in flight", "activations", "logits", "mask")
            memory["reference"] = 0 if config.lora_rank else 2 * size["all"] / config.gpus
            memory["sampling beyond the update"] = max(0, sampling - sum(memory[part] for part in update))
            flops += 2 * size["layers"] * 2 * asked / 2  # that half is sampled, and scored by the reference
        per_s = config.gpus * UTILISATION * TFLOPS * 1e12 / flops
        plans[method] = {"memory": memory, "flops": flops, "per_s": per_s}
    return size, plans


def print_plan(config):
    """The table of `bench.py plan`."""
    size, plans = plan(config)
    rank = config.lora_rank
    what = f"adapters of rank {rank}" if rank else "all weights but the vision tower's"
    print(
        f"{config.model}: {size['all'] / GB:.2f} billion parameters, {size['trained'] / GB:.3f} trained "
        f"({what}), on {config.gpus} GPU(s), {config.per_gpu} a forward pass, recompute {config.recompute}\n"
    )

    def line(title, numbers):
        print(f"{title:30}" + "".join(f"{number:10.1f}" for number in numbers))

    print(f"{'GB of one GPU':30}      MFPO      MBPO")
    for part in plans["MBPO"]["memory"]:
        line(part, [each["memory"].get(part, 0) / GB for each in plans.values()])
    line("together", [sum(each["memory"].values()) / GB for each in plans.values()])
    line("TFLOP a record (or group)", [each["flops"] / 1e12 for each in plans.values()])
    line(f"a second, {UTILISATION:.0%} of peak", [each["per_s"] for each in plans.values()])


@torch.no_grad()
def random_policy(architecture, device, lora_rank=0, recompute=False):
    """A LLaVA with random weights, where a trainer has it (runtime.shard); no host has to hold them all."""
    with torch.device("meta"):
        hf = LlavaForConditionalGeneration(architecture).float()
    if lora_rank:
        model.add_lora(hf, lora_rank)
    policy, alone = model.Policy(hf, warmup.build_processor()), runtime.world() == 1
    language, tower = hf.model.language_model, hf.model.vision_tower.embeddings
    if alone and device.type == "cuda":
        runtime.halve(policy)  # before it has memory: in float32 it might not fit
    if runtime.rank() == 0:  # where it is only read, to be sliced: what was never written takes no memory
        hf.to_empty(device=device if alone else "cpu")
    # Its buffers hold anything now; shard sends those of rank 0 to all.
    language.rotary_emb = type(language.rotary_emb)(config=language.config)
    tower.position_ids = torch.arange(tower.position_ids.shape[1])[None]
    runtime.shard(policy, device, recompute)
    for name, p in policy.named_parameters():
        p.normal_(0, 0.02) if p.ndim > 1 else p.fill_(float(name.endswith("weight")))  # norms 1, biases 0
    return policy.train()


def random_pairs(policy, count, question, answer, seed=0):
    """A data.Batch of `count` MFPO records of random tokens; a prompt has `question` beside the image's."""
    rng, vocabulary, rows = np.random.default_rng(seed), len(policy.tokenizer), []

    def words(number):  # token ids of no special meaning
        return rng.integers(vocabulary // 2, vocabulary, number).tolist()

    image = [policy.image_id] * policy.encoding.image_tokens
    for _ in range(count):
        prefix, chosen = words(5) + image + words(question - 5), words(answer)
        rows += [data.Row(prefix, [chosen, words(answer)]), data.Row(prefix, [chosen])]
    pixels = torch.rand(len(rows), 3, policy.image_size, policy.image_size)
    return data.pack(rows, pixels).to(policy.mean.device)


def descend(policy, optimizer):
    """What follows a backward pass in both trainers, at a small constant learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = 1e-5
    runtime.clip_gradients(policy, 1.0)
    optimizer.step()
    optimizer.zero_grad()


def mfpo_step(policy, optimizer, packed):
    """A step of train_mfpo.py on one batch; any numbers do for the reference."""
    logp = policy.logps(packed).sum(1).view(-1, 3)
    train_mfpo.mfpo(logp, logp.detach() - 1, train_mfpo.Config())[0].mean().backward()
    descend(policy, optimizer)


def synchronized(device):
    """The time in seconds, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(device, work, repeats, title=None):
    """Seconds of each of some calls of work(), of which the first, that warms up, is one more; with a bar."""
    times = [synchronized(device)]
    for _ in tqdm(range(repeats + 1), title, leave=False, disable=title is None or runtime.rank() > 0):
        work()
        times.append(synchronized(device))
    return np.diff(times)


def matrix_rate(device, dtype=torch.float32):
    """FLOPs a second that this device reaches in plain matrix products."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size**3 / seconds_of(device, lambda: a @ a, 9).min()


def flops_of(work, *args):
    """FLOPs of work(*args) as torch counts them: matrix products, convolutions, on a GPU also attention."""
    with FlopCounterMode(display=False) as counter:
        work(*args)
    return counter.get_total_flops()


def time_step(config):
    """What `bench.py step` prints, of steps on this machine."""
    device, ranks, count = runtime.start(), runtime.world(), config.per_gpu
    policy = random_policy(llava(config.model), device, config.lora_rank, config.recompute)
    packed = random_pairs(policy, count, config.question, config.answer, runtime.rank())
    step = functools.partial(mfpo_step, policy, runtime.adamw(policy, 0.0), packed)
    # What is computed again is no gain: of 8 FLOPs a weight and token (6 with adapters) 6 (4) are its own. So
    # in the layers; vision tower and head, which are not computed again, are a hundredth of a model of 7B.
    own = (2 / 3 if config.lora_rank else 3 / 4) if config.recompute else 1
    flops, tokens = own * flops_of(step), len(packed.ids)
    took = float(np.median(seconds_of(device, step, config.repeats, "steps")[1:]))
    rate = matrix_rate(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    runtime.say(
        f"{config.model} on {ranks} {device.type}, {count} pairs each, {tokens} tokens: {took:.3f} s a step, "
        f"{ranks * count / took:.2f} pairs/s, {ranks * tokens / took:.0f} tokens/s\n"
        f"{flops / took / 1e12:.3g} TFLOP/s each of {rate / 1e12:.3g} in plain matrix products: "
        f"{100 * flops / took / rate:.1f} % utilisation; peak memory {runtime.memory_gb():.1f} GB"
    )


MOVED = {f"--{name}": f"python bench.py {name}" for name in ("plan", "step")}
MOVED["--speed"] = "python -m extras.contest"


def main():
    """Read which of the two is asked for, and do it."""
    name, config = runtime.parse_command(__doc__, {"plan": PlanConfig, "step": StepConfig}, MOVED)
    print_plan(config) if name == "plan" else time_step(config)


if __name__ == "__main__":
    runtime.run(main)
