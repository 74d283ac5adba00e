"""
A world small enough for a laptop, in which a LLaVA learns to hallucinate for the reason that real ones do.

    scenes     64 x 64 pixels, 2 to 4 objects of 12 kinds and 6 colours on a 4 x 4 grid, drawn with Pillow
    the prior  kinds come in pairs (cup and spoon, lock and key, ...): in the training scenes an anchor brings its
               partner 87 % of the time, and the annotator often writes the partner down when it is not there
    the test   in the scenes for preferences, validation and test the partner is there half of the time
    the model  transformers' own LLaVA, CLIP-vision and Llama classes, 1.2 million parameters, a word tokenizer

`warm_up` trains that model on the biased captions: it sees well, and names the partner that is not there.
"""

import functools
from collections import deque

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from tqdm import tqdm
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from data import Row, encode_answer, encode_prompt, pack
from model import CONVENTIONS, Policy, without_warnings
from runtime import cosine

TEMPLATE = CONVENTIONS["hub"].template
SIZE, CELL = 64, 16  # pixels; a cell of the grid is a patch of the ViT: objects across patches are learnt far slower
PAIRS = [("cup", "spoon"), ("book", "pen"), ("plate", "fork"), ("pear", "knife"), ("lock", "key"), ("vase", "rose")]
KINDS = [kind for pair in PAIRS for kind in pair]
PARTNER = dict(PAIRS)
COLOURS = {
    "red": (214, 40, 40),
    "green": (46, 150, 70),
    "blue": (40, 90, 210),
    "yellow": (226, 180, 20),
    "purple": (140, 60, 180),
    "black": (45, 45, 50),
}
CAPTIONS = {  # question -> template of its answer
    "Describe the picture.": "The picture shows {}.",
    "What do you see?": "I can see {}.",
    "What is in the picture?": "There is {} in the picture.",
}
P_BIASED, P_FAIR = 0.87, 0.5  # how often an anchor brings its partner
# How often the annotator of the training scenes names an absent partner. Below one half a model that sees well enough
# learns to say nothing, and how much it hallucinates then depends on how well it was trained, so on the seed.
P_SLOPPY = 0.5
SPLIT_SEEDS = {"train": 1, "preference": 2, "val": 3, "test": 4}  # no scene is shared between splits


# ----------------------------------------------------------------------------------------------------- scenes


