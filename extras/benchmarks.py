"""
Answers -> scores of public benchmarks. With --model M, questions -> answers first; torchrun too.

    python -m extras.benchmarks pope --answers a.jsonl --questions coco_pope_random.json [--json out.json]
    python -m extras.benchmarks pope --compare a.jsonl b.jsonl --questions ...       the paired difference

    chair    --objects o.jsonl --synonyms s.txt          named objects that are not there: arXiv:1809.02156
    objhal   the same                                    Object HalBench's rates: RLHF-V, arXiv:2312.00849
    pope     --questions q.json                          is there a X? yes or no: arXiv:2305.10355
    closed   --questions q.jsonl                         closed-ended, by kind and category; MME's score
    amber    --annotations a.json --questions q.json     its yes/no part: arXiv:2311.07397
    mmhal    --judged j.json --judge NAME                a judge's scores: MMHal-Bench, arXiv:2309.14525
    llavabench, mmvet  the same                          reviews of LLaVA-Bench; grades of MM-Vet, arXiv:2308.02490
"""

import json
import re
from collections import Counter, namedtuple
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Literal

import data
import hub
import model
import parts
import runtime
import tables
from data import LETTERS, BadRecord
from rewards import closed_answer, is_right, yes_or_no
from runtime import Mistake, knob

DESCRIBE = "Please describe this image in detail."
SHORT = "\nAnswer the question using a single word or phrase."
AMBER_PARTS = {f"discriminative-attribute-{name}": "attribute" for name in ("state", "number", "action")}
AMBER_PARTS |= {"discriminative-hallucination": "existence", "discriminative-relation": "relation"}
AMBER_PARTS |= {"relation": "relation"}  # so half of the official file has it; type -> part of the table
MMHAL_TYPES = "attribute adversarial comparison counting relation environment holistic other".split()
opened = cache(lambda path: bool(data.load_image(path)))  # once for all questions about an image


@dataclass
class Config:
    answers: str = knob("", "answers, {id, answer} a line; with --model they are written here first")
    questions: str = knob("", "the benchmark's own file of questions; mmhal: needed only to answer them")
    objects: str = knob("", "chair, objhal: {id, objects, captions} a line; to answer: image, question too")
    synonyms: str = knob("", "chair, objhal: CHAIR's synonym file, a class a line")
    annotations: str = knob(
        "", "amber: its annotations.json; chair: COCO's captions, where --objects are its instances"
    )
    judged: str = knob("", "mmhal: the judge's answers")
    judge: str = knob("", "mmhal: the judge's name: scores of different judges cannot be compared")
    compare: list[str] = field(default_factory=list, metadata={"help": "two files of answers, compared"})
    json: str = knob("", "also write the numbers here")
    skip_bad: bool = knob(False, "leave bad records and what has no answer out, counted, instead of stopping")
    model: str = knob("", "checkpoint to answer with; empty: the answers are there already")
    images: str = knob("", "folder of the images; empty: that of the file that names them")
    convention: Literal["", "original", "hub"] = knob("", "how it sees and is asked; empty: its folder says")
    max_new_tokens: int = knob(0, "longest answer; 0: the benchmark's own")
    batch: int = knob(32, "answers at a time")

    def __post_init__(self):
        runtime.check(self, positive="batch", not_negative="max_new_tokens")
        if self.compare and (len(self.compare) != 2 or self.model or self.skip_bad):
            raise Mistake("--compare takes two files, and neither --model nor --skip_bad: all answers count")
        if not self.answers and (self.model or not (self.compare or self.judged)):
            raise Mistake("--answers is needed: a file of answers, or with --model the file to write them to")


def id_of(record):
    """A record's id, as text, under one of the names that benchmarks have for it (COCO's results: image_id)."""
    value = record.get("question_id", record.get("id", record.get("image_id")))
    if type(value) not in (str, int) or not str(value).strip():
        raise BadRecord("no id", "has no 'question_id' or 'id' that is a text or a whole number. Add it")
    return str(value)


