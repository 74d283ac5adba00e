"""
Pictures: contact sheets of distortions and attacks, curves over runs and steps, attention over an image.

They get what is to be drawn and draw it with Pillow: nothing here measures anything or asks a model.
"""

import re
import textwrap

import numpy as np
from PIL import Image, ImageDraw

from data import image_path, load_image
from model import to_pixels


def write_words(pen, at, right, words, red):
    """Write words from `at` (x, y), broken before `right`, those in red for which `red` holds. Returns the next y."""
    (left, y), x = at, at[0]
    for word, is_red in zip(words, red, strict=True):
        width = pen.textlength(word + " ", font_size=15)
        if x + width > right:
            x, y = left, y + 20
        pen.text((x, y), word, fill="red" if is_red else "black", font_size=15)
        x += width
    return y + 20


def draw_sheet(rows, folder, path, zoom=192):
    """A contact sheet, a row a record: the image with its regions, the distorted image, the words."""
    sheet = Image.new("RGB", (2 * zoom + 30 + 620, len(rows) * (zoom + 10) + 10), "white")
    pen = ImageDraw.Draw(sheet)
    for i, row in enumerate(rows):
        top = 10 + i * (zoom + 10)
        for column, name in enumerate((row["image"], row["image_rejected"])):
            image = load_image(image_path(folder, name))
            scale = zoom / max(image.size)
            how = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
            shown = image.resize([max(1, round(s * scale)) for s in image.size], how)
            sheet.paste(shown, (10 + column * (zoom + 10), top))
            if column == 0:
                for region in row["regions"]:
                    x0, y0, x1, y1 = (v * scale for v in region["box"])
                    pen.rectangle([10 + x0, top + y0, 10 + x1, top + y1], outline="red", width=2)
        lines = [
            f"keywords  {', '.join(row['keywords'])}",
            f"chosen    {row['chosen']}",
            f"rejected  {row['rejected']}  ({row['rejected_from']})",
            f"noise     {row['region_kind']}, {row['noise']['schedule']} t={row['noise']['t']}; regions: "
            + (", ".join(region["word"] for region in row["regions"]) or "none"),
        ]
        text = "\n".join(textwrap.fill(line, 88, max_lines=3, placeholder=" ...") for line in lines)
        pen.multiline_text((2 * zoom + 40, top), text, fill="black", font_size=14)
    sheet.save(path)


def draw_attacks(rows, folder, path, pad, is_new, zoom=192, factor=20):
    """
    A contact sheet, a row a record: the image, the attacked image, their difference `factor` times as large around
    grey, and both answers, with the words of the mined one in red for which is_new(word, chosen answer) holds.
    """
    sheet = Image.new("RGB", (3 * (zoom + 10) + 640, len(rows) * (zoom + 10) + 10), "white")
    pen = ImageDraw.Draw(sheet)
    for i, row in enumerate(rows):
        top = 10 + i * (zoom + 10)
        attacked = load_image(image_path(folder, row["image_attacked"]))
        clean = to_pixels(load_image(image_path(folder, row["image"])), attacked.width, pad)
        clean = (clean * 255).round().byte().permute(1, 2, 0).numpy()
        change = np.asarray(attacked).astype(int) - clean
        magnified = Image.fromarray((128 + factor * change).clip(0, 255).astype(np.uint8))
        for column, image in enumerate((Image.fromarray(clean), attacked, magnified)):
            shown = image.resize((zoom, zoom), Image.Resampling.NEAREST)
            sheet.paste(shown, (10 + column * (zoom + 10), top))
        left, y = 3 * (zoom + 10) + 20, top
        eps = round(row["attack"]["eps"] * 255, 2)
        sizes = f"{row['attack']['kind']}, eps {eps:g}/255; third picture: difference x {factor}"
        for title, text in (("chosen", row["chosen"]), ("mined", row["rejected"]), ("attack", sizes)):
            red = [title == "mined" and is_new(word, row["chosen"]) for word in text.split()]
            y = write_words(pen, (left, y), sheet.width - 10, [f"{title}:", *text.split()], [False, *red]) + 16
    sheet.save(path)


