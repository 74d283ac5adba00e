"""
Answers in, scores out: how an answer is read and what public benchmarks count. No model is needed.

    chair    CHAIR (Rohrbach et al. 2018, arXiv:1809.02156)        which named objects are not in the image
    objhal   Object HalBench (RLHF-V, arXiv:2312.00849)            the same, as rates of answers and of words
    pope     POPE (arXiv:2305.10355)                               is there a X? yes or no
    closed   closed-ended questions with a true answer             by kind and category; MME's score
    amber    AMBER (arXiv:2311.07397)                              its yes/no part; its response file
    mmhal    MMHal-Bench (arXiv:2309.14525)                        scores of a judge; its file for the judge

Each benchmark turns answers into counts, one row for each image, and its metrics are functions of the sums of these
rows: so an interval is a bootstrap over images, and the difference of two models one over the same images.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import data

RESAMPLES = 1000


def ratio(a, b):
    """a / b; nan where there is nothing to divide by. Of numbers or arrays."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    return np.where(b > 0, a / np.where(b > 0, b, 1), math.nan)[()]


def harmonic(a, b):
    """Harmonic mean; nan where both are 0 or one is nan."""
    return ratio(2 * a * b, a + b)


# ------------------------------------------------------------------------------------------ reading an answer


def yes_or_no(answer):
    """POPE's own parsing: the text before the first full stop; 'No', 'no' or 'not' as a word is no, all else yes."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "No" if {"No", "no", "not"} & set(words) else "Yes"


def plain(text):
    """Lower-case words, articles left out."""
    return " ".join(word for word in re.findall(r"\w+", text.lower()) if word not in ("a", "an", "the"))


def closed_answer(text, question):
    """
    The answer that a text gives to a closed-ended question (format: data.py), or None if it gives none or several:
    rewards are computed with these rules, and a text that names every answer must not score.

    yesno    "Yes" or "No": the one of which a word occurs
    choice   a letter, alone or in front as "B." or "(B)", or in "the answer is B"; or the letter of the option's text
    number   the only number in the text, in digits
    word     the one of "choices" that occurs; without choices the whole text, but for articles and case

    A letter with others after it ("A. B. C.") is no answer; "A. cup" is.
    """
    kind, choices = question["kind"], question.get("choices", [])
    if kind == "yesno":
        words = set(plain(text).split())
        found = [word for word, signs in (("Yes", {"yes"}), ("No", {"no", "not"})) if words & signs]
    elif kind == "choice":
        found = set(re.findall(r"(?i:the answer is) \(?([A-Z])\b", text))
        if re.match(r"\(?[A-Z](?:[.):]|$)", text.strip()):
            found = set(re.findall(r"(?<!\w)\(?([A-Z])(?:[.):]|$)", text.strip()))  # in front, and no other after it
        found = found or {data.LETTERS[i] for i, option in enumerate(choices) if plain(option) == plain(text)}
        found = [letter for letter in found if letter in data.LETTERS[: len(choices)]] if len(found) == 1 else []
    elif kind == "number":
        bare = re.sub(r"(?<=[0-9]),(?=[0-9]{3})", "", text)
        found = [digits.lstrip("0") or "0" for digits in re.findall(r"[0-9]+", bare)]
    elif choices:
        found = [choice for choice in choices if plain(choice) == plain(text)]  # "dark red" where "red" is one too
        found = found or [choice for choice in choices if f" {plain(choice)} " in f" {plain(text)} "]
    else:
        found = [plain(text)] if plain(text) else []
    return found[0] if len(found) == 1 else None


def is_right(text, question):
    """Does the text give the true answer?"""
    said, truth = closed_answer(text, question), question["answer"]
    if said is None or said == truth:
        return said == truth
    return {"number": said == (truth.lstrip("0") or "0"), "word": plain(said) == plain(truth)}.get(
        question["kind"], False
    )


def in_form(text, question):
    """Is the text an answer in the form asked for and nothing else: Yes or No, a letter, digits, so many words?"""
    said, answer = text.strip().removesuffix(".").lower(), closed_answer(text, question)
    if answer is None:
        return False
    if question["kind"] == "word":
        length = len(plain(question["answer"]).split())
        return plain(said) == plain(answer) and (bool(question.get("choices")) or len(plain(said).split()) == length)
    return said in (answer.lower(), f"({answer.lower()})")


def mme_answer(text):
    """
    MME's reading of a yes/no answer: "yes", "no" or, of anything else, "other". Case, blanks and full stops do not
    matter; a short y or n will do, else the first word says. (Its own script looks into the first four letters
    instead, so that it takes "know" and "not" for no.)
    """
    words = text.strip().lower().replace(".", "").split()
    first = words[0].strip(",;:!") if words else ""
    if words in (["y"], ["n"]):
        return {"y": "yes", "n": "no"}[first]
    return first if first in ("yes", "no") else "other"


def letter(text, choices):
    """
    The option that a text names, as LLaVA reads ScienceQA: the letter alone or in front as "B." "B)" "(B)", or in the
    one "The answer is B" of the text; else ''. Kinder than closed_answer, which must not reward "A. B. C. D.".
    """
    text, last = text.strip(), data.LETTERS[len(choices) - 1]
    found = re.match(rf"([A-{last}])(?:[.)]|$)|\(([A-{last}])\)", text)
    if found:
        return found[1] or found[2]
    said = re.findall(rf"[Tt]he answer is \(?([A-{last}])\b", text)
    return said[0] if len(said) == 1 else ""


# -------------------------------------------------------------------------------------------- objects in a text

DOUBLE_WORDS = """motor bike, motor cycle, air plane, traffic light, street light, traffic signal, stop light,
    fire hydrant, stop sign, parking meter, suit case, sports ball, baseball bat, baseball glove, tennis racket,
    wine glass, hot dog, cell phone, mobile phone, teddy bear, hair drier, potted plant, laptop computer,
    stove top oven, home plate, train track"""
JOINED = {" ".join(pair.split()): " ".join(pair.split()) for pair in DOUBLE_WORDS.split(",")}
for _animal in "bird cat dog horse sheep cow elephant bear zebra giraffe animal cub".split():
    JOINED |= {f"baby {_animal}": _animal, f"adult {_animal}": _animal}
JOINED |= {"passenger jet": "jet", "passenger train": "train", "bow tie": "tie", "toilet seat": "toilet"}
IRREGULAR = {"people": "person", "mice": "mouse", "geese": "goose", "oxen": "ox", "buses": "bus", "busses": "bus"}


class Objects:
    """
    The object classes that a text names, by CHAIR's word rule: lower case, singular, double words joined ("hot dog" is
    no dog), no "seat" beside a "toilet", then the words of the synonym table, each mapped to its class.

    path   the benchmark's synonym file: a class a line, the class first, then its synonyms, separated by commas

    The script of 2018 makes words singular with pattern.en, which loses "bus" (it becomes "bu") and "ties" ("ty"); here
    they count, and `lost_in_2018` says how often at least. Its tokenizer leaves "cat/dog" one word; here it is two.
    A hyphen joins a word, as it does there.
    """

    def __init__(self, path):
        self.class_of = {}
        if not path:
            raise ValueError("--synonyms is needed: name CHAIR's synonym file, a class a line")
        try:
            lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--synonyms {path}: cannot be read ({error}). Name the synonym file of CHAIR") from None
        for line in lines:
            words = [" ".join(word.lower().split()) for word in line.split(",") if word.strip()]
            for word in words:
                self.class_of.setdefault(word, words[0])
        if not self.class_of:
            raise ValueError(f"--synonyms {path}: holds no words. A line is 'dog, puppy, hound', the class first")
        self.classes = set(self.class_of.values())
        self.known = set(self.class_of) | {word for pair in JOINED for word in pair.split()}

    def singular(self, word):
        """The word without its plural, if that is a word of the table or of a double word; else as it is."""
        guesses = [IRREGULAR[word]] if word in IRREGULAR else []
        guesses += [word[:-3] + "man"] if word.endswith("men") else []
        guesses += [word[:-3]] if word.endswith("children") else []
        if word.endswith("s"):
            guesses += [word[:-1], word[:-2]] if word.endswith("es") else [word[:-1]]
            guesses += [word[:-3] + "y"] if word.endswith("ies") else []
            guesses += [word[:-3] + "f", word[:-3] + "fe"] if word.endswith("ves") else []
        kind = self.class_of.get(word)  # "skis" is a class of the table, and so is "ski": the same word twice
        for guess in guesses:
            if guess in self.known and (word not in self.known or (kind and self.class_of.get(guess) == kind)):
                return guess
        return word

    def mentions(self, text):
        """[(word, class)] in the order of the text, repeats kept."""
        words = [
            self.singular(w) for w in re.findall(r"[a-z0-9]+(?:-[a-z0-9]+)*", re.sub(r"['’]s\b", "", text.lower()))
        ]
        joined, i = [], 0
        while i < len(words):
            pair = " ".join(words[i : i + 2])
            joined.append(JOINED.get(pair, words[i]))
            i += 2 if pair in JOINED else 1
        if "toilet" in joined:
            joined = [word for word in joined if word != "seat"]
        return [(word, self.class_of[word]) for word in joined if word in self.class_of]

    def lost_in_2018(self, text):
        """How many mentions of this text the script of 2018 does not see, at least."""
        lost = re.findall(r"(?<![\w-])(?:bus|minibus|airbus|(?<!bow )ties)(?![\w-])", text.lower())
        return float(sum(self.singular(word) in self.class_of for word in lost))


# ----------------------------------------------------------------------------------------------- files of answers


def read_list(flag, path, skip_bad, check):
    """
    The records of a JSONL or JSON list as [(where, record)], those that pass check(record). A bad one is an error
    naming file, line, field and remedy, or with `skip_bad` dropped and counted.
    """
    if not path:
        raise ValueError(f"{flag} is needed: name the file")
    kept, dropped = [], Counter()
    for where, record in data.read_json(path):
        try:
            if isinstance(record, data.BadRecord):
                raise record
            if not isinstance(record, dict):
                raise data.BadRecord(
                    "not an object", f"must be a JSON object, this is a {type(record).__name__}. Mend it"
                )
            check(record)
            kept.append((where, record))
        except data.BadRecord as error:
            if not skip_bad:
                raise ValueError(f"{where}: {error}") from None
            dropped[error.reason] += 1
    for reason, count in dropped.items():
        print(f"{path}: {count} records dropped: {reason}")
    if not kept:
        raise ValueError(f"{path}: no usable records. Check {flag}")
    return kept


def id_of(record):
    """A record's id, as text, under one of the names that benchmarks have for it."""
    found = [record[name] for name in ("question_id", "id") if name in record]
    if not found or type(found[0]) not in (str, int) or not str(found[0]).strip():
        raise data.BadRecord("no id", "has no 'question_id' or 'id' that is a text or a whole number. Add it")
    return str(found[0])