def answer_of(record):
    """The answer in a line: "answer" (POPE), "response" (AMBER), "caption" (COCO) or, else, "text" (LLaVA)."""
    name = next((name for name in ("answer", "response", "caption", "text") if name in record), None)
    if not isinstance(record.get(name), str):
        raise BadRecord("no answer", "has no 'answer' that is a text (it may be empty). Add it")
    if (name == "text" and "label" in record) or {"kind", "question"} <= set(record):
        raise BadRecord("a question", "is a question, not an answer. Name the file of answers")
    if name == "answer" and record.get("response", record[name]) != record[name]:
        raise BadRecord("two answers", "'answer' and 'response' differ. Keep the one that is meant")
    return record[name]


def by_id(rows):
    """Rows; one object that holds objects by id, as MM-Vet's files, gives a row for each."""
    for where, row in rows:
        if isinstance(row, dict) and row and all(isinstance(value, dict) for value in row.values()):
            yield from ((f"{where}, {key}", {"id": key} | value) for key, value in row.items())
        else:
            yield where, row


def one_of(name, value, allowed, title=""):
    """BadRecord unless the value of field `name` is allowed; `title` stands for what is."""
    if value not in allowed:
        message = f"field {name!r} must be {title or ' or '.join(allowed)}, got {str(value)[:60]!r}. Mend it"
        raise BadRecord(f"{name!r} unusable", message)


def read(flag, path, config, check, order=()):
    """{id: record} of a file. One that check(record) refuses, or whose image a model would see and is damaged, is a
    Mistake naming its line, or with --skip_bad dropped and counted. Records that have a question and no id, as POPE's
    own scripts write answers, take those in `order`.
    """
    if not path:
        raise Mistake(f"--{flag} is needed: name the file")
    records, dropped = {}, Counter()
    for number, (where, record) in enumerate(by_id(data.read_json(path))):
        try:
            data.check(record, {})
            check(record)
            bare = "question" in record and number < len(order) and not {"question_id", "id", "image_id"} & set(record)
            key = order[number] if bare else id_of(record)
            if key in records:
                raise BadRecord("id used twice", f"id {key!r} was used before. Rename or delete the record")
            if config.model and flag in ("questions", "objects"):
                data.check(record, {"image": str})
                opened(data.image_path(config.images or Path(path).parent, record["image"]))
            records[key] = record
        except BadRecord as error:
            if not config.skip_bad:
                raise Mistake(f"{where}: {error}") from None
            dropped[error.reason] += 1
    for reason, count in dropped.items():
        print(f"{path}: {count} records dropped: {reason}")
    if not records:
        raise Mistake(f"{path}: no usable records. Check --{flag}{' and --images' if config.model else ''}")
    return records


def match(items, path, config, others=()):
    """[(item, answer)] in the order of the items; `others` may be answered too, and do not count."""
    answers = read("answers", path, config, answer_of, list(items))
    extra = [key for key in answers if key not in items and key not in others]
    missing = [key for key in items if key not in answers]
    if len(missing) == len(items):
        raise Mistake(f"{path}: answers no question that is scored here; descriptions are not. Check the ids")
    for fault, keys in (("is not asked", extra), ("has no answer", missing)):
        if keys and not config.skip_bad:
            remedy = "Answer these questions and no others, or leave such out with --skip_bad"
            raise Mistake(f"{path}: id {keys[0]!r} {fault} ({len(keys)} such). {remedy}")
        if keys:
            print(f"{path}: {len(keys)} left out, as id {keys[0]!r}, which {fault}")
    for key, item in items.items():
        asked, said = item.get("text") or item.get("question") or "", answers.get(key, {})
        claimed = said.get("question") or said.get("prompt")  # with or without the wish for a short answer
        short, long = sorted((" ".join(str(text).split()) for text in (asked, claimed or asked)), key=len)
        if not long.startswith(short):
            raise Mistake(f"{path}: id {key!r} answers {claimed!r}, not {asked!r}. Name this benchmark's answers")
    return [(item, answer_of(answers[key])) for key, item in items.items() if key in answers]


def by_image(counted):
    """[(image, {name: count})] -> a row of sums for each image, what the bootstrap draws."""
    rows = {}
    for image, counts in counted:
        rows.setdefault(image, Counter()).update(counts)  # adds
    return list(rows.values())


DOUBLE_WORDS = """motor bike, motor cycle, air plane, traffic light, street light, traffic signal, stop light,
    fire hydrant, stop sign, parking meter, suit case, sports ball, baseball bat, baseball glove, hot dog,
    tennis racket, wine glass, cell phone, mobile phone, teddy bear, hair drier, potted plant, home plate,
    stove top oven, laptop computer, train track"""
