"""
A thin wrapper around transformers' LLaVA: vision tower + projector + language model, in the open.

    image (3, H, W) in [0, 1] --normalise--> CLIP vision tower --> P patch features --> projector --> P embeddings
    those embeddings stand where the prompt holds image tokens; the language model reads on from there.

It scores packed rows (data.py), generates, loads a Hugging Face LLaVA folder and saves one in the layout of the hub
(the one that `LlavaForConditionalGeneration.from_pretrained` and vLLM read). It knows nothing of training.
"""

import hashlib
import json
import math
import os
import shutil
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoProcessor,
    DynamicCache,
    GenerationConfig,
    LlavaForConditionalGeneration,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils import logging

from data import image_path, load_image, pack


@dataclass(frozen=True)
class Convention:
    """How a model was taught to see and to be asked. With another convention than its own it answers worse."""

    template: str  # the answer follows after a space, then </s>
    pad: bool  # pad the image to a square, or else resize the shorter side and crop the centre


CONVENTIONS = {
    # LLaVA-1.5's own code: conversation template vicuna_v1, image_aspect_ratio pad.
    "original": Convention(
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: <image>\n{question} ASSISTANT:",
        pad=True,
    ),
    # The model cards and the processor of llava-hf on the hub, and the built-in world.
    "hub": Convention("USER: <image>\n{question} ASSISTANT:", pad=False),
}
PAD_COLOUR = (122, 116, 104)  # CLIP's mean colour, as LLaVA-1.5 pads with
DECODED_BYTES = 2_000_000_000  # of images that a process keeps: 5,900 of 336 x 336 pixels
SHARD_BYTES = 4_500_000_000  # one exported file, and the most that export holds in host memory


def check_convention(name):
    """ValueError unless `name` is one of CONVENTIONS, or empty."""
    if name and name not in CONVENTIONS:
        raise ValueError(f"--convention {name!r}: use one of {', '.join(CONVENTIONS)}, or leave it out")


def packed_attention(module, query, key, value, attention_mask, place=None, **kwargs):
    """
    Transformers' attention for tokens that lie behind each other without padding (data.Batch): each row's are put side
    by side, and what comes out is put back. All other layers work on the tokens that there are, and no others.

    query, key, value   (1, heads, N, D);   attention_mask  (R, 1, L, L);   returns  (1, N, heads, D) and None
    place               (N,) among the R * L places of padded rows; None: nothing is packed
    """
    if place is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    rows, length = attention_mask.shape[0], attention_mask.shape[-1]

    def spread(x):  # (1, heads, N, D) -> (R, heads, L, D)
        x = x[0].transpose(0, 1)  # (N, heads, D)
        x = x.new_zeros(rows * length, *x.shape[1:]).index_copy(0, place, x)
        return x.view(rows, length, *x.shape[1:]).transpose(1, 2)

    out, _ = sdpa_attention_forward(module, spread(query), spread(key), spread(value), attention_mask, **kwargs)
    return out.flatten(0, 1).index_select(0, place)[None], None


AttentionInterface.register("packed", packed_attention)
AttentionMaskInterface.register("packed", sdpa_mask)