def said(record):
    """
    The answer in a line of an answers file: "answer" (POPE), "response" (AMBER) or, where neither is, "text" (LLaVA).
    It may be empty.
    """
    name = next((name for name in ("answer", "response", "text") if name in record), None)
    if name is None or not isinstance(record[name], str):
        raise data.BadRecord("no answer", "has no 'answer' that is a text (an empty one counts as an answer). Add it")
    if "label" in record and name == "text":
        raise data.BadRecord("a question", "is a question, for it has a 'label'. Name the file of answers")
    if name == "answer" and record.get("response", record["answer"]) != record["answer"]:
        raise data.BadRecord("two answers", "'answer' and 'response' differ. Keep the one that is meant")
    return record[name]


def by_id(flag, path, skip_bad, check=lambda record: None):
    """{id: (where, record)} of a file in which ids do not repeat."""
    found = {}

    def checked(record):
        check(record)
        if id_of(record) in found:
            raise data.BadRecord("id used twice", f"id {id_of(record)!r} was used before. Rename or delete the record")
        found[id_of(record)] = None

    for where, record in read_list(flag, path, skip_bad, checked):
        found[id_of(record)] = (where, record)
    return {key: value for key, value in found.items() if value}


def matched(items, answers_path, skip_bad):
    """
    [(item, answer)] of a file of answers. An answer to no question, or a question without an answer, is an error that
    names it; with `skip_bad` both are counted and left out.
    """
    answers = by_id("--answers", answers_path, skip_bad, said)
    extra, missing = [key for key in answers if key not in items], [key for key in items if key not in answers]
    if extra and not skip_bad:
        where, _ = answers[extra[0]]
        raise ValueError(
            f"{where}: id {extra[0]!r} is not asked ({len(extra)} such). Use the answers to these questions"
        )
    if missing and not skip_bad:
        where, _ = items[missing[0]]
        raise ValueError(
            f"{where}: id {missing[0]!r} has no answer in {answers_path} ({len(missing)} such). Answer it, or "
            "leave such out with --skip_bad"
        )
    for count, reason in ((len(extra), "answers to no question"), (len(missing), "questions without an answer")):
        if count:
            print(f"{answers_path}: {count} left out: {reason}")
    pairs = [(items[key][1], said(answers[key][1])) for key in items if key in answers]
    if not pairs:
        raise ValueError(f"{answers_path}: answers none of the questions. Check the ids")
    return pairs


