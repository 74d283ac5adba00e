"""
A thin wrapper around transformers' LLaVA: vision tower + projector + language model, in the open.

    image (3, H, W) in [0, 1] --normalise--> CLIP vision tower --> P patch features --> projector --> P embeddings
    those embeddings stand where the prompt holds image tokens; the language model reads on from there.

It scores packed rows (data.py), generates, loads a Hugging Face LLaVA folder and saves one in the layout of the hub
(the one that `LlavaForConditionalGeneration.from_pretrained` and vLLM read). It knows nothing of training.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoProcessor, DynamicCache, LlavaForConditionalGeneration
from transformers.utils import logging

from data import image_path, load_image, pack

# The prompt of the llava-hf model cards; the answer follows after a space, then </s>.
TEMPLATE = "USER: <image>\n{question} ASSISTANT:"
SHARD_BYTES = 4_500_000_000  # one exported file, and the most that export holds in host memory


class Policy(nn.Module):
    """A LLaVA and its processor. `hf` is the transformers model, so nothing about it is hidden or renamed."""

    def __init__(self, hf, processor, train_vision=False):
        super().__init__()
        self.hf, self.processor, self.tokenizer = hf, processor, processor.tokenizer
        vision, images = hf.config.vision_config, processor.image_processor
        self.image_size = vision.image_size
        self.image_tokens = (vision.image_size // vision.patch_size) ** 2
        self.image_id = hf.config.image_token_id
        self.pad_id = self.tokenizer.pad_token_id
        for name in ("mean", "std"):  # per channel, applied to pixels in [0, 1]
            value = torch.tensor(getattr(images, f"image_{name}"), dtype=torch.float32).view(3, 1, 1)
            self.register_buffer(name, value, persistent=False)
        tower = hf.model.vision_tower
        # DEVIATION: the paper does not say what it trains; frozen, as LLaVA-1.5 was tuned, was better on the toy too.
        tower.requires_grad_(train_vision)
        # Layers behind the one whose features are read get no gradient; left trainable, they would have no
        # optimiser state and checkpoints could not be loaded back.
        for unused in [*tower.encoder.layers[len(tower.encoder.layers) + 1 + hf.config.vision_feature_layer :]]:
            unused.requires_grad_(False)
        tower.post_layernorm.requires_grad_(False)

    def forward(self, method, *args, **kwargs):
        """Call another method by name. FSDP2 gathers the weights of a module in its `forward`, so all enter here."""
        return getattr(self, method)(*args, **kwargs)

    def vision(self, pixels):
        """(R, 3, H, W) in [0, 1] -> (R, P, D): the tower's patch features, one layer before the last, CLS dropped."""
        hidden = self.hf.model.vision_tower((pixels - self.mean) / self.std, output_hidden_states=True).hidden_states
        return hidden[self.hf.config.vision_feature_layer][:, 1:]

    def embed(self, ids, vision):
        """(R, L) token ids and (R, P, D) patch features -> (R, L, E) input embeddings of the language model."""
        embeds = self.hf.get_input_embeddings()(ids)
        patches = self.hf.model.multi_modal_projector(vision).to(embeds.dtype)  # (R, P, E)
        return embeds.masked_scatter((ids == self.image_id)[..., None], patches)

    def logps(self, batch, vision=None, entropy=False):
        """
        Log-probabilities of the answers of packed rows, in float32 nats.

        batch     data.Batch: R rows with A answers, the longest of T tokens
        vision    (R, P, D) patch features, if they are known already
        returns   token_logp (A, T), 0 where batch.answer_mask is False; the answer's logp is its sum over T.
                  With `entropy`, also the entropy (A, T) of each of these predictions

        The head runs at answer tokens only: at a vocabulary of 32,000 the logits of a whole row would take more
        memory than the model's activations.
        """
        vision = self.vision(batch.pixels) if vision is None else vision
        hidden = self.hf.model.language_model(
            inputs_embeds=self.embed(batch.ids, vision),
            position_ids=batch.position,
            attention_mask=batch.mask,
            use_cache=False,
        ).last_hidden_state  # (R, L, E)
        logits = self.hf.lm_head(hidden[batch.row, batch.column]).float()  # (N, V)

        def padded(flat):
            return flat.new_zeros(batch.answer_mask.shape).masked_scatter(batch.answer_mask, flat)  # (A, T)

        token_logp = padded(-F.cross_entropy(logits, batch.target, reduction="none"))
        if not entropy:
            return token_logp
        log_p = logits.log_softmax(-1)
        return token_logp, padded(-(log_p.exp() * log_p).sum(-1))

    def generate(self, pixels, prompts, max_new_tokens, temperature=0.0):
        """
        Answers as text, greedy at temperature 0, else sampled.

        pixels (R, 3, H, W) in [0, 1];   prompts  R lists of token ids (data.encode_prompt)
        returns  R strings, and R flags: did the answer end by itself, within `max_new_tokens`?
        """
        ids, mask = self.left_padded(prompts)
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        out = self.hf.generate(
            input_ids=ids,
            attention_mask=mask.long(),
            pixel_values=(pixels - self.mean) / self.std,
            max_new_tokens=max_new_tokens,
            suppress_tokens=[self.image_id],  # a sampled image token would ask for an image that is not there
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.pad_id,
            synced_gpus=False,  # else each rank would wait, token by token, for ranks that have fewer batches
            **sampling,
        )[:, ids.shape[1] :]
        ended = (out == self.tokenizer.eos_token_id).any(1).tolist()
        return self.texts(out), ended

    def texts(self, answers):
        """Answers as text, from their token ids."""
        return [text.strip() for text in self.tokenizer.batch_decode(answers, skip_special_tokens=True)]

    def left_padded(self, prompts):
        """R lists of token ids -> ids (R, P) and mask (R, P), padded on the left: all answers start in one column."""
        length = max(map(len, prompts))
        ids = torch.tensor([[self.pad_id] * (length - len(prompt)) + prompt for prompt in prompts])
        mask = torch.arange(length) >= torch.tensor([[length - len(prompt)] for prompt in prompts])
        return ids.to(self.mean.device), mask.to(self.mean.device)

    @torch.no_grad()
    def sample(self, pixels, prompts, uniform):
        """
        G answers to each of N questions at temperature 1: a prompt is prefilled once, then its cache repeated G times.

        pixels    (N, 3, H, W) in [0, 1];   prompts  N lists of token ids (data.encode_prompt)
        uniform   (N, G, T) float64 in [0, 1): the numbers that pick the tokens. They come from the caller, so that an
                  answer depends on its question and a seed, not on the batch or the process that it was drawn in
        returns   N * G lists of at most T token ids, the G of a question together, with the end-of-sequence token where
                  it was reached; and their log-probabilities, lists of float32 nats, as `logps` gives them
        """
        group, limit = uniform.shape[1:]
        uniform, eos = uniform.flatten(0, 1).to(pixels.device), self.tokenizer.eos_token_id
        ids, mask = self.left_padded(prompts)
        position = (mask.cumsum(1) - 1).clamp(min=0)
        cache = DynamicCache(config=self.hf.config.text_config)

        def read(embeds):  # -> (rows, E): the state that predicts the next token
            out = self.hf.model.language_model(
                inputs_embeds=embeds, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True
            )
            return out.last_hidden_state[:, -1]

        hidden = read(self.embed(ids, self.vision(pixels))).repeat_interleave(group, 0)  # (N * G, E)
        cache.batch_repeat_interleave(group)
        mask, position = mask.repeat_interleave(group, 0), position[:, -1:].repeat_interleave(group, 0)
        tokens, logps = [], []
        ended = torch.zeros(len(hidden), dtype=torch.bool, device=pixels.device)
        for t in range(limit):
            logp = self.hf.lm_head(hidden).float().log_softmax(-1)  # (N * G, V)
            share = logp.double().exp()
            share[:, self.image_id] = 0  # a sampled image token would ask for an image that is not there
            reached = share.cumsum(1)
            token = torch.searchsorted(reached, uniform[:, t : t + 1] * reached[:, -1:], right=True)
            token = token.clamp(max=logp.shape[1] - 1)  # (N * G, 1)
            tokens.append(token)
            logps.append(logp.gather(1, token))
            ended |= token[:, 0] == eos
            if t + 1 == limit or ended.all():
                break
            mask, position = F.pad(mask, (0, 1), value=True), position + 1
            hidden = read(self.hf.get_input_embeddings()(token))
        tokens, logps = torch.cat(tokens, 1).tolist(), torch.cat(logps, 1).tolist()
        lengths = [answer.index(eos) + 1 if eos in answer else len(answer) for answer in tokens]
        return [a[:n] for a, n in zip(tokens, lengths, strict=True)], [
            a[:n] for a, n in zip(logps, lengths, strict=True)
        ]