JOINED = {" ".join(pair.split()): " ".join(pair.split()) for pair in DOUBLE_WORDS.split(",")}
for _animal in "bird cat dog horse sheep cow elephant bear zebra giraffe animal cub".split():
    JOINED |= {f"baby {_animal}": _animal, f"adult {_animal}": _animal}
JOINED |= {"passenger jet": "jet", "passenger train": "train", "bow tie": "tie", "toilet seat": "toilet"}
IRREGULAR = {"person": "people", "mouse": "mice", "goose": "geese", "ox": "oxen", "bus": "busses"}


def plurals(word):
    """The plurals of a word, by the rules of spelling: "ski" has "skis", and "skies" is none of its."""
    forms = [f"{word[:-1]}ies"] if re.search("[^aeiou]y$", word) else [f"{word}s"]
    forms = [f"{word}es"] if re.search("(s|x|z|ch|sh)$", word) else forms
    forms += [f"{word}es"] * word.endswith("o") + [re.sub("fe?$", "ves", word)] * word.endswith(("f", "fe"))
    forms += [f"{word[:-3]}men"] * word.endswith("man") + [f"{word}ren"] * word.endswith("child")
    return forms + ([IRREGULAR[word]] if word in IRREGULAR else [])


@cache  # a file is read once
class Objects:
    """The object classes that a text names, by CHAIR's word rule: lower case, singular, double words joined (a "hot
    dog" is no dog), no "seat" beside a "toilet"; then the words of a synonym file, mapped to classes.

    path   that file: a class a line, first the class, then its synonyms, with commas

    The script of 2018 makes words singular with pattern.en, which loses "bus" ("bu") and "ties" ("ty"); they count
    here. Its tokenizer leaves "cat/dog" one word; here it is two. Hyphen and apostrophe join words, as there.
    """

    def __init__(self, path):
        if not path:
            raise Mistake("--synonyms is needed: name CHAIR's synonym file, a class a line")
        self.class_of = {}
        for line in Path(path).read_text(encoding="utf-8-sig", errors="replace").splitlines():
            words = [" ".join(word.lower().split()) for word in line.split(",") if word.strip()]
            for word in words:
                self.class_of.setdefault(word, words[0])
        known = set(self.class_of) | {word for pair in JOINED for word in pair.split()}
        self.singular_of = {form: word for word in sorted(known) for form in plurals(word)}
        for word in known & set(self.singular_of):  # "skis" is a class, and "ski" is in its line: the same word twice
            if self.class_of.get(word) != self.class_of.get(self.singular_of[word]) or word not in self.class_of:
                del self.singular_of[word]

    def mentions(self, text):
        """[(word, class)] in the order of the text, repeats kept."""
        text = re.sub(r"['\u2019]s\b", "", text.lower())
        tokens = list(re.finditer(r"[a-z0-9]+(?:['\u2019-][a-z0-9]+)*", text))
        words = [self.singular_of.get(match[0], match[0]) for match in tokens]
        joined, i = [], 0
        while i < len(words):
            pair = " ".join(words[i : i + 2])
            pair = pair if text[tokens[i].end() : tokens[min(i + 1, len(tokens) - 1)].start()].isspace() else ""
            joined.append(JOINED.get(pair, words[i]))
            i += 2 if pair in JOINED else 1
        if "toilet" in joined:
            joined = [word for word in joined if word != "seat"]
        return [(word, self.class_of[word]) for word in joined if word in self.class_of]


def check_chair(record, config):
    """BadRecord unless it has "objects", which are there, and true "captions"; to answer, "image" too."""
    fields = {"objects": list, "captions": list}
    data.check(record, fields | {name: str for name in ("image", "question") if name in record})
    if not all(isinstance(text, str) for text in record["objects"] + record["captions"]):
        raise BadRecord("not texts", "fields 'objects' and 'captions' must hold texts only. Mend them")
    record["objects"] = [" ".join(name.lower().split()) for name in record["objects"]]
    for name in record["objects"]:
        one_of("objects", name, Objects(config.synonyms).class_of, f"classes of {config.synonyms}")