# ------------------------------------------------------------------------------------------------ benchmarks


@dataclass
class Counts:
    """What a benchmark counted: a row for each image, and what to make of the sums of rows."""

    rows: list  # of {name: float}
    metrics: dict  # name -> function of {name: sum}
    titles: dict  # name -> how the table calls it
    notes: list = field(default_factory=list)  # sentences below the table
    totals: tuple = ()  # names of sums that the table's first line and --json tell
    unit: str = "images"  # what a row is of


def add(rows, key, counts):
    """Add counts to the row of an image."""
    row = rows.setdefault(key, dict.fromkeys(counts, 0.0))
    for name, value in counts.items():
        row[name] = row.get(name, 0.0) + value


def filled(rows):
    """The rows of all images, each with the names of all."""
    names = {name: None for row in rows.values() for name in row}
    return [{name: row.get(name, 0.0) for name in names} for row in rows.values()]


def field_check(**kinds):
    """check(record): has these fields, of these types."""

    def check(record):
        id_of(record)
        for name, kind in kinds.items():
            if not isinstance(record.get(name), kind):
                told = "a list of texts" if kind is list else "a text"
                message = f"field {name!r} must be {told}, got {str(record.get(name))[:60]!r}. Mend the record"
                raise data.BadRecord(f"{name!r} missing or of the wrong type", message)
            if kind is list and not all(isinstance(item, str) for item in record[name]):
                raise data.BadRecord(f"{name!r} of the wrong type", f"field {name!r} must hold texts only. Mend it")

    return check