class Policy(nn.Module):
    """A LLaVA and its processor. `hf` is the transformers model, so nothing about it is hidden or renamed."""

    def __init__(self, hf, processor, train_vision=False, convention="hub"):
        super().__init__()
        self.hf, self.processor, self.tokenizer = hf, processor, processor.tokenizer
        self.convention, self.template, self.pad = convention, *vars(CONVENTIONS[convention]).values()
        self.decoded = None  # images that load_pixels keeps
        self.files = []  # the weights on disk, where they came from
        self.autocast = False  # one GPU holds whole weights and computes in bfloat16; FSDP sees to that itself
        vision, images = hf.config.vision_config, processor.image_processor
        self.image_size = vision.image_size
        self.image_tokens = (vision.image_size // vision.patch_size) ** 2
        self.image_id = hf.config.image_token_id
        hf.model.language_model.set_attn_implementation("packed")
        self.pad_id = self.tokenizer.pad_token_id
        for name in ("mean", "std"):  # per channel, applied to pixels in [0, 1]
            value = torch.tensor(getattr(images, f"image_{name}"), dtype=torch.float32).view(3, 1, 1)
            self.register_buffer(name, value, persistent=False)
        # No token is drawn that the text cannot hold: an image token would ask for an image that is not there, and
        # LLaVA-1.5 has embeddings for more tokens (32,064) than its tokenizer knows (32,002).
        self.unsayable = [self.image_id, *range(len(self.tokenizer), hf.config.text_config.vocab_size)]
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
        with torch.autocast(self.mean.device.type, torch.bfloat16, enabled=self.autocast):
            return getattr(self, method)(*args, **kwargs)

    def vision(self, pixels):
        """(R, 3, H, W) in [0, 1] -> (R, P, D): the tower's patch features, one layer before the last, CLS dropped."""
        hidden = self.hf.model.vision_tower((pixels - self.mean) / self.std, output_hidden_states=True).hidden_states
        return hidden[self.hf.config.vision_feature_layer][:, 1:]

    def embed(self, ids, vision):
        """(..., L) token ids with R images and (R, P, D) patch features -> (..., L, E) input embeddings."""
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
            inputs_embeds=self.embed(batch.ids, vision)[None],
            position_ids=batch.position[None],
            attention_mask=batch.mask,
            place=batch.place,
            use_cache=False,
        ).last_hidden_state[0]  # (N, E)
        logits = self.hf.lm_head(hidden[batch.before]).float()  # (M, V)

        def padded(flat):
            return flat.new_zeros(batch.answer_mask.shape).masked_scatter(batch.answer_mask, flat)  # (A, T)

        token_logp = padded(-F.cross_entropy(logits, batch.target, reduction="none"))
        if not entropy:
            return token_logp
        log_p = logits.log_softmax(-1)
        return token_logp, padded(-(log_p.exp() * log_p).sum(-1))

    def attention(self, pixels, row, at):
        """
        How what predicts an answer's token number `at` attends to the image, and that token's log-probability.

        pixels (1, 3, H, W) in [0, 1];   row  data.Row with one answer
        returns   (side, side) array, the share of the attention of each patch, mean over layers and heads: the sum is
                  what goes to the image, the rest goes to the text;   nats
        """
        ids = torch.tensor([row.prefix + row.answers[0][:at]], device=pixels.device)
        language, embeds = self.hf.model.language_model, self.embed(ids, self.vision(pixels))
        language.set_attn_implementation("eager")  # the others do not tell what they attend to
        out = language(inputs_embeds=embeds, output_attentions=True, use_cache=False)
        language.set_attn_implementation("packed")
        weights = torch.stack(out.attentions)[:, 0, :, -1].float().mean((0, 1))  # (layers, heads, L, L) -> (L,)
        patches = weights[ids[0] == self.image_id]
        logp = self.hf.lm_head(out.last_hidden_state[0, -1]).float().log_softmax(-1)[row.answers[0][at]]
        side = math.isqrt(len(patches))
        return patches.view(side, side).detach().cpu().numpy(), logp.item()

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
            suppress_tokens=self.unsayable,
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
        G answers to each of N questions at temperature 1. They grow side by side behind their prompt, in one row, as
        training has them (data.pack): a prompt is read once, and its keys and values are kept and looked at once.

        pixels    (N, 3, H, W) in [0, 1];   prompts  N lists of token ids (data.encode_prompt)
        uniform   (N, G, T) float64 in [0, 1): the numbers that pick the tokens. They come from the caller, so that an
                  answer depends on its question and a seed, not on the batch or the process that it was drawn in
        returns   N * G lists of at most T token ids, the G of a question together, with the end-of-sequence token where
                  it was reached; and their log-probabilities, lists of float32 nats, as `logps` gives them
        """
        group, limit = uniform.shape[1:]
        assert uniform.dtype == torch.float64 and uniform.max() < 1, uniform.dtype
        uniform, eos = uniform.to(pixels.device), self.tokenizer.eos_token_id
        ids, mask = self.left_padded(prompts)
        position = (mask.cumsum(1) - 1).clamp(min=0)
        cache = DynamicCache(config=self.hf.config.text_config)

        def read(embeds):  # -> (N, columns, E): the states that predict the next tokens
            return self.hf.model.language_model(
                inputs_embeds=embeds, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True
            ).last_hidden_state

        hidden = read(self.embed(ids, self.vision(pixels)))[:, -1:].expand(-1, group, -1)  # (N, G, E)
        position = position[:, -1:].expand(-1, group)
        mask = mask[:, None, None].expand(-1, 1, group, -1)  # (N, 1, G, P): all answers see the prompt
        itself = torch.eye(group, dtype=torch.bool, device=pixels.device).expand(len(ids), 1, -1, -1)
        tokens, logps = [], []
        ended = torch.zeros(len(ids), group, dtype=torch.bool, device=pixels.device)
        for t in range(limit):
            logits = self.hf.lm_head(hidden).double()  # (N, G, V)
            logp = logits.float().log_softmax(-1)
            logits[..., self.unsayable] = -torch.inf
            reached = logits.softmax(-1).cumsum(-1)
            token = torch.searchsorted(reached, uniform[..., t : t + 1] * reached[..., -1:], right=True)
            token = token.clamp(max=logp.shape[-1] - 1)  # (N, G, 1)
            tokens.append(token)
            logps.append(logp.gather(-1, token))
            ended |= token[..., 0] == eos
            if t + 1 == limit or ended.all():
                break
            mask, position = torch.cat([mask, itself], -1), position + 1  # of what answers say, each sees its own
            hidden = read(self.hf.get_input_embeddings()(token[..., 0]))
        tokens, logps = torch.cat(tokens, -1).flatten(0, 1).tolist(), torch.cat(logps, -1).flatten(0, 1).tolist()
        lengths = [answer.index(eos) + 1 if eos in answer else len(answer) for answer in tokens]
        return [a[:n] for a, n in zip(tokens, lengths, strict=True)], [
            a[:n] for a, n in zip(logps, lengths, strict=True)
        ]


def to_square(image, size, pad, colour=PAD_COLOUR, resample=Image.Resampling.BICUBIC):
    """
    PIL image -> PIL image of (size, size). With `pad` as LLaVA-1.5 does it: padded to a square, then resized. Without,
    as the hub's processor does it: the shorter side resized, the centre cropped, so that objects at the border may be
    lost. An image of that size passes unchanged.
    """
    width, height = image.size
    if (width, height) == (size, size):
        return image
    if pad:
        side = max(width, height)
        square = Image.new(image.mode, (side, side), colour)
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        return square.resize((size, size), resample)
    scale = size / min(width, height)
    image = image.resize((max(size, int(width * scale)), max(size, int(height * scale))), resample)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def to_pixels(image, size, pad=False):
    """PIL image -> (3, size, size) float32 in [0, 1], as `to_square` has it."""
    return torch.from_numpy(np.array(to_square(image, size, pad))).permute(2, 0, 1).float() / 255


def load_pixels(policy, folder, names):
    """
    The images `names` of a data folder as the policy's vision tower takes them: (R, 3, H, W) float32 in [0, 1].

    Where `policy.decoded` is a dict (the trainers') images are kept in it once they are decoded, as long as they fit.
    """
    kept = policy.decoded if policy.decoded is not None else {}
    found = []
    for name in names:
        image = kept.get((folder, name))
        if image is None:
            image = np.array(
                to_square(load_image(image_path(folder, name)), policy.image_size, policy.pad)
            )  # (H, W, 3)
            if len(kept) * image.nbytes < DECODED_BYTES:
                kept[folder, name] = image
        found.append(image)
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).float() / 255


def pair_batch(policy, records, rows, folder, with_distorted=True):
    """
    B MFPO records as one data.Batch on the policy's device. Its answers are, record by record, chosen and rejected
    given the image, and chosen given the distorted image (left out without `with_distorted`).

    rows   of each record: its two data.Row (data.mfpo_rows)
    """
    sides = ("image", "image_rejected") if with_distorted else ("image",)
    pixels = load_pixels(policy, folder, [record[side] for record in records for side in sides])  # (2B or B, 3, H, W)
    return pack([row for pair in rows for row in pair[: len(sides)]], pixels).to(policy.mean.device)


def without_warnings(make):
    """make(), without transformers' warning that torchvision is missing: its Pillow processor is the one we want."""
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
        return Path(snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja"]))
    except (OSError, ValueError) as error:  # no such id, no network, no permission
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"--model {path}: no model folder here, nor a Hugging Face id that can be had ({reason}). Check it"
        ) from None


def read_config(path, folder):
    """The config of a LLaVA folder; ValueError unless it is a LLaVA that this project can train, in safetensors."""
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"--model {path}: no model's folder ({str(error).partition(chr(10))[0]}). Check it") from None
    if config.model_type != "llava":
        raise ValueError(f"--model {path}: is a {config.model_type!r}; this project trains 'llava' models (LLaVA-1.5)")
    parts = (config.vision_config.model_type, config.text_config.model_type, config.vision_feature_select_strategy)
    if parts != ("clip_vision_model", "llama", "default") or not isinstance(config.vision_feature_layer, int):
        raise ValueError(
            f"--model {path}: a LLaVA of {parts}, features of layer {config.vision_feature_layer}; this project trains "
            "those of ('clip_vision_model', 'llama', 'default') that read one layer, as LLaVA-1.5 does"
        )
    if not list(folder.glob("*.safetensors")):
        raise ValueError(
            f"--model {path}: holds no .safetensors. Other formats are refused: reading a pickle can run code. Where "
            'you trust it, convert it once: python -c "from transformers import LlavaForConditionalGeneration as L; '
            f"L.from_pretrained('{path}', dtype='auto').save_pretrained('{path}-safe')\""
        )
    return config


