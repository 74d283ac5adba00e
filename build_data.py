"""
Own records -> preference records.

    python build_data.py toy                     the built-in world: scenes, a base model, held-out pairs
    python build_data.py mfpo --source data/toy/preference.jsonl --model data/toy/base --out data/toy/mfpo.jsonl
    python build_data.py mbpo ...                the same flags; also under torchrun, on all processes

`mfpo` follows MFPO (arXiv:2410.15334): keywords of the chosen answer by a word graph, their regions in the image,
noise inside those regions. Each negative image is made once and stored: policy and reference must see the same.
`mbpo` follows MBPO (arXiv:2506.08022): the records whose answer needs the image most, an attack on the image that
makes that answer unlikely, and what the model then says, misled by its language prior, as the rejected answer.

reads    {"id", "image", "question", "chosen", ["rejected"], ["objects": [{"word", "box"}]]} a line; public
         datasets become such by python -m extras.sources
writes   mfpo: <out>.jsonl (format: data.py), <out>_distorted/*.png and with --heldout <out>_heldout.jsonl
         mbpo: <out>.jsonl, <out>_attacked/*.png, <out>_dropped.jsonl; in the toy world <out>_closed.jsonl
         what is done lies in <out>.parts-... until all is: a build that was stopped goes on there
"""

import dataclasses
import functools
import math
import re
import unicodedata
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import data
import grounding
import hub
import losses
import model
import parts
import runtime
import toy
import warmup
from runtime import Mistake, knob, say

BOXED = ("key", "prior")  # kinds of region that are found by words
STOP_WORDS = set(
    "a an the and or but if of to in on at by for with from into over under above below near between behind beside is "
    "are was were be been being has have had do does did can could will would may might shall should must i you he she "
    "it we they me him her us them my your his its our their this that these those there here what which who whom "
    "whose when where why how not no yes as than then so such very also just some any all both each one other another "
    "am cannot s t describe image picture photo see seen show shows showing shown".split()
)
# Words as people write them, with accents (also as marks of their own), hyphens, apostrophes: t-shirt, o'clock, don't.
WORD = re.compile(r"[\w\u0300-\u036f]+(?:['\u2019\u00b4-][\w\u0300-\u036f]+)*")
IRREGULAR = {"men": "man", "women": "woman", "people": "person", "children": "child", "mice": "mouse"}


def singulars(word):
    """A word as it is and without a plural's ending."""
    forms = [word, IRREGULAR[word]] if word in IRREGULAR else [word]
    forms += [word[:-3] + "f", word[:-3] + "fe"] if word.endswith("ves") else []
    forms += [word[:-3] + "y"] if word.endswith("ies") else []
    forms += [word[:-2]] if re.search("(ch|sh|x|s|z|o)es$", word) else []
    return forms + ([word[:-1]] if re.search("[^su]s$", word) else [])


def content_words(text):
    """The candidates for keywords, plurals merged into singulars: {word: [position, ...]} among WORD's matches."""
    words = [
        unicodedata.normalize("NFC", re.sub("['\u2019\u00b4](s|re|ve|ll|d|m)$", "", m)) for m in WORD.findall(text)
    ]
    words, positions = [word.lower() for word in words], {}
    for position, word in enumerate(words):
        word = next((form for form in singulars(word)[1:] if form in words), word)
        if len(word) > 1 and word not in STOP_WORDS and not re.search("n['\u2019\u00b4]t$|[0-9_]", word):
            positions.setdefault(word, []).append(position)
    return positions


