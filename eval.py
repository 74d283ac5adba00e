"""
Checkpoint in, table out.

    python eval.py table --model out/mfpo-1/final --base data/toy/base --data data/toy
    python eval.py table --model out/run/final --base llava-hf/llava-1.5-7b-hf --pairs data/rlhfv/mfpo_heldout.jsonl
    python eval.py compare out/a/final out/b/final      two models and their paired difference
    python eval.py runs out/mfpo_ablation               one row a run, mean and interval over seeds; --less NAME: paired
    python eval.py mined data/toy-0 data/toy-1          what attacks made the base models say (runs/mbpo_attack.sh)

reads    <data>/<split>.jsonl, scenes; <data>/mfpo_<split>.jsonl, pairs; <data>/closed_<split>.jsonl, questions. With
         --pairs any MFPO records, for the rows about pairs
writes   the table, some captions before and after with the invented words in [brackets], and --json

    CHAIR_s     captions that name an object that is not there / captions            (Rohrbach et al. 2018)
    CHAIR_i     such mentions / all mentions                recall   objects named / objects there
    object F1   harmonic mean of 1 - CHAIR_i and recall: CHAIR alone is gamed by saying little
    exact       captions that name just the objects that are there, each in its colour
    yes/no      Is there a X? random: X absent at random; adversarial: X the partner of a present object (POPE)
    closed      closed-ended questions answered rightly, by the rules that also give MBPO's rewards (rewards.py)
    margins     nats, log-ratio differences of policy and base on held-out pairs, not multiplied by beta
    info gain   nats per token, how much the image helps to say the true caption (MBPO)

Every figure has a 95 % interval: a bootstrap over scenes or pairs; in `runs` and `mined` Student's t over seeds.
"""

import dataclasses
import gc
import json
import math
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import data
import hub
import losses
import model
import runtime
import tables
import toy
from rewards import in_form, is_right, yes_or_no
from runtime import Mistake, knob, say
from tables import ratio

# -------------------------------------------------------------------------------------------- what is counted


def kinds_in(text):
    """The kinds of objects that a text names."""
    return {kind for _, kind in toy.mentions(text)}


def caption_counts(caption, objects):
    """What is counted in one caption, as floats: whatever is added here can be a row of the table below.
    `objects` are the [(colour, kind)] that are there; `wrong` and `mentions` count repeats.
    """
    said, kinds = toy.mentions(caption), {kind for _, kind in objects}
    wrong = [kind for _, kind in said if kind not in kinds]
    return {
        "captions": 1.0,
        "hallucinated": float(bool(wrong)),
        "wrong": float(len(wrong)),
        "mentions": float(len(said)),
        "hits": float(len(kinds_in(caption) & kinds)),
        "kinds": float(len(kinds)),
        "exact": float(sorted(said) == sorted(objects)),
        "words": float(len(caption.split())),
    }


def object_f1(s):
    """Harmonic mean of 1 - CHAIR_i and recall, from sums; nan where both are 0 or one is nan."""
    right, recall = 1 - ratio(s["wrong"], s["mentions"]), ratio(s["hits"], s["kinds"])
    return ratio(2 * right * recall, right + recall)


def mean_fairness(s):
    """losses.fairness of the two mean margins, from sums."""
    text, image = (torch.as_tensor(ratio(s[f"{side}_margin"], s["pairs"])) for side in ("text", "image"))
    return losses.fairness(text, image).numpy()


