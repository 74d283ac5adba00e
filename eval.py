"""
Checkpoint in, table out.

    python eval.py --model out/mfpo-1/final --base data/toy/base --data data/toy
    python eval.py --runs out/mfpo_ablation             a table over finished runs, mean and interval over seeds
    python eval.py --mined data/toy-0,data/toy-1        what attacks made the base models say (runs/mbpo_attack.sh)
    python eval.py --compare out/a/final out/b/final    two models and their paired difference
    python eval.py --attention look.png --word spoon    where base and model look when they say it
    python eval.py --margins m.png out/text out/mfpo    text and image margins over the steps of MFPO runs
    python eval.py --story s.png --compare A B --attacked mined.jsonl       what is said before and after
    python eval.py --bench chair --answers a.jsonl --objects o.jsonl --synonyms s.txt       public benchmarks: scores.py
    torchrun ... eval.py --bench pope --model M --questions q.jsonl --images val2014 --answers a.jsonl     answers first

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

import dataclasses
import functools
import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import data
import draw
import losses
import model
import runtime
import scores
import sources
import toy
from runtime import knob
from scores import harmonic, in_form, is_right, ratio, yes_or_no

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
            blank = data.pack(clean, blank).to(policy.mean.device)
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
    draws = [values_of(arrays, rng.integers(count, size=count)) for _ in range(scores.RESAMPLES)]

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
SHORT_OF = {key: title for title, key in SHORT.items()}
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # 97.5 %, n - 1


def mean_text(values, digits):
    """Mean over seeds with its 95 % interval by Student's t; undefined if one of them is."""
    if None in values:
        return "undefined"
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    half = STUDENT[min(len(values), 10)] * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{np.mean(values):.{digits}f} ± {half:.{digits}f}"


def read_runs(folder):
    """The runs <folder>/<name>-<seed> as {name: {seed: summary}}, oldest first, the base models' as "base"."""
    found = {}
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
    return found


def runs_text(folder):
    """A Markdown table over the runs in a folder: mean over seeds with its 95 % interval (Student's t)."""
    lines = ["| | seeds | " + " | ".join(SHORT) + " |", "|---" * (len(SHORT) + 2) + "|"]
    for name, by_seed in read_runs(folder).items():
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


# ------------------------------------------------------------------------------------------- public benchmarks

# How each benchmark asks: the field of the question or the question itself, what is added to it, new tokens at most.
# objhal: the script of RLHF-V has 3 beams. amber: the suffix is ours, for its yes/no answers must be just that.
ASKED = {
    "chair": ("Please describe this image in detail.", "", 512),
    "objhal": ("Please describe this image in detail.", "", 1024),
    "pope": ("text", f"\n{sources.SHORT_PROMPT}", 128),
    "closed": ("question", "", 16),  # build_data.py has put the suffix into the question
    "amber": ("query", f"\n{sources.SHORT_PROMPT}", 512),
    "mmhal": ("question", "", 512),
}


