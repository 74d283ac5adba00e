"""
A thin wrapper around transformers' LLaVA: vision tower + projector + language model, in the open.

    image (3, H, W) in [0, 1] --normalise--> CLIP vision tower --> P patch features --> projector --> P embeddings
    those embeddings stand where the prompt holds image tokens; the language model reads on from there.

It scores packed rows (data.py), samples, and carries adapters. It knows nothing of training or model files.
"""

import inspect
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, LlamaModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from data import Encoding, Row, image_path, load_image, pack


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
# Transformers 5.24 renamed this argument and drops the old name in 5.40; a wrong name would be ignored in silence.
CACHE = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"


def row_mask(segment):
    """Where the tokens of packed rows may look: back, at the prefix and at their own answer, not at another answer.

    segment   (R, L): -1 padding, 0 the prefix, k the k-th answer;   returns  (R, 1, L, L) bool

    Padding sees the prefix too, so that no row of the mask is empty: softmax over nothing is nan.
    """
    causal = torch.ones(segment.shape[1], segment.shape[1], dtype=torch.bool, device=segment.device).tril()
    allowed = (segment[:, None, :] == 0) | (segment[:, :, None] == segment[:, None, :])  # (R, L, L)
    return (allowed & causal)[:, None]


def packed_attention(module, query, key, value, attention_mask, slot=None, **kwargs):
    """Transformers' attention for tokens that lie behind each other without padding (data.Batch). Padded to the longest
    of R rows, all rows have R x L slots; each token is put into its slot, row_mask says where it may look, and what
    comes out is taken from the slots again. All other layers work on the tokens that there are, and no others.

    query, key, value   (1, heads, N, D);   attention_mask  (R, 1, L, L);   returns  (1, N, heads, D) and None
    slot                (N,) among the R * L slots;   None: nothing is packed
    """
    if slot is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    rows, length = attention_mask.shape[0], attention_mask.shape[-1]

    def spread(x):  # (1, heads, N, D) -> (R, heads, L, D)
        x = x[0].transpose(0, 1)  # (N, heads, D)
        x = x.new_zeros(rows * length, *x.shape[1:]).index_copy(0, slot, x)
        return x.view(rows, length, *x.shape[1:]).transpose(1, 2)

    out, _ = sdpa_attention_forward(module, spread(query), spread(key), spread(value), attention_mask, **kwargs)
    return out.flatten(0, 1).index_select(0, slot)[None], None


AttentionInterface.register("packed", packed_attention)
AttentionMaskInterface.register("packed", sdpa_mask)


# ------------------------------------------------------------------------------------------------- the policy