RANDOM, ADVERSARIAL = tables.yes_no_metrics("random_"), tables.yes_no_metrics("adversarial_")
# A row of the table is one entry: name -> (title, column in the table over runs or "", value): a pair is sum
# over sum of what caption_counts and its like count, else a function of the sums.
METRICS = {
    "chair_s": ("CHAIR_s (lower is better)", "CHAIR_s", ("hallucinated", "captions")),
    "chair_i": ("CHAIR_i (lower is better)", "CHAIR_i", ("wrong", "mentions")),  # nan if nothing was named at all
    "recall": ("recall", "recall", ("hits", "kinds")),
    "object_f1": ("object F1", "obj. F1", object_f1),
    "exact": ("exact captions", "exact", ("exact", "captions")),
    "words": ("words per caption", "", ("words", "captions")),
    "pope_random": ("yes/no accuracy, random", "y/n rand.", RANDOM["accuracy"]),
    "pope_random_f1": ("yes/no F1, random", "", RANDOM["f1"]),
    "pope_random_yes": ("yes ratio, random", "", RANDOM["yes_ratio"]),
    "pope_adversarial": ("yes/no accuracy, adversarial", "y/n adv.", ADVERSARIAL["accuracy"]),
    "pope_adversarial_f1": ("yes/no F1, adversarial", "y/n adv. F1", ADVERSARIAL["f1"]),
    "pope_adversarial_yes": ("yes ratio, adversarial", "", ADVERSARIAL["yes_ratio"]),
    "closed": ("closed-ended accuracy", "closed", ("closed_right", "closed_asked")),
    "closed_yesno": ("  yes/no", "", ("yesno_right", "yesno_asked")),
    "closed_choice": ("  which of four", "", ("choice_right", "choice_asked")),
    "closed_number": ("  how many", "", ("number_right", "number_asked")),
    "closed_word": ("  what colour", "", ("word_right", "word_asked")),
    "closed_in_form": ("closed-ended, in the asked form", "", ("closed_in_form", "closed_asked")),
}
PAIR_METRICS = {
    "text_margin": ("text margin (nats)", "text margin", ("text_margin", "pairs")),
    "image_margin": ("image margin (nats)", "image margin", ("image_margin", "pairs")),
    "text_margin_positive": ("pairs with text margin > 0", "", ("text_margin_positive", "pairs")),
    "image_margin_positive": ("pairs with image margin > 0", "", ("image_margin_positive", "pairs")),
    "fairness": ("fairness", "fairness", mean_fairness),
    "chosen_shift": ("shift of chosen logp (nats)", "chosen", ("chosen_shift", "pairs")),
    "information_gain": ("information gain (nats/token)", "info gain", ("information_gain", "pairs")),
}
METRICS |= PAIR_METRICS

# -------------------------------------------------------------------------------------------------- measuring


@dataclass
class Yardstick:
    """What models are measured on: pairs, and with a split the scenes of the built-in world that they are of."""

    folder: Path
    pairs: Path
    split: str = ""


def yardstick(data_path, split):
    """What a run on `data_path` is measured on: scenes, else the pairs held out beside it, else None."""
    if split == "none":
        return None
    folder, held = data_path.parent, data_path.with_stem(f"{data_path.stem}_heldout")
    pairs = folder / f"mfpo_{split}.jsonl"
    if not (pairs.is_file() or held.is_file()):
        say(f"no table: {folder} holds neither {pairs.name}, of the built-in world, nor {held.name}")
        return None
    return Yardstick(folder, pairs, split) if pairs.is_file() else Yardstick(folder, held)


def answer(policy, folder, asked, max_new_tokens, title, images=None):
    """Greedy answers to `asked`, [(image name, question)], as text, on every rank."""

    def load(some):
        pixels = model.load_pixels(policy, folder, [name for name, _ in some], images)
        return pixels.to(policy.mean.device), [policy.encoding.prompt(question) for _, question in some]

    with runtime.summoned(policy):
        work = lambda loaded: policy.generate(*loaded, max_new_tokens)[0]  # noqa: E731
        return runtime.over_records(title, asked, 100, load, work)


def pair_scores(policy, pairs, folder):
    """Of held-out pairs under `policy`, (N, 4) float64: nats of y_w and y_l given the image and of y_w given the
    distorted image, and the information gain of y_w over the image filled with the mean colour, nats per token.
    """
    encoding = dataclasses.replace(policy.encoding, max_length=math.inf)

    def load(some):
        rows = encoding.rows(some, folder, "chosen", "rejected")
        blank = policy.mean.expand(len(some), 3, policy.image_size, policy.image_size)
        chosen = [data.Row(row.prefix, row.answers[:1]) for row in rows]
        return model.pair_batch(policy, some, rows, folder), data.pack(chosen, blank).to(policy.mean.device)

    def score(loaded):
        packed, blank = loaded
        token_logp = policy.logps(packed).unflatten(0, (-1, 3))  # (B, 3, T)
        blank_logp = policy.logps(blank)  # (B, T of chosen)
        chosen = token_logp[:, 0, : blank_logp.shape[1]]
        gain = losses.information_gain(chosen, blank_logp, blank.answer_mask)
        return torch.cat([token_logp.sum(2), gain[:, None]], 1).double().tolist()

    with runtime.summoned(policy):
        return np.array(runtime.over_records("scoring pairs", pairs, 64, load, score))