def benchmark_items(config):
    """The items that a model has to answer, each with "id", "image" and "prompt"; checked."""
    field, suffix, _ = ASKED[config.bench]
    if config.bench in ("chair", "objhal"):
        found = scores.chair_items(config)
    elif config.bench == "pope":
        found = scores.pope_items(config)
    elif config.bench == "closed":
        found = scores.closed_items(config)
    elif config.bench == "amber":
        if not config.questions:
            raise ValueError("--questions is needed: name AMBER's query_all.json; --annotations says what is true")
        found = scores.amber_items(config)
    else:
        check = scores.field_check(question=str, image_src=str)
        lines = scores.read_list("--questions", config.questions, config.skip_bad, lambda r: check({"id": 0, **r}))
        lines = enumerate(lines)
        found = {str(n): (where, {**item, "image": Path(item["image_src"]).name}) for n, (where, item) in lines}
    file = config.objects if config.bench in ("chair", "objhal") else config.questions
    folder = Path(config.images or Path(file).parent)
    items, dropped = [], Counter()
    for key, (where, item) in found.items():
        try:
            if not isinstance(item.get("image"), str):
                message = "field 'image' is missing. To answer, a model needs each item's image. Add it"
                raise data.BadRecord("'image' missing", message)
            if not data.image_path(folder, item["image"]).is_file():
                raise data.BadRecord("image missing", f"no image {folder / item['image']}. Name its folder as --images")
        except data.BadRecord as error:
            if not config.skip_bad:
                raise ValueError(f"{where}: {error}") from None
            dropped[error.reason] += 1
            continue
        asked = item.get("question", field) if config.bench in ("chair", "objhal") else item[field]
        add = "" if item.get("type") == "generative" or asked.endswith(suffix) else suffix
        items.append({**item, "id": item.get("question_id", item.get("id", key)), "prompt": asked + add})
    for reason, count in dropped.items():
        print(f"{file}: {count} not answered: {reason}")
    if not items:
        raise ValueError(f"{file}: no item has its image in {folder}. Name the images' folder as --images")
    return items, folder


def answer_benchmark(config):
    """
    Answer a benchmark with a model, greedily, into --answers in the form that its official script reads. All ranks
    call it; what is done lies in <answers>.parts, so that it can be stopped and goes on.
    """
    items, folder = runtime.first_alone(lambda: benchmark_items(config))
    limit = config.max_new_tokens or ASKED[config.bench][2]
    place = functools.partial(runtime.shard, device=runtime.device())
    policy = model.load(config.model, convention=config.convention, trained=False, place=place).eval()
    out, parts = Path(config.answers), Path(config.answers).with_suffix(".parts")

    def begin():
        mark = model.fingerprint(policy, runtime.device(), folder, [{"items": items}])
        names = ("bench", "model", "max_new_tokens", "batch")
        runtime.open_parts(parts, {name: getattr(config, name) for name in names} | {"fingerprint": mark})

    def answered(pick):
        chosen = [items[i] for i in pick]
        pixels = model.load_pixels(policy, folder, [item["image"] for item in chosen]).to(policy.mean.device)
        encode = functools.partial(data.encode_prompt, policy.tokenizer)
        prompts = [encode(item["prompt"], policy.template, policy.image_tokens) for item in chosen]
        texts, ended = policy("generate", pixels, prompts, limit)
        return [{"answer": text, "ended": end} for text, end in zip(texts, ended, strict=True)]

    def finish(lines):
        lines = list(lines)
        texts, cut = [line["answer"] for line in lines], sum(not line["ended"] for line in lines)
        if config.bench == "amber":  # an answer that says neither stays as it is, and so counts as wrong
            yes_no = [bool({"yes", "no", "not"} & set(re.findall(r"\w+", text.lower()))) for text in texts]
            plain = [item["type"] == "generative" or not known for item, known in zip(items, yes_no, strict=True)]
            names = [text if keep else yes_or_no(text) for text, keep in zip(texts, plain, strict=True)]
            answers = [{"id": item["id"], "response": name} for item, name in zip(items, names, strict=True)]
            runtime.write_text(out, json.dumps(answers, indent=1))
        elif config.bench == "mmhal":
            keep = [{k: v for k, v in item.items() if k not in ("id", "image", "prompt")} for item in items]
            answers = [{**item, "model_answer": text} for item, text in zip(keep, texts, strict=True)]
            runtime.write_text(out, json.dumps(answers, indent=1))
        else:
            name = "question_id" if config.bench == "pope" else "id"
            runtime.write_jsonl(out, [{name: i["id"], "answer": t} for i, t in zip(items, texts, strict=True)])
        runtime.discard(parts)
        print(f"wrote {out}: {len(texts)} answers of {config.model}; {cut} were cut at {limit} new tokens")

    out.parent.mkdir(parents=True, exist_ok=True)
    runtime.first_alone(begin)
    with torch.no_grad(), runtime.summoned(policy):
        lines = runtime.in_parts(parts, "answers", config.bench, range(len(items)), config.batch, answered)
    runtime.first_alone(lambda: finish(lines))