def load(path, train_vision=False, convention="", trained=True, lora_rank=0, place=None, weights=True):
    """
    A Policy from a LLaVA folder or hub id. Raises ValueError if it is no such folder.

    train_vision   train the vision tower too;   trained   False: nothing is trained (a reference, mining, a table)
    convention     original | hub; empty: what the folder says (convention.json), else original
    lora_rank      > 0: train adapters of that rank in the language model and the projector, not their weights
    place          place(policy) shards the model, or moves it to a device, before its weights are read: they go
                   from the files straight to where they belong, and no process holds the whole model in host memory
    weights        False: read none, for a builder that needs the tokenizer, the image settings and `stored_weight`

    Only safetensors are read (a pickle could run code), and no code from the folder is run. Weights are float32,
    whatever the files hold.
    """
    folder = local_folder(path)
    config = read_config(path, folder)
    try:
        processor = without_warnings(lambda: AutoProcessor.from_pretrained(folder))
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--model {path}: has no tokenizer and processor ({reason}). Fetch it again") from None
    stored = folder / "convention.json"
    if not convention and stored.is_file():
        try:
            convention = json.loads(stored.read_text())["convention"]
            CONVENTIONS[convention]
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{stored}: names none of {', '.join(CONVENTIONS)}. Mend it, or use --convention"
            ) from None
    convention = convention or "original"
    check_convention(convention)
    words = CONVENTIONS[convention].template.format(question="")
    if processor.tokenizer.unk_token_id in processor.tokenizer(words)["input_ids"]:
        raise ValueError(
            f"--model {path}: its tokenizer does not know the words of the {convention!r} template. Name its own with "
            "--convention; a toy base model of an older version is to be deleted, it is built again"
        )
    with torch.device("meta"):
        hf = LlavaForConditionalGeneration(config).float()  # its parts may have kinds of their own in the config
    if (folder / "generation_config.json").is_file():
        hf.generation_config = GenerationConfig.from_pretrained(folder)
    if lora_rank:
        add_lora(hf, lora_rank)
    policy = Policy(hf, processor, train_vision, convention)
    policy.files = sorted(folder.glob("*.safetensors"))
    if not trained:
        policy.requires_grad_(False)
    if not weights:
        return policy
    if place:
        place(policy)
    else:
        policy.to_empty(device="cpu")
    fill(policy, path, folder)
    return policy