def measure(policy, stick):
    """Everything a table needs of one model: pair scores and, of scenes, captions and answers. None without a stick."""
    if stick is None:
        return None
    folder, split, images = stick.folder, stick.split, {}
    pairs = data.read_records(stick.pairs, data.MFPO_FIELDS)
    made = {"stick": stick, "pairs": pairs, "scores": pair_scores(policy, pairs, folder)}
    if not split:
        return made
    scenes = data.read_records(folder / f"{split}.jsonl", data.SOURCE_FIELDS | {"objects": list, "asked": list})
    closed = data.read_records(folder / f"closed_{split}.jsonl", data.QUESTION_FIELDS)
    images_of = {s["image"] for s in scenes}
    if [r["id"] for r in pairs] != [s["id"] for s in scenes] or not {q["image"] for q in closed} <= images_of:
        built = f"mfpo_{split}.jsonl or closed_{split}.jsonl was not built from {split}.jsonl"
        raise Mistake(f"{folder}: {built}. Delete both")
    described = [(s["image"], s["question"]) for s in scenes]
    asked = [(s["image"], question["question"]) for s in scenes for question in s["asked"]]
    questions = [(question["image"], question["question"]) for question in closed]
    return made | {
        "scenes": scenes,
        "captions": answer(policy, folder, described, 60, "captions", images),
        "answers": answer(policy, folder, asked, 4, "yes/no", images),
        "closed": closed,
        "closed_answers": answer(policy, folder, questions, 16, "closed-ended", images),
    }


def counts_of(measured, base):
    """tables.Counts of a measured model, a row a scene (or pair). `base` is the measured reference model."""
    h = measured["scores"] - base["scores"]  # log-ratios of y_w | m, y_l | m, y_w | m'
    rows = []
    for (chosen, rejected, distorted, _), (*_, gain) in zip(h, measured["scores"], strict=True):
        row = {"pairs": 1.0, "text_margin": chosen - rejected, "image_margin": chosen - distorted}
        row |= {f"{name}_positive": float(row[name] > 0) for name in ("text_margin", "image_margin")}
        rows.append(row | {"chosen_shift": chosen, "information_gain": gain})
    stick, kinds = measured["stick"], Counter()
    for pair in measured["pairs"]:
        kinds[f"{pair.get('negative', 'image_rejected')} ({pair.get('region_kind', 'region not told')})"] += 1
    notes = [f"image pairs of {stick.pairs}: " + ", ".join(f"{kind} {n}" for kind, n in kinds.most_common(3))]
    metrics = {k: (title, value) for k, (title, _, value) in (METRICS if stick.split else PAIR_METRICS).items()}
    if not stick.split:
        return tables.Counts(rows, metrics, notes, unit="pairs")
    answers, at = iter(measured["answers"]), {}
    zero = {f"{k}_{n}": 0.0 for k in ("closed", *data.QUESTION_KINDS) for n in ("asked", "right", "in_form")}
    zero |= {name: 0.0 for split in ("random", "adversarial") for name in tables.yes_no("", "", f"{split}_")}
    for i, (scene, caption) in enumerate(zip(measured["scenes"], measured["captions"], strict=True)):
        objects = [(o["colour"], o["word"]) for o in scene["objects"]]
        at[scene["image"]] = rows[i] = Counter(rows[i] | caption_counts(caption, objects) | zero)
        for question in scene["asked"]:
            rows[i].update(tables.yes_no(question["answer"], yes_or_no(next(answers)), f"{question['split']}_"))
    for question, text in zip(measured["closed"], measured["closed_answers"], strict=True):
        counts = {"asked": 1, "right": is_right(text, question), "in_form": in_form(text, question)}
        for name in ("closed", question["kind"]):
            at[question["image"]].update({f"{name}_{key}": float(value) for key, value in counts.items()})
    return tables.Counts(rows, metrics, notes, unit="scenes")


