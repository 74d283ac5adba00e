"""
A Hugging Face LLaVA folder in, a Hugging Face LLaVA folder out; a name for all that its numbers depend on.

Only safetensors are read (a pickle could run code), and no code from a folder is run. Rank 0 reads a model in
float32, the others get their slices from it: 28 GB of host memory for 7B, 53 GB for 13B, twice to export.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import AutoConfig, AutoProcessor, LlavaForConditionalGeneration
from transformers.utils import logging

import runtime
from data import image_path
from model import CONVENTIONS, LoraLinear, Policy, add_lora
from runtime import Mistake, last_line

SHARD_BYTES = 4_500_000_000  # one exported file
HUB_NAMES = {  # transformers 5's names of a model's parts -> those of files on the hub
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
}
logging.disable_progress_bar()


def without_warnings(make):
    """make(), without transformers' warnings, as that torchvision is missing: its Pillow processor is ours."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return make()
    finally:
        logging.set_verbosity(level)


def local_folder(path):
    """The folder of a model: `path` itself, or for a hub id its files, fetched or from the cache."""
    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(snapshot_download(str(path), allow_patterns="*.json *.safetensors *.model *.jinja".split()))
    except (OSError, ValueError) as error:  # no such id, no network, no permission
        reason = str(error).split("\n")[0][:100]
        raise Mistake(f"--model {path}: neither a folder here nor a hub id that can be had ({reason})") from None


def read_config(path, folder):
    """The config of a LLaVA folder; Mistake unless it is one that this project trains, in safetensors."""
    try:
        stored = json.loads((folder / "config.json").read_text())
        if "mm_projector_type" in stored or "LlavaLlamaForCausalLM" in stored.get("architectures", []):
            remedy = "Name the hub's conversion, llava-hf/llava-1.5-7b-hf or -13b-hf"
            raise Mistake(f"--model {path}: is in the layout of LLaVA's own code, without a vision tower. {remedy}")
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Mistake:
        raise
    except (OSError, ValueError) as error:
        raise Mistake(f"--model {path}: no model's folder ({str(error).split(chr(10))[0][:100]}). Check it") from None
    if config.model_type != "llava":
        raise Mistake(f"--model {path}: is a {config.model_type!r}; this project trains 'llava' models (LLaVA-1.5)")
    parts = [config.vision_config.model_type, config.text_config.model_type, config.vision_feature_select_strategy]
    layer = config.vision_feature_layer
    if parts != ["clip_vision_model", "llama", "default"] or not isinstance(layer, int):
        need = "only of clip_vision_model, llama, default, one layer, as LLaVA-1.5 is, are trained here"
        raise Mistake(f"--model {path}: a LLaVA of {', '.join(parts)}, features of layer {layer}; {need}")
    if not list(folder.glob("*.safetensors")):
        if not list(folder.glob("*.bin")):
            raise Mistake(f"--model {path}: holds no weights. Fetch or export it again")
        remedy = "If you trust it: AutoModelForImageTextToText.from_pretrained(folder).save_pretrained(folder)"
        raise Mistake(f"--model {path}: only a pickle, which can run code. {remedy}")
    return config


def load(path, train_vision=False, convention="", trained=True, lora_rank=0, recompute=False, weights=True):
    """A Policy from a LLaVA folder or hub id, in float32, sharded over all ranks (runtime.shard).

    train_vision   train the vision tower too;   trained  False: nothing is trained (a reference, a table)
    convention     original | hub; empty: what the folder says (convention.json), else original
    lora_rank      > 0: train adapters of that rank in language model and projector, not their weights
    recompute      keep few activations and compute them again
    weights        False: read none, for a builder that needs the tokenizer and the image settings alone
    """
    folder = local_folder(path)
    config = read_config(path, folder)
    try:
        processor = without_warnings(lambda: AutoProcessor.from_pretrained(folder, trust_remote_code=False))
    except (OSError, ValueError) as error:
        raise Mistake(f"--model {path}: no tokenizer and processor ({last_line(error)}). Fetch it again") from None
    stored = folder / "convention.json"
    if not convention:
        convention = json.loads(stored.read_text())["convention"] if stored.is_file() else "original"
    if convention not in CONVENTIONS:
        raise Mistake(f"{stored}: names none of {', '.join(CONVENTIONS)}. Mend it, or use --convention")
    words = processor.tokenizer(CONVENTIONS[convention].template.format(question=""))["input_ids"]
    if processor.tokenizer.unk_token_id in words:
        message = f"its tokenizer does not know the words of the {convention!r} template"
        raise Mistake(f"--model {path}: {message}. Name its own with --convention")
    held = []
    if weights:
        runtime.first_alone(lambda: held.append(read_weights(path, folder)))
    if not held:  # shapes alone; what they hold comes from rank 0
        with torch.device("meta"):
            held = [LlavaForConditionalGeneration(config).float()]
    if lora_rank:
        add_lora(held[0], lora_rank)
    policy = Policy(held[0], processor, train_vision, convention)
    policy.folder, policy.config = folder, config
    if not trained:
        policy.requires_grad_(False).eval()
    return runtime.shard(policy, runtime.device(), recompute) if weights else policy