def keywords(text, vector_of, top=5, phi=1.0, gamma=1.0, decay=0.05, damping=0.85, topic=0.6):
    """The image-relevant words of an answer, best first: weighted PageRank on a multipartite graph of its words (MFPO,
    "keywords"; MultipartiteRank, Boudin 2018, arXiv:1803.08721). Words of one topic have no edge between them.

        theta_ij = sum over occurrences of 1 / (1 + |l_i - l_j|^phi)        positional influence
        S_ij     = cos(v_i, v_j)                                            semantic similarity
        kappa_i  = exp(-decay * l_i)                                        early words weigh more
        w_ij     = (theta_ij + gamma * S_ij) * kappa_i                      edge from j into i, of another topic
        score_i  = (1 - damping) + damping * sum_j w_ij / (sum_k w_kj) * score_j

    vector_of   word -> (E,) array;   returns  [(word, score)], at most `top`

    DEVIATION: candidates, vectors (the policy's own embeddings), how the three make w_ij and all values are ours, K = 5
    too; kappa is applied to the word that receives (on the giving word it would cancel) at its first occurrence, a
    negative cosine counts as 0. A topic is ours: words that share a stem or whose cosine is over `topic`, and what is
    linked through such words; with one topic alone the words rank by position.
    """
    positions = content_words(text)
    words = list(positions)
    if not words:
        return []
    vectors = np.stack([vector_of(word) for word in words])
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    similarity = np.maximum(vectors @ vectors.T, 0)  # (W, W)

    def influence(a, b):
        return sum(1 / (1 + abs(i - j) ** phi) for i in positions[a] for j in positions[b])

    theta = np.array([[influence(a, b) for b in words] for a in words])
    kappa = np.exp(-decay * np.array([positions[word][0] for word in words]))  # (W,)
    stems = np.array([re.sub("(?<=[a-z]{3})(ing|ed|er|est|ly|e)$", "", singulars(word)[-1]) for word in words])
    alike = (similarity > topic) | (stems[:, None] == stems)
    for k in range(len(words)):  # what is alike through word k is alike
        alike |= alike[:, k : k + 1] & alike[k : k + 1]
    weight = np.where(alike, 0, theta + gamma * similarity) * kappa[:, None]
    share = weight / np.maximum(weight.sum(0, keepdims=True), 1e-12)  # column j: how word j spreads its score
    score = np.ones(len(words))
    for _ in range(100):
        score = (1 - damping) + damping * share @ score
    order = np.argsort(-score, kind="stable")[:top]
    return [(words[i], float(score[i])) for i in order]


# ------------------------------------------------------------------------------------- regions and distortion


def is_about(word, phrase):
    """Does a keyword name what a box is called, "tables" a "dining table"?"""
    return bool(set(singulars(word)) & {form for other in content_words(phrase) for form in singulars(other)})


def own_regions(record, words):
    """The boxes that a record has of its keywords."""
    named = [o for o in record.get("objects", []) if any(is_about(word, o["word"]) for word in words)]
    return [{"word": o["word"], "box": o["box"]} for o in named]


@torch.no_grad()
def word_gains(policy, records, pixels):
    """MBPO's information gain, word by word: for each record {content word of its chosen answer: nats per token}. Least
    has the word that the language prior would have said without the image, pixels (B, 3, H, W).
    """
    batch = data.pack([policy.encoding.row(record, "chosen") for record in records], pixels).to(pixels.device)
    blank = dataclasses.replace(batch, pixels=policy.mean.expand_as(pixels))
    gains = []
    for record, gain in zip(records, policy.logps(batch) - policy.logps(blank), strict=True):  # (T,)
        spans = policy.encoding.spans(record["question"], record["chosen"])
        places, words = [m.span() for m in WORD.finditer(record["chosen"].strip())], {}
        for word, positions in content_words(record["chosen"]).items():
            at = [places[p] for p in positions]
            tokens = [t for t, (a, b) in enumerate(spans) if any(a < end and b > start for start, end in at)]
            words[word] = gain[tokens].mean().item()
        gains.append(words)
    return gains


def prior_regions(regions, masks, words, gain):
    """Of regions (and their masks) those of one keyword: of the keywords that have any, the one with the least gain."""
    for word in sorted((word for word in words if word in gain), key=gain.get):
        if its := [i for i, region in enumerate(regions) if is_about(word, region["word"])]:
            return [regions[i] for i in its], None if masks is None else masks[its]
    return [], None


def region_mask(kind, boxes, size, rng):
    """(H, W) bool, True in the region to change. kind: key, prior (the boxes, pixels, x1 and y1 exclusive) | random (a
    rectangle of 20 % of the area, the paper's ablation) | global (everything)
    """
    width, height = size
    mask = np.full((height, width), kind == "global")
    if kind == "random":
        w, h = max(1, round(width * 0.2**0.5)), max(1, round(height * 0.2**0.5))
        x, y = rng.integers(width - w + 1), rng.integers(height - h + 1)
        boxes = [(x, y, x + w, y + h)]
    for box in boxes if kind != "global" else []:
        x0, y0, x1, y1 = (max(0, v) for v in box)  # a negative index counts from the other side
        mask[math.floor(y0) : math.ceil(y1), math.floor(x0) : math.ceil(x1)] = True
    return mask


def sqrt_alpha_bar(schedule):
    """sqrt(abar_t) for t = 0..999, float64: how much of the image is left after t steps of forward diffusion.

    vcd    beta_t = sigmoid(linspace(-6, 6, 1000)) * (0.5e-2 - 1e-5) + 1e-5 (Visual Contrastive Decoding)
    ddpm   beta_t from 1e-4 to 0.02, linear (Ho et al. 2020): far stronger at the same t

    DEVIATION: which schedule MFPO's "t = 500" is of could not be found; its abar is surely of 1 - beta.
    """
    beta = np.linspace(1e-4, 0.02, 1000)
    if schedule == "vcd":
        beta = 1 / (1 + np.exp(-np.linspace(-6, 6, 1000))) * (0.5e-2 - 1e-5) + 1e-5
    return np.sqrt(np.cumprod(1 - beta))


