"""
Checkpoint in, table out.

    python eval.py --model out/mfpo-1/final --base data/toy/base --data data/toy
    python eval.py --runs out/mfpo_ablation             a table over finished runs, mean and interval over seeds
    python eval.py --mined data/toy-0,data/toy-1        what attacks made the base models say (runs/mbpo_attack.sh)

reads    <data>/<split>.jsonl, scenes with objects, a question and yes/no questions; <data>/mfpo_<split>.jsonl, pairs;
         <data>/closed_<split>.jsonl, closed-ended questions
writes   the table, some captions before and after with the invented words in [brackets], and --json

    CHAIR_s     captions that name an object that is not there / captions            (Rohrbach et al. 2018)
    CHAIR_i     such mentions / all mentions                recall   objects named / objects there
    object F1   harmonic mean of 1 - CHAIR_i and recall: CHAIR alone is gamed by saying little
    exact       captions that name just the objects that are there, each in its colour
    yes/no      Is there a X? random: X absent at random; adversarial: X the partner of a present object (POPE)
    closed      closed-ended questions answered rightly: yes/no (a third of all about partners), which of four
                is there, how many, what colour; read from the text by the rules that also give MBPO's rewards
    margins     nats, log-ratio differences of policy and base on held-out pairs, not multiplied by beta
    info gain   nats per token, how much the image helps to say the true caption (MBPO)

Every figure has a 95 % bootstrap interval over scenes.
"""

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import losses
import model
import runtime
import toy
from runtime import knob
from scores import harmonic, in_form, is_right, ratio, yes_or_no

RESAMPLES = 1000


# -------------------------------------------------------------------------------------------- measuring


def caption_counts(caption, objects):
    """
    What CHAIR counts in one caption, as floats.

    objects   [(colour, kind)] that are there
    returns   hallucinated (0 or 1), wrong and all mentions (repeats counted), kinds named rightly, kinds there,
              exact (0 or 1), words
    """
    said, kinds = toy.mentions(caption), {kind for _, kind in objects}
    wrong = [kind for _, kind in said if kind not in kinds]
    return {
        "captions": 1.0,
        "hallucinated": float(bool(wrong)),
        "wrong": float(len(wrong)),
        "mentions": float(len(said)),
        "hits": float(len({kind for _, kind in said} & kinds)),
        "kinds": float(len(kinds)),
        "exact": float(sorted(said) == sorted(objects)),
        "words": float(len(caption.split())),
    }


def yesno_counts(answers, truths, prefix):
    """Confusion counts of POPE, yes being positive, as floats; `prefix` names the split."""
    counts = dict.fromkeys(("asked", "tp", "fp", "fn", "tn"), 0.0)
    for answer, truth in zip(answers, truths, strict=True):
        said = yes_or_no(answer)
        counts["asked"] += 1
        counts[("t" if said == truth else "f") + ("p" if said == "Yes" else "n")] += 1
    return {f"{prefix}_{name}": value for name, value in counts.items()}


METRICS = {  # name -> value from sums over scenes
    "chair_s": lambda s: ratio(s["hallucinated"], s["captions"]),
    "chair_i": lambda s: ratio(s["wrong"], s["mentions"]),  # nan if nothing was named at all
    "recall": lambda s: ratio(s["hits"], s["kinds"]),
    "object_f1": lambda s: harmonic(1 - METRICS["chair_i"](s), METRICS["recall"](s)),
    "exact": lambda s: ratio(s["exact"], s["captions"]),
    "words": lambda s: ratio(s["words"], s["captions"]),
}
for _split in ("random", "adversarial"):
    METRICS |= {
        f"pope_{_split}": lambda s, p=_split: ratio(s[f"{p}_tp"] + s[f"{p}_tn"], s[f"{p}_asked"]),
        f"pope_{_split}_f1": lambda s, p=_split: ratio(
            2 * s[f"{p}_tp"], 2 * s[f"{p}_tp"] + s[f"{p}_fp"] + s[f"{p}_fn"]
        ),
        f"pope_{_split}_yes": lambda s, p=_split: ratio(s[f"{p}_tp"] + s[f"{p}_fp"], s[f"{p}_asked"]),
    }
METRICS["closed"] = lambda s: ratio(
    *(sum(s[f"closed_{kind}_{n}"] for kind in data.QUESTION_KINDS) for n in ("right", "asked"))
)
METRICS["closed_in_form"] = lambda s: ratio(
    s["closed_in_form"], sum(s[f"closed_{kind}_asked"] for kind in data.QUESTION_KINDS)
)
METRICS |= {
    f"closed_{kind}": lambda s, k=kind: ratio(s[f"closed_{k}_right"], s[f"closed_{k}_asked"])
    for kind in data.QUESTION_KINDS
}
MEANS = ("text_margin", "image_margin", "text_margin_positive", "image_margin_positive", "chosen_shift",
         "information_gain")  # fmt: skip