def fill(policy, path, folder):
    """Read the weights into `policy`, each process its share, and make anew what no file holds."""
    alone = not any(isinstance(p, DTensor) for p in policy.parameters())  # no slices: no other rank need be there
    try:
        reader = HuggingFaceStorageReader(str(folder))
        stored = reader.read_metadata().state_dict_metadata
        state, wrong = {}, []
        for name, parameter in policy.hf.named_parameters():
            if "lora_" in name:
                continue
            key = hub_key(name) if hub_key(name) in stored else name
            if key not in stored:
                wrong.append(f"{hub_key(name)} is missing")
            elif tuple(stored[key].size) != tuple(parameter.shape):
                wrong.append(f"{key} is {tuple(stored[key].size)}, its config says {tuple(parameter.shape)}")
            state[key] = parameter.detach()
        if wrong:
            raise ValueError(f"--model {path}: {'; '.join(wrong[:3])} ({len(wrong)} weights). Fetch or export it again")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is read by one process alone, which is meant
            dcp.load(state, storage_reader=reader, no_dist=alone)
    except (OSError, KeyError, SafetensorError, json.JSONDecodeError, CheckpointException) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise ValueError(f"--model {path}: its weights cannot be read ({reason}). Fetch or export it again") from None
    fill_anew(policy)


