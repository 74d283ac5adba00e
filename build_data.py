"""
Raw sources -> preference records.

    python build_data.py toy                                   the built-in world: scenes and a base model
    python build_data.py mfpo --source data/toy/preference.jsonl --model data/toy/base --out data/toy/mfpo.jsonl

`mfpo` follows MFPO (arXiv:2410.15334): keywords of the chosen answer by a word graph, their regions in the image,
diffusion noise inside those regions. Each image is distorted once and stored: policy and reference must see the same.

reads    a JSONL of {"id", "image", "question", "chosen", "objects": [{"word", "box"}], "rejected"}; in the toy world
         "rejected" is made here, from the model's own answers
writes   <out>.jsonl (format: data.py) and <out>_distorted/*.png beside it
"""

import json
import re
import shutil
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

import data
import model
import runtime
import toy
from runtime import knob

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
        w, h = round(width * 0.2**0.5), round(height * 0.2**0.5)
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


def check_source(record, needs_rejected):
    """Raise BadRecord unless a source record's objects and rejected answer can be used."""
    for o in record.get("objects", []):
        box = o.get("box") if isinstance(o, dict) and isinstance(o.get("word"), str) else None
        good = isinstance(box, list) and len(box) == 4 and all(isinstance(v, int | float) for v in box)
        if not good or not (box[0] < box[2] and box[1] < box[3] and box[2] > 0 and box[3] > 0):
            message = (
                f'field \'objects\' needs {{"word": text, "box": [x0, y0, x1, y1]}} with x0 < x1, y0 < y1, got {o!r}'
            )
            raise data.BadRecord("'objects' unusable", message)
    if "rejected" in record:
        rejected = record["rejected"]
        if not isinstance(rejected, str) or rejected.strip() in ("", record["chosen"].strip()):
            message = (
                f"field 'rejected' must be a text other than 'chosen', got {rejected!r}. Mend or delete the record"
            )
            raise data.BadRecord("'rejected' unusable", message)
    elif needs_rejected:
        raise data.BadRecord("'rejected' missing", "field 'rejected' is missing. Add it to every record")


def embedding_of(policy):
    """word -> the mean of the model's own input embeddings over the word's tokens, so that no other model is needed."""
    table = policy.hf.get_input_embeddings().weight.detach().float().cpu().numpy()

    def vector_of(word):
        return table[policy.tokenizer(word, add_special_tokens=False)["input_ids"]].mean(0)

    return vector_of


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
    cases = {}  # (partner, is it there) -> scenes
    for i, record in enumerate(records):
        present = [o["word"] for o in record["objects"]]
        absent = [kind for kind in toy.KINDS if kind not in present]
        for kinds, answer in ((present, "Yes"), (absent, "No")):
            asked[i].append({"split": "random", "question": toy.yesno(rng.choice(kinds)), "answer": answer})
        for anchor in present:
            if anchor in toy.PARTNER:
                cases.setdefault((toy.PARTNER[anchor], toy.PARTNER[anchor] in present), []).append(i)
    for partner in toy.PARTNER.values():
        there, gone = cases.get((partner, True), []), cases.get((partner, False), [])
        for found, answer in ((there, "Yes"), (gone, "No")):
            for i in found[: min(len(there), len(gone))]:
                asked[i].append({"split": "adversarial", "question": toy.yesno(partner), "answer": answer})
    return asked


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
    if not (out / "base" / "config.json").is_file():
        print("warming up the base model: about 2 minutes on 2 cores, once")
        model.save(toy.warm_up(config.seed), out / "base")
        print(f"wrote {out}/base")


# ---------------------------------------------------------------------------------------- `build_data.py mfpo`