# ---------------------------------------------------------------------------------------------------- showing


def report(measured):
    """{"base": measured, "final": measured} -> the text of the table, and eval.json's numbers {name: summary}."""
    counts = {name: counts_of(one, measured["base"]) for name, one in measured.items()}
    numbers = {name: tables.summary(one) for name, one in counts.items()}
    text, split = tables.table(counts["base"], numbers), measured["base"]["stick"].split
    if split:
        text = f"{samples_text(measured)}\n\n{text}"
    for summary in numbers.values():
        summary |= {"split": split or "heldout", "scenes": len(counts["base"].rows)}
    return text, numbers


def marked(caption, kinds):
    """The caption with the names of objects that are not in `kinds` in [brackets]."""
    absent, text = set(toy.KINDS) - kinds, " ".join(caption.split())
    return re.sub(r"\w+", lambda word: f"[{word[0]}]" if word[0] in absent else word[0], text)


def samples_text(measured, count=4):
    """Some captions of each model side by side, those first in which the base model invents something."""
    samples = []
    for i, scene in enumerate(measured["base"]["scenes"]):
        kinds = {o["word"] for o in scene["objects"]}
        captions = {name: marked(one["captions"][i], kinds) for name, one in measured.items()}
        lines = [f"    {name:6} {text}" for name, text in ({"truth": scene["chosen"]} | captions).items()]
        samples.append(("[" not in captions["base"], i, "\n".join([scene["image"], *lines])))
    return "\n".join(text for *_, text in sorted(samples)[:count])


def finish(policy, run, before, stick, base, contrast):
    """What both trainers end with, once `final/` is written: table, eval.json, the next command. All ranks call it."""
    say(f"wrote {run}/final")
    if stick:
        text, numbers = report({"base": before, "final": measure(policy.eval(), stick)})
        say(f"\n{text}\n")
        runtime.first_alone(lambda: runtime.write_text(run / "eval.json", json.dumps(numbers, indent=2)))
        say(f"wrote {run}/eval.json")
    folder, method = Path(base).parent, contrast.removeprefix("train_").split(".py")[0]
    if (folder / "world.json").is_file():  # of the built-in world
        say(f"next: torchrun {contrast}\n      bash runs/{method}_ablation.sh")
        say(f"      python eval.py table --model {run}/final --base {base} --data {folder} --split val")
    else:
        answers = f"--answers {run}/pope.jsonl --questions <POPE's lines> --images <COCO's val2014>"
        say(f"next: python -m extras.benchmarks pope --model {run}/final {answers}")


STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # 97.5 %, n - 1


def mean_text(values, digits):
    """Mean over seeds with its 95 % interval by Student's t; undefined if one of them is."""
    if None in values:
        return "undefined"
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    half = STUDENT[min(len(values), 10)] * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{np.mean(values):.{digits}f} ± {half:.{digits}f}"