def distort(image, mask, root, mean, std, rng):
    """MFPO's distorted image: forward diffusion inside the mask, every other pixel untouched.

        m' = sqrt(abar_t) * R + sqrt(1 - abar_t) * eps,   eps ~ N(0, 1)

    image       (H, W, 3) uint8;   mask  (H, W) bool;   root  sqrt(abar_t);   returns  (H, W, 3) uint8
    mean, std   (3,) the tower's normalisation. DEVIATION: noise is added to normalised pixels, as Visual
                Contrastive Decoding does; whether MFPO's is could not be found
    """
    region = (image / 255.0 - mean) / std
    noisy = root * region + np.sqrt(1 - root**2) * rng.standard_normal(image.shape)
    noisy = ((noisy * std + mean) * 255).round().clip(0, 255).astype(np.uint8)
    return np.where(mask[..., None], noisy, image)


def erase(image, mask, rng):
    """The region (mask (H, W) bool) of an image (H, W, 3) uint8 filled with its surroundings (ours): with colours that
    grow in from its border, a pixel a round, each the mean of its neighbours, and with the grain of the pixels within
    4 of the border (how each differs from the mean of its neighbours).
    """
    if mask.all():
        return np.broadcast_to(image.mean((0, 1)).round().astype(np.uint8), image.shape)

    def blurred(values, weight, reach=1):  # the mean over neighbours that count: (3, H, W), and where there are any
        both = torch.cat([values * weight, weight])[None]
        *total, count = F.avg_pool2d(both, 2 * reach + 1, 1, reach)[0]
        return torch.stack(total) / count.clamp(min=1e-9), count > 1e-9

    seen = torch.from_numpy(~mask)[None].float()  # (1, H, W): 1 where a colour is known
    colour, known = torch.tensor(image).permute(2, 0, 1).float(), seen
    band = (blurred(colour, 1 - seen, 4)[1] & (seen[0] > 0)).numpy()
    grain = (colour - blurred(colour, seen)[0]).permute(1, 2, 0).numpy()[band]  # (pixels of the band, 3)
    while not known.all():
        mean, reached = blurred(colour, known)
        colour, known = torch.where(known > 0, colour, mean), torch.maximum(known, reached.float())
    filled = colour.permute(1, 2, 0).numpy()
    filled[mask] += grain[rng.integers(len(grain), size=int(mask.sum()))]
    return np.where(mask[..., None], filled.round().clip(0, 255).astype(np.uint8), image)


def crop(image, rng):
    """A random part of an image (H, W, 3) uint8, resized back: mDPO's negative (arXiv:2406.11839), whose public code
    takes 1 to 20 % of the area, sides at 3:4 to 4:3, anywhere in the image.
    """
    height, width = image.shape[:2]
    area, ratio = rng.uniform(0.01, 0.2) * height * width, (4 / 3) ** rng.uniform(-1, 1)
    w, h = np.clip(np.round(np.sqrt([area * ratio, area / ratio])).astype(int), 1, [width, height])
    x, y = rng.integers(width - w + 1), rng.integers(height - h + 1)
    part = Image.fromarray(image[y : y + h, x : x + w])
    return np.asarray(part.resize((width, height), Image.Resampling.BILINEAR))


def negative(image, mask, config, mean, std, rng, other=None):
    """The negative image m' of a record and the words that say what it is, which record, sheet and tables show. A
    negative of another kind is made here, and named here.

    image       (H, W, 3) uint8, as the model sees it;   mask  (H, W) bool, the region
    mean, std   (3,) the vision tower's normalisation;   other  the image of another record, for "other"
    returns     (H, W, 3) uint8, text
    """
    if config.negative == "erase":
        return erase(image, mask, rng), "all erased: the mean colour" if mask.all() else "erased"
    if config.negative == "crop":
        return crop(image, rng), "crop"
    if config.negative == "other":
        return other, "another record's image"
    root = sqrt_alpha_bar(config.schedule)[config.t]
    return distort(image, mask, root, mean, std, rng), f"noise {config.schedule} t={config.t}"


def seeded(seed, record_id):
    """A generator for one record: the same whatever the order of records and the number of processes."""
    return np.random.default_rng([seed, zlib.crc32(record_id.encode())])


def load_images(records, config):
    """The images of source records, RGB."""
    folder = Path(config.out).parent
    with ThreadPoolExecutor(8) as pool:  # decoding images releases the interpreter's lock
        return list(pool.map(lambda record: data.load_image(folder / record["image"]), records))