def draw_runs(runs, path, titles, keys=("chair_s", "recall", "image_margin", "information_gain")):
    """
    Curves over runs whose names begin with a number, as those of runs/noise_sweep.sh: a panel a metric, a dot a seed,
    a line through the means of each group of names (what follows the number, digits aside), the base's in grey.

    runs   {name: {seed: {metric: value}}};   titles  {metric: what to call it}
    """
    groups, width, height = {}, 360, 240
    for name, by_seed in runs.items():
        if number := re.match(r"(\d+\.?\d*)_?(.*)", name):
            label = re.sub(r"[_\d]+$", "", number[2])
            groups.setdefault(label, []).append((float(number[1]), list(by_seed.values())))
    if not groups:
        raise ValueError("--plot: no run has a name that begins with a number, as 0.44_ddpm_400-0")
    sheet = Image.new("RGB", (len(keys) * (width + 70) + 30, height + 90), "white")
    pen = ImageDraw.Draw(sheet)
    xs = [x for points in groups.values() for x, _ in points]
    for panel, key in enumerate(keys):
        left, top = 60 + panel * (width + 70), 40
        base = [summary[key] for summary in runs["base"].values() if summary[key] is not None]
        drawn = base + [s[key] for points in groups.values() for _, many in points for s in many if s[key] is not None]
        low, high = min(drawn), max(drawn)
        low, high = low - 0.05 * (high - low or 1), high + 0.05 * (high - low or 1)

        def at(x, y, left=left, top=top, low=low, high=high):
            across = (x - min(xs)) / (max(xs) - min(xs) or 1)
            return left + across * width, top + height - (y - low) / (high - low) * height

        pen.rectangle([left, top, left + width, top + height], outline="black")
        title = f"{titles.get(key, key)} over the number in the runs' names"
        pen.text((left, top - 26), title, fill="black", font_size=16)
        pen.line([at(min(xs), np.mean(base)), at(max(xs), np.mean(base))], fill="grey", width=2)
        pen.text((left + 6, at(0, np.mean(base))[1] + 3), "base", fill="grey", font_size=13)
        for value in (low, (low + high) / 2, high):
            pen.text((left - 6, at(0, value)[1]), f"{value:.2f}", fill="black", font_size=12, anchor="rm")
        for x in sorted({min(xs), max(xs), *(round(x, 1) for x in xs)}):
            if min(xs) <= x <= max(xs):
                pen.text((at(x, low)[0], top + height + 6), f"{x:g}", fill="black", font_size=12, anchor="ma")
        for colour, (label, points) in zip(("blue", "red", "green", "orange"), sorted(groups.items()), strict=False):
            points = sorted((x, [s[key] for s in many if s[key] is not None]) for x, many in points)
            if len(points) > 2:
                pen.line([at(x, np.mean(many)) for x, many in points if many], fill=colour, width=2)
            for x, many in points:
                for value in many:
                    across, down = at(x, value)
                    pen.ellipse([across - 3, down - 3, across + 3, down + 3], outline=colour)
            pen.text(
                (left + 60 + 90 * sorted(groups).index(label), top + height + 28), label, fill=colour, font_size=14
            )
    sheet.save(path)


def draw_maps(records, folder, grids, path, names, word, square, zoom=192):
    """
    A row a record: the image, then the attention of the base and of the trained model over it, red where it is
    strongest; both on one scale.

    grids   of each model, its maps;   names  of the models;   square  brings an image to the shape that they see
    """
    sheet = Image.new("RGB", (3 * (zoom + 10) + 420, len(records) * (zoom + 10) + 30), "white")
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(("image", *names)):
        pen.text((10 + column * (zoom + 10), 5), title, fill="black", font_size=14)
    for i, record in enumerate(records):
        top = 30 + i * (zoom + 10)
        image = load_image(image_path(folder, record["image"]))
        image = square(image).resize((zoom, zoom), Image.Resampling.NEAREST)
        sheet.paste(image, (10, top))
        brightest = max(found[i].max() for found in grids)
        for column, found in enumerate(grids, 1):
            heat = Image.fromarray((found[i] / brightest * 255).astype(np.uint8))
            heat = heat.resize((zoom, zoom), Image.Resampling.BICUBIC)
            faded = Image.blend(image.convert("L").convert("RGB"), Image.new("RGB", image.size, "white"), 0.4)
            sheet.paste(
                Image.composite(Image.new("RGB", image.size, "red"), faded, heat), (10 + column * (zoom + 10), top)
            )
            share = f"{found[i].sum():.2f} on the image"
            pen.text((14 + column * (zoom + 10), top + zoom - 18), share, fill="black", font_size=13)
        text = textwrap.fill(f"when about to say {word!r} in: {record['chosen']}", 52)
        pen.multiline_text((3 * (zoom + 10) + 20, top), text, fill="black", font_size=14)
    sheet.save(path)