@dataclass
class MfpoConfig:
    source: str = knob("data/toy/preference.jsonl", "JSONL of records to turn into preferences")
    model: str = knob("data/toy/base", "model whose answers are rejected and whose embeddings rank keywords")
    out: str = knob("data/toy/mfpo.jsonl", "where the records go; distorted images go beside it")
    region: str = knob("key", "where the noise goes: key | random | global (the paper's ablation)")
    # DEVIATION: the paper's best is t = 500 of an unknown schedule. vcd at 500 leaves 86 % of the image, which does not
    # hide a glyph of the toy world; ddpm at 400 leaves 44 %.
    schedule: str = knob("ddpm", "noise schedule: vcd | ddpm")
    t: int = knob(400, "diffusion step, 0 to 999; the paper's best is 500, its schedule unknown")
    top: int = knob(5, "keywords per answer, K in the paper")
    seed: int = knob(0, "seed of the noise, the random regions and the sampled answers")
    sheet: str = knob("", "also draw a contact sheet of the first records into this PNG")

    def __post_init__(self):
        if self.region not in data.REGION_KINDS:
            raise ValueError(f"--region {self.region!r}: use one of {', '.join(data.REGION_KINDS)}")
        if self.schedule not in ("vcd", "ddpm"):
            raise ValueError(f"--schedule {self.schedule!r}: use vcd or ddpm")
        if not 0 <= self.t < 1000:
            raise ValueError(f"--t {self.t}: a diffusion step lies in 0 to 999")
        if self.top < 1 or self.seed < 0:
            raise ValueError(f"--top must be positive and --seed not negative, got {self.top} and {self.seed}")
        if self.sheet and not self.sheet.endswith(".png"):
            raise ValueError(f"--sheet {self.sheet}: must end in .png")
        if not self.out.endswith(".jsonl") or Path(self.out).resolve() == Path(self.source).resolve():
            raise ValueError(f"--out {self.out}: must be a .jsonl file other than --source {self.source}")


SOURCE_FIELDS = {"id": str, "image": str, "question": str, "chosen": str}


def seeded(seed, record_id):
    """A generator for one record: the same whatever the order of records and the number of processes."""
    return np.random.default_rng([seed, zlib.crc32(record_id.encode())])


def own_answers(policy, records, folder, seed, batch=64):
    """The model's sampled answer (temperature 1) to each record's question: text, or None where it did not end."""
    answers = []
    torch.manual_seed(seed)
    with torch.no_grad():
        for i in tqdm(range(0, len(records), batch), "the model's own answers", leave=False):
            chunk = records[i : i + batch]
            pixels = torch.stack([load_pixels(policy, folder, r["image"]) for r in chunk])
            prompts = [
                data.encode_prompt(policy.tokenizer, r["question"], model.TEMPLATE, policy.image_tokens) for r in chunk
            ]
            texts, ended = policy.generate(pixels, prompts, 60, temperature=1.0)
            answers += [text if whole else None for text, whole in zip(texts, ended, strict=True)]
    return answers


def load_pixels(policy, folder, name):
    """(3, H, W) pixels in [0, 1] of a record's image, as the policy's vision tower takes them."""
    return model.to_pixels(data.load_image(data.image_path(folder, name)), policy.image_size)


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