def pixels_of(policy, images):
    """PIL images as the policy sees them, on its device: (B, 3, H, W) float32 in [0, 1]."""
    squares = [model.to_square(image, policy.image_size, policy.pad) for image in images]
    return model.to_pixels(squares).to(policy.mean.device)


# ---------------------------------------------------------------------------------------- `build_data.py mfpo`


@dataclass
class MfpoConfig(parts.Config):
    out: str = knob("data/toy/mfpo.jsonl", "where the records go; negative images go beside it")
    region: Literal["key", "prior", "random", "global"] = knob("key", "where the image is changed (prior: ours)")
    negative: Literal["noise", "erase", "crop", "other"] = knob("noise", "what is done there; crop is mDPO's")
    # DEVIATION: the paper's best is t = 500 of a schedule that could not be found. vcd at 500 leaves 86 % of the
    # image, which does not hide a glyph of the toy world; ddpm at 400 leaves 44 %.
    schedule: Literal["vcd", "ddpm"] = knob("ddpm", "noise schedule")
    t: int = knob(400, "diffusion step, 0 to 999; the paper's best is 500")
    top: int = knob(5, "keywords per answer, K in the paper; 5 is ours")
    grounder: str = knob("", "finds keywords in images without boxes: a Grounding DINO or a SAM 3, id or folder")
    segmenter: str = knob("", "makes Grounding DINO's boxes masks: a SAM, id or folder; empty: boxes are used")
    threshold: float = knob(0.3, "a region counts if the grounder is as sure of it (ours)")
    heldout: int = knob(0, "so many of them, drawn by the seed, go to <out>_heldout.jsonl, for a table")

    def __post_init__(self):
        super().__post_init__()
        runtime.check(self, positive="top", not_negative="t threshold heldout")
        if self.t > 999 or self.threshold >= 1:
            raise Mistake(f"--t {self.t} --threshold {self.threshold}: t lies in 0 to 999, threshold below 1")
        if self.segmenter and not self.grounder:
            raise Mistake("--segmenter needs the boxes of a --grounder: name a Grounding DINO too")
        if self.negative in ("crop", "other"):
            self.region = "global"  # nothing is left of the image itself


def mfpo_record(record, image, words, region, others, policy, config, save):
    """One MFPO record: the paper's steps in its order. `words` are the keywords of the chosen answer (step 1), `region`
    their regions in the image, with masks (n, H, W) or None (step 2); `others` are the names of all images.

    Falls back to the complete image, region_kind "global": with --region key or prior where no keyword has a region (no
    box and no grounder, nothing above its threshold), and where a mask is empty or the hub's crop leaves it out.
    """
    rng, (regions, masks) = seeded(config.seed, record["id"]), region
    rejected, origin = record.get("rejected"), "given"
    if rejected is None:
        rejected, origin = toy.rejected(record, rng)
    kind = config.region if regions or config.region not in BOXED else "global"
    mask = region_mask(kind, [region["box"] for region in regions], image.size, rng)  # 2. the region
    if kind in BOXED and masks is not None:
        mask = masks.any(0)
    # DEVIATION: the image is changed at the size at which the model sees it (what MFPO does could not be found): on
    # a large photograph the same noise would be averaged away when it is made small.
    square = {"size": policy.image_size, "pad": policy.pad}
    mask = Image.fromarray(mask.astype(np.uint8) * 255)
    mask = np.asarray(model.to_square(mask, **square, colour=0, resample=Image.Resampling.BOX)) > 0
    if not mask.any():
        kind, mask = "global", np.ones_like(mask)
    seen, other = np.asarray(model.to_square(image, **square)), None
    if config.negative == "other":
        name = str(rng.choice([name for name in others if name != record["image"]]))
        other = np.asarray(model.to_square(load_images([{"image": name}], config)[0], **square))
    mean, std = (v.flatten().cpu().numpy().astype(np.float64) for v in (policy.mean, policy.std))
    image_rejected, text = negative(seen, mask, config, mean, std, rng, other)  # 3. the distortion
    name = save(image_rejected, record=record)
    line = {key: record[key] for key in data.SOURCE_FIELDS} | {"rejected": rejected, "rejected_from": origin}
    line |= {"image_rejected": name, "negative": text, "region_kind": kind}
    line |= {"regions": regions if kind in BOXED else [], "keywords": words, "source": record.get("source", "")}
    return line | ({"origin": record["origin"]} if "origin" in record else {})