def object_counts(text, truth, objects):
    """CHAIR's counts of one answer; truth  the classes that are there."""
    found = objects.mentions(text)
    wrong = [word for word, kind in found if kind not in truth]
    return {
        "captions": 1.0,
        "hallucinated_captions": float(bool(wrong)),
        "captions_with_objects": float(bool(found)),
        "mentions": float(len(found)),
        "hallucinated_mentions": float(len(wrong)),
        "words": float(len({word for word, _ in found})),
        "hallucinated_words": float(len(set(wrong))),
        "objects": float(len(truth)),
        "objects_named": float(len({kind for _, kind in found} & truth)),
        "length": float(len(text.split())),
        "lost_in_2018": objects.lost_in_2018(text),
    }


def chair(config, pairs=None):
    """CHAIR, and with --bench objhal Object HalBench's two rates: `config` names the files."""
    objects, rows = Objects(config.synonyms), {}
    for item, text in matched(chair_items(config), config.answers, config.skip_bad):
        truth = {objects.class_of[" ".join(name.lower().split())] for name in item["objects"]}
        truth |= {kind for caption in item["captions"] for _, kind in objects.mentions(caption)}
        add(rows, item.get("image", id_of(item)), object_counts(text, truth, objects))
    rows = list(rows.values())
    metrics = {
        "chair_s": lambda s: ratio(s["hallucinated_captions"], s["captions"]),
        "chair_i": lambda s: ratio(s["hallucinated_mentions"], s["mentions"]),
        "recall": lambda s: ratio(s["objects_named"], s["objects"]),
    }
    titles = {
        "chair_s": "CHAIR_s: captions that name an absent object",
        "chair_i": "CHAIR_i: mentions that are of absent objects",
        "recall": "recall: objects there that are named",
    }
    if config.bench == "objhal":
        metrics = {
            "response_rate": lambda s: ratio(s["hallucinated_captions"], s["captions_with_objects"]),
            "mention_rate": lambda s: ratio(s["hallucinated_words"], s["words"]),
        } | metrics
        titles = {
            "response_rate": "response rate: of answers that name any object",
            "mention_rate": "mention rate: words counted once an answer",
        } | titles
    metrics |= {
        "coverage": lambda s: ratio(s["captions_with_objects"], s["captions"]),
        "length": lambda s: ratio(s["length"], s["captions"]),
    }
    titles |= {"coverage": "captions that name any object", "length": "words a caption"}
    notes = []
    if not sum(row["mentions"] for row in rows):
        notes.append("No caption names an object of the table, so CHAIR_i is undefined.")
    if lost := int(sum(row["lost_in_2018"] for row in rows)):
        notes.append(f"At least {lost} mentions (bus, ties) count here that the script of 2018 does not see.")
    names = (
        "captions",
        "hallucinated_captions",
        "captions_with_objects",
        "mentions",
        "hallucinated_mentions",
        "objects",
    )
    return Counts(rows, metrics, titles, notes, (*names, "objects_named", "lost_in_2018"))