METRICS |= {name: lambda s, n=name: ratio(s[n], s["captions"]) for name in MEANS}


def answer_all(policy, pixels, asked, max_new_tokens, title, batch=100):
    """Greedy answers to `asked`, [(index into pixels, question)], as text; this rank's share, gathered."""
    answers = []
    mine = runtime.my_share(asked)
    with torch.no_grad(), runtime.summoned(policy):
        for i in tqdm(range(0, len(mine), batch), title, leave=False, disable=runtime.rank() > 0):
            chunk = mine[i : i + batch]
            prompts = [data.encode_prompt(policy.tokenizer, q, policy.template, policy.image_tokens) for _, q in chunk]
            images = pixels[[index for index, _ in chunk]].to(policy.mean.device)
            answers += policy("generate", images, prompts, max_new_tokens)[0]
    return runtime.gather(answers)


def pair_scores(policy, pairs, folder, batch=64):
    """
    Log-probabilities of held-out pairs under `policy`: {name: (N,) float64 array}.

    chosen, rejected, distorted   nats: y_w and y_l given the image, y_w given the distorted image
    information_gain              nats per token, of y_w over the image filled with the mean colour
    """
    scores = []
    mine = runtime.my_share(pairs)
    with torch.no_grad(), runtime.summoned(policy):
        for i in tqdm(range(0, len(mine), batch), "scoring pairs", leave=False, disable=runtime.rank() > 0):
            chunk = mine[i : i + batch]
            _, rows = data.encode_records(
                data.mfpo_rows, chunk, folder, policy.tokenizer, policy.template, policy.image_tokens, math.inf
            )
            packed = model.pair_batch(policy, chunk, rows, folder)
            token_logp = policy("logps", packed).view(len(chunk), 3, -1)  # (B, 3, T)
            blank = policy.mean.expand(len(chunk), 3, policy.image_size, policy.image_size)
            clean = [data.Row(pair[0].prefix, pair[0].answers[:1]) for pair in rows]
            blank = data.pack(clean, blank, policy.pad_id).to(policy.mean.device)
            blank_logp = policy("logps", blank)  # (B, T of chosen)
            gain = losses.information_gain(token_logp[:, 0, : blank_logp.shape[1]], blank_logp, blank.answer_mask)
            scores += torch.cat([token_logp.sum(2), gain[:, None]], 1).double().tolist()
    table = np.array(runtime.gather(scores))  # (N, 4)
    return dict(zip(("chosen", "rejected", "distorted", "information_gain"), table.T, strict=True))


def measure(policy, folder, split):
    """Everything a table needs of one model: captions, yes/no answers and pair scores on a split of the toy world."""
    folder = Path(folder)
    fields = {"id": str, "image": str, "question": str, "chosen": str, "objects": list, "asked": list}
    scenes = data.read_records(folder / f"{split}.jsonl", fields)
    pairs = data.read_records(folder / f"mfpo_{split}.jsonl", data.MFPO_FIELDS)
    closed = data.read_records(folder / f"closed_{split}.jsonl", data.QUESTION_FIELDS)
    if [r["id"] for r in pairs] != [r["id"] for r in scenes]:
        raise ValueError(f"{folder}/mfpo_{split}.jsonl: was not built from {split}.jsonl (other ids). Delete it")
    if not {q["image"] for q in closed} <= {r["image"] for r in scenes}:
        raise ValueError(f"{folder}/closed_{split}.jsonl: was not built from {split}.jsonl (other images). Delete it")
    pixels = model.load_pixels(policy, folder, [s["image"] for s in scenes])
    described = [(i, scene["question"]) for i, scene in enumerate(scenes)]
    questions = [(i, asked["question"]) for i, scene in enumerate(scenes) for asked in scene["asked"]]
    scene_of = {scene["image"]: i for i, scene in enumerate(scenes)}
    closed = [{**question, "scene": scene_of[question["image"]]} for question in closed]
    closed_asked = [(question["scene"], question["question"]) for question in closed]
    return {
        "split": split,
        "scenes": scenes,
        "captions": answer_all(policy, pixels, described, 60, "captions"),
        "answers": answer_all(policy, pixels, questions, 4, "yes/no"),
        "closed": closed,
        "closed_answers": answer_all(policy, pixels, closed_asked, 16, "closed-ended"),
        "scores": pair_scores(policy, pairs, folder),
    }