def build_mfpo(config):
    """Source records -> MFPO records with negative images. All ranks call it."""
    prior = config.region == "prior"  # only this needs the model's weights
    policy = hub.load(config.model, convention=config.convention, trained=False, weights=prior)
    table, out = hub.embeddings(policy.folder), Path(config.out)
    finder = grounding.load(config.grounder, config.segmenter, runtime.device()) if config.grounder else None

    policy.encoding.max_length = config.max_length

    def check(record):  # what the trainer refuses is refused here, before any grounding
        parts.check_source(record, rejected=True)
        policy.encoding.row(record, *(name for name in ("chosen", "rejected") if name in record))

    records = parts.read_source(config, check)
    others = sorted({record["image"] for record in records}) if config.negative == "other" else []
    here, folder = parts.parts_of(out, policy, config, others), out.with_name(f"{out.stem}_distorted")
    if len(others) == 1:
        raise Mistake(f"--negative other: {config.source} has one image only. Use another kind, or more records")
    save = functools.partial(parts.save_image, folder=folder, parts=here)
    what = f"{config.negative}{f' {config.schedule} t={config.t}' if config.negative == 'noise' else ''}"
    say(f"{len(records)} records; negative: {what}, regions: {config.region}")

    def vector_of(word):  # the mean of the model's input embeddings of its tokens: no other model is needed
        return table[policy.tokenizer(word, add_special_tokens=False)["input_ids"]].mean(0)

    def make(some):
        """Lines of some source records, a batch for the grounder."""
        images = load_images(some, config)
        words = [[w for w, _ in keywords(record["chosen"], vector_of, config.top)] for record in some]  # step 1
        # DEVIATION: the paper has SAM find the keywords in the image; boxes that a record has are taken first.
        regions = [(own_regions(record, named), None) for record, named in zip(some, words, strict=True)]
        asked = [i for i, record in enumerate(some) if words[i] and not record.get("objects")]
        if finder and config.region in BOXED and asked:  # step 2
            answers = finder([images[i] for i in asked], [words[i] for i in asked], config.threshold)
            for i, region in zip(asked, answers, strict=True):
                regions[i] = region
        if prior:
            gains = word_gains(policy, some, pixels_of(policy, images))
            regions = [prior_regions(*one) for one in zip(*zip(*regions, strict=True), words, gains, strict=True)]
        one = functools.partial(mfpo_record, others=others, policy=policy, config=config, save=save)
        with ThreadPoolExecutor(8) as pool:  # encoding images releases the interpreter's lock
            return list(pool.map(one, some, images, words, regions))  # steps 2 to 4

    with runtime.summoned(policy):
        lines = parts.in_parts(here, "record", "distorting", records, config.batch, make)

    def finish():
        """Rank 0: hold some lines out, write the files, print the counts."""
        held = set(np.random.default_rng(config.seed).permutation(len(lines))[: config.heldout].tolist())
        files = {out: [line for i, line in enumerate(lines) if i not in held]}
        if not files[out]:
            raise Mistake(f"--heldout {config.heldout}: no record is left to train on. Lower it")
        other = out.with_stem(f"{out.stem}_heldout")
        other.unlink(missing_ok=True)  # an older build's pairs may be trained on now
        files |= {other: [lines[i] for i in sorted(held)]} if held else {}
        parts.publish(files, folder, here)
        counts = Counter(f"{key} {line[key]}" for line in lines for key in ("region_kind", "rejected_from"))
        counts = ", ".join(f"{name}: {count}" for name, count in sorted(counts.items()))
        print("\n".join(f"wrote {path}: {len(rows)} records" for path, rows in files.items()) + f"; {counts}")
        if config.region in BOXED and "region_kind global" in counts and not config.grounder:
            print("note: region_kind global: no keyword has a box there. Name a --grounder to find regions")

    runtime.first_alone(finish)


# ---------------------------------------------------------------------------------------- `build_data.py mbpo`


@dataclass
class MbpoConfig(parts.Config):
    out: str = knob("data/toy/mbpo.jsonl", "where the records go; attacked images and questions go beside it")
    iig_keep: float = knob(0.0, "share of records kept, those of the largest gain (ours); 0: half, 1: all")
    iig_min: float | None = knob(None, "or a cutoff, MBPO's way: the least gain that is kept, nats per token")
    attack: Literal["pgd", "diffusion", "random"] = knob("pgd", "diffusion: the paper's control; random: ours")
    eps: str = knob("4/255", "largest change of a pixel, pixels being in [0, 1]; ours, see runs/mbpo_attack.sh")
    alpha: str = knob("1/255", "step; below 1/255 bfloat16 loses part of it; a negative one makes answers likelier")
    steps: int = knob(10, "steps of the attack")
    questions: int = knob(2000, "closed-ended questions to make of a toy source")
    max_new_tokens: int = knob(128, "answers that do not end within so many tokens are dropped")

    def __post_init__(self):
        super().__post_init__()
        runtime.check(self, positive="steps max_new_tokens", not_negative="questions iig_keep")
        if self.iig_keep > 1:
            raise Mistake(f"--iig_keep {self.iig_keep}: a share in (0, 1]; 1 keeps all records")
        if self.iig_keep and self.iig_min is not None:
            raise Mistake(f"--iig_keep {self.iig_keep} --iig_min {self.iig_min}: a share or a cutoff, not both")
        if pixels_in("--eps", self.eps) < 1 / 255:
            raise Mistake(f"--eps {self.eps}: less than 1/255 vanishes when the image is rounded to 8 bits")
        pixels_in("--alpha", self.alpha.removeprefix("-"))


