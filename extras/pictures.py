"""
Pictures of what is on disk: records, attacks, runs, and what models say.

    python -m extras.pictures sheet   --records data/toy/mfpo.jsonl --out sheet.png     what MFPO learns from
    python -m extras.pictures attack  --records data/toy/mbpo.jsonl --out attack.png    what an attack does
    python -m extras.pictures curves  --runs out/noise_sweep --out sweep.png            metrics over a number
    python -m extras.pictures margins --runs out/text_only out/mfpo-1 --out m.png       MFPO's fairness figure
    python -m extras.pictures story   --models out/mfpo/final --attacked data/toy/attacked.jsonl --out s.png

reads    records and their images; runs <name>-<seed> with eval.json; the metrics.jsonl of runs
writes   one PNG; curves and margins need matplotlib. Under torchrun all processes answer for story
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageOps

import build_data
import data
import eval
import hub
import runtime
from model import to_square
from runtime import Mistake, knob

ZOOM, GAP = 192, 10  # pixels: the longer side of an image on a sheet, the space between two
WHO, TEXT, LINE = 110, 640, 20  # pixels: width of who says something, of what is said; a line's height
WORDS = 80  # of a text that a sheet shows
FACTOR = 20  # how much a sheet enlarges what an attack changed: 4/255 becomes a third of the scale
SMOOTH = 10  # steps that a point of a margin's curve is the mean of
CURVES = "chair_s", "recall", "image_margin", "information_gain"


@dataclass
class Config:
    out: str = field(metadata={"help": "the PNG to write, in a folder that exists"})

    def __post_init__(self):
        path = Path(self.out)
        if path.suffix != ".png" or path.is_dir() or not path.parent.is_dir():
            raise Mistake(f"--out {self.out} must end in .png and lie in a folder that exists")
        runtime.check(self, positive="rows")


@dataclass
class RecordsConfig(Config):
    records: str = field(metadata={"help": "sheet: MFPO records; attack: MBPO records"})
    rows: int = knob(8, "records to draw, the first of them")
    pad: bool = knob(False, "attack: the attacked model pads images to a square (convention 'original')")


@dataclass
class RunsConfig(Config):
    runs: list[str] = field(metadata={"help": "curves: folders of runs; margins: MFPO runs"})


@dataclass
class StoryConfig(Config):
    models: list[str] = field(metadata={"help": "models after training"})
    base: str = knob("data/toy/base", "the model before training")
    attacked: str = knob("data/toy/attacked.jsonl", "MBPO records mined from the scenes of --split")
    data: str = knob("data/toy", "folder of the built-in world")
    split: Literal["test", "val"] = knob("test", "its scenes")
    rows: int = knob(5, "scenes to draw, the first in which the base invents something")


def write_words(pen, at, right, words, red=()):
    """Write words from `at` (x, y), broken before `right`, those of `red` in red. Returns the next y."""
    (left, y), x = at, at[0]
    for word in words:
        width = pen.textlength(word + " ", font_size=15)
        if x + width > right and x > left:
            x, y = left, y + LINE
        pen.text((x, y), word, fill="red" if word in red else "black", font_size=15)
        x += width
    return y + LINE


def sheet(titles, rows):
    """A row a record, its images left and what is said of it right, as one image. `titles` of the columns;
    rows [(images, lines)], lines [(who, text, the words of the text that are red)].
    """
    left = GAP + (len(titles) - 1) * (ZOOM + GAP)
    width = left + WHO + TEXT
    strips = [Image.new("RGB", (width, LINE + GAP), "white")]
    for x, title in zip(range(GAP, left + 1, ZOOM + GAP), titles, strict=True):
        ImageDraw.Draw(strips[0]).text((x, 5), title, fill="black", font_size=15)
    for images, lines in rows:
        strip = Image.new("RGB", (width, ZOOM + GAP + len(lines) * WORDS * LINE), "white")
        pen, y = ImageDraw.Draw(strip), 0
        for x, image in zip(range(GAP, left, ZOOM + GAP), images, strict=True):
            how = Image.Resampling.NEAREST if max(image.size) < ZOOM else Image.Resampling.LANCZOS
            strip.paste(ImageOps.contain(image, (ZOOM, ZOOM), how), (x, 0))
        for who, text, red in lines:
            words = text.split()
            words[WORDS:] = ["..."] * (len(words) > WORDS)
            pen.text((left, y), who, fill="black", font_size=15)
            y = write_words(pen, (left + WHO, y), width - GAP, words, red) + 4
        strips.append(strip.crop((0, 0, width, max(ZOOM, y) + GAP)))
    return Image.fromarray(np.concatenate([np.asarray(strip) for strip in strips]))


def record_sheet(config, titles, field, row_of):
    """A sheet of row_of(record, image, the one called `field`, config) of the first records."""
    path, rows = Path(config.records), []
    for record in data.read_records(path, data.PAIR_FIELDS | {field: str})[: config.rows]:
        try:
            files = record["image"], record[field]
            images = [data.load_image(data.image_path(path.parent, file)) for file in files]
            rows.append(row_of(record, *images, config))
        except data.BadRecord as error:
            raise Mistake(f"{path}, record {record['id']!r}: {error}") from None
    return sheet(titles, rows)


def sheet_row(record, image, distorted, config):
    """Of an MFPO record: the image with its regions, the distorted image, the words."""
    regions = record.get("regions", [])
    for region in regions:
        data.check(region, {"word": str, "box": list})
        x0, y0, x1, y1 = region["box"]
        box = x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)  # what a box ends with lies outside of it
        ImageDraw.Draw(image).rectangle(box, outline="red", width=max(1, max(image.size) // 96))
    words = ", ".join(region["word"] for region in regions) or "none"
    lines = {
        "keywords": ", ".join(record.get("keywords", [])),
        "chosen": record["chosen"],
        "rejected": f"{record['rejected']} ({record.get('rejected_from', 'given')})",
        "negative": record.get("negative", "unknown"),
        "region": f"{record.get('region_kind', 'unknown')}: {words}",
    }
    return (image, distorted), [(who, text, ()) for who, text in lines.items()]


def attack_row(record, image, attacked, config):
    """Of an MBPO record: the image, the attacked one, their difference, and both answers."""
    image, attacked = (to_square(picture, attacked.width, config.pad) for picture in (image, attacked))
    change = np.asarray(attacked).astype(int) - np.asarray(image)
    larger = Image.fromarray((128 + FACTOR * change).clip(0, 255).astype(np.uint8))
    chosen, mined = record["chosen"], record["rejected"]
    red = {word for word in mined.split() if build_data.is_new_word(word, chosen)}
    lines = ("chosen", chosen, ()), ("mined", mined, red), ("attack", attack_of(record), ())
    return (image, attacked, larger), lines


def attack_of(record):
    """What was done to the image of an MBPO record."""
    attack = record.get("attack")
    data.check(attack, {"kind": str, "eps": float})
    return (
        f"{attack['kind']} t={attack['t']}" if "t" in attack else f"{attack['kind']}, eps {attack['eps'] * 255:.3g}/255"
    )


def story(config):
    """Scenes as MFPO distorts them and as the records of --attacked have them (MBPO's attack, or another negative), and
    what models say of them, as a sheet. All ranks call it.
    """
    folder, path, source = Path(config.data), Path(config.attacked), f"{config.data}/{config.split}.jsonl"
    scenes = {scene["image"]: scene for scene in data.read_lines(source)}
    pairs = data.read_lines(folder / f"mfpo_{config.split}.jsonl")
    distorted = {pair["image"]: pair["image_rejected"] for pair in pairs}
    first = data.read_records(path, data.PAIR_FIELDS)[0]
    field = "image_rejected" if "image_rejected" in first else "image_attacked"
    mined = data.read_records(path, data.PAIR_FIELDS | {field: str})
    mined = [record for record in mined if record["image"] in scenes.keys() & distorted.keys()][:100]
    if path.parent.resolve() != folder.resolve() or not mined:
        build = f"--source {source} --out {folder}/attacked.jsonl --iig_keep 1 --questions 0"
        raise Mistake(f"--attacked {path}: no scenes of --data. Mine them: python build_data.py mbpo {build}")
    asked = [(record["image"], record["question"]) for record in mined]
    said, rows = [], []
    for name in (config.base, *config.models):
        said.append(eval.answer(hub.load(name, trained=False), folder, asked, 64, f"captions of {name}"))
    names = "truth", "before", "attacked", *(f"after {Path(name).parent.name}" for name in config.models)
    for record, before, *after in zip(mined, *said, strict=True):
        kinds, lines = {o["word"] for o in scenes[record["image"]]["objects"]}, []
        for who, text in zip(names, (record["chosen"], before, record["rejected"], *after), strict=True):
            marks = zip(text.split(), eval.marked(text, kinds).split(), strict=True)
            if who != "attacked" or field == "image_attacked":  # else no model said it
                lines.append((who, text, {word for word, marked in marks if word != marked}))
        if lines[1][2]:  # the base invents something
            files = record["image"], distorted[record["image"]], record[field]
            rows.append(([data.load_image(data.image_path(folder, file)) for file in files], lines))
    if not rows:
        raise Mistake(f"--base {config.base} invents nothing in the scenes of {path}: nothing to show")
    other = f"attacked: {attack_of(mined[0])}" if field == "image_attacked" else f"{mined[0]['region_kind']}: "
    other += mined[0]["negative"] if field == "image_rejected" else ""
    titles = "image", "key regions noised", other, "in red what is not there"
    return sheet(titles, rows[: config.rows])


def curve_panels(runs):
    """Metrics over the number that runs' names begin with: a dot a seed, a line through the means, a colour for what
    follows the number (of 0.44_ddpm_400 "ddpm"), the base's mean dashed. Undefined values become nan: not drawn.

    runs {name: {seed: summary}};   returns  a panel a metric: (title, [(label, xs, ys, matplotlib's format)])
    """
    groups, panels = {}, []
    for name, by_seed in runs.items():
        if number := re.match(r"(\d+\.?\d*)_?(.*)", name):
            group = groups.setdefault(re.sub(r"[_\d]+$", "", number[2]), [])
            group += [(float(number[1]), summary) for summary in by_seed.values()]
    if not groups:
        raise Mistake("--runs: no run's name begins with a number, as 0.44_ddpm_400-0. Name yours so")
    numbers = [x for group in groups.values() for x, _ in group]
    for metric in CURVES:
        base = np.array([summary.get(metric) for summary in runs["base"].values()], float).mean()
        lines = [("base", [min(numbers), max(numbers)], [base, base], "k--")]
        for colour, (label, group) in enumerate(sorted(groups.items())):
            dots = np.array([(x, summary.get(metric)) for x, summary in group], float)  # (N, 2)
            xs = np.unique(dots[:, 0])
            means = [dots[dots[:, 0] == x, 1].mean() for x in xs]
            lines += [(None, *dots.T, f"C{colour}."), (label, xs, means, f"C{colour}-")]
        panels.append((eval.METRICS[metric][0], lines))
    return panels


def margin_panel(folder):
    """An MFPO run's margins over its steps, means over SMOOTH of them, as a panel (`curve_panels`)."""
    steps, lines = data.read_lines(Path(folder) / "metrics.jsonl"), []
    for name in ("text_margin", "image_margin"):
        if not steps or not all(isinstance(step, dict) and name in step for step in steps):
            remedy = "A run with --image_weight 1e-9 measures image margins and trains nothing with them"
            raise Mistake(f"--runs {folder}: its metrics.jsonl has no {name!r}, or is cut off. {remedy}")
        over = min(SMOOTH, len(steps))
        means = np.convolve([step[name] for step in steps], np.full(over, 1 / over), "valid").tolist()
        xs = [step["step"] for step in steps[over - 1 :]]
        lines.append((f"{name.replace('_', ' ')} (nats)", xs, means, "-"))
    return f"{folder}, means over {SMOOTH} steps", lines


def plot(panels, **options):
    """Panels side by side, a matplotlib figure; Mistake without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise Mistake("curves and margins are drawn by matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(4 * len(panels), 3), dpi=120, layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, **options)[0]
    for axis, (title, lines) in zip(axes, panels, strict=True):
        for label, xs, ys, form in lines:
            axis.plot(xs, ys, form, label=label)
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    return figure


COMMANDS = {"sheet": RecordsConfig, "attack": RecordsConfig, "story": StoryConfig}
COMMANDS |= dict.fromkeys(("curves", "margins"), RunsConfig)


def main():
    """Draw on all ranks, for story is answered by all; rank 0 saves."""
    command, config = runtime.parse_command(__doc__, COMMANDS)
    runtime.start()
    if command == "sheet":
        titles = "image, its regions", "distorted", "record"
        save = record_sheet(config, titles, "image_rejected", sheet_row).save
    elif command == "attack":
        titles = "image", "attacked", f"difference x {FACTOR}", "in red what the chosen answer does not say"
        save = record_sheet(config, titles, "image_attacked", attack_row).save
    elif command == "curves":
        save = plot(curve_panels(eval.read_runs(*config.runs))).savefig
    elif command == "margins":
        save = plot([margin_panel(folder) for folder in config.runs], sharey=True).savefig
    else:
        save = story(config).save
    if runtime.rank() == 0:
        save(config.out)
        print(f"wrote {config.out}")


if __name__ == "__main__":
    runtime.run(main)