def benchmark(config):
    """`eval.py --bench`: answer, if a model is named; score; compare."""
    if config.model:
        answer_benchmark(config)
    if runtime.rank() > 0:
        return
    settings = {name: getattr(config, name) for name in ("bench", "answers", "questions", "objects", "synonyms")}
    settings |= {"annotations": config.annotations, "judged": config.judged, "judge": config.judge}
    settings |= {"model": config.model, "max_new_tokens": config.max_new_tokens or ASKED[config.bench][2]}
    if not config.model:
        del settings["max_new_tokens"]  # whoever answered knows
    score = scores.BENCHMARKS[config.bench]
    if config.bench == "mmhal" and not config.judged and not config.compare:
        if not Path(config.answers).is_file():
            raise ValueError(f"--answers {config.answers}: no such file. Name --model to answer, or --judged to score")
        print(
            f"next: let a judge rate {config.answers}, then eval.py --bench mmhal --judged <its answers> --judge <name>"
        )
        return
    if config.compare:
        files = "judged" if config.bench == "mmhal" else "answers"
        both = [score(dataclasses.replace(config, **{files: path})) for path in config.compare]
        if len(both[0].rows) != len(both[1].rows):
            raise ValueError(f"--compare {' '.join(config.compare)}: answers to different questions. Answer the same")
        print(scores.compare_table(*both, config.compare))
        found = {name: [list(pair) for pair in cells] for name, cells in scores.compared(*both).items()}
        report = {"compare": config.compare, "a_b_difference": found, "settings": settings}
    else:
        counts = score(config)
        print(scores.table(counts, settings))
        report = scores.summary(counts, settings)
    if config.json:
        runtime.write_text(config.json, json.dumps(report, indent=2))
        print(f"wrote {config.json}")


# ----------------------------------------------------------------------------------------- attention on the image


def word_in(policy, record, word):
    """The number of the first token of `word` in the record's chosen answer, and its row; None if it is not there."""
    settings = (policy.tokenizer, policy.template, policy.image_tokens, math.inf)
    found = re.search(rf"\b{re.escape(word)}\b", record["chosen"], re.IGNORECASE)
    if not found:
        return None
    row = data.chosen_row(record, *settings)
    before = record["chosen"][: found.start()].strip()
    if not before:
        return 0, row
    return len(data.chosen_row({**record, "chosen": before}, *settings).answers[0]) - 1, row  # without the end


def draw_attention(config, place, count=100, drawn=5):
    """
    A sheet of the first records whose chosen answer has --word: the image, and where the base and the trained model
    look when they are about to say it. Returns means over up to `count` records, as text.
    """
    path = Path(config.questions or f"{config.data}/{config.split}.jsonl")
    folder = Path(config.images or path.parent)
    records, maps = None, []
    for name in (config.base, config.model):
        policy = model.load(name, convention=config.convention, trained=False, place=place).eval()
        if records is None:
            check = scores.field_check(**dict.fromkeys(("id", "image", "question", "chosen"), str))
            lines = scores.read_list("--questions", path, config.skip_bad, check)
            records = [record for _, record in lines if word_in(policy, record, config.word)][:count]
            if not records:
                raise ValueError(f"{path}: no record's 'chosen' holds the word {config.word!r}. Name another --word")
        found = []
        for record in records:
            at, row = word_in(policy, record, config.word)
            pixels = model.load_pixels(policy, folder, [record["image"]]).to(policy.mean.device)
            with torch.no_grad(), runtime.summoned(policy):
                found.append(policy("attention", pixels, row, at))
        maps.append(found)
    grids = [[grid for grid, _ in found] for found in maps]
    names = f"base: {Path(config.base).name}", f"final: {Path(config.model).name}"
    draw.draw_maps(
        records[:drawn], folder, grids, config.attention, names, config.word,
        lambda image: model.to_square(image, policy.image_size, policy.pad),
    )  # fmt: skip
    shares = {name: [grid.sum() for grid in found] for name, found in zip(("base", "final"), grids, strict=True)}
    lines = [f"attention when about to say {config.word!r}, mean over layers, heads and {len(records)} records"]
    for name, found in zip(("base", "final"), maps, strict=True):
        on_image = np.mean(shares[name])
        in_box = [
            share_in_boxes(grid, record, config.word, folder, policy)
            for (grid, _), record in zip(found, records, strict=True)
        ]
        in_box = [share for share in in_box if share is not None]
        told = f", {np.mean(in_box):.3f} of that in the boxes of {config.word!r}" if in_box else ""
        logp = np.mean([value for _, value in found])
        lines.append(
            f"    {name:6} on the image {on_image:.3f}{told}; log-probability of the word's first token {logp:.3f}"
        )
    return "\n".join(lines)


