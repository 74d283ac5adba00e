"""
Raw sources -> preference records.

    python build_data.py toy                                   the built-in world: scenes and a base model
    python build_data.py mfpo --source data/toy/preference.jsonl --model data/toy/base --out data/toy/mfpo.jsonl
    python build_data.py mbpo --source data/toy/preference.jsonl --model data/toy/base --out data/toy/mbpo.jsonl
    python build_data.py mfpo --source RLHF-V-Dataset.parquet --grounder IDEA-Research/grounding-dino-base ...
    torchrun --standalone --nproc_per_node=8 build_data.py mbpo ...       the same records, on 8 GPUs

`mfpo` follows MFPO (arXiv:2410.15334): keywords of the chosen answer by a word graph, their regions in the image,
diffusion noise inside those regions. Each image is distorted once and stored: policy and reference must see the same.

`mbpo` follows MBPO (arXiv:2506.08022): the records whose answer needs the image most, an attack on the image that
makes that answer unlikely, and what the model then says, misled by its language prior, as the rejected answer.

reads    any format of sources.py; regions are the records' own boxes, else what --grounder finds (grounding.py). The
         toy world's rejected answers for MFPO are made here, from the model's own answers
writes   mfpo: <out>.jsonl (format: data.py) and <out>_distorted/*.png beside it
         mbpo: <out>.jsonl, <out>_attacked/*.png, <out>_dropped.jsonl and, in the toy world, <out>_closed.jsonl;
         of a set of closed-ended questions just <out>.jsonl, for train_mbpo.py --questions
         <out>_images/ for images that did not lie in the folder of <out>; <out>.parts/ until all is done
"""

import dataclasses
import functools
import hashlib
import json
import math
import re
import shutil
import sys
import tempfile
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import data
import draw
import grounding
import losses
import model
import runtime
import sources
import toy
from runtime import knob, say

# ------------------------------------------------------------------------------------------------- distortion


def sqrt_alpha_bar(schedule):
    """
    sqrt(abar_t) for t = 0..999, float64: how much of the image is left after t steps of forward diffusion.

    vcd    beta_t = sigmoid(linspace(-6, 6, 1000)) * (0.5e-2 - 1e-5) + 1e-5, as Visual Contrastive Decoding has it
    ddpm   beta_t from 1e-4 to 0.02, linear (Ho et al. 2020): far stronger at the same t

    DEVIATION: MFPO names no schedule and prints abar as a product of beta, surely of 1 - beta.
    """
    if schedule == "vcd":
        beta = 1 / (1 + np.exp(-np.linspace(-6, 6, 1000))) * (0.5e-2 - 1e-5) + 1e-5
    else:
        beta = np.linspace(1e-4, 0.02, 1000)
    return np.sqrt(np.cumprod(1 - beta))


def distort(image, mask, root, mean, std, rng):
    """
    MFPO's distorted image: forward diffusion inside the mask, every other pixel untouched.

        m' = sqrt(abar_t) * R + sqrt(1 - abar_t) * eps,   eps ~ N(0, 1)

    image       (H, W, 3) uint8;   mask  (H, W) bool, True where the noise goes;   root  sqrt(abar_t)
    mean, std   (3,) the vision tower's normalisation
    returns     (H, W, 3) uint8

    DEVIATION: noise is added to normalised pixels, as Visual Contrastive Decoding does; the paper does not say.
    """
    region = (image / 255.0 - mean) / std
    noisy = root * region + np.sqrt(1 - root**2) * rng.standard_normal(image.shape)
    noisy = ((noisy * std + mean) * 255).round().clip(0, 255).astype(np.uint8)
    return np.where(mask[..., None], noisy, image)


def region_mask(kind, boxes, size, rng):
    """
    (H, W) bool, True in the region to distort.

    kind   key (the boxes, pixels, x1 and y1 exclusive) | random (a rectangle of 20 % of the area, the paper's
           ablation) | global (everything)
    """
    width, height = size
    mask = np.zeros((height, width), bool)
    if kind == "global":
        mask[:] = True
    elif kind == "random":
        w, h = max(1, round(width * 0.2**0.5)), max(1, round(height * 0.2**0.5))
        x, y = rng.integers(width - w + 1), rng.integers(height - h + 1)
        mask[y : y + h, x : x + w] = True
    else:
        for box in boxes:
            x0, y0, x1, y1 = (max(0, round(v)) for v in box)  # a negative index would count from the other side
            mask[y0:y1, x0:x1] = True
    return mask


# --------------------------------------------------------------------------------------------------- keywords

STOP_WORDS = frozenset(
    """
    a an the and or but if of to in on at by for with from into over under above below near between behind beside
    is are was were be been being has have had do does did can could will would may might shall should must
    i you he she it we they me him her us them my your his its our their this that these those there here
    what which who whom whose when where why how not no yes as than then so such very also just some any all both
    each one other another s t describe image picture photo see seen show shows showing shown
    """.split()
)


def content_words(text):
    """The candidates for keywords with their word positions: {word: [position, ...]}, plurals merged into singulars."""
    words = re.findall(r"[a-z]+", text.lower())
    known = set(words)
    found = {}
    for position, word in enumerate(words):
        if len(word) == 1 or word in STOP_WORDS:
            continue
        for plural, singular in (("ies", "y"), ("es", ""), ("s", "")):
            if word.endswith(plural) and word.removesuffix(plural) + singular in known:
                word = word.removesuffix(plural) + singular
                break
        found.setdefault(word, []).append(position)
    return found