def over_seeds(head, columns, rows):
    """A Markdown table of means: `head` and `columns`, {name: title}, above `rows`, {(cells below `head`):
    [{name: value} of each seed]}. What no seed has is left empty.
    """
    lines = [f"| {' | '.join([*head, *columns.values()])} |", "|---" * len([*head, *columns]) + "|"]
    for first, seeds in rows.items():
        cells = [str(cell) for cell in first]
        for name in columns:
            nats = name in PAIR_METRICS and name != "fairness"
            values = [seed[name] for seed in seeds if name in seed]
            cells.append(mean_text(values, 2 if nats else 3) if values else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def read_runs(*folders):
    """The runs <folder>/<name>-<seed> as {name: {seed: summary}}, oldest first, the base models' as "base"."""
    runs, paths = {}, [path for folder in folders for path in Path(folder).glob("*-*/eval.json")]
    for path in sorted(paths, key=lambda path: path.stat().st_mtime):
        name, seed = path.parent.name.rsplit("-", 1)
        summaries = json.loads(path.read_text())
        runs.setdefault("base", {})[seed] = summaries["base"]
        runs.setdefault(name, {})[seed] = summaries["final"]
    if not runs:
        raise Mistake(f"runs {' '.join(map(str, folders))}: no <name>-<seed>/eval.json there. Train runs there first")
    splits = {summary["split"] for by_seed in runs.values() for summary in by_seed.values()}
    if len(splits) > 1:
        raise Mistake(f"runs: these mix the splits {', '.join(sorted(splits))}. Keep them in separate folders")
    return runs


def runs_text(*folders, less=""):
    """A Markdown table over runs, a row each; with `less` also what each is more than the run of that name, by seed."""
    columns, rows = {name: column for name, (_, column, _) in METRICS.items() if column}, {}
    runs = read_runs(*folders)
    if less and less not in runs:
        raise Mistake(f"--less {less}: no such run. There are {', '.join(runs)[:150]}")
    for run, by_seed in runs.items():
        # Without scenes there are no values of theirs: they are told as undefined.
        rows[run, len(by_seed)] = [dict.fromkeys(columns) | summary for summary in by_seed.values()]
    for run, by_seed in runs.items() if less else ():
        pairs = [
            (by_seed[seed], runs[less][seed]) for seed in by_seed if seed in runs[less] and run not in (less, "base")
        ]
        known = [name for name in columns if all(pair.get(name) is not None for both in pairs for pair in both)]
        if pairs:
            rows[f"{run} less {less}", len(pairs)] = [{name: a[name] - b[name] for name in known} for a, b in pairs]
    return over_seeds(["", "seeds"], columns, rows)


MINED = {  # value -> column of the table over attacks
    "chair_s": "names an absent object", "adds": "adds one", "absent": "absent objects an answer", "recall": "recall",
    "object_f1": "object F1", "fall": "fall of the true answer", "kept": "kept",
}  # fmt: skip


def mined_values(truths, answers, clean):
    """What answers name beside their true captions. `absent`: kinds named wrongly, a mean over answers;
    `adds`: the share that name an absent kind which the same model's answer to the clean image does not name.
    """
    sums = Counter()
    for truth, answer, before in zip(truths, answers, clean, strict=True):
        wrong = kinds_in(answer) - kinds_in(truth)
        sums.update(caption_counts(answer, toy.mentions(truth)))
        sums.update(absent=len(wrong), adds=bool(wrong - kinds_in(before)))
    values = {name: float(tables.value_of(METRICS[name][2], sums)) for name in ("chair_s", "recall", "object_f1")}
    return values | {name: sums[name] / len(truths) for name in ("absent", "adds")}


def mined_text(*folders):
    """A Markdown table of what attacks made the base models say: <folder>/attack_*.jsonl (build_data.py mbpo), a
    folder a seed, beside the same models' answers to the clean images. Dropped answers count too.
    """
    rows, others = defaultdict(list), ("_dropped", "_closed")  # (attack, eps x 255) -> values of each folder
    for folder in map(Path, folders):
        files = [path for path in sorted(folder.glob("attack_*.jsonl")) if not path.stem.endswith(others)]
        if not files:
            raise Mistake(f"mined {folder}: no attack_*.jsonl in it. Mine some: bash runs/mbpo_attack.sh")
        clean, policy = {}, hub.load(folder / "base", trained=False)  # clean: id -> answer to the clean image
        for path in files:
            good, dropped = (data.read_lines(path.with_stem(path.stem + suffix)) for suffix in ("", "_dropped"))
            lines = sorted(good + dropped, key=lambda line: line["id"])
            truths = [line["chosen"] for line in lines]
            if not clean:
                said = answer(policy, folder, [(line["image"], line["question"]) for line in lines], 60, "clean")
                clean = dict(zip((line["id"] for line in lines), said, strict=True))
                rows["none", 0].append(mined_values(truths, said, said))
            if set(clean) != {line["id"] for line in lines}:
                raise Mistake(f"{path}: other records than {files[0]}. Mine both from one source with --iig_keep 1")
            values = mined_values(truths, [line["rejected"] for line in lines], list(clean.values()))
            values |= {"fall": float(np.mean([line["fall"] for line in lines])), "kept": len(good) / len(lines)}
            attack = lines[0]["attack"]
            rows[attack["kind"], round(attack["eps"] * 255)].append(values)
    return over_seeds(["attack", "eps x 255"], MINED, dict(sorted(rows.items())))


# ------------------------------------------------------------------------------------------------------- main


@dataclass
class FoldersConfig:
    paths: list[str] = field(default_factory=list, metadata={"help": "before all flags: folders, or two checkpoints"})

    def __post_init__(self):
        if not self.paths:
            raise Mistake("name folders, as in: eval.py runs out/mfpo_ablation, eval.py mined data/toy-0")


@dataclass
class RunsConfig(FoldersConfig):
    less: str = knob("", "name of a run: also print what each other is more, paired by seed")


@dataclass
class TableConfig:
    model: str = knob("out/mfpo-1/final", "checkpoint to evaluate")
    base: str = knob("data/toy/base", "the model before training")
    data: str = knob("data/toy", "folder of the built-in world")
    split: Literal["test", "val"] = knob("test", "its scenes; tune on val only")
    pairs: str = knob("", "instead: any MFPO records, for margins, fairness and information gain on them")
    convention: Literal["", "original", "hub"] = knob("", "how the model sees and is asked; empty: its folder's own")
    json: str = knob("", "also write the numbers here")

    def __post_init__(self):
        if self.json and (Path(self.json).is_dir() or not Path(self.json).parent.is_dir()):
            raise Mistake(f"--json {self.json}: is a folder, or lies in none. Name another file")


@dataclass
class CompareConfig(TableConfig, FoldersConfig):
    def __post_init__(self):
        TableConfig.__post_init__(self)
        if len(self.paths) != 2:
            raise Mistake("compare takes two checkpoints: python eval.py compare out/a/final out/b/final")


def measured_models(config, **paths):
    """{name: measured} of models by name, each loaded in turn."""
    pairs, folder, measured = Path(config.pairs), Path(config.data), {}
    builtin = Yardstick(folder, folder / f"mfpo_{config.split}.jsonl", config.split)
    stick = Yardstick(pairs.parent, pairs) if config.pairs else builtin
    for name, path in paths.items():
        say(f"{name}: {path}")
        measured[name] = measure(hub.load(path, convention=config.convention, trained=False), stick)
        gc.collect()  # on a GPU a policy refers to itself, and would stay in memory beside the next
    return measured


def main():
    """One of the commands: what it found is printed, and with --json also written."""
    commands = {"table": TableConfig, "compare": CompareConfig, "runs": RunsConfig, "mined": FoldersConfig}
    name, config = runtime.parse_command(__doc__, commands, MOVED)
    runtime.start()
    if name in ("runs", "mined"):
        say(runs_text(*config.paths, less=config.less) if name == "runs" else mined_text(*config.paths))
        return
    if name == "table":
        text, numbers = report(measured_models(config, base=config.base, final=config.model))
    else:
        measured = measured_models(config, base=config.base, A=config.paths[0], B=config.paths[1])
        a, b = (counts_of(measured[name], measured["base"]) for name in "AB")
        text, cells = tables.compare_table(a, b, "AB")
        numbers = {"compare": config.paths, "a_b_difference": cells}
    say(text)
    if config.json:
        runtime.first_alone(lambda: runtime.write_text(config.json, json.dumps(numbers, indent=2)))
        say(f"wrote {config.json}")


MOVED = {"--bench": "python -m extras.benchmarks pope (or chair, amber, ...)", "--runs": "python eval.py runs FOLDER",
         "--mined": "python eval.py mined FOLDERS", "--compare": "python eval.py compare A B",
         "--margins": "python -m extras.pictures margins", "--story": "python -m extras.pictures story",
         "--plot": "python -m extras.pictures curves", "--attention": "nothing: the maps showed little"}  # fmt: skip

if __name__ == "__main__":
    runtime.run(main)