def share_in_boxes(grid, record, word, folder, policy):
    """The share of a map's attention that lies in the record's boxes of the word; None if it has none."""
    known = [*record.get("objects", []), *record.get("regions", [])]
    boxes = [o["box"] for o in known if isinstance(o, dict) and str(o.get("word")).lower() == word.lower()]
    if not boxes:
        return None
    size = data.load_image(data.image_path(folder, record["image"])).size
    mask = Image.new("L", size, 0)
    for box in boxes:
        mask.paste(255, [round(v) for v in box])
    mask = model.to_square(mask, policy.image_size, policy.pad, 0, Image.Resampling.BOX)
    covered = np.asarray(mask.resize(grid.shape, Image.Resampling.BOX)) / 255
    return float((grid * covered).sum() / grid.sum())


@dataclass
class Config:
    model: str = knob("", "checkpoint to evaluate; with --bench: to answer with, empty: --answers are there already")
    base: str = knob("data/toy/base", "the model before training, for the margins and the comparison")
    data: str = knob("data/toy", "folder of the built-in world")
    split: str = knob("test", "val | test; tune on val only")
    convention: str = knob("", "how the model sees and is asked: original | hub; empty: what its folder says")
    json: str = knob("", "also write the numbers here")
    runs: str = knob("", "instead: the table over the runs <name>-<seed> in this folder, mean and interval over seeds")
    plot: str = knob("", "runs: also draw those whose names begin with a number as curves, into this PNG")
    mined: str = knob("", "instead: the table over attack_*.jsonl in these toy folders, separated by commas")
    bench: str = knob("", f"instead: a public benchmark, {' | '.join(ASKED)}")
    answers: str = knob("", "bench: answers, {id, answer} a line; with --model they are written here first")
    questions: str = knob("", "bench: the benchmark's own file of questions; attention: records with the word")
    objects: str = knob(
        "", "bench chair, objhal: {id, objects, captions} a line; image and question too, to answer them"
    )
    synonyms: str = knob("", "bench chair, objhal: the synonym file of CHAIR")
    annotations: str = knob("", "bench amber: its annotations.json")
    judged: str = knob("", "bench mmhal: the judge's answers")
    judge: str = knob("", "bench mmhal: the judge's name: scores of different judges cannot be compared")
    images: str = knob("", "folder of the images; empty: that of the file that names them")
    max_new_tokens: int = knob(0, "bench: longest answer; 0: the benchmark's own")
    batch: int = knob(32, "bench: answers at a time")
    skip_bad: bool = knob(False, "bench: leave bad records and what has no answer out, counted, instead of stopping")
    compare: list[str] = dataclasses.field(
        default_factory=list,
        metadata={"help": "two checkpoints, or with --bench two files of answers, side by side with their difference"},
    )
    margins: list[str] = dataclasses.field(
        default_factory=list,
        metadata={"help": "instead: a PNG and finished MFPO runs, whose text and image margins are drawn into it"},
    )
    story: str = knob("", "instead: draw scenes and what --base and the models of --compare say, into this PNG")
    attacked: str = knob("", "story: records mined from the scenes of --split (build_data.py mbpo)")
    attention: str = knob("", "instead: draw where --base and --model look when they say --word, into this PNG")
    word: str = knob("", "attention: the word")

    def __post_init__(self):
        if self.split not in ("val", "test"):
            raise ValueError(f"--split {self.split!r}: use val or test")
        if self.bench and self.bench not in ASKED:
            raise ValueError(f"--bench {self.bench!r}: use one of {', '.join(ASKED)}")
        if self.compare and (len(self.compare) != 2 or (self.bench and (self.model or self.skip_bad))):
            raise ValueError(
                "--compare takes two, and in a benchmark neither --model nor --skip_bad: same questions for both"
            )
        if self.bench and not self.answers and not self.compare and not (self.bench == "mmhal" and self.judged):
            raise ValueError("--answers is needed: a file of answers, or with --model the file to write them to")
        if self.attention and not (self.word and self.attention.endswith(".png")):
            raise ValueError("--attention needs a file that ends in .png and a --word to look for")
        if min(self.max_new_tokens, self.batch - 1) < 0:
            raise ValueError("--max_new_tokens must not be negative, --batch must be positive")
        if self.plot and not (self.runs and self.plot.endswith(".png")):
            raise ValueError("--plot needs --runs and a file that ends in .png")
        if self.story and not (self.story.endswith(".png") and len(self.compare) == 2 and self.attacked):
            raise ValueError("--story needs a file that ends in .png, --compare with two models, and --attacked")
        if self.margins and not (self.margins[0].endswith(".png") and len(self.margins) > 1):
            raise ValueError("--margins needs a file that ends in .png and runs, as --margins m.png out/mfpo-1")
        places = [("margins", path) for path in self.margins[:1]]
        for name, path in places + [(name, getattr(self, name)) for name in ("json", "plot", "attention", "story")]:
            if path and (Path(path).is_dir() or not Path(path).parent.is_dir()):
                raise ValueError(f"--{name} {path}: is a folder, or lies in none. Name another file")
        model.check_convention(self.convention)
        if not self.bench and not self.model:
            self.model = "out/mfpo-1/final"