def keywords(text, vector_of, top=5, phi=1.0, gamma=1.0, decay=0.05, damping=0.85):
    """
    The image-relevant words of an answer, best first: weighted PageRank on a graph of its words (MFPO, "keywords").

        theta_ij = sum over occurrences of 1 / (1 + |l_i - l_j|^phi)        positional influence
        S_ij     = cos(v_i, v_j)                                            semantic similarity
        kappa_i  = exp(-decay * l_i)                                        early words weigh more
        w_ij     = (theta_ij + gamma * S_ij) * kappa_i                      edge from j into i
        score_i  = (1 - damping) + damping * sum_j w_ij / (sum_k w_kj) * score_j

    vector_of   word -> (E,) array
    returns     [(word, score)], at most `top`

    DEVIATION: the paper gives no values but K; kappa is applied to the word that receives (on the giving word it
    would cancel in the normalisation) at its first occurrence, and a negative cosine counts as 0.
    """
    positions = content_words(text)
    words = list(positions)
    if not words:
        return []
    vectors = np.stack([vector_of(word) for word in words])
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    similarity = np.maximum(vectors @ vectors.T, 0)  # (W, W)
    theta = np.array(
        [[sum(1 / (1 + abs(i - j) ** phi) for i in positions[a] for j in positions[b]) for b in words] for a in words]
    )
    kappa = np.exp(-decay * np.array([positions[word][0] for word in words]))  # (W,)
    weight = (theta + gamma * similarity) * kappa[:, None]
    np.fill_diagonal(weight, 0)
    share = weight / np.maximum(weight.sum(0, keepdims=True), 1e-12)  # column j: how word j spreads its score
    score = np.ones(len(words))
    for _ in range(100):
        score = (1 - damping) + damping * share @ score
    order = np.argsort(-score, kind="stable")[:top]
    return [(words[i], float(score[i])) for i in order]


def check_source(record):
    """Raise BadRecord unless a source record's objects and rejected answer can be used for MFPO."""
    objects = record.get("objects", [])
    for o in objects if isinstance(objects, list) else [objects]:
        box = o.get("box") if isinstance(o, dict) and isinstance(o.get("word"), str) else None
        good = isinstance(box, list) and len(box) == 4
        good = good and all(type(v) in (int, float) and -1e9 < v < 1e9 for v in box)
        if not good or not (box[0] < box[2] and box[1] < box[3] and box[2] > 0 and box[3] > 0):
            message = (
                f'field \'objects\' needs {{"word": text, "box": [x0, y0, x1, y1]}} with x0 < x1, y0 < y1, got {o!r}'
            )
            raise data.BadRecord("'objects' unusable", message)
    if "chosen" not in record:
        raise data.BadRecord("'chosen' missing", "is a closed-ended question: those are for build_data.py mbpo")
    if "rejected" in record:
        rejected = record["rejected"]
        if not isinstance(rejected, str) or rejected.strip() in ("", record["chosen"].strip()):
            message = (
                f"field 'rejected' must be a text other than 'chosen', got {rejected!r}. Mend or delete the record"
            )
            raise data.BadRecord("'rejected' unusable", message)
    elif record.get("source") != "toy":
        raise data.BadRecord("'rejected' missing", "field 'rejected' is missing. Add it to every record")
    check_toy_objects(record)


def check_toy_objects(record):
    """Raise BadRecord where a record says that it is of the toy world and lacks what is true of its scene."""
    objects = record.get("objects")
    known = isinstance(objects, list) and all(
        isinstance(o, dict) and o.get("word") in toy.KINDS and o.get("colour") in toy.COLOURS for o in objects
    )
    if record.get("source") == "toy" and not (known and objects):
        message = "field 'source' says toy, but 'objects' does not hold the scene's. Name another source"
        raise data.BadRecord("no toy scene", message)


# ----------------------------------------------------------------------------------------- `build_data.py toy`


@dataclass
class ToyConfig:
    out: str = knob("data/toy", "folder of the world; what it already holds is kept")
    seed: int = knob(0, "seed of the preference scenes and of the base model (val and test are the same for all)")
    preference: int = knob(2000, "scenes for preference records")
    heldout: int = knob(400, "scenes for validation, and as many for test")

    def __post_init__(self):
        if min(self.seed, self.preference - 1, self.heldout - 1) < 0:
            raise ValueError("--seed must not be negative, --preference and --heldout must be positive")


def ask_about(records, rng):
    """
    POPE's yes/no questions for each scene, as [{"split", "question", "answer"}] lists.

    random        a present kind and an absent one
    adversarial   the partner of a present anchor, absent in half of the questions for each kind of partner: were
                  absent partners asked about more often than present ones, "partners are not there" would score well
    """
    asked = [[] for _ in records]
    for i, record in enumerate(records):
        present = [o["word"] for o in record["objects"]]
        absent = [kind for kind in toy.KINDS if kind not in present]
        for kinds, answer in ((present, "Yes"), (absent, "No")):
            asked[i].append({"split": "random", "question": toy.yesno(rng.choice(kinds)), "answer": answer})
    for partner, there, gone in partner_pairs(records):
        asked[there].append({"split": "adversarial", "question": toy.yesno(partner), "answer": "Yes"})
        asked[gone].append({"split": "adversarial", "question": toy.yesno(partner), "answer": "No"})
    return asked


def partner_pairs(records):
    """
    [(partner, scene with it, scene without it)], scenes as indices: both hold the partner's anchor, so that only the
    image tells them apart, and "is there a <partner>" is as often true as not.
    """
    cases = {}  # (partner, is it there) -> scenes
    for i, record in enumerate(records):
        present = [o["word"] for o in record["objects"]]
        for anchor in present:
            if anchor in toy.PARTNER:
                cases.setdefault((toy.PARTNER[anchor], toy.PARTNER[anchor] in present), []).append(i)
    return [
        (partner, there, gone)
        for partner in toy.PARTNER.values()
        for there, gone in zip(cases.get((partner, True), []), cases.get((partner, False), []), strict=False)
    ]


# Shares of closed-ended questions, a guess: half of them yes/no, most of those about the partner of an object that is
# there, which the prior answers with yes.
QUESTION_MIX = {"partner": 0.35, "yesno": 0.15, "choice": 0.2, "number": 0.15, "word": 0.15}