def build_mfpo(config):
    """Records of `source` -> MFPO records with distorted images. Prints what it used and what it could not."""
    source, out = Path(config.source), Path(config.out)
    if out.parent.resolve() != source.parent.resolve():
        raise ValueError(f"--out {out}: must lie beside --source {source}, for the records name images relative to it")
    records = data.read_records(source, SOURCE_FIELDS)
    toy_world = all(record.get("source") == "toy" for record in records)
    data.keep_good(
        records,
        lambda record: check_source(record, needs_rejected=not toy_world),
        lambda record: f"{source}, record {record['id']!r}",
        skip_bad=False,
        title=f"checking {source}",
    )
    policy = model.load(config.model)
    folder, images = source.parent, Path(f"{out.stem}_distorted")
    print(f"{len(records)} records from {source}; noise: {config.schedule} t={config.t}, regions: {config.region}")
    missing = any("rejected" not in record for record in records)
    answers = own_answers(policy, records, folder, config.seed) if missing else [None] * len(records)
    mean, std = (getattr(policy, name).flatten().numpy().astype(np.float64) for name in ("mean", "std"))
    root = sqrt_alpha_bar(config.schedule)[config.t]
    vector_of = embedding_of(policy)
    aside = folder / f"{images}.tmp"  # an older build stays whole until this one is
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    rows, counts = [], {}
    for number, (record, answer) in enumerate(
        zip(tqdm(records, "distorting", leave=False, delay=2), answers, strict=True)
    ):
        rng = seeded(config.seed, record["id"])
        rejected, origin = (record["rejected"], "given") if "rejected" in record else reject(record, answer, rng)
        # DEVIATION: the paper has SAM find the keywords in the image; here the record's own boxes say where they are.
        words = [word for word, _ in keywords(record["chosen"], vector_of, config.top)]
        regions = [{"word": o["word"], "box": o["box"]} for o in record.get("objects", []) if o["word"] in words]
        kind = "global" if config.region == "key" and not regions else config.region
        image = np.asarray(data.load_image(data.image_path(folder, record["image"])))
        mask = region_mask(kind, [r["box"] for r in regions], image.shape[1::-1], rng)
        name = f"{number:06}.png"
        Image.fromarray(distort(image, mask, root, mean, std, rng)).save(aside / name)
        row = {key: record[key] for key in SOURCE_FIELDS}
        row |= {
            "rejected": rejected,
            "rejected_from": origin,
            "image_rejected": str(images / name),
            "region_kind": kind,
        }
        row |= {"regions": regions if kind == "key" else [], "keywords": words, "source": record.get("source", "")}
        row["noise"] = {"schedule": config.schedule, "t": config.t, "sqrt_alpha_bar": round(float(root), 4)}
        rows.append(row)
        for label in (f"rejected: {origin}", f"region: {kind}"):
            counts[label] = counts.get(label, 0) + 1
    out.unlink(missing_ok=True)
    shutil.rmtree(folder / images, ignore_errors=True)
    aside.rename(folder / images)
    runtime.write_jsonl(out, rows)
    print(f"wrote {out}: {len(rows)} records; " + ", ".join(f"{k} {v}" for k, v in sorted(counts.items())))
    if config.sheet:
        draw_sheet(rows[:8], folder, config.sheet)
        print(f"wrote {config.sheet}")


def draw_sheet(rows, folder, path, zoom=192):
    """A contact sheet, a row a record: the image with its regions, the distorted image, the words."""
    sheet = Image.new("RGB", (2 * zoom + 30 + 620, len(rows) * (zoom + 10) + 10), "white")
    pen = ImageDraw.Draw(sheet)
    for i, row in enumerate(rows):
        top = 10 + i * (zoom + 10)
        for column, name in enumerate((row["image"], row["image_rejected"])):
            image = data.load_image(data.image_path(folder, name))
            scale = zoom / max(image.size)
            shown = image.resize([round(s * scale) for s in image.size], Image.Resampling.NEAREST)
            sheet.paste(shown, (10 + column * (zoom + 10), top))
            if column == 0:
                for region in row["regions"]:
                    x0, y0, x1, y1 = (v * scale for v in region["box"])
                    pen.rectangle([10 + x0, top + y0, 10 + x1, top + y1], outline="red", width=2)
        lines = [
            f"keywords  {', '.join(row['keywords'])}",
            f"chosen    {row['chosen']}",
            f"rejected  {row['rejected']}  ({row['rejected_from']})",
            f"noise     {row['region_kind']}, {row['noise']['schedule']} t={row['noise']['t']}",
        ]
        pen.multiline_text((2 * zoom + 40, top), "\n\n".join(lines), fill="black", font_size=14)
    sheet.save(path)


# ------------------------------------------------------------------------------------------------------- main


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    commands = {"toy": (ToyConfig, build_toy), "mfpo": (MfpoConfig, build_mfpo)}
    if argv and argv[0] in ("-h", "--help"):
        print(__doc__ + "\neach takes --help")
        return
    if not argv or argv[0] not in commands:
        raise ValueError(f"build_data.py needs what to build: {' | '.join(commands)}, for example build_data.py toy")
    config_class, build = commands[argv[0]]
    config = runtime.parse_config(config_class, argv[1:], description=__doc__)
    build(config)
    if argv[0] == "toy":
        print(f"next: python build_data.py mfpo --source {config.out}/preference.jsonl --model {config.out}/base "
              f"--out {config.out}/mfpo.jsonl")  # fmt: skip
    else:
        base = "" if Path(config.model) == Path(config.out).parent / "base" else f"--model {config.model} "
        print(f"next: torchrun train_mfpo.py {base}--data {config.out}")


if __name__ == "__main__":
    runtime.run(main)