@functools.cache
def glyph(kind, colour, size):
    """An object as a (size, size) RGBA image, drawn eight times larger and reduced, so that edges are smooth."""
    n = 8 * size
    image = Image.new("RGBA", (n, n), (0, 0, 0, 0))
    pen, fill = ImageDraw.Draw(image), COLOURS[colour]
    hole = tuple(int(c + (255 - c) * 0.75) for c in fill)

    def at(*xy):  # coordinates as fractions of the glyph
        return [v * n for v in xy]

    if kind == "cup":
        pen.ellipse(at(0.55, 0.25, 0.98, 0.75), outline=fill, width=n // 9)
        pen.rounded_rectangle(at(0.05, 0.1, 0.75, 0.95), n // 6, fill=fill)
    elif kind == "spoon":
        pen.ellipse(at(0.28, 0.0, 0.72, 0.45), fill=fill)
        pen.rectangle(at(0.43, 0.4, 0.57, 1), fill=fill)
    elif kind == "book":
        pen.rectangle(at(0, 0.12, 1, 0.9), fill=fill)
        pen.rectangle(at(0.46, 0.12, 0.54, 0.9), fill=hole)
        for y in (0.3, 0.5, 0.7):
            pen.rectangle(at(0.1, y, 0.38, y + 0.06), fill=hole)
            pen.rectangle(at(0.62, y, 0.9, y + 0.06), fill=hole)
    elif kind == "pen":
        pen.polygon(at(0, 1, 0.08, 0.72, 0.78, 0.02, 0.98, 0.22, 0.28, 0.92), fill=fill)
    elif kind == "plate":
        pen.ellipse(at(0, 0, 1, 1), fill=fill)
        pen.ellipse(at(0.22, 0.22, 0.78, 0.78), fill=hole)
    elif kind == "fork":
        for x in (0.2, 0.44, 0.68):
            pen.rectangle(at(x, 0, x + 0.12, 0.45), fill=fill)
        pen.rectangle(at(0.2, 0.36, 0.8, 0.48), fill=fill)
        pen.rectangle(at(0.44, 0.4, 0.56, 1), fill=fill)
    elif kind == "pear":
        pen.ellipse(at(0.1, 0.38, 0.9, 1), fill=fill)
        pen.ellipse(at(0.28, 0.12, 0.72, 0.65), fill=fill)
        pen.rectangle(at(0.47, 0, 0.55, 0.2), fill=fill)
    elif kind == "knife":
        pen.polygon(at(0.4, 0, 0.7, 0.12, 0.7, 0.6, 0.4, 0.6), fill=fill)
        pen.rectangle(at(0.44, 0.6, 0.6, 1), fill=fill)
    elif kind == "lock":
        pen.ellipse(at(0.2, 0, 0.8, 0.75), outline=fill, width=n // 9)
        pen.rectangle(at(0.05, 0.42, 0.95, 1), fill=fill)
        pen.ellipse(at(0.4, 0.58, 0.6, 0.82), fill=hole)
    elif kind == "key":
        pen.ellipse(at(0, 0.28, 0.45, 0.73), outline=fill, width=n // 9)
        pen.rectangle(at(0.42, 0.45, 1, 0.57), fill=fill)
        pen.rectangle(at(0.72, 0.5, 0.8, 0.76), fill=fill)
        pen.rectangle(at(0.9, 0.5, 0.98, 0.76), fill=fill)
    elif kind == "vase":
        pen.polygon(at(0.25, 0, 0.75, 0, 0.62, 0.25, 1, 0.6, 0.75, 1, 0.25, 1, 0, 0.6, 0.38, 0.25), fill=fill)
    elif kind == "rose":
        for x, y in ((0.1, 0.14), (0.46, 0.14), (0.28, 0.0), (0.28, 0.28)):
            pen.ellipse(at(x, y, x + 0.44, y + 0.4), fill=fill)
        pen.rectangle(at(0.45, 0.6, 0.55, 1), fill=(46, 150, 70))
    return image.resize((size, size), Image.Resampling.LANCZOS)


def draw_scene(rng, p_partner):
    """
    One scene. `p_partner`: the probability that an anchor brings its partner.

    returns  image (64, 64, 3) uint8, objects [{"kind", "colour", "box": [x0, y0, x1, y1]}] with boxes in pixels
             (x1, y1 exclusive), in the order in which captions name them: by pair, anchor before partner
    """
    anchors = rng.permutation(len(PAIRS))[: 1 + (rng.random() < 0.6)]
    kinds = [PAIRS[a][0] for a in anchors]
    kinds += [PAIRS[a][1] for a in anchors if rng.random() < p_partner]
    strays = [PAIRS[a][1] for a in rng.permutation(len(PAIRS)) if a not in anchors]
    if len(kinds) < 2 or (len(kinds) < 4 and rng.random() < 0.15):  # a partner on its own, so that it can be
        kinds.append(strays[0])
    background = 222 + 30 * rng.random(3)
    image = background + 8 * rng.standard_normal((SIZE, SIZE, 3))  # pixel noise: glyphs are not copied bit for bit
    image = Image.fromarray(image.clip(0, 255).astype(np.uint8))
    objects = []
    for cell, kind in zip(rng.permutation(16), sorted(kinds, key=KINDS.index), strict=False):
        size = int(rng.integers(14, 17) if kind in PARTNER else rng.integers(11, 14))
        colour = list(COLOURS)[rng.integers(len(COLOURS))]
        x, y = (int(c * CELL + rng.integers(CELL - size + 1)) for c in (cell % 4, cell // 4))
        sprite = glyph(kind, colour, size)
        image.paste(sprite, (x, y), sprite)
        objects.append({"kind": kind, "colour": colour, "box": [x, y, x + size, y + size]})
    return np.asarray(image), objects


def say(objects, question):
    """The caption that names `objects` [(colour, kind)] in answer to one of the questions of CAPTIONS."""
    names = [f"a {colour} {kind}" for colour, kind in objects]
    text = ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else names[0]
    return CAPTIONS[question].format(text)


def with_partner(objects, anchor, rng):
    """`objects` [(colour, kind)] with the absent partner of `anchor` named after it, in a colour out of the air."""
    at = [kind for _, kind in objects].index(anchor) + 1
    return [*objects[:at], (str(rng.choice(list(COLOURS))), PARTNER[anchor]), *objects[at:]]


def absent_partners(objects):
    """The anchors in `objects` [(colour, kind)] whose partner is not there."""
    kinds = {kind for _, kind in objects}
    return [kind for _, kind in objects if kind in PARTNER and PARTNER[kind] not in kinds]


def sloppy(objects, rng):
    """The annotator of the training scenes: sees an absent partner with probability P_SLOPPY."""
    for anchor in absent_partners(objects):
        if rng.random() < P_SLOPPY:
            objects = with_partner(objects, anchor, rng)
    return objects


def pairs_of(objects):
    """[{"kind", "colour", ...}] -> [(colour, kind)], as captions name them."""
    return [(o["colour"], o["kind"]) for o in objects]


def mentions(text):
    """The objects that a caption names, in order: [(colour or '', kind)]. Any text is accepted, also garbage."""
    words = text.lower().replace(",", " ").replace(".", " ").split()
    return [(b if b in COLOURS else "", w) for b, w in zip(["", *words], words, strict=False) if w in KINDS]


def scenes(split, count, seed, p_partner=P_FAIR):
    """`count` scenes of a split as (image, objects, rng); the rng goes on to draw what belongs to that scene."""
    for i in range(count):
        rng = np.random.default_rng([SPLIT_SEEDS[split], seed, i])
        yield *draw_scene(rng, p_partner), rng


def yesno(kind):
    """The question of POPE."""
    return f"Is there a {kind} in the picture?"


def closed_question(kind, objects, rng):
    """
    A closed-ended question about a scene with `objects` [(colour, kind)], its answer and its choices, all text.

    kind   yesno (present or a random absent kind, half each) | choice (four options, one present) | number | word
    """
    present = [name for _, name in objects]
    absent = [k for k in KINDS if k not in present]
    if kind == "yesno":
        yes = rng.random() < 0.5
        return yesno(rng.choice(present if yes else absent)), "Yes" if yes else "No", []
    if kind == "choice":
        right = int(rng.integers(4))
        options = list(rng.permutation(absent)[:3])
        options.insert(right, rng.choice(present))
        text = " ".join(f"{letter}. {option}" for letter, option in zip("ABCD", options, strict=True))
        return f"Which of these is in the picture? {text}", "ABCD"[right], [str(option) for option in options]
    if kind == "number":
        return "How many objects are in the picture?", str(len(objects)), []
    if kind == "word":
        colour, name = objects[rng.integers(len(objects))]
        return f"What colour is the {name}?", colour, list(COLOURS)
    raise ValueError(f"question kind {kind!r}: use yesno, choice, number or word")


# --------------------------------------------------------------------------------------- tokenizer and model


def build_processor():
    """A word-level tokenizer over everything the world can say, and CLIP's normalisation of its images."""
    texts = [*CAPTIONS, *CAPTIONS.values(), TEMPLATE.replace("<image>", ""), "a , . and Yes No 2 3 4 A B C D"]
    texts += [yesno("it"), "Which of these is in the picture?", "How many objects are", "What colour is the"]
    split = pre_tokenizers.Whitespace()
    words = {w for text in texts for w, _ in split.pre_tokenize_str(text.replace("{}", "").replace("{question}", ""))}
    special = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
    vocab = {word: i for i, word in enumerate([*special, *sorted(words), *COLOURS, *KINDS])}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = split
    words.decoder = decoders.WordPiece(prefix="##", cleanup=True)  # joins words, no blank before a comma or full stop
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
    )
    sizes = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
    images = without_warnings(lambda: transformers.CLIPImageProcessor(**sizes))
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=CELL,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
    )


def build_policy(seed):
    """The tiny LLaVA with random weights: every part of LLaVA-1.5 is there, at a thousandth of the width."""
    processor = build_processor()
    tokenizer = processor.tokenizer
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
    config = LlavaConfig(
        # Four layers, of which LLaVA reads the last but one.
        vision_config=CLIPVisionConfig(**sizes, num_hidden_layers=4, image_size=SIZE, patch_size=CELL),
        text_config=LlamaConfig(
            **sizes,
            num_hidden_layers=3,
            vocab_size=len(tokenizer),
            max_position_embeddings=256,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    config.dtype = torch.float32
    torch.manual_seed(seed)
    hf = LlavaForConditionalGeneration(config)
    # Attention starts by looking for tokens like the one it stands on (keys = queries) and by copying what it finds
    # (output = values transposed): "is there a cup" has to find the patch of a cup. From plain random weights that
    # step alone takes longer than all of the warm-up. The factor 3 and the embeddings' norm of 1 were found by trial.
    with torch.no_grad():
        hf.get_input_embeddings().weight.normal_(std=128**-0.5)
        for attention in (layer.self_attn for layer in hf.model.language_model.layers):
            attention.q_proj.weight.mul_(3)
            attention.v_proj.weight.mul_(3)
            attention.k_proj.weight.copy_(attention.q_proj.weight)
            attention.o_proj.weight.copy_(attention.v_proj.weight.T)
    return Policy(hf, processor, train_vision=True)


# ---------------------------------------------------------------------------------------------------- warm-up


def descend(modules, steps, peak, loss_of, title, until=0.0):
    """
    A plain training loop: AdamW on `loss_of()`. Betas, decay and clip are usual values, not tuned.

    With `until`, the rate stays at its peak and training stops once the mean of 20 losses is below it.
    """
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.01)
    recent = deque(maxlen=20)
    bar = tqdm(range(steps), f"warm-up: {title}", leave=False, mininterval=1)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = cosine(step, steps, peak, warm=20, floor=1.0 if until else 0.05)
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        recent.append(loss.item())
        mean = sum(recent) / len(recent)
        bar.set_postfix_str(f"loss {mean:.3f}", refresh=False)
        if step >= 20 and mean < until:
            break
    bar.close()
    print(f"warm-up: {title}: {step + 1} steps, loss {mean:.3f}")


STAGES = (  # name, steps, stop below this loss, peak rate, scenes a step, {kind of turn: how many a scene}, annotator
    ("captions", 500, 0.0, 2e-3, 16, {"caption": 1, "word": 3}, "sloppy"),
    # Yes/no stays at chance (0.347) for 100 to 300 steps, then falls within 100: how long differs from seed to seed.
    ("yes/no", 800, 0.08, 1e-3, 16, {"yesno": 8}, "careful"),
    ("mixed", 400, 0.0, 1e-3, 16, {"caption": 1, "yesno": 4, "choice": 1, "number": 0.5, "word": 0.5}, "sloppy"),
)


def warm_up(seed, vision_steps=250, stages=STAGES, images=6000):
    """
    The base model: a Policy that sees well and hallucinates by prior.

    1. Vision tower and projector name the kind and the colour of each patch, on fair scenes: the patch's embedding
       is to be like those of its words. Then the tower is frozen. Trained only through captions it stays poor, and
       every method then just trades precision against recall.
    2. Captions of the biased scenes by the sloppy annotator, with questions about colours.
    3. Yes/no questions alone, answered truly: mixed with captions from the start, they are not learnt.
    4. All kinds of question and captions together, answered by the sloppy annotator.
    """
    policy = build_policy(seed)
    tower, tokenizer = policy.hf.model.vision_tower, policy.tokenizer
    rng = np.random.default_rng([seed, 99])
    learn_patches(policy, list(scenes("train", images, seed)), vision_steps, rng)

    # The rest sees the biased world through the frozen tower, so its features are computed once.
    tower.requires_grad_(False)
    world = list(scenes("train", images, seed + 1000, P_BIASED))
    with torch.no_grad():
        features = torch.cat([policy.vision(pixels_of(world[i : i + 500])) for i in range(0, images, 500)])
    seen = {"careful": [pairs_of(objects) for _, objects, _ in world]}
    seen["sloppy"] = [sloppy(pairs, scene[2]) for pairs, scene in zip(seen["careful"], world, strict=True)]
    described = [str(scene_rng.choice(list(CAPTIONS))) for _, _, scene_rng in world]
    opening = encode_prompt(tokenizer, "", TEMPLATE, policy.image_tokens)
    opening = opening[: opening.index(policy.image_id) + policy.image_tokens]  # <s> USER: <image>...<image>

    @functools.cache
    def turn(question, answer):
        """Token ids of one question and its answer behind `opening`, and the length of the answer."""
        prompt = encode_prompt(tokenizer, question, TEMPLATE, policy.image_tokens)[len(opening) :]
        reply = encode_answer(tokenizer, question, answer, TEMPLATE)
        return prompt + reply, len(reply)

    def loss_of(count, kinds, annotator):
        """Mean negative log-probability of answer tokens. All turns about a scene share its image in one row."""
        rows, lengths, picked = [], [], rng.integers(images, size=count)
        for scene in picked:
            turns = []
            for kind, share in kinds.items():
                for _ in range(int(share) + (rng.random() < share % 1)):
                    pairs, question = seen[annotator][scene], described[scene]
                    asked = (
                        (question, say(pairs, question)) if kind == "caption" else closed_question(kind, pairs, rng)[:2]
                    )
                    turns.append(turn(*asked))
            rows.append(Row(opening, [ids for ids, _ in turns]))
            lengths += [length for _, length in turns]
        batch = pack(rows, None)
        question_length = batch.answer_mask.sum(1) - torch.tensor(lengths)
        counted = batch.answer_mask & (torch.arange(batch.answer_mask.shape[1]) >= question_length[:, None])
        return -(policy.logps(batch, features[picked]) * counted).sum() / counted.sum()

    learner = [policy.hf.model.multi_modal_projector, policy.hf.model.language_model, policy.hf.lm_head]
    for name, steps, until, peak, count, kinds, annotator in stages:
        descend(learner, steps, peak, functools.partial(loss_of, count, kinds, annotator), name, until)
    return policy


def pixels_of(world):
    """Scenes -> (N, 3, 64, 64) in [0, 1]."""
    return torch.from_numpy(np.stack([scene[0] for scene in world])).permute(0, 3, 1, 2).float() / 255


def learn_patches(policy, world, steps, rng):
    """Stage 1 of the warm-up. The head starts as a copy of the embeddings that it learns: words out are words in."""
    kind_of, colour_of = np.zeros((len(world), 16), int), np.full((len(world), 16), -100)  # -100: no colour to name
    for i, (_, objects, _) in enumerate(world):
        for o in objects:
            cell = o["box"][1] // CELL * 4 + o["box"][0] // CELL
            kind_of[i, cell], colour_of[i, cell] = 1 + KINDS.index(o["kind"]), list(COLOURS).index(o["colour"])
    kind_of, colour_of = torch.from_numpy(kind_of), torch.from_numpy(colour_of)
    words = policy.tokenizer.convert_tokens_to_ids(["picture", *KINDS, *COLOURS])  # "picture" stands for no object
    weight = torch.tensor([0.2] + [1.0] * len(KINDS))  # most patches hold no object
    table, projector = policy.hf.get_input_embeddings(), policy.hf.model.multi_modal_projector

    def loss_of():
        pick = rng.integers(len(world), size=64)
        patches = projector(policy.vision(pixels_of([world[i] for i in pick])))  # (64, 16, E)
        likeness = 10 * (patches @ table.weight[words].T).flatten(0, 1)  # (1024, 19); 10: a patch of norm 1 is enough
        kind, colour = likeness.split([1 + len(KINDS), len(COLOURS)], dim=1)
        return F.cross_entropy(kind, kind_of[pick].flatten(), weight) + F.cross_entropy(
            colour, colour_of[pick].flatten()
        )

    descend([policy.hf.model.vision_tower, projector, table], steps, 1e-3, loss_of, "vision")
    with torch.no_grad():
        policy.hf.lm_head.weight.copy_(table.weight)