def chair_items(config):
    objects = Objects(config.synonyms)

    def check(record):
        field_check(objects=list, captions=list)(record)
        field_check(**{name: str for name in ("image", "question") if name in record})(record)
        for name in record["objects"]:
            if " ".join(name.lower().split()) not in objects.class_of:
                message = f"field 'objects': {name!r} is not in {config.synonyms}. Use the classes of that file"
                raise data.BadRecord("unknown class", message)

    return by_id("--objects", config.objects, config.skip_bad, check)


def pope(config):
    """POPE with its own reading of answers; yes is positive."""
    rows = {}
    for item, text in matched(pope_items(config), config.answers, config.skip_bad):
        says, words = yes_or_no(text), set(re.findall(r"\w+", text.lower()))
        counts = dict.fromkeys(("asked", "tp", "fp", "fn", "tn"), 0.0) | {"asked": 1.0}
        counts[("t" if says.lower() == item["label"].lower() else "f") + ("p" if says == "Yes" else "n")] = 1.0
        counts["neither"] = float(not words & {"yes", "no", "not"})
        counts["no_read_as_yes"] = float(says == "Yes" and "yes" not in words and bool(words & {"no", "not"}))
        add(rows, item["image"], counts)
    metrics = {
        "accuracy": lambda s: ratio(s["tp"] + s["tn"], s["asked"]),
        "precision": lambda s: ratio(s["tp"], s["tp"] + s["fp"]),
        "recall": lambda s: ratio(s["tp"], s["tp"] + s["fn"]),
        "f1": lambda s: ratio(2 * s["tp"], 2 * s["tp"] + s["fp"] + s["fn"]),
        "yes_ratio": lambda s: ratio(s["tp"] + s["fp"], s["asked"]),
    }
    titles = {name: name.replace("_", " ") for name in metrics}
    sums = {name: int(sum(row[name] for row in rows.values())) for name in ("neither", "no_read_as_yes")}
    notes = [f"{sums['neither']} answers held neither a yes nor a no; the official rule counts them as yes."]
    if sums["no_read_as_yes"]:
        notes.append(f"{sums['no_read_as_yes']} answers say no in a way that the official rule counts as yes, as 'NO'.")
    return Counts(list(rows.values()), metrics, titles, notes, tuple(next(iter(rows.values()))))


def pope_items(config):
    def check(record):
        field_check(image=str, text=str, label=str)(record)
        if record["label"].lower() not in ("yes", "no"):
            message = f"field 'label' must be yes or no, got {record['label']!r}. Mend the record"
            raise data.BadRecord("'label' unusable", message)

    return by_id("--questions", config.questions, config.skip_bad, check)


