"""
What a run will need, computed before anything is rented.

    python bench.py --plan --model 7b --gpus 8            LLaVA-1.5-7B, all weights trained, on 8 GPUs
    python bench.py --plan --model 13b --gpus 8 --per_gpu 2
    python bench.py --plan --model 7b --gpus 1 --lora_rank 64

prints   memory of one GPU in GB, part by part, FLOPs a record and records a second, for both methods

Parameters are counted on the model itself, built without memory. The rest are formulas, each written where it is used;
allocator slack, NCCL buffers and kernels' workspace come on top (plan for a tenth more).
"""

from dataclasses import dataclass

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import model
import runtime
from runtime import knob

GB = 1e9


@dataclass
class Config:
    plan: bool = knob(False, "print the plan")
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
        for name, value in vars(self).items():
            if isinstance(value, int | float) and name not in ("plan", "lora_rank", "recompute") and value <= 0:
                raise ValueError(f"--{name} must be positive, got {value}")


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
        # MFPO: a record is two rows, [image, question, chosen, rejected] and [distorted image, question, chosen],
        # padded alike. MBPO: half of the groups are a pair, half a question with its group of answers.
        pair, asked = prefix + 2 * config.answer, prefix + config.group * config.sampled
        tokens = 2 * pair if method == "MFPO" else (pair + asked) / 2
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
        kept = 2 * rows * length * (8 * width + 3 * text.intermediate_size)
        inputs = 2 * rows * length * width
        memory["activations"] = layers * inputs + kept if config.recompute else layers * kept
        memory["logits"] = (
            3 * 4 * config.per_gpu * answers * vocabulary
        )  # float32: logits, their log-softmax, the gradient
        memory["mask"] = rows * length**2 * (1 + 2)  # bool, and as numbers inside attention
        if method == "MBPO":
            # All weights at once in bfloat16, and keys and values of all layers for G answers a question. That is freed
            # before the update, so only the larger of the two counts. The frozen reference stays, its slice.
            cache = 2 * 2 * layers * width * config.per_gpu * config.group * (prefix + config.sampled)
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


def main():
    config = runtime.parse_config(Config, description=__doc__)
    if not config.plan:
        raise ValueError(
            "say what to do: --plan prints memory and time of a run, for example bench.py --plan --model 7b"
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