def compare_text(config, place):
    """Two checkpoints on the built-in world, side by side with the paired difference."""
    measured = {}
    for name, path in (("base", config.base), *(zip(("A", "B"), config.compare, strict=True))):
        runtime.say(f"{name}: {path}")
        policy = model.load(path, convention=config.convention, trained=False, place=place).eval()
        measured[name] = measure(policy, config.data, config.split)
    count = len(measured["A"]["scenes"])
    taken = scores.draws(count)
    both = [counts_of(measured[name], measured["base"]) for name in ("A", "B")]
    one, two = ({key: taken @ values for key, values in arrays.items()} for arrays in both)
    lines, found = [f"{'':31}" + "".join(f"{name:>28}" for name in ("A", "B", "B - A"))], {}
    for name in (name for name in TABLE if name in METRICS):
        drawn = METRICS[name](one), METRICS[name](two), METRICS[name](two) - METRICS[name](one)
        found[name] = [scores.with_interval(d) for d in drawn]
        lines.append(f"{TABLE[name]:31}" + "".join(f"{scores.cell(*each):>28}" for each in found[name]))
    if config.json and runtime.rank() == 0:
        runtime.write_text(config.json, json.dumps({"compare": config.compare, "a_b_difference": found}, indent=2))
        lines.append(f"wrote {config.json}")
    return "\n".join([*lines, f"95 % intervals by bootstrap over the same {count} scenes for both"])