def counts_of(measured, base):
    """Per-scene arrays {name: (N,)} whose sums make every metric. `base` is the measured reference model."""
    rows, answers = [], iter(measured["answers"])
    for scene, caption in zip(measured["scenes"], measured["captions"], strict=True):
        row = caption_counts(caption, [(o["colour"], o["word"]) for o in scene["objects"]])
        asked = [(question, next(answers)) for question in scene["asked"]]
        for split in ("random", "adversarial"):
            here = [(said, question["answer"]) for question, said in asked if question["split"] == split]
            row |= yesno_counts([said for said, _ in here], [truth for _, truth in here], split)
        rows.append(row | {f"closed_{kind}_{n}": 0.0 for kind in data.QUESTION_KINDS for n in ("asked", "right")})
        rows[-1]["closed_in_form"] = 0.0
    for question, text in zip(measured["closed"], measured["closed_answers"], strict=True):
        row, kind = rows[question["scene"]], question["kind"]
        row[f"closed_{kind}_asked"] += 1
        row[f"closed_{kind}_right"] += is_right(text, question)
        row["closed_in_form"] += in_form(text, question)
    arrays = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    h = {name: measured["scores"][name] - base["scores"][name] for name in ("chosen", "rejected", "distorted")}
    arrays["text_margin"], arrays["image_margin"] = h["chosen"] - h["rejected"], h["chosen"] - h["distorted"]
    for name in ("text_margin", "image_margin"):
        arrays[f"{name}_positive"] = (arrays[name] > 0).astype(float)
    arrays["chosen_shift"], arrays["information_gain"] = h["chosen"], measured["scores"]["information_gain"]
    return arrays


def values_of(arrays, pick):
    """Every metric over the scenes `pick` (indices, repeats allowed)."""
    sums = {name: values[pick].sum() for name, values in arrays.items()}
    values = {name: float(metric(sums)) for name, metric in METRICS.items()}
    margins = (torch.from_numpy(arrays[name][pick]) for name in ("text_margin", "image_margin"))
    return values | {"fairness": losses.fairness(*margins).item()}


def summarise(measured, base):
    """{metric: value} with {"interval": {metric: [low, high]}}, 95 % by bootstrap over scenes; nan becomes None."""
    arrays = counts_of(measured, base)
    count = len(measured["scenes"])
    rng = np.random.default_rng(0)
    values = values_of(arrays, np.arange(count))
    draws = [values_of(arrays, rng.integers(count, size=count)) for _ in range(RESAMPLES)]

    def plain(value):
        return None if math.isnan(value) else value

    def bounds(name):
        found = [draw[name] for draw in draws if not math.isnan(draw[name])]
        return [float(np.quantile(found, q)) for q in (0.025, 0.975)] if found else None

    summary = {name: plain(value) for name, value in values.items()}
    return summary | {"split": measured["split"], "scenes": count, "interval": {name: bounds(name) for name in values}}


# --------------------------------------------------------------------------------------------- showing

TABLE = {
    "chair_s": "CHAIR_s (lower is better)",
    "chair_i": "CHAIR_i (lower is better)",
    "recall": "recall",
    "object_f1": "object F1",
    "exact": "exact captions",
    "words": "words per caption",
    "pope_random": "yes/no accuracy, random",
    "pope_random_f1": "yes/no F1, random",
    "pope_random_yes": "yes ratio, random",
    "pope_adversarial": "yes/no accuracy, adversarial",
    "pope_adversarial_f1": "yes/no F1, adversarial",
    "pope_adversarial_yes": "yes ratio, adversarial",
    "closed": "closed-ended accuracy",
    "closed_yesno": "  yes/no",
    "closed_choice": "  which of four",
    "closed_number": "  how many",
    "closed_word": "  what colour",
    "closed_in_form": "closed-ended, in the asked form",
    "text_margin": "text margin (nats)",
    "image_margin": "image margin (nats)",
    "text_margin_positive": "pairs with text margin > 0",
    "image_margin_positive": "pairs with image margin > 0",
    "fairness": "fairness",
    "chosen_shift": "shift of chosen logp (nats)",
    "information_gain": "information gain (nats/token)",
}