def of_coco(config, instances):
    """{id: item} of COCO's instances_*.json, with captions_*.json as --annotations, of the images that are answered."""
    if not config.annotations:
        raise Mistake("--annotations is needed: COCO's captions_*.json, for what its captions name is there too")
    answered = set().union(*(read("answers", path, config, answer_of) for path in config.compare or [config.answers]))
    names = {kind["id"]: kind["name"] for kind in instances["categories"]}
    items = {str(image["id"]): {"id": image["id"], "image": image["file_name"]} for image in instances["images"]}
    items = {key: item | {"objects": set(), "captions": []} for key, item in items.items() if key in answered}
    for note in instances["annotations"]:
        if (key := str(note["image_id"])) in items:
            items[key]["objects"].add(names[note["category_id"]])
    _, captions = next(data.read_json(config.annotations))
    for note in captions.get("annotations", []) if isinstance(captions, dict) else []:
        if (key := str(note.get("image_id"))) in items and "caption" in note:
            items[key]["captions"].append(note["caption"])
    for item in items.values():
        item["objects"] = sorted(item["objects"])
        check_chair(item, config)
    if not any(item["captions"] for item in items.values()):
        raise Mistake(f"--annotations {config.annotations}: has no captions of these images. Name those of their split")
    return items


def chair(config, items, path, rates=False):
    """CHAIR; `rates`: Object HalBench's two too. What is there is annotated, or a true caption names it."""
    objects, counted = Objects(config.synonyms), []
    for item, text in match(items, path, config):
        truth = {objects.class_of[name] for name in item["objects"]}
        truth |= {kind for caption in item["captions"] for _, kind in objects.mentions(caption)}
        said = objects.mentions(text)
        wrong = [word for word, kind in said if kind not in truth]
        counts = {"captions": 1, "hallucinated_captions": bool(wrong), "captions_with_objects": bool(said)}
        counts |= {"mentions": len(said), "hallucinated_mentions": len(wrong), "objects": len(truth)}
        counts |= {"objects_named": len({kind for _, kind in said} & truth), "length": len(text.split())}
        counts |= {"words": len({word for word, _ in said}), "hallucinated_words": len(set(wrong))}
        counted.append((item.get("image", id_of(item)), counts))
    answers, words = ("hallucinated_captions", "captions_with_objects"), ("hallucinated_words", "words")
    metrics = {
        "response_rate": ("response rate: of answers that name any object", answers),
        "mention_rate": ("mention rate: words counted once an answer", words),
        "chair_s": ("CHAIR_s: captions that name an absent object", ("hallucinated_captions", "captions")),
        "chair_i": ("CHAIR_i: mentions that are of absent objects", ("hallucinated_mentions", "mentions")),
        "recall": ("recall: objects there that are named", ("objects_named", "objects")),
        "coverage": ("captions that name any object", ("captions_with_objects", "captions")),
        "length": ("words a caption", ("length", "captions")),
    }
    if not rates:
        del metrics["response_rate"], metrics["mention_rate"]
    return tables.Counts(by_image(counted), metrics, totals=tuple(counts)[:7])  # down to objects_named


def check_pope(record, config):
    """BadRecord unless it is a line of POPE's files."""
    data.check(record, {"image": str, "text": str, "label": str})
    one_of("label", record["label"].lower(), ("yes", "no"))


def pope(config, items, path):
    """POPE with its own reading of answers; yes is positive."""
    counted = []
    for item, text in match(items, path, config):
        said, words = yes_or_no(text), set(re.findall(r"\w+", text.lower()))
        counts = tables.yes_no(item["label"].capitalize(), said)
        counts["neither"] = not words & {"yes", "no", "not"}
        counts["no_read_as_yes"] = said == "Yes" and "yes" not in words and not counts["neither"]
        counted.append((item["image"], counts))
    metrics = {name: (name.replace("_", " "), value) for name, value in tables.yes_no_metrics().items()}
    counts = tables.Counts(by_image(counted), metrics, totals=tuple(counts))
    neither, misread = counts.sum("neither"), counts.sum("no_read_as_yes")
    counts.notes = [f"{neither:.0f} answers held neither a yes nor a no; the official rule says yes."]
    if misread:
        counts.notes += [f"{misread:.0f} answers say no in a way that counts as yes by that rule, as 'NO'."]
    return counts