def pixels_in(flag, text):
    """A size on the scale of pixels in [0, 1], written 4/255 or 0.0157, as a float."""
    try:
        value = float(Fraction(text))
    except (ValueError, ArithmeticError):  # also 1/0 and 1e400
        raise Mistake(f"{flag} {text}: not a number. Write it as 4/255 or 0.0157") from None
    if not 0 < value <= 1:
        raise Mistake(f"{flag} {text}: must lie in (0, 1], for pixels do; a common size is 4/255")
    return value


def mean_logp(policy, batch, pixels):
    """The log-probabilities of a batch's answers, one a row, given other images: nats per token, (B,)."""
    return policy.logps(dataclasses.replace(batch, pixels=pixels)).sum(1) / batch.answer_mask.sum(1)


@torch.no_grad()
def image_gain(policy, rows, pixels):
    """Image information gain of B rows (data.Row with the chosen answer) with images (B, 3, H, W): (B,) nats per token.
    DEVIATION: what the image is compared with is ours: the mean colour, which is 0 after normalisation.
    """
    batch = data.pack(rows, pixels).to(pixels.device)
    blank = dataclasses.replace(batch, pixels=policy.mean.expand_as(pixels))
    return losses.information_gain(policy.logps(batch), policy.logps(blank), batch.answer_mask)


def attack_images(policy, rows, pixels, noise, eps, alpha, steps):
    """MBPO's adversarial images: small changes that make an answer unlikely (untargeted PGD, Madry et al. 2018).

        delta <- clip(delta - alpha * sign(grad_delta mean_t log pi(y_t|x, m + delta, y_<t)), -eps, eps)

    rows      B of data.Row with one answer: the chosen one. A targeted attack: the target's, alpha negative
    pixels    (B, 3, H, W) m, multiples of 1/255 in [0, 1]; m + delta stays in [0, 1] too
    noise     (B, 3, H, W) in [-1, 1]: the start is eps * noise; with 0 steps that is all, the control
    returns   (B, 3, H, W), multiples of 1/255, at most eps from m: what is saved is what was attacked

    DEVIATION: sizes, steps and start are ours. Only the image's gradient is computed: parameters are frozen.
    """
    batch, delta = data.pack(rows, pixels).to(pixels.device), eps * noise
    for _ in range(steps):
        attacked = (pixels + delta).clamp(0, 1).requires_grad_()
        # Each image moves only its own answer, so the gradient of the sum is each one's own.
        (gradient,) = torch.autograd.grad(mean_logp(policy, batch, attacked).sum(), attacked)
        delta = (delta - alpha * gradient.sign()).clamp(-eps, eps)
    levels = math.floor(eps * 255 + 1e-6)  # rounded to 8 bits inside the ball, not out of it
    change = (delta * 255).round().clamp(-levels, levels)
    return ((pixels * 255).round() + change).clamp(0, 255) / 255


REFUSAL = re.compile(
    r"(unfortunately,? |sorry,? )?((i['’]?m |i am )?(sorry|unable|not able)|i (can['’]?t|cannot|can not|could not)"
    r"\b|i (do not|don['’]t) see (a|an|any|the) (picture|image|photo)|as an ai)",
    re.IGNORECASE,
)


def is_new_word(word, text):
    """Is `word` one with a content that `text` does not have?"""
    return bool(set(content_words(word)) - set(content_words(text)))


def why_drop(line, ended, encoding):
    """Why the mined answer of a record cannot be a rejected one, or '':

    empty      no word in it            loop      a phrase of up to 12 words three times in a row
    too long   not ended in time        refusal   "I cannot see" is no answer misled by the language prior
    equal      the chosen one's words   or the reason why data.Encoding.row refuses it: longer than --max_length,
               special token in an answer, answer merges with the prompt, chosen equal to rejected
    """
    words, truth = (re.findall(r"\w+", line[name].lower()) for name in ("rejected", "chosen"))
    phrases = [(n, i) for n in range(1, 13) for i in range(len(words) - 3 * n + 1)]
    if not words:
        return "empty"
    if any(words[i : i + n] == words[i + n : i + 2 * n] == words[i + 2 * n : i + 3 * n] for n, i in phrases):
        return "loop"
    if not ended:
        return "too long"
    if REFUSAL.match(line["rejected"].strip()):
        return "refusal"
    if words == truth:
        return "equal"
    try:
        encoding.row(line, "chosen", "rejected")
    except data.BadRecord as error:
        return error.reason
    return ""