def closed_questions(records, count, rng):
    """`count` closed-ended questions (format: data.py) about toy scenes, as QUESTION_MIX has it, in random order."""
    pairs, asked = rng.permutation(partner_pairs(records)), []
    ends = np.round(np.cumsum(list(QUESTION_MIX.values())) * count).astype(int).tolist()
    for kind, start, end in zip(QUESTION_MIX, [0, *ends], ends, strict=False):
        for n in range(end - start):
            if kind == "partner" and len(pairs):  # in a world of a few scenes there may be none
                partner, *scenes = pairs[n // 2 % len(pairs)]
                i, question, answer, choices = int(scenes[n % 2]), toy.yesno(partner), ("Yes", "No")[n % 2], []
            else:
                i = rng.integers(len(records))
                objects = [(o["colour"], o["word"]) for o in records[i]["objects"]]
                question, answer, choices = toy.closed_question(kind.replace("partner", "yesno"), objects, rng)
            record = {"image": records[i]["image"], "question": question, "kind": kind.replace("partner", "yesno")}
            asked.append(record | {"answer": answer, "choices": choices, "about": records[i]["id"], "source": "toy"})
    return [{"id": f"closed-{n}", **asked[i]} for n, i in enumerate(rng.permutation(len(asked)))]


def build_toy(config):
    """Write <out>/{preference,val,test}.jsonl with their images, and <out>/base, each only if it is not there yet."""
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    made = {"seed": config.seed, "preference": config.preference, "heldout": config.heldout}
    if (out / "world.json").is_file():
        before = json.loads((out / "world.json").read_text())
        if before != made:
            print(f"note: {out} was built with {before}; it is kept. For {made} name another folder with --out")
    else:
        runtime.write_text(out / "world.json", json.dumps(made))
    for split, count in (("preference", config.preference), ("val", config.heldout), ("test", config.heldout)):
        if (out / f"{split}.jsonl").is_file():
            continue
        print(f"drawing {count} {split} scenes into {out}/images")
        (out / "images").mkdir(exist_ok=True)
        seed = config.seed if split == "preference" else 0  # all seeds are measured on the same scenes
        records = []
        for i, (image, objects, rng) in enumerate(toy.scenes(split, count, seed)):
            name = f"images/{split}_{i:05}.png"
            Image.fromarray(image).save(out / name)
            question = str(rng.choice(list(toy.CAPTIONS)))
            records.append(
                {
                    "id": f"{split}-{i}",
                    "image": name,
                    "question": question,
                    "chosen": toy.say(toy.pairs_of(objects), question),
                    "objects": [{"word": o["kind"], "colour": o["colour"], "box": o["box"]} for o in objects],
                    "source": "toy",
                }
            )
        if split != "preference":
            for record, asked in zip(records, ask_about(records, np.random.default_rng(seed)), strict=True):
                record["asked"] = asked
        runtime.write_jsonl(out / f"{split}.jsonl", records)
    for split in ("val", "test"):
        if not (out / f"closed_{split}.jsonl").is_file():
            records = [record for _, record in data.read_jsonl(out / f"{split}.jsonl")]
            asked = closed_questions(records, len(records), np.random.default_rng(0))
            runtime.write_jsonl(out / f"closed_{split}.jsonl", asked)
    if not (out / "base" / "config.json").is_file():
        print("warming up the base model: about 2 minutes on 2 cores, once")
        model.save(toy.warm_up(config.seed), out / "base")
        print(f"wrote {out}/base")


# ------------------------------------------------------------------------------- what mfpo and mbpo builds share

SOURCE_FIELDS = ("id", "image", "question", "chosen")


def check_out(config):
    """ValueError unless the files can be written: `out` a JSONL that is not the source, `sheet`, if any, a PNG."""
    out = Path(config.out)
    if not config.out.endswith(".jsonl") or out.is_dir() or out.resolve() == Path(config.source).resolve():
        raise ValueError(f"--out {config.out}: must be a .jsonl file other than --source {config.source}")
    if config.sheet and not (config.sheet.endswith(".png") and Path(config.sheet).parent.is_dir()):
        raise ValueError(f"--sheet {config.sheet}: must end in .png and lie in a folder that exists")
    if config.source_format and config.source_format not in sources.FORMATS:
        raise ValueError(f"--source_format {config.source_format!r}: use one of {', '.join(sources.FORMATS)}")
    if config.images and not Path(config.images).is_dir():
        raise ValueError(
            f"--images {config.images}: no such folder. Name the one that the source's image paths start in"
        )
    if not Path(config.source).exists():
        raise ValueError(f"--source {config.source}: no such file. Check it")
    if min(config.batch - 1, config.seed) < 0:
        raise ValueError("--batch must be positive and --seed not negative")
    model.check_convention(config.convention)


def source_records(config, check, copies=None):
    """sources.records of the build's source; images to be copied go to `copies`."""
    source = Path(config.source)
    images = Path(config.images or (source if source.is_dir() else source.parent))
    return sources.records(
        source, config.source_format, images, Path(config.out).parent, copies, check, config.skip_bad
    )


def open_build(config, policy, check, kind):
    """
    Begin a build, or find the one that was stopped: <out>.parts holds its settings, the source's records in our form
    and, later, the parts that are done. All ranks call it.

    check     check(record) raises BadRecord unless the builder can use it
    kind      name of a folder in the parts for the images that will be made
    returns   the folder of the parts, the records (data.Lines)
    """
    out, parts = Path(config.out), Path(config.out).with_suffix(".parts")

    def unpack():
        before = parts.is_dir()
        try:
            open_parts(parts, config, policy, kind)
            if not (parts / "source.jsonl").is_file():
                read_source(config, parts, check)
        except ValueError:
            if not before:  # nothing is left behind by a mistake
                shutil.rmtree(parts, ignore_errors=True)
            raise

    out.parent.mkdir(parents=True, exist_ok=True)
    runtime.first_alone(unpack)
    return parts, data.Lines(parts / "source.jsonl")


def open_parts(parts, config, policy, kind):
    """runtime.open_parts for a build: its settings, source and model are those that it was begun with."""
    sha = hashlib.sha256()
    for file in sources.files_of(config.source):
        with open(file, "rb") as content:
            while block := content.read(1 << 24):
                sha.update(block)
    mark = model.fingerprint(policy, runtime.device(), parts.parent, [{"source": sha.hexdigest()}])
    runtime.open_parts(parts, vars(config) | {"fingerprint": mark}, ("sheet",), (kind,))


def read_source(config, parts, check):
    """The source's usable records -> <parts>/source.jsonl; what is left out is counted by reason and printed."""
    dropped, copies = Counter(), Path(config.out).with_name(f"{Path(config.out).stem}_images")
    there = copies.exists()

    def usable():
        found = source_records(config, check, copies)
        total = sources.count(config.source)
        for where, record in tqdm(found, f"reading {config.source}", total, leave=False, unit="record", delay=2):
            if isinstance(record, data.BadRecord):
                if not (config.skip_bad or isinstance(record, sources.TextOnly)):
                    raise ValueError(f"{where}: {record}")
                dropped[record.reason] += 1
                continue
            dropped["a later turn of a conversation"] += record.pop("left_out", 0)
            yield record

    try:
        count = runtime.write_jsonl(parts / "source.jsonl", usable())
    except ValueError:
        if not there:  # nothing is left behind by a mistake
            shutil.rmtree(copies, ignore_errors=True)
        raise
    told = ", ".join(f"{reason} {n}" for reason, n in dropped.most_common() if n)
    print(f"{count} records from {config.source}" + (f"; left out: {told}" if told else ""))
    if not count:
        raise ValueError(f"--source {config.source}: no usable records. See what was left out, and mend them")


def publish(out, parts, kind, rows):
    """What was built goes to its place: the images <parts>/<kind> to <out>_<kind>, `rows` to <out>. Returns a count."""
    images = out.with_name(f"{out.stem}_{kind}")
    if (parts / kind).is_dir():  # else it was moved before this was interrupted
        out.unlink(missing_ok=True)  # an older build, whole until now
        shutil.rmtree(images, ignore_errors=True)
        (parts / kind).rename(images)
    return runtime.write_jsonl(out, rows)


def seeded(seed, record_id):
    """A generator for one record: the same whatever the order of records and the number of processes."""
    return np.random.default_rng([seed, zlib.crc32(record_id.encode())])


# ---------------------------------------------------------------------------------------- `build_data.py mfpo`


@dataclass
class MfpoConfig:
    source: str = knob("data/toy/preference.jsonl", "records to turn into preferences: a file, or a folder of .parquet")
    source_format: str = knob("", f"{' | '.join(sources.FORMATS)}; empty: told by its fields")
    images: str = knob("", "folder that the source's image paths start in; empty: the source's own")
    model: str = knob(
        "data/toy/base", "model that will be trained: its embeddings rank keywords, its input size counts"
    )
    out: str = knob("data/toy/mfpo.jsonl", "where the records go; distorted images go beside it")
    region: str = knob("key", "where the noise goes: key | random | global (the paper's ablation)")
    grounder: str = knob("", "finds keywords in images without boxes: id or folder of a Grounding DINO, or of a SAM 3")
    segmenter: str = knob("", "makes Grounding DINO's boxes masks: id or folder of a SAM; empty: the boxes are noised")
    threshold: float = knob(0.3, "a region counts if the grounder is as sure of it (ours)")
    # DEVIATION: the paper's best is t = 500 of an unknown schedule. vcd at 500 leaves 86 % of the image, which does not
    # hide a glyph of the toy world; ddpm at 400 leaves 44 %.
    schedule: str = knob("ddpm", "noise schedule: vcd | ddpm")
    t: int = knob(400, "diffusion step, 0 to 999; the paper's best is 500, its schedule unknown")
    top: int = knob(5, "keywords per answer, K in the paper")
    explain: int = knob(0, "instead: print the ranked words of so many records")
    skip_bad: bool = knob(False, "drop bad source records, counted by reason, instead of stopping at the first")
    batch: int = knob(32, "records at a time; lower it when the grounder runs out of memory")
    convention: str = knob("", "how the model sees and is asked: original | hub; empty: what its folder says")
    seed: int = knob(0, "seed of the noise, the random regions and the sampled answers")
    sheet: str = knob("", "also draw a contact sheet of the first records into this PNG")

    def __post_init__(self):
        if self.region not in data.REGION_KINDS:
            raise ValueError(f"--region {self.region!r}: use one of {', '.join(data.REGION_KINDS)}")
        if self.schedule not in ("vcd", "ddpm"):
            raise ValueError(f"--schedule {self.schedule!r}: use vcd or ddpm")
        if not 0 <= self.t < 1000:
            raise ValueError(f"--t {self.t}: a diffusion step lies in 0 to 999")
        if self.top < 1 or self.explain < 0 or not 0 <= self.threshold < 1:
            raise ValueError("--top must be positive, --explain not negative, --threshold in [0, 1)")
        if self.segmenter and not self.grounder:
            raise ValueError(
                "--segmenter turns a grounder's boxes into masks: name a Grounding DINO with --grounder too"
            )
        check_out(self)


def own_answers(policy, records, folder, seed, batch=64):
    """The model's sampled answer (temperature 1) to each record's question: text, or None where it did not end."""
    answers = []
    torch.manual_seed(seed)
    with torch.no_grad():
        for i in tqdm(range(0, len(records), batch), "the model's own answers", leave=False):
            chunk = [records[k] for k in range(i, min(i + batch, len(records)))]
            pixels = model.load_pixels(policy, folder, [r["image"] for r in chunk]).to(policy.mean.device)
            prompts = [
                data.encode_prompt(policy.tokenizer, r["question"], policy.template, policy.image_tokens) for r in chunk
            ]
            texts, ended = policy("generate", pixels, prompts, 60, temperature=1.0)
            answers += [text if whole else None for text, whole in zip(texts, ended, strict=True)]
    return answers


def reject(record, answer, rng):
    """
    The rejected answer of a toy record: the model's own where it names an object that is not there; else the truth
    with an absent partner put in; else, when no partner is absent, the truth with a partner left out.
    DEVIATION: the paper's rejected answers were written by people (RLHF-V).

    returns  text, origin (own | added | omitted)
    """
    objects = [(o["colour"], o["word"]) for o in record["objects"]]
    if answer and {kind for _, kind in toy.mentions(answer)} - {kind for _, kind in objects}:
        return answer, "own"
    absent = toy.absent_partners(objects)
    if absent:
        changed, origin = toy.with_partner(objects, str(rng.choice(absent)), rng), "added"
    else:
        partners = [o for o in objects if o[1] not in toy.PARTNER]
        gone = partners[rng.integers(len(partners))]
        changed, origin = [o for o in objects if o != gone], "omitted"
    return toy.say(changed, record["question"]), origin


def toy_answers(config, parts, records):
    """Rank 0: the base model's answers to a toy source without rejected ones, in <parts>/answers.jsonl, or nothing."""
    if (parts / "answers.jsonl").is_file() or all("rejected" in record for record in records):
        return
    place = functools.partial(runtime.whole, device=runtime.device())
    policy = model.load(config.model, convention=config.convention, trained=False, place=place).eval()
    answers = own_answers(policy, records, Path(config.out).parent, config.seed)
    runtime.write_jsonl(parts / "answers.jsonl", [{"answer": answer} for answer in answers])


def build_mfpo(config):
    """
    Records of `source` -> MFPO records with distorted images. All ranks call it; a build that was stopped goes on.
    """
    policy = model.load(config.model, convention=config.convention, trained=False, weights=False)
    table = model.stored_weight(policy, "model.language_model.embed_tokens.weight").numpy()

    def vector_of(word):  # the mean of the model's input embeddings over the word's tokens: no other model is needed
        return table[policy.tokenizer(word, add_special_tokens=False)["input_ids"]].mean(0)

    if config.explain:
        runtime.first_alone(lambda: explain(config, vector_of))
        return
    out = Path(config.out)
    finder = grounding.load(config.grounder, config.segmenter, runtime.device()) if config.grounder else None
    parts, records = open_build(config, policy, check_source, "distorted")
    runtime.first_alone(lambda: toy_answers(config, parts, records))
    answers = data.Lines(parts / "answers.jsonl") if (parts / "answers.jsonl").is_file() else None
    root = sqrt_alpha_bar(config.schedule)[config.t]
    mean, std = (getattr(policy, name).flatten().numpy().astype(np.float64) for name in ("mean", "std"))

    def distorted(i, record, words, image, found):
        """One record: its rejected answer, its mask, its distorted image, its line."""
        rng = seeded(config.seed, record["id"])
        rejected, origin = record.get("rejected"), "given"
        if rejected is None:
            rejected, origin = reject(record, answers[i]["answer"], rng)
        regions, masks = found
        kind = "global" if config.region == "key" and not regions else config.region
        mask = region_mask(kind, [region["box"] for region in regions], image.size, rng)
        if kind == "key" and masks is not None:
            mask = masks.any(0)
        # DEVIATION: noise is added to the image as the model sees it, at its input size; the paper does not say. On a
        # large photograph the same noise would be averaged away when it is made small.
        mask = Image.fromarray(mask.astype(np.uint8) * 255)
        mask = np.asarray(model.to_square(mask, policy.image_size, policy.pad, 0, Image.Resampling.BOX)) > 0
        if not mask.any():  # an empty mask, or a region that the crop of the hub's convention leaves out
            kind, mask = "global", np.ones_like(mask)
        seen = np.asarray(model.to_square(image, policy.image_size, policy.pad))
        name = f"{i:06}.png"
        noisy = distort(seen, mask, root, mean, std, rng)
        Image.fromarray(noisy).save(parts / "distorted" / name)
        line = {key: record[key] for key in SOURCE_FIELDS} | {"rejected": rejected, "rejected_from": origin}
        line |= {"image_rejected": f"{out.stem}_distorted/{name}", "region_kind": kind}
        line |= {"regions": regions if kind == "key" else [], "keywords": words, "source": record.get("source", "")}
        line["noise"] = {"schedule": config.schedule, "t": config.t, "sqrt_alpha_bar": round(float(root), 4)}
        return line | ({"origin": record["origin"]} if "origin" in record else {})

    def distort_part(pick):
        chosen = [records[i] for i in pick]
        words = [[word for word, _ in keywords(record["chosen"], vector_of, config.top)] for record in chosen]
        with ThreadPoolExecutor(8) as pool:  # decoding and encoding images releases the interpreter's lock
            images = list(pool.map(lambda r: data.load_image(data.image_path(out.parent, r["image"])), chosen))
            # DEVIATION: the paper has SAM find the keywords in the image; boxes that the record has are taken first.
            found = [(own_regions(record, named), None) for record, named in zip(chosen, words, strict=True)]
            asked = [k for k, record in enumerate(chosen) if not record.get("objects") and words[k]]
            if finder and config.region == "key" and asked:
                answers_of = finder([images[k] for k in asked], [words[k] for k in asked], config.threshold)
                for k, answer in zip(asked, answers_of, strict=True):
                    found[k] = answer
            return list(pool.map(distorted, pick, chosen, words, images, found))

    say(f"{len(records)} records; noise: {config.schedule} t={config.t}, regions: {config.region}")
    lines = runtime.in_parts(parts, "record", "distorting", range(len(records)), config.batch, distort_part)
    runtime.first_alone(lambda: finish_mfpo(config, out, parts, lines))


def own_regions(record, words):
    """The boxes that a record has of its keywords: "dining table" has those of "tables"."""
    named = stems(" ".join(words))
    return [{"word": o["word"], "box": o["box"]} for o in record.get("objects", []) if stems(o["word"]) & named]


def stems(text):
    """Content words as they are and without a plural's ending."""
    found = set(content_words(text))
    found |= {word[:-1] for word in found if re.search("[^su]s$", word)}
    return found | {word[:-1] for word in found if re.search("(ch|sh|x|s)e$", word)}


def explain(config, vector_of):
    """Print the ranked words of the first records."""
    shown = 0
    for where, record in source_records(config, check_source):
        if isinstance(record, data.BadRecord):
            print(f"{where}: left out, {record.reason}")
            continue
        print(f"record {record['id']}: {record['chosen']}")
        for rank, (word, score) in enumerate(keywords(record["chosen"], vector_of, 2 * config.top), 1):
            print(f"    {rank:2} {score:.3f} {word}" + ("" if rank <= config.top else "  (not used: over --top)"))
        shown += 1
        if shown == config.explain:
            break


def finish_mfpo(config, out, parts, lines):
    """Put the parts together, count and tell what was used and what could not be."""
    counts, first = Counter(), []

    def counted():
        for line in lines:
            counts.update((f"rejected: {line['rejected_from']}", f"region: {line['region_kind']}"))
            if len(first) < 8:
                first.append(line)
            yield line

    number = publish(out, parts, "distorted", counted())
    print(f"wrote {out}: {number} records; " + ", ".join(f"{k} {v}" for k, v in sorted(counts.items())))
    if config.region == "key" and counts["region: global"]:
        remedy = "" if config.grounder else ". Without boxes in the records, name a --grounder to find them"
        print(
            f"note: {counts['region: global']} records have global noise, for no region of a keyword was found{remedy}"
        )
    runtime.discard(parts)
    if config.sheet:
        draw.draw_sheet(first, out.parent, config.sheet)
        print(f"wrote {config.sheet}")


def check_toy(method, config, data_path):
    """
    ValueError where a trainer with --model toy would have to build in a folder that holds something else. Only the
    default file, <method>.jsonl, is built; what else --data names must be there.
    """
    folder = data_path.parent
    if config.resume and not data_path.is_file():
        raise ValueError(f"{data_path}: no such file. Resume from the directory that the run was started in")
    if folder.exists() and folder != Path("data/toy") and not (folder / "preference.jsonl").is_file():
        raise ValueError(
            f"--data {folder}: holds neither {data_path.name} nor the toy world. Build records there with "
            f"build_data.py {method} and name their --model, or build the toy world: build_data.py toy --out {folder}"
        )
    if data_path.name != f"{method}.jsonl" and not data_path.is_file():
        raise ValueError(f"--data {data_path}: no such file. Build it with build_data.py {method} --out {data_path}")


def build_world(config):
    """The toy world with what its table needs: scenes, base model, held-out pairs. What is there already is kept."""
    runtime.first_alone(lambda: build_toy(config))
    for split in ("val", "test"):
        source, out = Path(config.out) / f"{split}.jsonl", Path(config.out) / f"mfpo_{split}.jsonl"
        if not runtime.first_alone(out.is_file):
            base = str(Path(config.out) / "base")
            build_mfpo(MfpoConfig(source=str(source), out=str(out), model=base, seed=config.seed))


def prepare_toy(folder, seed):
    """Build what the toy world in `folder` lacks, but for the records to train on. Returns the base model's folder."""
    build_world(ToyConfig(out=str(folder), seed=seed))
    return str(folder / "base")


# ---------------------------------------------------------------------------------------- `build_data.py mbpo`


@dataclass
class MbpoConfig:
    source: str = knob("data/toy/preference.jsonl", "records with a true answer each, or closed-ended questions")
    source_format: str = knob("", f"{' | '.join(sources.FORMATS)}; empty: told by its fields")
    images: str = knob("", "folder that the source's image paths start in; empty: the source's own")
    model: str = knob("data/toy/base", "model to attack; its answers to attacked images become the rejected ones")
    out: str = knob("data/toy/mbpo.jsonl", "where the records go; attacked images and questions go beside it")
    iig_keep: float = knob(0.5, "share of records kept, those with the largest image information gain; 1 keeps all")
    attack: str = knob("pgd", "pgd | random (noise of the same size, the paper's control)")
    eps: str = knob("4/255", "largest change of a pixel, pixels being in [0, 1]; our choice, see runs/mbpo_attack.sh")
    alpha: str = knob("1/255", "step of pgd; below 1/255 part of it is lost in bfloat16")
    steps: int = knob(10, "steps of pgd")
    questions: int = knob(2000, "closed-ended questions: so many are made of a toy source, or kept of a source of them")
    max_new_tokens: int = knob(128, "answers that do not end within so many tokens are dropped")
    max_length: int = knob(2048, "tokens of image, question and answer; a longer record is an error, never cut")
    skip_bad: bool = knob(False, "drop bad source records, counted by reason, instead of stopping at the first")
    batch: int = knob(32, "records per forward pass; lower it when memory runs out")
    convention: str = knob("", "how the model sees and is asked: original | hub; empty: what its folder says")
    seed: int = knob(0, "seed of the noise and of the questions")
    sheet: str = knob("", "also draw a contact sheet of the first records into this PNG")

    def __post_init__(self):
        if not 0 < self.iig_keep <= 1:
            raise ValueError(f"--iig_keep {self.iig_keep}: a share in (0, 1]; 1 keeps all records")
        if self.attack not in ("pgd", "random"):
            raise ValueError(f"--attack {self.attack!r}: use pgd or random")
        if pixels_in("--eps", self.eps) < 1 / 255:
            raise ValueError(f"--eps {self.eps}: less than 1/255 vanishes when the image is rounded to 8 bits")
        pixels_in("--alpha", self.alpha)
        for name in ("steps", "max_new_tokens", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be positive, got {getattr(self, name)}")
        if self.questions < 0:
            raise ValueError("--questions must not be negative")
        check_out(self)


def pixels_in(flag, text):
    """A size on the scale of pixels in [0, 1], written 4/255 or 0.0157, as a float."""
    try:
        value = float(Fraction(text))
    except (ValueError, ArithmeticError):  # also 1/0 and 1e400
        raise ValueError(f"{flag} {text}: not a number. Write it as 4/255 or 0.0157") from None
    if not 0 < value <= 1:
        raise ValueError(f"{flag} {text}: must lie in (0, 1], for pixels do; a common size is 4/255")
    return value


def mean_logp(policy, batch, pixels):
    """The log-probabilities of a batch's answers, one a row, given other images than its own: nats per token, (B,)."""
    return policy("logps", dataclasses.replace(batch, pixels=pixels)).sum(1) / batch.answer_mask.sum(1)


@torch.no_grad()
def image_gain(policy, rows, pixels):
    """
    Image information gain of some records.

    rows      B of data.Row with the chosen answer;   pixels  (B, 3, H, W) in [0, 1]
    returns   (B,) nats per token
    """
    batch = data.pack(rows, pixels).to(pixels.device)
    # The paper does not say what the image is compared with: the mean colour is 0 after normalisation.
    blank = data.pack(rows, policy.mean.expand_as(pixels)).to(pixels.device)
    return losses.information_gain(policy("logps", batch), policy("logps", blank), batch.answer_mask)


def attack_images(policy, rows, pixels, noise, kind, eps, alpha=0.0, steps=0):
    """
    MBPO's adversarial images: small changes that make the chosen answer unlikely (untargeted PGD, Madry et al. 2018).

        delta <- clip(delta - alpha * sign(grad_delta mean_t log pi(y_t|x, m + delta, y_<t)), -eps, eps)

    rows      B of data.Row with the chosen answer
    pixels    (B, 3, H, W) m, multiples of 1/255 in [0, 1]; m + delta stays in [0, 1] too
    noise     (B, 3, H, W) in [-1, 1]: the start is eps * noise, and with kind "random" that is all
    returns   (B, 3, H, W), again multiples of 1/255, each at most eps from m: what is saved is what was attacked

    DEVIATION: the paper names neither steps nor sizes nor the start; all are ours. Only the image's gradient is
    computed: the caller freezes the parameters, which saves their gradients' time and memory.
    """
    batch, delta = data.pack(rows, pixels).to(pixels.device), eps * noise
    for _ in range(steps if kind == "pgd" else 0):
        attacked = (pixels + delta).clamp(0, 1).requires_grad_()
        # Each image moves only its own answer, so the gradient of the sum is each one's own.
        (gradient,) = torch.autograd.grad(mean_logp(policy, batch, attacked).sum(), attacked)
        delta = (delta - alpha * gradient.sign()).clamp(-eps, eps)
    levels = math.floor(eps * 255 + 1e-6)  # rounded to 8 bits inside the ball, not out of it
    change = (delta * 255).round().clamp(-levels, levels)
    return ((pixels * 255).round() + change).clamp(0, 255) / 255


REFUSAL = re.compile(
    r"(unfortunately,? |sorry,? )?((i['’]?m |i am )?(sorry|unable|not able)|i (can['’]?t|cannot|can not|could not)\b"
    r"|i (do not|don['’]?t) see (a|an|any|the) (picture|image|photo)|as an ai)",
    re.IGNORECASE,
)


def is_new_word(word, text):
    """Is `word` one with a content that `text` does not have?"""
    return bool(set(content_words(word)) - set(content_words(text)))


def why_drop(mined, chosen, ended):
    """
    Why a mined answer cannot be a rejected one, or '': too long | empty | refusal | equal | loop.

    A loop is a phrase of up to 12 words three times in a row. Refusals are dropped because an attacked image may only
    provoke "I cannot see", which is not an answer misled by the language prior.
    """
    words, truth = (re.findall(r"\w+", text.lower()) for text in (mined, chosen))
    phrases = [(n, i) for n in range(1, 13) for i in range(len(words) - 3 * n + 1)]
    if not words:
        return "empty"
    if any(words[i : i + n] == words[i + n : i + 2 * n] == words[i + 2 * n : i + 3 * n] for n, i in phrases):
        return "loop"
    if not ended:
        return "too long"
    if REFUSAL.match(mined.strip()):
        return "refusal"
    return "equal" if words == truth else ""


def build_mbpo(config):
    """
    Records of `source` -> MBPO records: choose by information gain, attack, let the model answer, drop what is no
    answer. All ranks call it. What is done is kept in <out>.parts, so a build that was stopped goes on from there.
    Of a source of closed-ended questions, --questions of them are kept, in this project's form; nothing is attacked.
    """
    out = Path(config.out)
    if runtime.first_alone(lambda: asks_closed(config)):
        runtime.first_alone(lambda: keep_questions(config, out))
        return
    device = runtime.device()
    place = functools.partial(runtime.shard, device=device)
    policy = model.load(config.model, convention=config.convention, trained=False, place=place).eval()
    encoding = (policy.tokenizer, policy.template, policy.image_tokens, config.max_length)

    def check(record):
        check_toy_objects(record)
        data.chosen_row(record, *encoding)

    parts, records = open_build(config, policy, check, "attacked")
    eps, alpha = pixels_in("--eps", config.eps), pixels_in("--alpha", config.alpha)
    say(f"{len(records)} records; attack: {config.attack} eps={config.eps}")

    def rows_and_pixels(pick):
        chosen = [records[i] for i in pick]
        pixels = model.load_pixels(policy, out.parent, [record["image"] for record in chosen]).to(device)
        return chosen, [data.chosen_row(record, *encoding) for record in chosen], pixels

    def gain_of(pick):
        _, rows, pixels = rows_and_pixels(pick)
        gains = image_gain(policy, rows, pixels).tolist()
        return [{"iig": gain, "tokens": len(row.answers[0])} for gain, row in zip(gains, rows, strict=True)]

    with runtime.summoned(policy):
        everything = range(len(records))
        lines = runtime.in_parts(parts, "gain", "information gain", everything, config.batch, gain_of)
        gains, length = np.array([(line["iig"], line["tokens"]) for line in lines]).T
    kept = np.sort(np.argsort(-gains, kind="stable")[: max(1, round(len(gains) * config.iig_keep))])
    say(
        f"information gain: kept {len(kept)} of {len(gains)}, {gains[kept].mean():.2f} nats per token against "
        f"{gains.mean():.2f} over all; their answers have {length[kept].mean():.1f} tokens against {length.mean():.1f}"
    )

    def mine(pick):
        chosen, rows, pixels = rows_and_pixels(pick)
        draws = [seeded(config.seed, record["id"]).uniform(-1, 1, pixels.shape[1:]) for record in chosen]
        noise = torch.from_numpy(np.stack(draws)).float().to(device)
        attacked = attack_images(policy, rows, pixels, noise, config.attack, eps, alpha, config.steps)
        with torch.no_grad():
            answers, ended = policy("generate", attacked, [row.prefix for row in rows], config.max_new_tokens)
            batch = data.pack(rows, pixels).to(pixels.device)
            fall = mean_logp(policy, batch, pixels) - mean_logp(policy, batch, attacked)
        lines = []
        for k, (i, record) in enumerate(zip(pick, chosen, strict=True)):
            name = f"{i:06}.png"
            image = (attacked[k] * 255).round().byte().permute(1, 2, 0).cpu().numpy()
            Image.fromarray(image).save(parts / "attacked" / name)
            used = {"kind": config.attack, "eps": round(eps, 6)}
            used |= {"alpha": round(alpha, 6), "steps": config.steps} if config.attack == "pgd" else {}
            line = {key: record[key] for key in SOURCE_FIELDS} | {"rejected": answers[k]}
            line |= {"image_attacked": f"{out.stem}_attacked/{name}", "iig": float(gains[i]), "attack": used}
            # How many nats per token the attack took from the chosen answer.
            line |= {"fall": fall[k].item(), "source": record.get("source", "")}
            reason = why_drop(answers[k], record["chosen"], ended[k])
            if not reason:
                try:  # what is kept can be trained on
                    data.pair_row(line, *encoding)
                except data.BadRecord as error:
                    reason = error.reason
            lines.append(line | {"dropped": reason})
        return lines

    with runtime.summoned(policy):
        runtime.in_parts(parts, "attack", "attacking and answering", kept.tolist(), config.batch, mine)
    runtime.first_alone(lambda: finish_mbpo(config, out, parts, records, policy.pad))


def finish_mbpo(config, out, parts, records, pad):
    """Put the parts together: what was dropped, attacked images, questions, records; then the parts can go."""
    reasons, first = Counter(), []

    def mined(dropped):
        for file in sorted(parts.glob("attack_*.jsonl")):
            for _, line in data.read_jsonl(file):
                reason = line.pop("dropped")
                if bool(reason) == dropped:
                    yield line | ({"dropped": reason} if dropped else {})

    def kept():
        for line in mined(dropped=False):
            if len(first) < 8:
                first.append(line)
            yield line

    gone = out.with_name(f"{out.stem}_dropped.jsonl")
    runtime.write_jsonl(gone, mined(dropped=True))
    reasons.update(line["dropped"] for line in mined(dropped=True))
    told = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common()) or "none"
    if next(mined(dropped=False), None) is None:
        runtime.discard(parts)
        raise ValueError(
            f"{config.source}: no mined answer can be used; dropped: {told}. Look at {gone.name}, and "
            "change --eps or --attack"
        )
    if config.questions and all(record.get("source") == "toy" for record in records):
        asked = closed_questions(list(records), config.questions, np.random.default_rng([config.seed, 5]))
        runtime.write_jsonl(out.with_name(f"{out.stem}_closed.jsonl"), asked)
        print(f"wrote {out.stem}_closed.jsonl: {len(asked)} closed-ended questions")
    elif config.questions:
        print("no closed-ended questions: they are made for the toy world only. Build some from a set of them")
    count = publish(out, parts, "attacked", kept())
    runtime.discard(parts)
    print(f"wrote {out}: {count} records; dropped: {told} (kept in {gone.name})")
    if config.sheet:
        draw.draw_attacks(first, out.parent, config.sheet, pad, is_new_word)
        print(f"wrote {config.sheet}")


def asks_closed(config):
    """Is the source a set of closed-ended questions?"""
    for where, raw in sources.read(config.source):
        if config.source_format:
            return config.source_format in sources.CLOSED
        try:
            return sources.recognise(raw, where) in sources.CLOSED
        except ValueError:
            if not config.skip_bad:
                raise
    return False


def keep_questions(config, out):
    """A source of closed-ended questions -> --questions of them (0: all), drawn by the seed, in the source's order."""
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".questions", dir=out.parent))
    try:
        read_source(config, aside, data.check_question)
        asked = data.Lines(aside / "source.jsonl")
        count = min(config.questions or len(asked), len(asked))
        pick = np.sort(np.random.default_rng(config.seed).permutation(len(asked))[:count])
        runtime.write_jsonl(out, (asked[i] for i in pick))
    finally:
        shutil.rmtree(aside)
    print(f"wrote {out}: {count} of {len(asked)} closed-ended questions")