def check_closed(record, config):
    """BadRecord unless it is a closed-ended question that can be verified; those of MME have a category."""
    names = ["image", "question", "kind", "answer"] + ["category"] * (record.get("source") == "mme")
    data.check(record, dict.fromkeys(names, str))
    data.check_question(record)


def mme_answer(text):
    """MME's own reading of a yes/no answer: what the first four letters hold, so that it takes "know" and "not" for no;
    "" where they hold neither.
    """
    return next((word for word in ("yes", "no") if word in text.lower()[:4]), "")


def letter(text, choices):
    """The option that a text names, as LLaVA reads ScienceQA: the letter alone or in front as "B." "B)" "(B)", or
    in the one "The answer is B"; else "". Kinder than closed_answer, which must not reward "A. B. C. D.".
    """
    last = LETTERS[len(choices) - 1]
    front = re.match(rf"([A-{last}])(?:[.)]|$)|\(([A-{last}])\)", text.strip())
    letters = re.findall(rf"[Tt]he answer is \(?([A-{last}])\b", text)
    if front:
        return front[1] or front[2]
    return letters[0] if len(letters) == 1 else ""


def closed(config, items, path):
    """Closed-ended questions by kind and category: letters as LLaVA reads them, MME's yes and no as MME does, else
    as the rewards do. MME's score: of each category, accuracy and share of images with both right.
    """
    counted, kinds, categories, mme = [], set(), set(), {}
    for item, text in match(items, path, config):
        kind, category, of_mme = item["kind"], item.get("category", ""), item.get("source") == "mme"
        if kind == "choice":
            said = letter(text, item["choices"])
            right = said == item["answer"]
        elif of_mme:
            said = mme_answer(text)
            right = said == item["answer"].lower()
        else:
            said, right = closed_answer(text, item), is_right(text, item)
        counts = {"asked": 1, "right": right, "unread": not said, f"{kind} asked": 1, f"{kind} right": right}
        counts |= {f"/{category} asked": 1, f"/{category} right": right} if category else {}
        counted.append((item["image"], counts))
        kinds.add(kind)
        categories |= {category} - {""}
        if of_mme:
            mme.setdefault((category, item["image"]), []).append(right)
    for (category, image), both in mme.items():
        if len(both) != 2:
            raise Mistake(f"MME: {image!r} ({category}) has {len(both)} questions, not 2. Use the whole set")
        counted.append((image, {f"/{category} images": 1, f"/{category} both": all(both)}))
    metrics = {"accuracy": ("accuracy", ("right", "asked"))}
    for part in [*(sorted(kinds) if len(kinds) > 1 else []), *(f"/{name}" for name in sorted(categories))]:
        metrics[part] = ("  " + part.removeprefix("/"), (f"{part} right", f"{part} asked"))
    if mme:
        scored = sorted({category for category, _ in mme})
        shares = [(f"/{c} right", f"/{c} asked") for c in scored]
        shares += [(f"/{c} both", f"/{c} images") for c in scored]
        title = f"MME score, of {100 * len(shares)}"
        metrics["mme"] = (title, lambda s: 100 * sum(tables.ratio(s[a], s[b]) for a, b in shares))
    counts = tables.Counts(by_image(counted), metrics, totals=("asked", "right", "unread"))
    counts.notes.append(f"{counts.sum('unread'):.0f} answers could not be read; they count as wrong.")
    return counts


def check_amber(record, config):
    """BadRecord unless it is an annotation of AMBER."""
    data.check(record, {"type": str})
    one_of("type", record["type"], ("generative", *AMBER_PARTS), "a type of AMBER's")
    if record["type"] != "generative":
        one_of("truth", record.get("truth"), ("yes", "no"))