def mbpo_records(records, pixels, policy, config, save):
    """MBPO's records of source records that were chosen by their gain: the paper's steps in its order, and a third of
    ours.
    """
    rows = [policy.encoding.row(record, "chosen") for record in records]
    eps, alpha = float(Fraction(config.eps)), float(Fraction(config.alpha))

    def noise(kind, *options):
        draws = [getattr(seeded(config.seed, r["id"]), kind)(*options, pixels.shape[1:]) for r in records]
        return torch.from_numpy(np.stack(draws)).float().to(pixels.device)

    if config.attack == "diffusion":  # the paper's control is POVID's noise: this schedule, t = 500, pixels in [0, 1]
        root, used = sqrt_alpha_bar("vcd")[500], {"kind": "diffusion", "eps": 1.0, "t": 500}
        noisy = root * pixels + (1 - root**2) ** 0.5 * noise("standard_normal")
        attacked = (noisy.clamp(0, 1) * 255).round() / 255
    else:
        steps = 0 if config.attack == "random" else config.steps  # only the control takes no steps
        used = {"kind": config.attack, "eps": round(eps, 6)}
        used |= {"alpha": round(alpha, 6), "steps": steps} if steps else {}
        attacked = attack_images(policy, rows, pixels, noise("uniform", -1, 1), eps, alpha, steps)  # 1. the attack
    with torch.no_grad():
        answers, ended = policy.generate(attacked, [row.prefix for row in rows], config.max_new_tokens)  # 2.
        batch = data.pack(rows, pixels).to(pixels.device)
        fall = mean_logp(policy, batch, pixels) - mean_logp(policy, batch, attacked)  # of the chosen answer
    lines = []
    for k, record in enumerate(records):
        image = (attacked[k] * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        line = {key: record[key] for key in data.SOURCE_FIELDS} | {"rejected": answers[k]}
        line |= {"image_attacked": save(image, record=record), "iig": record["iig"]}
        line |= {"attack": used, "fall": fall[k].item(), "source": record.get("source", "")}
        reason = why_drop(line, ended[k], policy.encoding)  # 3. what is no answer is dropped
        lines.append(line | ({"dropped": reason} if reason else {}))
    return lines


def build_mbpo(config):
    """Source records -> MBPO records: choose by information gain, attack, let the model answer, drop what is no answer.
    All ranks call it.
    """
    policy = hub.load(config.model, convention=config.convention, trained=False)
    policy.encoding.max_length, out = config.max_length, Path(config.out)

    def check(record):
        parts.check_source(record)
        policy.encoding.row(record, "chosen")

    records = parts.read_source(config, check)
    here, folder = parts.parts_of(out, policy, config), out.with_name(f"{out.stem}_attacked")
    save = functools.partial(parts.save_image, folder=folder, parts=here)
    size = "t=500" if config.attack == "diffusion" else f"eps={config.eps}"
    say(f"{len(records)} records; attack: {config.attack} {size}")

    def gains_of(some):
        rows = [policy.encoding.row(record, "chosen") for record in some]
        gains = image_gain(policy, rows, pixels_of(policy, load_images(some, config))).tolist()
        return [{"iig": gain, "tokens": len(row.answers[0])} for gain, row in zip(gains, rows, strict=True)]

    def mine(some):
        return mbpo_records(some, pixels_of(policy, load_images(some, config)), policy, config, save)

    with runtime.summoned(policy):
        lines = parts.in_parts(here, "gain", "information gain", records, config.batch, gains_of)
        gains, length = np.array([(line["iig"], line["tokens"]) for line in lines]).T
        most = max(1, round(len(gains) * (config.iig_keep or 0.5)))
        if config.iig_min is not None and not (most := int((gains >= config.iig_min).sum())):
            raise Mistake(f"--iig_min {config.iig_min}: no record gains as much, the most is {gains.max():.2f}")
        chosen = np.sort(np.argsort(-gains, kind="stable")[:most])
        share = f"{len(chosen)} of {len(gains)}, {gains[chosen].mean():.2f} nats per token"
        say(f"information gain: chose {share} (all: {gains.mean():.2f}), "
            f"{length[chosen].mean():.1f} tokens an answer (all: {length.mean():.1f})")  # fmt: skip
        some = [records[i] | {"iig": float(gains[i])} for i in chosen]
        lines = parts.in_parts(here, "attack", "attacking and answering", some, config.batch, mine)

    def finish():
        """Rank 0: write what can be used and what was dropped, print the counts."""
        good, bad = ([line for line in lines if ("dropped" in line) == drop] for drop in (False, True))
        gone, reasons = out.with_stem(f"{out.stem}_dropped"), Counter(line["dropped"] for line in bad)
        drops = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common()) or "none"
        if not good:
            runtime.write_jsonl(gone, bad)
            parts.discard(here)
            remedy = f"Look at {gone.name}, change --eps, --attack or --max_new_tokens {config.max_new_tokens}"
            remedy = f"Raise --max_new_tokens {config.max_new_tokens}" if set(reasons) == {"too long"} else remedy
            raise Mistake(f"{config.source}: no mined answer can be used; dropped: {drops}. {remedy}")
        if config.questions and all("own_answer" in record for record in records):  # of the built-in world
            asked = toy.closed_questions(records, config.questions, np.random.default_rng([config.seed, 5]))
            runtime.write_jsonl(out.with_stem(f"{out.stem}_closed"), asked)
            print(f"wrote {out.stem}_closed.jsonl: {len(asked)} closed-ended questions")
        parts.publish({gone: bad, out: good}, folder, here)
        print(f"wrote {out}: {len(good)} records; dropped: {drops} (in {gone.name})")

    runtime.first_alone(finish)