def fill_anew(policy):
    """Make what no file holds and memory from `to_empty` has lost: the buffers, and adapters at their start."""
    device, hf = policy.mean.device, policy.hf
    images = policy.processor.image_processor
    for name in ("mean", "std"):
        getattr(policy, name).copy_(torch.tensor(getattr(images, f"image_{name}")).view(3, 1, 1))
    language, vision = hf.model.language_model, hf.model.vision_tower.embeddings
    language.rotary_emb = LlamaRotaryEmbedding(config=language.config).to(device)
    vision.position_ids.copy_(torch.arange(vision.position_ids.shape[1])[None])
    generator = torch.Generator().manual_seed(0)
    for module in policy.modules():
        if isinstance(module, LoraLinear):
            module.start(generator)


class LoraLinear(nn.Linear):
    """
    LoRA (Hu et al. 2021, arXiv:2106.09685), Eq. 3: W x + s * B A x, where W is frozen and A, B are small.

    A (r, in) starts at random, B (out, r) at 0, so the first outputs are those of W; s = 2, as with alpha = 2 r.
    """

    scale = 2.0

    def start(self, generator):
        """A as nn.Linear starts its weights, the same on any number of processes; B zero."""
        with torch.no_grad():
            values = torch.rand(self.lora_a.shape, generator=generator) * 2 - 1  # (r, in)
            values = values / self.in_features**0.5
            if isinstance(self.lora_a, DTensor):
                values = distribute_tensor(
                    values.to(self.lora_a.device), self.lora_a.device_mesh, self.lora_a.placements
                )
            self.lora_a.copy_(values)
            self.lora_b.zero_()

    def forward(self, x):
        return F.linear(x, self.weight, self.bias) + self.scale * F.linear(F.linear(x, self.lora_a), self.lora_b)

    def merged(self, weight, full):
        """
        The one matrix that does the same: W + s * B A, in float32: in bfloat16 most of a small change would be lost.
        `full` gathers a parameter that is sharded.
        """
        return weight.float() + self.scale * (full(self.lora_b).float() @ full(self.lora_a).float())


