"""
A world small enough for a laptop, in which a LLaVA learns to hallucinate for the reason that real ones do.

    scenes     64 x 64 pixels, 2 to 4 objects of 12 kinds and 6 colours on a 4 x 4 grid, drawn with Pillow
    the prior  kinds come in pairs (cup and spoon, lock and key, ...): in the training scenes an anchor brings its
               partner 87 % of the time, and the annotator often writes the partner down when it is not there
    the test   in the scenes for preferences, validation and test the partner is there half of the time

This file draws scenes, asks about them and writes them to disk; warmup.py trains the model that describes them.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

import runtime
from data import read_lines
from runtime import knob

SIZE, CELL = (64, 16)  # pixels; a cell of the grid is a patch of the ViT: objects across patches are learnt slowly
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
GLYPHS = {  # strokes of an object, in fractions of its size; a shape with a * is a hole, one with a ! always green
    "cup": "ring .55 .25 .98 .75, round .05 .1 .75 .95",
    "spoon": "oval .28 0 .72 .45, box .43 .4 .57 1",
    "book": "box 0 .12 1 .9, box* .46 .12 .54 .9, box* .1 .3 .38 .36, box* .62 .3 .9 .36, "
    "box* .1 .5 .38 .56, box* .62 .5 .9 .56, box* .1 .7 .38 .76, box* .62 .7 .9 .76",
    "pen": "shape 0 1 .08 .72 .78 .02 .98 .22 .28 .92",
    "plate": "oval 0 0 1 1, oval* .22 .22 .78 .78",
    "fork": "box .2 0 .32 .45, box .44 0 .56 .45, box .68 0 .8 .45, box .2 .36 .8 .48, box .44 .4 .56 1",
    "pear": "oval .1 .38 .9 1, oval .28 .12 .72 .65, box .47 0 .55 .2",
    "knife": "shape .4 0 .7 .12 .7 .6 .4 .6, box .44 .6 .6 1",
    "lock": "ring .2 0 .8 .75, box .05 .42 .95 1, oval* .4 .58 .6 .82",
    "key": "ring 0 .28 .45 .73, box .42 .45 1 .57, box .72 .5 .8 .76, box .9 .5 .98 .76",
    "vase": "shape .25 0 .75 0 .62 .25 1 .6 .75 1 .25 1 0 .6 .38 .25",
    "rose": "oval .1 .14 .54 .54, oval .46 .14 .9 .54, oval .28 0 .72 .4, oval .28 .28 .72 .68, box! .45 .6 .55 1",
}
CAPTIONS = {  # question -> template of its answer
    "Describe the picture.": "The picture shows {}.",
    "What do you see?": "I can see {}.",
    "What is in the picture?": "There is {} in the picture.",
}
P_BIASED, P_FAIR = 0.87, 0.5  # how often an anchor brings its partner
# How often the annotator of the training scenes names an absent partner. Below one half a model that sees
# well enough learns to say nothing, and how much it hallucinates depends on how well it was trained, so on the seed.
P_SLOPPY = 0.5
SPLIT_SEEDS = {"train": 1, "preference": 2, "val": 3, "test": 4}  # no scene is shared between splits
# Shares of closed-ended questions, a guess: half of them yes/no, most of those about the partner of an object
# that is there, which the prior answers with yes.
QUESTION_MIX = {"partner": 0.35, "yesno": 0.15, "choice": 0.2, "number": 0.15, "word": 0.15}


@functools.cache
def glyph(kind, colour, size):
    """An object as a (size, size) RGBA image, drawn eight times larger and reduced: its edges are smooth."""
    n = 8 * size
    image = Image.new("RGBA", (n, n), (0, 0, 0, 0))
    pen, solid = ImageDraw.Draw(image), COLOURS[colour]
    hole = tuple(int(c + (255 - c) * 0.75) for c in solid)
    for stroke in GLYPHS[kind].split(","):
        shape, *numbers = stroke.split()
        at = [float(number) * n for number in numbers]
        fill = {"*": hole, "!": COLOURS["green"]}.get(shape[-1], solid)
        match shape.rstrip("*!"):
            case "oval":
                pen.ellipse(at, fill=fill)
            case "ring":
                pen.ellipse(at, outline=fill, width=n // 9)
            case "box":
                pen.rectangle(at, fill=fill)
            case "round":
                pen.rounded_rectangle(at, n // 6, fill=fill)
            case "shape":
                pen.polygon(at, fill=fill)
    return image.resize((size, size), Image.Resampling.LANCZOS)


def draw_scene(rng, p_partner):
    """One scene. `p_partner`: the probability that an anchor brings its partner.

    returns  image (64, 64, 3) uint8, objects [{"kind", "colour", "box": [x0, y0, x1, y1]}] with boxes in
             pixels (x1, y1 exclusive), in the order in which captions name them: by pair, anchor before partner
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
    """A closed-ended question about a scene with `objects` [(colour, kind)], its answer and its choices, all text.

    kind   yesno (present or a random absent kind, half each) | choice (four options, one present) | number |
           word
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


# -------------------------------------------------------------------------------------------------- questions


def ask_about(records, rng):
    """POPE's yes/no questions for each scene, as [{"split", "question", "answer"}] lists.

    random        a present kind and an absent one
    adversarial   the partner of a present anchor, absent in half of the questions for each kind of partner:
                  were absent partners asked about more often than present ones, "partners are not there" would score
    """
    asked = [[] for _ in records]
    for i, record in enumerate(records):
        present = [o["word"] for o in record["objects"]]
        absent = [kind for kind in KINDS if kind not in present]
        for kinds, answer in ((present, "Yes"), (absent, "No")):
            asked[i].append({"split": "random", "question": yesno(rng.choice(kinds)), "answer": answer})
    for partner, there, gone in partner_pairs(records):
        asked[there].append({"split": "adversarial", "question": yesno(partner), "answer": "Yes"})
        asked[gone].append({"split": "adversarial", "question": yesno(partner), "answer": "No"})
    return asked


def partner_pairs(records):
    """[(partner, scene with it, scene without it)], scenes as indices: both hold the partner's anchor, so that
    only the image tells them apart, and "is there a <partner>" is as often true as not.
    """
    cases = {}  # (partner, is it there) -> scenes
    for i, record in enumerate(records):
        present = [o["word"] for o in record["objects"]]
        for anchor in present:
            if anchor in PARTNER:
                cases.setdefault((PARTNER[anchor], PARTNER[anchor] in present), []).append(i)
    return [
        (partner, there, gone)
        for partner in PARTNER.values()
        for there, gone in zip(cases.get((partner, True), []), cases.get((partner, False), []), strict=False)
    ]


def closed_questions(records, count, rng):
    """`count` closed-ended questions (format: data.py) about scenes, as QUESTION_MIX has it, in random order."""
    pairs, asked = rng.permutation(partner_pairs(records)), []
    ends = np.round(np.cumsum(list(QUESTION_MIX.values())) * count).astype(int).tolist()
    for kind, start, end in zip(QUESTION_MIX, [0, *ends], ends, strict=False):
        for n in range(end - start):
            if kind == "partner" and len(pairs):  # in a world of a few scenes there may be none
                partner, *scenes = pairs[n // 2 % len(pairs)]
                i, question, answer, choices = int(scenes[n % 2]), yesno(partner), ("Yes", "No")[n % 2], []
            else:
                i = rng.integers(len(records))
                objects = [(o["colour"], o["word"]) for o in records[i]["objects"]]
                question, answer, choices = closed_question(kind.replace("partner", "yesno"), objects, rng)
            record = {"image": records[i]["image"], "question": question, "kind": kind.replace("partner", "yesno")}
            asked.append(record | {"answer": answer, "choices": choices, "about": records[i]["id"], "source": "toy"})
    return [{"id": f"closed-{n}", **asked[i]} for n, i in enumerate(rng.permutation(len(asked)))]


def rejected(record, rng):
    """The rejected answer of a scene's record: the base model's own ("own_answer", from warmup.py) where it names an
    object that is not there; else the truth with an absent partner put in; else, when no partner is absent, the truth
    with a partner left out.

    DEVIATION: RLHF-V's rejected answers are all models' own. What differs more is the chosen side: there people
    corrected the model, here it is the truth about the scene.

    returns  text, origin (own | added | omitted)
    """
    objects = [(o["colour"], o["word"]) for o in record["objects"]]
    answer = record["own_answer"]
    if answer and {kind for _, kind in mentions(answer)} - {kind for _, kind in objects}:
        return answer, "own"
    absent = absent_partners(objects)
    if absent:
        changed, origin = with_partner(objects, str(rng.choice(absent)), rng), "added"
    else:
        partners = [o for o in objects if o[1] not in PARTNER]
        gone = partners[rng.integers(len(partners))]
        changed, origin = [o for o in objects if o != gone], "omitted"
    return say(changed, record["question"]), origin


# -------------------------------------------------------------------------------------------------- its files


@dataclass
class Config:
    out: str = knob("data/toy", "folder of the world; what it already holds stays as it is")
    seed: int = knob(0, "seed of the preference scenes and of the base model (val and test are the same for all)")
    preference: int = knob(2000, "scenes for preference records")
    heldout: int = knob(400, "scenes for validation, and as many for test")
    preference_bias: float = knob(P_FAIR, f"how often an anchor brings its partner there ({P_BIASED}: as in training)")

    def __post_init__(self):
        runtime.check(self, positive="preference heldout", not_negative="seed preference_bias")
        if self.preference_bias > 1:
            raise runtime.Mistake(f"--preference_bias {self.preference_bias}: a probability, in [0, 1]")


def write(config):
    """Write <out>/{preference,val,test}.jsonl with images and closed_{val,test}.jsonl, each unless it is there."""
    out = Path(config.out)
    (out / "images").mkdir(parents=True, exist_ok=True)
    made = {name: value for name, value in vars(config).items() if name != "out"}
    if (out / "world.json").is_file():
        before = json.loads((out / "world.json").read_text())
        before.setdefault("preference_bias", P_FAIR)
        if before != made:
            print(f"note: {out} was built with {before} and stays so. For {made} name another folder with --out")
    else:
        runtime.write_text(out / "world.json", json.dumps(made))
    for split, count in (("preference", config.preference), ("val", config.heldout), ("test", config.heldout)):
        if (out / f"{split}.jsonl").is_file():
            continue
        print(f"drawing {count} {split} scenes into {out}/images")
        seed, bias, records = 0, P_FAIR, []  # all seeds are measured on the same scenes
        if split == "preference":
            seed, bias = config.seed, config.preference_bias
        for i, (image, objects, rng) in enumerate(scenes(split, count, seed, bias)):
            record = {"id": f"{split}-{i}", "image": f"images/{split}_{i:05}.png"}
            Image.fromarray(image).save(out / record["image"])
            record["question"] = str(rng.choice(list(CAPTIONS)))
            record["chosen"] = say(pairs_of(objects), record["question"])
            record["objects"] = [{"word": o["kind"], "colour": o["colour"], "box": o["box"]} for o in objects]
            records.append(record | {"source": "toy"})
        if split != "preference":
            for record, asked in zip(records, ask_about(records, np.random.default_rng(seed)), strict=True):
                record["asked"] = asked
        runtime.write_jsonl(out / f"{split}.jsonl", records)
    for split in ("val", "test"):
        if not (out / f"closed_{split}.jsonl").is_file():
            records = read_lines(out / f"{split}.jsonl")
            asked = closed_questions(records, len(records), np.random.default_rng(0))
            runtime.write_jsonl(out / f"closed_{split}.jsonl", asked)