def read_weights(path, folder):
    """The model of a folder, float32, on the CPU; Mistake if a weight is missing or has another shape."""
    options = {"dtype": torch.float32, "use_safetensors": True, "ignore_mismatched_sizes": True}
    read = LlavaForConditionalGeneration.from_pretrained
    try:
        hf, info = without_warnings(lambda: read(folder, output_loading_info=True, **options))
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        reason = last_line(error)
        raise Mistake(f"--model {path}: its weights cannot be read ({reason}). Fetch or export it again") from None
    wrong = [f"{name} is missing" for name in info["missing_keys"]]
    wrong += [f"{name} is {tuple(a)}, its config says {tuple(b)}" for name, a, b in info["mismatched_keys"]]
    if wrong:
        raise Mistake(f"--model {path}: {'; '.join(wrong[:2])} ({len(wrong)} weights). Fetch or export it again")
    return hf


def embeddings(folder):
    """The input embeddings (V, E) of a model's folder as a float32 array, with nothing else read."""
    names = {f"{part}embed_tokens.weight" for part in ("model.language_model.", "language_model.model.")}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as content:
            for key in names & set(content.keys()):
                return content.get_tensor(key).float().numpy()
    raise Mistake(f"{folder}: its files hold none of {', '.join(names)}. Fetch or export it again")


def digest(folder, records):
    """A name for records and the content of their images."""
    sha = hashlib.sha256(json.dumps(records, sort_keys=True).encode())
    for record in records:
        for field in ("image", "image_rejected"):
            if field in record:
                sha.update(image_path(folder, record[field]).read_bytes())
    return sha.hexdigest()[:16]


def fingerprint(policy, folder, records):
    """A name for everything that the reference log-probabilities depend on: weights, tokenizer, template, image
    settings, records, image files, precision. If any of it changes, a stale cache is not found.
    """
    sha = hashlib.sha256()
    for file in sorted(policy.folder.glob("*.safetensors")):
        with open(file, "rb") as content:
            while block := content.read(1 << 24):
                sha.update(block)
    settings = [policy.encoding.template, policy.pad, policy.mean.tolist(), policy.std.tolist()]
    settings += [runtime.device().type, policy.config.to_dict(), policy.tokenizer.backend_tokenizer.to_str()]
    settings += [digest(folder, records)]
    sha.update(json.dumps(settings, sort_keys=True, default=str).encode())
    return sha.hexdigest()[:16]


def write_aside(policy, folder, write):
    """write(aside) fills a folder that then takes the place of `folder`: a half-written one is no model."""
    folder = Path(folder)
    aside, old = (folder.with_name(f"{folder.name}{end}") for end in (".tmp", ".old.tmp"))
    for left in (aside, old):
        shutil.rmtree(left, ignore_errors=True)
    aside.mkdir(parents=True)
    write(aside)
    (aside / "convention.json").write_text(json.dumps({"convention": policy.convention}))
    runtime.fsync_folder(aside)
    if folder.exists():
        os.rename(folder, old)
    os.rename(aside, folder)
    shutil.rmtree(old, ignore_errors=True)


@torch.no_grad()
def export(policy, folder):
    """Write a trained policy to `folder` (see docs/scale.md). The base is read again and what was trained put
    in its place, adapters merged, so that the rest is exact. All ranks call it; rank 0 writes.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    trained = get_model_state_dict(policy.hf, options=options)  # gathered from all ranks, on rank 0 alone

    def write(aside):
        """The base, read again, with what was trained in its place."""
        hf = read_weights(policy.folder, policy.folder)
        weights = dict(hf.named_parameters())
        for name, value in trained.items():
            if name.endswith("lora_b"):  # in float32: in bfloat16 most of a small change would be lost
                a = trained[name.replace("lora_b", "lora_a")]
                weights[name.replace("lora_b", "weight")] += LoraLinear.scale * value @ a
            elif not name.endswith("lora_a"):
                weights[name].copy_(value)
        hf.to(policy.config.dtype or torch.float32).save_pretrained(aside, max_shard_size=SHARD_BYTES)
        for file in policy.folder.iterdir():
            if file.suffix in (".json", ".jinja", ".model", ".txt") and ".index." not in file.name:
                shutil.copy(file, aside)

    runtime.first_alone(lambda: write_aside(policy, folder, write))


def save_new(policy, folder):
    """Write a policy that was made from a config, not read, under the hub's names."""
    dtype = policy.hf.config.dtype or torch.float32

    def write(aside):
        """Weights under the hub's names, configs, tokenizer, processor."""
        tensors = {}
        for name, parameter in policy.hf.named_parameters():
            ours = next(part for part in HUB_NAMES if name.startswith(part))
            tensors[HUB_NAMES[ours] + name.removeprefix(ours)] = parameter.detach().to("cpu", dtype).contiguous()
        save_file(tensors, aside / "model.safetensors", metadata={"format": "pt"})
        policy.hf.config.architectures = [type(policy.hf).__name__]  # TRL and others ask which class this is
        for part in (policy.hf.config, policy.hf.generation_config, policy.processor):
            part.save_pretrained(aside)

    write_aside(policy, folder, write)