def to_pixels(image, size):
    """
    PIL image -> (3, size, size) float32 in [0, 1], as the hub's LLaVA processor does it: the shorter side resized to
    `size` (bicubic), then the centre cropped. An image of that size passes unchanged.
    """
    width, height = image.size
    if (width, height) != (size, size):
        scale = size / min(width, height)
        image = image.resize((max(size, int(width * scale)), max(size, int(height * scale))), Image.Resampling.BICUBIC)
        left, top = (image.width - size) // 2, (image.height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def load_pixels(policy, folder, names):
    """The images `names` of a data folder as the policy's vision tower takes them: (R, 3, H, W) float32 in [0, 1]."""
    return torch.stack([to_pixels(load_image(image_path(folder, name)), policy.image_size) for name in names])


def pair_batch(policy, records, rows, folder, with_distorted=True):
    """
    B MFPO records as one data.Batch on the policy's device. Its answers are, record by record, chosen and rejected
    given the image, and chosen given the distorted image (left out without `with_distorted`).

    rows   of each record: its two data.Row (data.mfpo_rows)
    """
    sides = ("image", "image_rejected") if with_distorted else ("image",)
    pixels = load_pixels(policy, folder, [record[side] for record in records for side in sides])  # (2B or B, 3, H, W)
    return pack([row for pair in rows for row in pair[: len(sides)]], pixels, policy.pad_id).to(policy.mean.device)