class Policy(nn.Module):
    """A LLaVA and its processor. `hf` is the transformers model, so nothing about it is hidden or renamed."""

    ENTRIES = ("logps", "decode")  # the methods through which a sharded model is entered (runtime.slice_layers)

    def __init__(self, hf, processor, train_vision=False, convention="hub"):
        super().__init__()
        self.hf, self.processor, self.tokenizer = hf, processor, processor.tokenizer
        self.convention, self.pad = convention, CONVENTIONS[convention].pad
        vision = hf.config.vision_config
        self.image_size, image_tokens = vision.image_size, (vision.image_size // vision.patch_size) ** 2
        self.image_id = hf.config.image_token_id
        self.encoding = Encoding(self.tokenizer, CONVENTIONS[convention].template, image_tokens)
        hf.model.language_model.set_attn_implementation("packed")
        for name in ("mean", "std"):  # per channel, applied to pixels in [0, 1]
            value = torch.tensor(getattr(processor.image_processor, f"image_{name}"), dtype=torch.float32)
            self.register_buffer(name, value.view(3, 1, 1), persistent=False)
        # No token is drawn that the text cannot hold: an image token would ask for an image that is not
        # there, and LLaVA-1.5 has embeddings for more tokens (32,064) than its tokenizer knows (32,002).
        self.unsayable = [self.image_id, *range(len(self.tokenizer), hf.config.text_config.vocab_size)]
        tower = hf.model.vision_tower
        # DEVIATION: what the papers train could not be found; frozen, as LLaVA-1.5 was tuned, was better on the toy.
        tower.requires_grad_(train_vision)
        # Layers behind the one whose features are read get no gradient; left trainable, they would have no
        # optimiser state and checkpoints could not be loaded back.
        for unused in [*tower.encoder.layers[len(tower.encoder.layers) + 1 + hf.config.vision_feature_layer :]]:
            unused.requires_grad_(False)
        tower.post_layernorm.requires_grad_(False)

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
        """Log-probabilities of the answers of packed rows, in float32 nats.

        batch     data.Batch: R rows with A answers, the longest of T tokens
        vision    (R, P, D) patch features, if they are known already
        returns   token_logp (A, T), 0 where batch.answer_mask is False; the answer's logp is its sum over T.
                  With `entropy`, also the entropy (A, T) of each of these predictions

        The head runs at answer tokens only: at a vocabulary of 32,000 the logits of all tokens would take more memory
        than the model's activations.
        """
        vision = self.vision(batch.pixels) if vision is None else vision
        hidden = self.hf.model.language_model(
            inputs_embeds=self.embed(batch.ids, vision)[None],
            position_ids=batch.position[None],
            attention_mask=row_mask(batch.segment),
            slot=batch.slot,
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

    @torch.no_grad()
    def decode(self, pixels, prompts, group, limit, pick):
        """G answers to each of N questions. They grow side by side behind their prompt, in one row, as training has
        them (data.pack): a prompt is read once, and its keys and values are kept and looked at once.

        pixels    (N, 3, H, W) in [0, 1];   prompts  N lists of token ids (data.Encoding.prompt)
        pick      pick(logits (N, G, V) float64, t) -> (N, G, 1), the tokens number t
        returns   N * G lists of at most `limit` token ids, the G of a question together, with the end-of-sequence
                  token where it was reached; and their log-probabilities, float32 nats, as `logps` gives them
        """
        eos, device = self.tokenizer.eos_token_id, pixels.device
        length = max(map(len, prompts))  # padded on the left: all answers start in one column
        pad = [[self.tokenizer.pad_token_id] * (length - len(prompt)) for prompt in prompts]
        ids = torch.tensor([p + prompt for p, prompt in zip(pad, prompts, strict=True)], device=device)
        mask = torch.arange(length, device=device) >= torch.tensor([[len(p)] for p in pad], device=device)
        position = (mask.cumsum(1) - 1).clamp(min=0)
        cache = {CACHE: DynamicCache(config=self.hf.config.text_config)}

        def read(embeds):  # -> (N, columns, E): the states that predict the next tokens
            return self.hf.model.language_model(
                inputs_embeds=embeds, attention_mask=mask, position_ids=position, use_cache=True, **cache
            ).last_hidden_state

        hidden = read(self.embed(ids, self.vision(pixels)))[:, -1:].expand(-1, group, -1)  # (N, G, E)
        position = position[:, -1:].expand(-1, group)
        mask = mask[:, None, None].expand(-1, 1, group, -1)  # (N, 1, G, P): all answers see the prompt
        itself = torch.eye(group, dtype=torch.bool, device=device).expand(len(ids), 1, -1, -1)
        tokens, logps = [], []
        ended = torch.zeros(len(ids), group, dtype=torch.bool, device=device)
        for t in range(limit):
            logits = self.hf.lm_head(hidden).double()  # (N, G, V)
            logp = logits.float().log_softmax(-1)
            logits[..., self.unsayable] = -torch.inf
            tokens.append(pick(logits, t))
            logps.append(logp.gather(-1, tokens[-1]))
            ended |= tokens[-1][..., 0] == eos
            if t + 1 == limit or ended.all():
                break
            mask, position = (torch.cat([mask, itself], -1), position + 1)  # of what answers say, each sees its own
            hidden = read(self.hf.get_input_embeddings()(tokens[-1][..., 0]))
        tokens, logps = (torch.cat(parts, -1).flatten(0, 1).tolist() for parts in (tokens, logps))
        lengths = [answer.index(eos) + 1 if eos in answer else len(answer) for answer in tokens]
        tokens, logps = ([v[:n] for v, n in zip(values, lengths, strict=True)] for values in (tokens, logps))
        return tokens, logps

    def sample(self, pixels, prompts, uniform):
        """G answers to each of N questions at temperature 1: tokens and log-probabilities, as `decode` gives them.

        uniform   (N, G, T) float64 in [0, 1): the numbers that pick the tokens. They come from the caller, so
                  that an answer depends on its question and a seed, not on the batch or the process that it
                  was drawn in
        """
        assert uniform.dtype == torch.float64 and uniform.max() < 1, uniform.dtype
        uniform = uniform.to(pixels.device)

        def pick(logits, t):
            reached = logits.softmax(-1).cumsum(-1)
            token = torch.searchsorted(reached, uniform[..., t : t + 1] * reached[..., -1:], right=True)
            return token.clamp(max=logits.shape[-1] - 1)  # (N, G, 1)

        return self.decode(pixels, prompts, *uniform.shape[1:], pick)

    def generate(self, pixels, prompts, max_new_tokens):
        """One greedy answer to each of N questions: N texts, and N flags: did it end within `max_new_tokens`?"""
        tokens, _ = self.decode(pixels, prompts, 1, max_new_tokens, lambda logits, t: logits.argmax(-1, True))
        return self.texts(tokens), [answer[-1] == self.tokenizer.eos_token_id for answer in tokens]

    def texts(self, answers):
        """Answers as text, from their token ids."""
        return [text.strip() for text in self.tokenizer.batch_decode(answers, skip_special_tokens=True)]


def to_square(image, size, pad, colour=PAD_COLOUR, resample=Image.Resampling.BICUBIC):
    """PIL image -> PIL image of (size, size). With `pad` as LLaVA-1.5 does it: padded to a square, then resized.
    Without, as the hub's processor does it: the shorter side resized, the centre cropped, so that objects at the
    border may be lost. An image of that size passes unchanged.
    """
    width, height = image.size
    if (width, height) == (size, size):
        return image
    if pad:
        side = max(width, height)
        square = Image.new(image.mode, (side, side), colour)
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        return square.resize((size, size), resample)
    image = image.resize((max(size, size * width // height), max(size, size * height // width)), resample)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def to_pixels(images):
    """RGB images of one size, PIL's or arrays -> (R, 3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float() / 255


def load_pixels(policy, folder, names, cache=None):
    """The images `names` of a data folder as the policy's vision tower takes them: (R, 3, H, W) float32 in [0, 1].
    `cache`, a dict of the caller's, keeps them once they are decoded, as long as they fit into DECODED_BYTES.
    """
    cache, images = {} if cache is None else cache, []
    for name in names:
        image = cache.get((folder, name))
        if image is None:
            image = load_image(image_path(folder, name))
            image = np.asarray(to_square(image, policy.image_size, policy.pad))  # (H, W, 3)
            if len(cache) * image.nbytes < DECODED_BYTES:
                cache[folder, name] = image
        images.append(image)
    return to_pixels(images)


def pair_batch(policy, records, rows, folder, distorted=True, cache=None):
    """B MFPO records as one data.Batch on the policy's device. Its answers are, record by record, chosen and rejected
    given the image and, with `distorted`, chosen given the distorted image.

    rows   of each record, its data.Row with chosen and rejected
    """
    sides = ("image", "image_rejected") if distorted else ("image",)
    pixels = load_pixels(policy, folder, [record[side] for record in records for side in sides], cache)
    again = [[row, Row(row.prefix, row.answers[:1], row.id)][: len(sides)] for row in rows]
    return pack([row for pair in again for row in pair], pixels).to(policy.mean.device)


class LoraLinear(nn.Linear):
    """LoRA (Hu et al. 2021, arXiv:2106.09685), Eq. 3: W x + s * B A x, where W is frozen and A, B are small.

    A (r, in) starts at random, B (out, r) at 0, so the first outputs are those of W; s = 2, as with alpha = 2 r.
    """

    scale = 2.0

    def forward(self, x):
        return F.linear(x, self.weight, self.bias) + self.scale * F.linear(F.linear(x, self.lora_a), self.lora_b)


def add_lora(hf, rank):
    """Give every linear layer of the language model and the projector an adapter, and freeze all else."""
    hf.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)  # the same start on any number of processes
    for part in (hf.model.multi_modal_projector, hf.model.language_model):
        for module in part.modules():
            if type(module) is nn.Linear:
                module.__class__ = LoraLinear
                device, size = module.weight.device, module.in_features
                start = (torch.rand(rank, size, generator=generator) * 2 - 1) / size**0.5  # as nn.Linear's weights
                module.lora_a = nn.Parameter(start.to(device))
                module.lora_b = nn.Parameter(torch.zeros(module.out_features, rank, device=device))


@contextmanager
def without_lora(policy):
    """The model as it was before training: all adapters off."""
    LoraLinear.scale, scale = 0.0, LoraLinear.scale
    try:
        yield policy
    finally:
        LoraLinear.scale = scale