def draw_margins(runs, path, width=380, height=260):
    """
    Text and image reward margins over the steps of some runs, a panel each, all on one scale, as means over 10 steps:
    MFPO's fairness figure.

    runs   {title: [{"step", "text_margin", "image_margin", ...}, ...]}, nats of reward (beta * log-ratio), a step each
    """
    sheet = Image.new("RGB", (len(runs) * (width + 50) + 60, height + 90), "white")
    pen = ImageDraw.Draw(sheet)
    sides = {"text_margin": "blue", "image_margin": "red"}

    def smooth(values, over=10):
        return np.convolve(values, np.ones(over) / over, "valid") if len(values) >= over else np.array(values)

    lines = {t: {side: smooth([s[side] for s in steps]) for side in sides} for t, steps in runs.items()}
    drawn = np.concatenate([line for of_run in lines.values() for line in of_run.values()])
    low, high = min(0.0, drawn.min()), max(drawn.max(), 1e-6)
    for panel, (title, of_run) in enumerate(lines.items()):
        left, top = 50 + panel * (width + 50), 40
        pen.rectangle([left, top, left + width, top + height], outline="black")
        pen.text((left, top - 26), title, fill="black", font_size=16)
        for value in (low, (low + high) / 2, high):
            down = top + height - (value - low) / (high - low) * height
            pen.text((left - 6, down), f"{value:.1f}", fill="black", font_size=12, anchor="rm")
        last = f"to step {runs[title][-1]['step']}, means over 10"
        pen.text((left + width, top + height + 6), last, fill="black", font_size=12, anchor="ra")
        for k, (side, colour) in enumerate(sides.items()):
            line = of_run[side]
            across = left + np.linspace(0, width, len(line))
            down = top + height - (line - low) / (high - low) * height
            pen.line(list(zip(across.tolist(), down.tolist(), strict=True)), fill=colour, width=2)
            pen.text((left + 4 + 130 * k, top + height + 24), side.replace("_", " "), fill=colour, font_size=14)
    sheet.save(path)


def draw_story(rows, folder, path, attack, zoom=160):
    """
    The front page, a row a scene: the image, the same with its key regions noised (MFPO), the same attacked (MBPO), and
    what models say.

    rows     {"images": three names in `folder`, "said": [(who, text, red: a bool for each word of text), ...]}
    attack   title of the third column
    """
    titles = ("the image", "key regions noised", attack, "what is said; in red what is not there")
    sheet = Image.new("RGB", (3 * (zoom + 10) + 640, len(rows) * (zoom + 10) + 30), "white")
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        pen.text((10 + column * (zoom + 10), 6), title, fill="black", font_size=15)
    for i, row in enumerate(rows):
        top = 30 + i * (zoom + 10)
        for column, name in enumerate(row["images"]):
            image = load_image(image_path(folder, name)).resize((zoom, zoom), Image.Resampling.NEAREST)
            sheet.paste(image, (10 + column * (zoom + 10), top))
        y = top
        for who, text, red in row["said"]:
            pen.text((3 * (zoom + 10) + 10, y), who, fill="black", font_size=15)
            y = write_words(pen, (3 * (zoom + 10) + 130, y), sheet.width - 10, text.split(), red) + 4
    sheet.save(path)