def amber(config, items, path):
    """AMBER's yes/no part; no is positive, and what is neither "Yes" nor "No" to the letter is wrong and no no.
    The official script's 0.001 in the denominators (it avoids a division by zero) is left out.
    """
    asked = {key: item for key, item in items.items() if item["type"] in AMBER_PARTS}
    counted, unread = [], 0
    for item, text in match(asked, path, config, others=items):
        truth, counts = item["truth"].capitalize(), {}
        hit = text == truth == "No"
        unread += text not in ("Yes", "No")
        for part in ("", AMBER_PARTS[item["type"]] + " "):
            counts |= {f"{part}asked": 1, f"{part}right": text == truth, f"{part}no": truth == "No"}
            counts |= {f"{part}said no": text == "No", f"{part}no right": hit, f"{part}twice": 2 * hit}
            counts |= {f"{part}either": (text == "No") + (truth == "No")}
        counted.append((item.get("image", id_of(item)), counts))
    rows, metrics, names = by_image(counted), {}, ("accuracy", "precision", "recall", "f1")
    shares = (("right", "asked"), ("no right", "said no"), ("no right", "no"), ("twice", "either"))
    for part in ("", "existence ", "attribute ", "relation "):
        if any(f"{part}asked" in row for row in rows):
            for name, (a, b) in zip(names, shares, strict=True):
                metrics[part + name] = ("  " * bool(part) + part + name, (part + a, part + b))
    notes = [f"{unread} answers were neither Yes nor No to the letter, and count as wrong."]
    if described := len(items) - len(asked):
        notes.append(f"{described} descriptions are for the official script: it needs NLTK and spaCy.")
    unit = "images" if config.questions else "questions (name --questions to draw by images)"
    return tables.Counts(rows, metrics, notes, ("asked", "right", "no", "said no"), unit)


def check_mmhal(record, config):
    """BadRecord unless it is of response_template.json, which has no "id" and "image": they are added."""
    data.check(record, {"question": str, "image_src": str})
    name = Path(record["image_src"]).name
    record |= {"id": f"{name}: {record['question']}", "image": name}


def mmhal(config, items, path):
    """MMHal-Bench's scores of a judge's answers, in the order of the questions: texts, or OpenAI's responses. The
    rating, 0 to 6, is the one "rating: N" of the text; with none or several it is 0, as in MMHal-Bench.
    """
    if not path or not config.judge:
        raise Mistake("--judged and --judge are needed: its answers, its name. Scores of two judges differ")
    counted, unread = [], 0
    for number, (where, answer) in enumerate(data.read_json(path)):
        if isinstance(answer, dict):
            with suppress(KeyError, IndexError, TypeError, BadRecord):
                choices = answer.get("choices")
                answer = choices[0]["message"]["content"] if choices else answer_of(answer)
        if not isinstance(answer, str):
            raise Mistake(f"{where}: no text of a judge: a text, a response with 'choices', or an 'answer'")
        ratings = [n for n in range(7) if f"rating: {n}" in answer.lower()]
        score, kind = ratings[0] if len(ratings) == 1 else 0, MMHAL_TYPES[number % 8]
        unread += len(ratings) != 1
        counts = {"items": 1, "score": score, "hallucinated": score < 3}
        counted.append((number, counts | {f"{kind} items": 1, f"{kind} score": score}))
    if len(counted) != 96:
        raise Mistake(f"{path}: holds {len(counted)} judge answers, MMHal-Bench has 96. Judge all, in order")
    metrics = {"score": ("score, 0 to 6", ("score", "items"))}
    metrics["hallucination_rate"] = ("hallucination rate: rated below 3", ("hallucinated", "items"))
    metrics |= {kind: (f"  {kind}", (f"{kind} score", f"{kind} items")) for kind in MMHAL_TYPES}
    notes = [f"judge: {config.judge}. {unread} of its answers hold no rating, or several, and count as 0."]
    return tables.Counts(by_image(counted), metrics, notes, ("items", "hallucinated"), "questions")


def check_text(record, config):
    """BadRecord unless it is a question of LLaVA-Bench ("text") or MM-Vet ("question", "imagename")."""
    record |= {"image": record.get("image", record.get("imagename"))}
    record |= {"question": record.get("text", record.get("question"))}
    data.check(record, {"image": str, "question": str})


def judged(config, items, path, read_one):
    """Counts of a judge's file, of all and by kind: read_one(record) -> kinds, what was won, of how much."""
    if not path or not config.judge:
        raise Mistake("--judged and --judge are needed: its file, its name. Scores of two judges differ")
    counted, metrics = [], {}
    for where, record in by_id(data.read_json(path)):
        try:
            kinds, won, most = read_one(record)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise Mistake(f"{where}: no review of this benchmark ({str(error)[:60]}). Judge it again") from None
        row = {f"{kind}{name}": value for kind in ("", *kinds) for name, value in (("won", won), ("of", most))}
        counted.append((where, row))
        metrics |= {f"{kind}score": (f"{kind} score".strip(), (f"{kind}won", f"{kind}of")) for kind in ("", *kinds)}
    if items and len(counted) != len(items):
        raise Mistake(f"{path}: holds {len(counted)} reviews of {len(items)} questions. Judge all")
    return tables.Counts(by_image(counted), metrics, [f"judge: {config.judge}"], unit="questions")