def table_text(summaries):
    """{"base": summary, "final": summary} -> a table with intervals."""
    lines = [f"{'':31}" + "".join(f"{name:>24}" for name in summaries)]
    for key, title in TABLE.items():
        cells = []
        for summary in summaries.values():
            value, interval = summary[key], summary["interval"][key]
            cells.append("undefined" if value is None else f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]")
        lines.append(f"{title:31}" + "".join(f"{cell:>24}" for cell in cells))
    return "\n".join(lines)


def marked(caption, kinds):
    """The caption with the names of objects that are not in `kinds` in [brackets]."""
    words = []
    for word in caption.split():
        bare = word.strip(".,")
        words.append(word.replace(bare, f"[{bare}]") if bare in toy.KINDS and bare not in kinds else word)
    return " ".join(words)


def samples_text(measured, count=4):
    """Some captions of each model side by side, those first in which the first model invents something."""
    names, first = list(measured), next(iter(measured.values()))
    kinds = [{o["word"] for o in scene["objects"]} for scene in first["scenes"]]
    invents = [i for i, caption in enumerate(first["captions"]) if "[" in marked(caption, kinds[i])]
    lines = []
    for i in list(dict.fromkeys(invents + list(range(len(kinds)))))[:count]:
        lines.append(f"{first['scenes'][i]['image']}")
        lines.append(f"    {'truth':6} {first['scenes'][i]['chosen']}")
        lines += [f"    {name:6} {marked(measured[name]['captions'][i], kinds[i])}" for name in names]
    return "\n".join(lines)


SHORT = {  # column of the table over runs -> metric
    "CHAIR_s": "chair_s", "CHAIR_i": "chair_i", "recall": "recall", "obj. F1": "object_f1", "exact": "exact",
    "y/n rand.": "pope_random", "y/n adv.": "pope_adversarial", "y/n adv. F1": "pope_adversarial_f1",
    "closed": "closed", "info gain": "information_gain", "text margin": "text_margin", "image margin": "image_margin",
    "chosen": "chosen_shift", "fairness": "fairness",
}  # fmt: skip
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # 97.5 %, n - 1


def mean_text(values, digits):
    """Mean over seeds with its 95 % interval by Student's t; undefined if one of them is."""
    if None in values:
        return "undefined"
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    half = STUDENT[min(len(values), 10)] * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{np.mean(values):.{digits}f} ± {half:.{digits}f}"