def closed(config):
    """
    Closed-ended questions by kind and by category: letters as LLaVA reads them, MME's yes and no as MME does, all else
    as closed_answer does; those of MME by its own score too.
    """
    rows, kinds, categories, mme = {}, set(), set(), {}
    for item, text in matched(closed_items(config), config.answers, config.skip_bad):
        kind, category, of_mme = item["kind"], item.get("category", ""), item.get("source") == "mme"
        if kind == "choice":
            read = letter(text, item["choices"])
            right = read == item["answer"]
        elif of_mme:
            read = mme_answer(text).replace("other", "")
            right = read == item["answer"].lower()
        else:
            read, right = closed_answer(text, item), is_right(text, item)
        counts = {"asked": 1.0, "right": float(right), "unread": float(not read)}
        counts |= {f"{kind} asked": 1.0, f"{kind} right": float(right)}
        counts |= {f"/{category} asked": 1.0, f"/{category} right": float(right)} if category else {}
        add(rows, item["image"], counts)
        kinds.add(kind)
        categories |= {category} - {""}
        if of_mme:
            mme.setdefault((category, item["image"]), []).append(right)
    for (category, image), answers in mme.items():
        if len(answers) != 2:
            raise ValueError(f"MME: {image!r} ({category}) has {len(answers)} questions, not 2. Use the whole set")
        add(rows, image, {f"/{category} images": 1.0, f"/{category} both": float(all(answers))})
    metrics = {"accuracy": lambda s: ratio(s["right"], s["asked"])}
    titles = {"accuracy": "accuracy"}
    for kind in sorted(kinds) if len(kinds) > 1 else []:
        metrics[kind] = lambda s, k=kind: ratio(s[f"{k} right"], s[f"{k} asked"])
        titles[kind] = f"  {kind}"
    for category in sorted(categories):
        metrics[f"/{category}"] = lambda s, c=category: ratio(s[f"/{c} right"], s[f"/{c} asked"])
        titles[f"/{category}"] = f"  {category}"
    scored = sorted({category for category, _ in mme})
    if scored:

        def score(s, c):
            return 100 * (ratio(s[f"/{c} right"], s[f"/{c} asked"]) + ratio(s[f"/{c} both"], s[f"/{c} images"]))

        metrics["mme"] = lambda s: sum(score(s, c) for c in scored)
        titles["mme"] = f"MME score, of {200 * len(scored)}"
    notes = [f"{sum(row['unread'] for row in rows.values()):.0f} answers could not be read; they count as wrong."]
    return Counts(filled(rows), metrics, titles, notes, ("asked", "right", "unread"))


def closed_items(config):
    def check(record):
        needed = ["category"] if record.get("source") == "mme" else []
        needed += [name for name in ("category", "source") if name in record]
        field_check(image=str, question=str, kind=str, answer=str, **dict.fromkeys(needed, str))(record)
        data.check_question(record)

    return by_id("--questions", config.questions, config.skip_bad, check)


AMBER_PARTS = {  # the type of a question -> the part of the table
    "discriminative-hallucination": "existence",
    "discriminative-attribute-state": "attribute",
    "discriminative-attribute-number": "attribute",
    "discriminative-attribute-action": "attribute",
    "discriminative-relation": "relation",
    "relation": "relation",  # so half of the official file has it
}