def llavabench(config, items, path):
    """LLaVA-Bench: a review's first line holds two scores, the reference's and the model's, as "8 7" or "9,8"; the
    relative score is 100 x mean second / mean first, of all and by category.
    """

    def read_one(review):
        first, second = map(float, re.findall(r"[0-9.]+", review["content"].strip().split("\n")[0]))
        if not 0 < first <= 10 or not 0 <= second <= 10:
            raise ValueError(f"scores {first:g} and {second:g}, not of 10")
        return [review["category"]] if review.get("category") else [], 100 * second, first

    return judged(config, items, path, read_one)


def mmvet(config, items, path):
    """MM-Vet: the mean of its grader's scores (0 to 1) x 100, of all and by capability where --questions tells them."""

    def read_one(grade):
        score = grade["score"][-1] if isinstance(grade["score"], list) else grade["score"]
        if not 0 <= float(score) <= 1:
            raise ValueError(f"score {score}, not of 1")
        return items.get(id_of(grade), {}).get("capability", []), 100 * float(score), 1

    return judged(config, items, path, read_one)


def answer_line(item, text):
    """POPE's form, and ours."""
    name = "question_id" if "question_id" in item else "id"
    return {name: item[name], "answer": text}


def amber_line(item, text):
    """Of the response file: Yes or No where that was asked; what says neither stays, and counts as wrong."""
    if item["type"] in AMBER_PARTS:
        text = closed_answer(text, {"kind": "yesno"}) or text
    return {"id": item.get("question_id", item.get("id")), "response": text}


def mmhal_line(item, text):
    """Of the file for the judge: the template's record, with the model's answer."""
    return {name: item[name] for name in item if name not in ("id", "image")} | {"model_answer": text}


def review_line(item, text):
    """Of LLaVA-Bench's answer file."""
    return {"question_id": item.get("question_id"), "prompt": item["question"], "text": text}


# flag: of the items' file; field, suffix: what is asked; tokens: at most; line(item, text): of --answers
Benchmark = namedtuple("Benchmark", "flag check score field suffix tokens line")
# objhal: RLHF-V's script has 3 beams. closed: extras.sources has put the suffix into the question. amber: the
# suffix is ours, for its yes/no answers must be just that.
objhal = partial(chair, rates=True)
BENCHMARKS = {
    "chair": Benchmark("objects", check_chair, chair, "question", "", 512, answer_line),
    "objhal": Benchmark("objects", check_chair, objhal, "question", "", 1024, answer_line),
    "pope": Benchmark("questions", check_pope, pope, "text", SHORT, 128, answer_line),
    "closed": Benchmark("questions", check_closed, closed, "question", "", 16, answer_line),
    "amber": Benchmark("annotations", check_amber, amber, "query", SHORT, 512, amber_line),
    "mmhal": Benchmark("questions", check_mmhal, mmhal, "question", "", 512, mmhal_line),
    "llavabench": Benchmark("questions", check_text, llavabench, "question", "", 1024, review_line),
    "mmvet": Benchmark("questions", check_text, mmvet, "question", "", 512, answer_line),
}


JUDGED = ("mmhal", "llavabench", "mmvet")


def items_of(name, config):
    """{id: item} of a benchmark; AMBER's are its annotations, joined with its queries if these are named."""
    bench = BENCHMARKS[name]
    if config.objects and bench.flag == "objects" and not config.model:
        _, first = next(data.read_json(config.objects), (None, None))
        if isinstance(first, dict) and {"images", "annotations", "categories"} <= set(first):
            return of_coco(config, first)
    items = read(bench.flag, getattr(config, bench.flag), config, lambda item: bench.check(item, config))
    if name != "amber" or not (config.questions or config.model):
        return items

    def check_query(record):
        data.check(record, {"image": str, "query": str})
        one_of("id", id_of(record), items, f"one of {config.annotations}")

    queries = read("questions", config.questions, config, check_query)
    return {key: items[key] | query for key, query in queries.items()}