def add_lora(hf, rank):
    """Give every linear layer of the language model and the projector an adapter, and freeze all else."""
    hf.requires_grad_(False)
    for part in (hf.model.language_model, hf.model.multi_modal_projector):
        for module in part.modules():
            if type(module) is nn.Linear:
                module.__class__ = LoraLinear
                options = {"device": module.weight.device, "dtype": torch.float32}
                module.lora_a = nn.Parameter(torch.empty(rank, module.in_features, **options))
                module.lora_b = nn.Parameter(torch.empty(module.out_features, rank, **options))


@contextmanager
def without_lora(policy):
    """The model as it was before training: all adapters off."""
    LoraLinear.scale, scale = 0.0, LoraLinear.scale
    try:
        yield policy
    finally:
        LoraLinear.scale = scale


def digest(folder, records):
    """A name for records and the content of their images."""
    sha = hashlib.sha256(json.dumps(records, sort_keys=True).encode())
    for record in records:
        for field in ("image", "image_rejected"):
            if field in record:
                sha.update(image_path(folder, record[field]).read_bytes())
    return sha.hexdigest()[:16]


def fingerprint(policy, device, folder, records):
    """
    A name for everything that the reference log-probabilities depend on: weights, tokenizer, template, image
    settings, records, image files, precision. If any of it changes, so does the name, and a stale cache is not found.
    """
    sha = hashlib.sha256()
    for file in policy.files:
        with open(file, "rb") as content:
            while block := content.read(1 << 24):
                sha.update(block)
    settings = [policy.template, policy.pad, policy.mean.tolist(), policy.std.tolist(), device.type]
    settings += [policy.hf.config.to_dict(), policy.tokenizer.backend_tokenizer.to_str(), digest(folder, records)]
    sha.update(json.dumps(settings, sort_keys=True, default=str).encode())
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


def stored_weight(policy, name):
    """A weight as the files hold it that `policy` was loaded from, float32."""
    for file in policy.files:
        with safe_open(file, "pt") as content:
            for key in {hub_key(name), name} & set(content.keys()):
                return content.get_tensor(key).float()
    raise ValueError(f"{policy.files[0].parent}: no longer holds {name}, which the export needs. Put the model back")


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
    owners = dict(policy.hf.named_modules())
    shards, room = [], 0

    def full(parameter):
        return (parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter).detach()

    for name, parameter in policy.hf.named_parameters():
        if "lora_" in name:
            continue  # goes into the weight that it belongs to
        room -= parameter.numel() * dtype.itemsize
        if room < 0:
            shards.append([])
            room = SHARD_BYTES - parameter.numel() * dtype.itemsize
        shards[-1].append((name, parameter))
    if first:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    index = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        tensors = {}
        for name, parameter in shard:
            whole, owner = full(parameter), owners[name.rpartition(".")[0]]
            if whole.dtype == torch.bfloat16 and policy.files and first:
                whole = stored_weight(
                    policy, name
                )  # one GPU keeps what is not trained in bfloat16; the files know better
            if isinstance(owner, LoraLinear) and name.endswith("weight"):
                whole = owner.merged(whole, full)
            if first:
                tensors[hub_key(name)] = whole.to("cpu", dtype).contiguous()
                index[hub_key(name)] = file
        if first:
            save_file(tensors, aside / file, metadata={"format": "pt"})
    if first:
        if len(shards) > 1:
            size = sum(p.numel() * dtype.itemsize for shard in shards for _, p in shard)
            text = json.dumps({"metadata": {"total_size": size}, "weight_map": index}, indent=2)
            (aside / "model.safetensors.index.json").write_text(text)
        policy.hf.config.architectures = [type(policy.hf).__name__]  # TRL and others ask which class this is
        policy.hf.config.save_pretrained(aside)
        policy.hf.generation_config.save_pretrained(aside)
        policy.processor.save_pretrained(aside)
        (aside / "convention.json").write_text(json.dumps({"convention": policy.convention}))
        for file in aside.iterdir():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        old = folder.with_name(folder.name + ".old.tmp")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            os.rename(folder, old)
        os.rename(aside, folder)
        shutil.rmtree(old, ignore_errors=True)