def runs_text(folder):
    """A Markdown table over the runs <folder>/<name>-<seed>: mean over seeds with its 95 % interval (Student's t)."""
    found = {}  # name -> {seed: summary}
    for path in sorted(Path(folder).glob("*-*/eval.json"), key=lambda p: p.stat().st_mtime):
        name, seed = path.parent.name.rsplit("-", 1)
        try:
            summaries = json.loads(path.read_text())
            found.setdefault("base", {})[seed] = summaries["base"]
            found.setdefault(name, {})[seed] = summaries["final"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a table of train_mfpo.py ({error}). Delete it and train again") from None
    if not found:
        raise ValueError(f"--runs {folder}: no <name>-<seed>/eval.json in it. Train runs there first")
    splits = {summary["split"] for by_seed in found.values() for summary in by_seed.values()}
    if len(splits) > 1:
        raise ValueError(
            f"--runs {folder}: mixes the splits {', '.join(sorted(splits))}. Keep them in separate folders"
        )
    lines = ["| | seeds | " + " | ".join(SHORT) + " |", "|---" * (len(SHORT) + 2) + "|"]
    for name, by_seed in found.items():
        cells = []
        for key in SHORT.values():
            digits = 2 if key in ("text_margin", "image_margin", "chosen_shift", "information_gain") else 3
            cells.append(mean_text([summary.get(key) for summary in by_seed.values()], digits))
        lines.append(f"| {name} | {len(by_seed)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


MINED = {  # column of the table over attacks -> value
    "names an absent object": "chair_s", "adds one": "adds", "absent objects an answer": "absent", "recall": "recall",
    "object F1": "object_f1", "fall of the true answer": "fall", "kept": "kept",
}  # fmt: skip


def mined_values(truths, answers, clean):
    """
    What answers name that is not there and that is; what is there is what the true captions name.

    returns  CHAIR_s, recall and object F1; `absent`: kinds named wrongly, a mean over answers; `adds`: the share of
             answers that name an absent kind which the same model's answer to the clean image does not name
    """
    there, said, before = (
        [{kind for _, kind in toy.mentions(text)} for text in texts] for texts in (truths, answers, clean)
    )
    rows = [caption_counts(answer, toy.mentions(truth)) for truth, answer in zip(truths, answers, strict=True)]
    sums = {name: sum(row[name] for row in rows) for name in rows[0]}
    wrong = [b - a for a, b in zip(there, said, strict=True)]
    return {name: METRICS[name](sums) for name in ("chair_s", "recall", "object_f1")} | {
        "absent": float(np.mean([len(kinds) for kinds in wrong])),
        "adds": float(np.mean([bool(kinds - old) for kinds, old in zip(wrong, before, strict=True)])),
    }


def mined_text(folders, place):
    """
    A Markdown table of what attacks made the base models say: <folder>/attack_*.jsonl, written by build_data.py mbpo,
    a folder a seed, beside the same models' answers to the clean images. Dropped answers count too.
    """
    found = {}  # (attack, eps) -> values of each folder
    for folder in map(Path, folders):
        others = ("_dropped", "_closed")
        files = [path for path in sorted(folder.glob("attack_*.jsonl")) if not path.stem.endswith(others)]
        if not files:
            raise ValueError(f"--mined {folder}: no attack_*.jsonl in it. Mine some: bash runs/mbpo_attack.sh")
        clean = {}
        for path in files:
            kept, dropped = (
                [line for _, line in data.read_jsonl(path.with_stem(path.stem + suffix))] for suffix in ("", "_dropped")
            )
            lines = sorted(kept + dropped, key=lambda line: line["id"])
            truths = [line["chosen"] for line in lines]
            if not clean:
                policy = model.load(folder / "base", trained=False, place=place).eval()
                pixels = model.load_pixels(policy, folder, [line["image"] for line in lines])
                said = answer_all(policy, pixels, [(i, line["question"]) for i, line in enumerate(lines)], 60, "clean")
                clean = dict(zip((line["id"] for line in lines), said, strict=True))
                found.setdefault(("none", 0.0), []).append(mined_values(truths, said, said))
            if set(clean) != {line["id"] for line in lines}:
                raise ValueError(f"{path}: other records than {files[0]}. Mine both from one source with --iig_keep 1")
            values = mined_values(truths, [line["rejected"] for line in lines], list(clean.values()))
            values["fall"] = float(np.mean([line["fall"] for line in lines]))
            values["kept"] = len(kept) / len(lines)
            attack = lines[0]["attack"]
            found.setdefault((attack["kind"], attack["eps"] * 255), []).append(values)
    table = ["| attack | eps x 255 | " + " | ".join(MINED) + " |", "|---" * (len(MINED) + 2) + "|"]
    for (kind, eps), values in sorted(found.items()):
        cells = [mean_text([v[key] for v in values], 3) if key in values[0] else "" for key in MINED.values()]
        table.append(f"| {kind} | {eps:.0f} | " + " | ".join(cells) + " |")
    return "\n".join(table)


@dataclass
class Config:
    model: str = knob("out/mfpo-1/final", "checkpoint to evaluate")
    base: str = knob("data/toy/base", "the model before training, for the margins and the comparison")
    data: str = knob("data/toy", "folder of the built-in world")
    split: str = knob("test", "val | test; tune on val only")
    convention: str = knob("", "how the model sees and is asked: original | hub; empty: what its folder says")
    json: str = knob("", "also write the numbers here")
    runs: str = knob("", "instead: the table over the runs <name>-<seed> in this folder, mean and interval over seeds")
    mined: str = knob("", "instead: the table over attack_*.jsonl in these toy folders, separated by commas")

    def __post_init__(self):
        if self.split not in ("val", "test"):
            raise ValueError(f"--split {self.split!r}: use val or test")
        model.check_convention(self.convention)


def main():
    config = runtime.parse_config(Config, description=__doc__)
    if config.runs:
        print(runs_text(config.runs))
        return
    if config.json and not Path(config.json).parent.is_dir():
        raise ValueError(f"--json {config.json}: no folder {Path(config.json).parent}. Make it, or name another file")
    place = functools.partial(runtime.shard, device=runtime.start())
    if config.mined:
        runtime.say(mined_text(config.mined.split(","), place))
        return
    measured = {}
    for name, path in (("base", config.base), ("final", config.model)):
        runtime.say(f"{name}: {path}")
        policy = model.load(path, convention=config.convention, trained=False, place=place).eval()
        measured[name] = measure(policy, config.data, config.split)
    summaries = {name: summarise(found, measured["base"]) for name, found in measured.items()}
    runtime.say(samples_text(measured) + "\n\n" + table_text(summaries))
    if config.json and runtime.rank() == 0:
        runtime.write_text(config.json, json.dumps(summaries, indent=2))
        print(f"wrote {config.json}")


if __name__ == "__main__":
    runtime.run(main)