def build_toy(config):
    """The built-in world, with held-out pairs for its table. All ranks call it; what is there already stays."""
    warmup.build_world(config)
    base = str(Path(config.out) / "base")
    for split in ("val", "test"):
        source, out = (Path(config.out) / f"{prefix}{split}.jsonl" for prefix in ("", "mfpo_"))
        if not runtime.first_alone(out.is_file):
            build_mfpo(MfpoConfig(source=str(source), out=str(out), model=base, seed=config.seed))


def ready(method, config, data_path):
    """The model that a trainer starts from: --model, or with 'toy' the built-in world's base. That world is built here,
    with <method>.jsonl, in the default folder or in one that build_data.py toy has made, and nowhere else.
    """
    if config.model != "toy":
        return config.model
    folder, base, default = data_path.parent, str(data_path.parent / "base"), Path("data/toy")
    if config.resume and not data_path.is_file():
        raise Mistake(f"{data_path}: no such file. Resume from the directory that the run was started in")
    if not folder.is_dir() and folder != default:
        raise Mistake(f"--data {folder}: no such folder. Leave it out for the built-in world, or name another")
    if folder != default and not (folder / "world.json").is_file():
        remedy = f"Name its --model, or build the world there: build_data.py toy --out {folder}"
        raise Mistake(f"--data {folder}: is not of the built-in world. {remedy}")
    if data_path.name != f"{method}.jsonl" and not data_path.is_file():
        raise Mistake(f"--data {data_path}: no such file. Build it: build_data.py {method} --out {data_path}")
    build_toy(toy.Config(out=str(folder), seed=config.seed))
    if not runtime.first_alone(data_path.is_file):
        config_class, build = COMMANDS[method]
        source = str(folder / "preference.jsonl")
        build(config_class(source=source, out=str(data_path), model=base, seed=config.seed))
    return base


# ------------------------------------------------------------------------------------------------------- main

COMMANDS = {"toy": (toy.Config, build_toy), "mfpo": (MfpoConfig, build_mfpo), "mbpo": (MbpoConfig, build_mbpo)}
MOVED = dict.fromkeys(("--source_format", "--images"), "python -m extras.sources FILE --out FOLDER")
MOVED |= dict.fromkeys(("--sheet", "--explain"), "python -m extras.pictures sheet (or attack) --records X.jsonl")


def main():
    """Build what is asked for, and print the next command."""
    name, config = runtime.parse_command(__doc__, {name: pair[0] for name, pair in COMMANDS.items()}, MOVED)
    runtime.start()
    COMMANDS[name][1](config)
    out = Path(config.out)
    if name == "toy":
        options = f"--source {out}/preference.jsonl --model {out}/base --out {out}/mfpo.jsonl"
        say(f"next: python build_data.py mfpo {options}")
        return
    base = "" if Path(config.model) == out.parent / "base" else f" --model {config.model}"
    base += f" --convention {config.convention}" if config.convention else ""
    alone = name == "mbpo" and not out.with_stem(f"{out.stem}_closed").is_file()
    say(f"next: torchrun train_{name}.py{base} --data {out}{' --online_fraction 0' if alone else ''}")


if __name__ == "__main__":
    runtime.run(main)