def amber(config):
    """
    AMBER's yes/no part; no is the positive class, and what is neither "Yes" nor "No" to the letter is wrong and no no.
    The official script's 0.001 in the denominators (it avoids a division by zero) is left out.
    """
    items = amber_items(config)
    yes_no = {key: item for key, item in items.items() if item[1]["type"] in AMBER_PARTS}
    described = len(items) - len(yes_no)
    answers = by_id("--answers", config.answers, config.skip_bad, said)
    if not yes_no or not any(key in answers for key in yes_no):
        raise ValueError(
            f"{config.answers}: holds no answers to yes/no questions, and descriptions need the official script"
        )
    extra = [key for key in answers if key not in items]
    missing = [key for key in yes_no if key not in answers]
    if (extra or missing) and not config.skip_bad:
        told = f"id {extra[0]!r} is not asked" if extra else f"id {missing[0]!r} has no answer"
        raise ValueError(f"{config.answers}: {told}. Use the answers to these questions, or --skip_bad")
    rows, unread, names = {}, 0, set()
    for key, (_, item) in yes_no.items():
        if key not in answers:
            continue
        text, truth = said(answers[key][1]), item["truth"].capitalize()
        unread += text not in ("Yes", "No")
        counts = {}
        for part in ("", AMBER_PARTS[item["type"]] + " "):
            counts |= {f"{part}asked": 1.0, f"{part}right": float(text == truth)}
            counts |= {f"{part}no": float(truth == "No"), f"{part}said no": float(text == "No")}
            counts |= {f"{part}no right": float(text == truth == "No")}
        add(rows, item.get("image", key), counts)
        names |= counts.keys()
    metrics = {}
    for part in ("", "existence ", "attribute ", "relation "):
        if f"{part}asked" in names:
            metrics |= {
                f"{part}accuracy": lambda s, p=part: ratio(s[f"{p}right"], s[f"{p}asked"]),
                f"{part}precision": lambda s, p=part: ratio(s[f"{p}no right"], s[f"{p}said no"]),
                f"{part}recall": lambda s, p=part: ratio(s[f"{p}no right"], s[f"{p}no"]),
                f"{part}f1": lambda s, p=part: ratio(2 * s[f"{p}no right"], s[f"{p}said no"] + s[f"{p}no"]),
            }
    titles = {name: name.capitalize() if name.count(" ") == 0 else f"  {name}" for name in metrics}
    notes = [f"{unread} answers were neither Yes nor No to the letter, and count as wrong."]
    if described:
        notes.append(
            f"{described} descriptions are for the official script: it needs NLTK's nouns and spaCy's vectors."
        )
    unit = "images" if config.questions else "questions (name --questions to draw by images)"
    return Counts(filled(rows), metrics, titles, notes, ("asked", "right", "no", "said no"), unit)


def amber_items(config):
    """{id: (where, {"id", "type", "truth" [, "image", "query"]})}: annotations joined with the queries, if named."""

    def check(record):
        field_check(type=str)(record)
        if record["type"] in AMBER_PARTS:
            if record.get("truth") not in ("yes", "no"):
                message = f"field 'truth' of a {record['type']} must be yes or no, got {record.get('truth')!r}. Mend it"
                raise data.BadRecord("'truth' unusable", message)
        elif record["type"] != "generative":
            known = ", ".join(["generative", *AMBER_PARTS])
            raise data.BadRecord("'type' unknown", f"field 'type': {record['type']!r} is none of {known}. Mend it")

    items = by_id("--annotations", config.annotations, config.skip_bad, check)
    if not config.questions:
        return items
    queries = by_id("--questions", config.questions, config.skip_bad, field_check(image=str, query=str))
    for key, (where, _) in queries.items():
        if key not in items:
            raise ValueError(f"{where}: id {key!r} is not in {config.annotations}. Use the files of one release")
    return {key: (where, {**items[key][1], **query}) for key, (where, query) in queries.items()}


MMHAL_TYPES = ("attribute", "adversarial", "comparison", "counting", "relation", "environment", "holistic", "other")


def rating(text):
    """The judge's rating, 0 to 6: exactly one 'rating: N' in the text gives it, else it is 0, as MMHal-Bench has it."""
    found = [n for n in range(7) if f"rating: {n}" in text.lower()]
    return found[0] if len(found) == 1 else 0


def mmhal(config):
    """MMHal-Bench's scores of a file of judge answers, in the order of the questions: texts, or OpenAI's responses."""
    if not config.judge:
        raise ValueError("--judge is needed: the judge model's name. Scores of different judges cannot be compared")
    rows, unread = [], 0
    for number, (where, answer) in enumerate(data.read_json(config.judged)):
        if isinstance(answer, data.BadRecord):
            raise ValueError(f"{where}: {answer}")
        if isinstance(answer, dict):
            try:
                answer = answer["choices"][0]["message"]["content"] if "choices" in answer else said(answer)
            except (KeyError, IndexError, TypeError, data.BadRecord):
                answer = None
        if not isinstance(answer, str):
            raise ValueError(
                f"{where}: no text of a judge. It is a text, a response with 'choices', or has an 'answer'"
            )
        score, kind = rating(answer), MMHAL_TYPES[number % 8]
        unread += sum(f"rating: {n}" in answer.lower() for n in range(7)) != 1
        row = {f"{name} {what}": 0.0 for name in MMHAL_TYPES for what in ("items", "score")}
        row |= {f"{kind} items": 1.0, f"{kind} score": float(score)}
        rows.append(row | {"items": 1.0, "score": float(score), "hallucinated": float(score < 3)})
    if len(rows) != 96:
        raise ValueError(
            f"{config.judged}: holds {len(rows)} judge answers, MMHal-Bench has 96. Judge all, in its order"
        )
    metrics = {
        "score": lambda s: ratio(s["score"], s["items"]),
        "hallucination_rate": lambda s: ratio(s["hallucinated"], s["items"]),
    }
    metrics |= {kind: lambda s, k=kind: ratio(s[f"{k} score"], s[f"{k} items"]) for kind in MMHAL_TYPES}
    titles = {"score": "score, 0 to 6", "hallucination_rate": "hallucination rate: rated below 3"}
    titles |= {kind: f"  {kind}" for kind in MMHAL_TYPES}
    notes = [f"judge: {config.judge}. {unread} of its answers hold no rating, or several, and count as 0."]
    return Counts(rows, metrics, titles, notes, ("items", "hallucinated"), "questions")