# ------------------------------------------------------------------------------------------------------- main


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    commands = {
        "toy": (ToyConfig, build_world),
        "mfpo": (MfpoConfig, build_mfpo),
        "mbpo": (MbpoConfig, build_mbpo),
    }
    if argv and argv[0] in ("-h", "--help"):
        print(__doc__ + "\neach takes --help")
        return
    if not argv or argv[0] not in commands:
        raise ValueError(f"build_data.py needs what to build: {' | '.join(commands)}, for example build_data.py toy")
    config_class, build = commands[argv[0]]
    config = runtime.parse_config(config_class, argv[1:], description=__doc__)
    runtime.start()
    build(config)
    if argv[0] == "toy":
        say(f"next: python build_data.py mfpo --source {config.out}/preference.jsonl --model {config.out}/base "
            f"--out {config.out}/mfpo.jsonl")  # fmt: skip
        return
    base = "" if Path(config.model) == Path(config.out).parent / "base" else f"--model {config.model} "
    base += f"--convention {config.convention} " if config.convention else ""
    if argv[0] == "mfpo" and config.explain:
        say("next: the same without --explain builds the records")
    elif argv[0] == "mbpo" and asks_closed(config):
        say(f"next: torchrun train_mbpo.py {base}--questions {config.out} --data <records mined by build_data.py mbpo>")
    else:
        closed = Path(config.out).with_name(f"{Path(config.out).stem}_closed.jsonl")
        alone = "" if argv[0] == "mfpo" or closed.is_file() else " --online_fraction 0"
        say(f"next: torchrun train_{argv[0]}.py {base}--data {config.out}{alone}")


if __name__ == "__main__":
    runtime.run(main)