def answer(name, config, items):
    """Answer a benchmark with a model, greedily, into --answers in the form that its official script reads. All
    ranks call it; what is done lies in <answers>.parts-<fingerprint>, so that it can be stopped and goes on.
    """
    bench, out, records, decoded = BENCHMARKS[name], Path(config.answers), [], {}
    folder = Path(config.images or Path(config.objects or config.questions).parent)
    limit = config.max_new_tokens
    policy = hub.load(config.model, convention=config.convention, trained=False)
    for key, item in list(items.items()):
        prompt = item.get(bench.field, DESCRIBE)
        if item.get("type") != "generative" and not prompt.endswith(bench.suffix):
            prompt += bench.suffix
        try:
            policy.encoding.prompt(prompt)  # a bad one is told before hours of answering
        except BadRecord as error:
            if not config.skip_bad:
                raise Mistake(f"id {key!r}: {error}") from None
            runtime.say(f"id {key!r} left out: {error}")
            del items[key]
            continue
        records.append({"id": key, "image": item["image"], "prompt": prompt})
    settings = [{"bench": name, "max_new_tokens": limit}]
    mark = runtime.first_alone(lambda: hub.fingerprint(policy, folder, settings))
    here = out.with_name(f"{out.name}.parts-{mark}")

    def work(records):
        prompts = [policy.encoding.prompt(record["prompt"]) for record in records]
        pixels = model.load_pixels(policy, folder, [record["image"] for record in records], decoded)
        texts, ended = policy.generate(pixels.to(policy.mean.device), prompts, limit)
        return [{"answer": text, "ended": end} for text, end in zip(texts, ended, strict=True)]

    with runtime.summoned(policy):
        answers = parts.in_parts(here, "answers", name, records, config.batch, work)
    if runtime.rank() > 0:
        return
    lines = [bench.line(item, said["answer"]) for item, said in zip(items.values(), answers, strict=True)]
    if name in ("amber", "mmhal", "mmvet"):  # their files are one list, or one object
        lines = {line["id"]: line["answer"] for line in lines} if name == "mmvet" else lines
        runtime.write_text(out, json.dumps(lines, indent=1))
    else:
        runtime.write_jsonl(out, lines)
    parts.discard(here)
    cut = f"{sum(not said['ended'] for said in answers)} were cut at {limit} new tokens"
    print(f"wrote {out}: {len(lines)} answers of {config.model}; {cut}")


def report(name, config, items):
    """Score a file of answers, or compare two: print the table, write --json."""
    bench = BENCHMARKS[name]
    settings = {"bench": name} | vars(config)
    del settings["batch"], settings["json"]
    if config.compare:
        both = [bench.score(config, items, path) for path in config.compare]
        text, numbers = tables.compare_table(*both, config.compare)
        numbers = {"compare": config.compare, "a_b_difference": numbers, "settings": settings}
    else:
        counts = bench.score(config, items, config.judged if name in JUDGED else config.answers)
        numbers = tables.summary(counts)
        text = tables.table(counts, {"": numbers})
        text += "\n" + ", ".join(f"{flag} {value}" for flag, value in settings.items() if value)
        sums = {total.replace(" ", "_"): int(counts.sum(total)) for total in counts.totals}
        numbers |= sums | {"counts": sums, "images": len(counts.rows), "unit": counts.unit}
        numbers |= {"settings": settings, "notes": counts.notes}
    print(text)
    if config.json:
        runtime.write_text(config.json, json.dumps(numbers, indent=2))
        print(f"wrote {config.json}")


def main():
    """Read and check all files, answer if a model is named, score."""
    name, config = runtime.parse_command(__doc__, dict.fromkeys(BENCHMARKS, Config))
    runtime.start()
    needed = name not in JUDGED or config.model or config.questions  # a judge's answers are scored without them
    items = runtime.first_alone(lambda: items_of(name, config)) if needed else {}
    if config.model:
        config.max_new_tokens = config.max_new_tokens or BENCHMARKS[name].tokens
        answer(name, config, items)
    if name in JUDGED and config.model and not config.judged:
        runtime.say(f"next: let a judge rate {config.answers}, then {name} --judged <its file> --judge <name>")
    elif runtime.rank() == 0:
        report(name, config, items)


if __name__ == "__main__":
    runtime.run(main)