def without_warnings(make):
    """make(), without transformers' warning that torchvision is missing: its Pillow processor is the one we want."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return make()
    finally:
        logging.set_verbosity(level)


def load(path, train_vision=False):
    """
    A Policy from a LLaVA folder or hub id, in float32. Raises ValueError if it is no such folder.

    Only safetensors are read (a pickle could run code), and no code from the folder is run.
    """
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"--model {path}: no model folder here, nor a Hugging Face id that can be had ({reason}). Check it"
        ) from None
    if config.model_type != "llava":
        raise ValueError(f"--model {path}: is a {config.model_type!r}; this project trains 'llava' models (LLaVA-1.5)")
    parts = (config.vision_config.model_type, config.text_config.model_type, config.vision_feature_select_strategy)
    if parts != ("clip_vision_model", "llama", "default") or not isinstance(config.vision_feature_layer, int):
        raise ValueError(
            f"--model {path}: a LLaVA of {parts}, features of layer {config.vision_feature_layer}; this project trains "
            "those of ('clip_vision_model', 'llama', 'default') that read one layer, as LLaVA-1.5 does"
        )
    try:
        hf, info = LlavaForConditionalGeneration.from_pretrained(
            path, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
        processor = without_warnings(lambda: AutoProcessor.from_pretrained(path))
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).split("\n")[0]
        message = f"--model {path}: cannot be read ({reason}). It needs whole .safetensors, a tokenizer and a processor"
        raise ValueError(message) from None
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise ValueError(f"--model {path}: its files lack the weights {missing}, ... Fetch or export the model again")
    return Policy(hf, processor, train_vision)


def fingerprint(policy, device, folder, records):
    """
    A name for everything that the reference log-probabilities depend on: weights, tokenizer, template, image
    settings, records, image files, precision. If any of it changes, so does the name, and a stale cache is not found.
    """
    sha = hashlib.sha256()
    for name, parameter in policy.named_parameters():
        sha.update(name.encode() + parameter.detach().numpy().tobytes())
    settings = [TEMPLATE, policy.mean.tolist(), policy.std.tolist(), device.type, policy.hf.config.to_dict()]
    settings += [policy.tokenizer.backend_tokenizer.to_str(), records]
    sha.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for record in records:
        for field in ("image", "image_rejected"):
            if field in record:
                sha.update(image_path(folder, record[field]).read_bytes())
    return sha.hexdigest()[:16]


def hub_key(name):
    """A parameter's name in transformers 5 -> its key in files on the hub (the layout since transformers 4)."""
    for ours, hub in (
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
    ):
        if name.startswith(ours):
            return hub + name.removeprefix(ours)
    raise AssertionError(f"no hub key for {name}")


def save(policy, folder):
    """
    Write `policy` to `folder` in the hub's layout: safetensors, config, tokenizer and processor.

    Written aside and renamed, so a half-written folder is never taken for a model. If the weights are sharded, all
    ranks call it (they are gathered one by one); rank 0 writes, and holds at most one shard in host memory.
    """
    first = not dist.is_initialized() or dist.get_rank() == 0
    folder = Path(folder)
    aside = folder.with_name(folder.name + ".tmp")
    dtype = policy.hf.config.dtype or torch.float32
    shards, room = [], 0
    for name, parameter in policy.hf.named_parameters():
        room -= parameter.numel() * dtype.itemsize
        if room < 0:
            shards.append([])
            room = SHARD_BYTES - parameter.numel() * dtype.itemsize
        shards[-1].append((hub_key(name), parameter))
    if first:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    index = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        tensors = {}
        for key, parameter in shard:
            full = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
            if first:
                tensors[key] = full.detach().to("cpu", dtype).contiguous()
                index[key] = file
        if first:
            save_file(tensors, aside / file, metadata={"format": "pt"})
    if first:
        if len(shards) > 1:
            size = sum(p.numel() * dtype.itemsize for p in policy.hf.parameters())
            text = json.dumps({"metadata": {"total_size": size}, "weight_map": index}, indent=2)
            (aside / "model.safetensors.index.json").write_text(text)
        policy.hf.config.save_pretrained(aside)
        policy.hf.generation_config.save_pretrained(aside)
        policy.processor.save_pretrained(aside)
        for file in aside.iterdir():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        old = folder.with_name(folder.name + ".old.tmp")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            os.rename(folder, old)
        os.rename(aside, folder)
        shutil.rmtree(old, ignore_errors=True)