def draw_story(config, place, count=5):
    """The first scenes in which the base invents something and that were attacked: what each model says of them."""
    folder, mined_at = Path(config.data), Path(config.attacked)
    distorted = {r["image"]: r["image_rejected"] for _, r in data.read_jsonl(folder / f"mfpo_{config.split}.jsonl")}
    scenes = {r["image"]: r for _, r in data.read_jsonl(folder / f"{config.split}.jsonl")}
    mined = [r for _, r in data.read_jsonl(mined_at) if isinstance(r, dict) and "image_attacked" in r]
    mined = [r for r in mined if r["image"] in distorted and r["image"] in scenes]
    if mined_at.parent.resolve() != folder.resolve() or not mined:
        raise ValueError(
            f"--attacked {mined_at}: mines no scene of {folder}/{config.split}.jsonl. Build it: build_data.py mbpo "
            f"--source {folder}/{config.split}.jsonl --out {folder}/attacked.jsonl --iig_keep 1 --questions 0"
        )
    mined, said = mined[:100], {}
    for path in (config.base, *config.compare):
        policy = model.load(path, convention=config.convention, trained=False, place=place).eval()
        rows = [(k, r["question"]) for k, r in enumerate(mined)]
        pixels = model.load_pixels(policy, folder, [r["image"] for r in mined])
        said[path] = answer_all(policy, pixels, rows, 64, f"captions of {path}")
    shown = []
    for k, record in enumerate(mined):
        kinds = {o["word"] for o in scenes[record["image"]]["objects"]}
        if "[" not in marked(said[config.base][k], kinds) or len(shown) == count:
            continue
        lines = [
            ("truth", record["chosen"]),
            ("before", said[config.base][k]),
            ("  if attacked", record["rejected"]),
        ]
        lines += [(f"after {Path(path).parent.name}", said[path][k]) for path in config.compare]
        told = [(who, text, ["[" in word for word in marked(text, kinds).split()]) for who, text in lines]
        images = record["image"], distorted[record["image"]], record["image_attacked"]
        shown.append({"images": images, "said": told})
    if not shown:
        raise ValueError(f"--story: {config.base} invents nothing in the scenes of {mined_at}: nothing to show")
    eps = f"attacked, eps {mined[0]['attack']['eps'] * 255:.3g}/255"
    if runtime.rank() == 0:
        draw.draw_story(shown, folder, config.story, eps)
    return f"wrote {config.story}"


def draw_margins(path, *folders):
    """Text and image reward margins over the steps of finished MFPO runs, into the PNG `path`."""
    runs = {}
    for folder in map(Path, folders):
        steps = [line for _, line in data.read_jsonl(folder / "metrics.jsonl")] if folder.is_dir() else []
        if not steps or any(isinstance(line, data.BadRecord) for line in steps):
            raise ValueError(f"--margins {folder}: holds no whole metrics.jsonl, so no finished run. Name another")
        runs[str(folder)] = steps
        if "image_margin" not in steps[0]:
            raise ValueError(
                f"--margins: {folder} measured no image margin. A run with --image_weight 1e-9 does, and trains "
                "nothing with it"
            )
    draw.draw_margins(runs, path)
    print(f"wrote {path}")


def main():
    config = runtime.parse_config(Config, description=__doc__)
    if config.margins:
        draw_margins(*config.margins)
        return
    if config.runs:
        print(runs_text(config.runs))
        if config.plot:
            draw.draw_runs(read_runs(config.runs), config.plot, SHORT_OF)
            print(f"wrote {config.plot}")
        return
    device = runtime.start()
    place = functools.partial(runtime.shard, device=device)
    if config.bench:
        benchmark(config)
        return
    if config.mined:
        runtime.say(mined_text(config.mined.split(","), place))
        return
    if config.attention:
        runtime.say(draw_attention(config, place) + f"\nwrote {config.attention}")
        return
    if config.story:
        runtime.say(draw_story(config, place))
        return
    if config.compare:
        runtime.say(compare_text(config, place))
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