BENCHMARKS = {"chair": chair, "objhal": chair, "pope": pope, "closed": closed, "amber": amber, "mmhal": mmhal}


# ------------------------------------------------------------------------------------------ intervals and tables


def draws(count):
    """(RESAMPLES + 1, count): how often each row is taken; the first line takes each once, the others resample."""
    rng = np.random.default_rng(0)
    picks = rng.multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    return np.concatenate([np.ones((1, count)), picks])


def values(counts):
    """{metric: (RESAMPLES + 1,) array}: the value, then its resamples."""
    taken = draws(len(counts.rows))
    sums = {name: taken @ np.array([row[name] for row in counts.rows]) for name in counts.rows[0]}
    return {name: metric(sums) for name, metric in counts.metrics.items()}


def with_interval(drawn):
    """(RESAMPLES + 1,) -> value and 95 % interval as floats, None where undefined."""
    value, resampled = float(drawn[0]), drawn[1:][~np.isnan(drawn[1:])]
    if math.isnan(value) or not len(resampled):
        return None, None
    return value, [float(np.quantile(resampled, q)) for q in (0.025, 0.975)]


def summary(counts, settings):
    """What --json writes: each metric, its interval, counts, settings."""
    found = {name: with_interval(drawn) for name, drawn in values(counts).items()}
    sums = {name.replace(" ", "_"): int(sum(row[name] for row in counts.rows)) for name in counts.totals}
    told = {name: value for name, (value, _) in found.items()} | sums
    return told | {
        "counts": sums,
        "images": len(counts.rows),
        "unit": counts.unit,
        "interval": {name: interval for name, (_, interval) in found.items()},
        "settings": settings,
        "notes": counts.notes,
    }


def cell(value, interval):
    return "undefined" if value is None else f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


def table(counts, settings):
    """The table of one file of answers."""
    lines = [f"{counts.titles[name]:48}{cell(*with_interval(drawn)):>26}" for name, drawn in values(counts).items()]
    sums = ", ".join(f"{name.replace('_', ' ')} {sum(row[name] for row in counts.rows):.0f}" for name in counts.totals)
    told = ", ".join(f"{name} {value}" for name, value in settings.items() if value)
    return "\n".join(
        [*lines, sums, *counts.notes, f"95 % intervals by bootstrap over {len(counts.rows)} {counts.unit}", told]
    )


def compared(a, b):
    """{metric: (value of a, of b, of b - a)}, each with its interval; the same images are drawn for both."""
    first, second = values(a), values(b)
    both = [name for name in first if name in second]
    return {
        name: tuple(with_interval(drawn) for drawn in (first[name], second[name], second[name] - first[name]))
        for name in both
    }


def compare_table(a, b, names):
    """The table of two files of answers to the same questions."""
    lines = [f"{'':48}" + "".join(f"{name:>28}" for name in (*names, "difference"))]
    for name, cells in compared(a, b).items():
        lines.append(f"{a.titles[name]:48}" + "".join(f"{cell(*each):>28}" for each in cells))
    return "\n".join([*lines, f"95 % intervals by bootstrap over the same {len(a.rows)} {a.unit} for both"])
