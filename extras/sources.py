"""
Public datasets -> this project's own records: what build_data.py and train_mbpo.py read.

    python -m extras.sources FILE --out FOLDER [--images DIR] [--split NAME] [--records N] [--skip_bad True]

reads    FILE: .jsonl, .json (one list), .parquet, or a folder with .parquet files in it or in its data/:
         RLHF-V, RLAIF-V, mDPO, POVID, TRL, LLaMA-Factory, ms-swift, LLaVA-mix; ScienceQA, AI2D, MMStar, MME,
         R1-V; our own (see FORMATS)
writes   FOLDER/source.jsonl, or FOLDER/questions.jsonl from a closed-ended set (format: data.py), and images

Images are files under DIR, or bytes in the records. Those under FOLDER stay where they are; others come to
FOLDER/images, named by their content: a file as a hard link where the file system can, else as a copy.
"""

import base64
import hashlib
import io
import json
import os
import random
import re
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Literal

from PIL import Image
from tqdm import tqdm

import data
import runtime
from data import BadRecord
from runtime import Mistake, knob

USAGE = "usage: python -m extras.sources FILE --out FOLDER; --help lists all flags"
TEXT_ONLY = ("text only", "has no image")  # good sets have many: left out and counted, never an error
SEVERAL_TURNS = ("several turns", "the prompt is a conversation of several turns. Cut it to one question")
CHOICE_PROMPT = "Answer with the option's letter from the given choices directly."
SHORT_PROMPT = "Answer the question using a single word or phrase."
WHO = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}
# What a file's name says of its split: train-00000-of-00002.parquet as the hub writes it, or train.parquet.
SPLIT = re.compile(r".+?(?=[-_]\d+-of-\d+)|(?:.*[-_])?(?:train|validation|val|dev|test)(?![a-zA-Z])")

# ------------------------------------------------------------------------------- one reader for each format


def texts(raw, *names):
    """The fields `names`, each of which must be a text with something in it."""
    data.check(raw, dict.fromkeys(names, str))
    return [raw[name] for name in names]


def bare_question(prompt):
    """The question without its image token, and without the vicuna template of mDPO's prompts."""
    if template := re.fullmatch(r".*?USER: ?(.*?) ?ASSISTANT:\s*", prompt, re.DOTALL):
        if prompt.count("USER:") > 1:
            raise BadRecord(*SEVERAL_TURNS)
        prompt = template[1]
    if prompt.count("<image>") > 1:
        raise BadRecord("several images", "the prompt has several <image>, we train on one. Delete it")
    question = prompt.replace("<image>", "").strip()
    if not question:
        raise BadRecord("question empty", f"the prompt {prompt[:60]!r} holds no question. Delete the record")
    return question


def bare_answer(answer):
    """An answer without the end-of-sequence mark that some datasets have written into it."""
    return re.sub(r"\s*(</s>|<\|im_end\|>|<\|end\|>)\s*$", "", answer).strip()


def image_parts(talk):
    """The parts of a conversation's messages that are images."""
    contents = [turn.get("content") for turn in talk if isinstance(turn, dict)]
    parts = chain.from_iterable(content for content in contents if isinstance(content, list))
    return [part for part in parts if isinstance(part, dict) and str(part.get("type")).startswith("image")]


def image_in(raw):
    """The one image that a record names: in a field, or inside of a message. What mentions one is never "text only"."""
    parts = max((image_parts(talk) for talk in raw.values() if isinstance(talk, list)), key=len, default=[])
    inside = [next(filter(None, map(part.get, ("image", "image_url", "url", "path"))), None) for part in parts]
    for named in (*map(raw.get, ("images", "image", "img_path", "image_path")), inside):
        named = [value for value in (named if isinstance(named, list) else [named]) if value]
        named = [value for value in named if not isinstance(value, dict) or any(value.values())]
        if named:
            break
    if max(len(named), len(parts)) > 1:
        raise BadRecord(
            "several images", f"has {max(len(named), len(parts))} images, we train on one. Delete the record"
        )
    if named:
        return named[0]["url"] if isinstance(named[0], dict) and "url" in named[0] else named[0]
    where = ["a message"] * bool(parts) + [name for name, value in raw.items() if "<image>" in str(value)]
    where += [name for name, value in raw.items() if value and re.search("image|img|photo|picture", name.lower())]
    where += [name for name, value in raw.items() if re.search(r"\.(png|jpe?g|webp|bmp|gif)$", str(value).lower())]
    if where:
        message = f"mentions an image in {where[0]}, and names none in image, images, img_path or a message"
        raise BadRecord("image not named", f"{message}. Rename its field")
    raise BadRecord(*TEXT_ONLY)


def turns_of(talk, field):
    """[(who, text)] of a conversation in LLaVA's form ("from", "value") or with roles; who: human | gpt | system."""
    turns = []
    for turn in talk if isinstance(talk, list) and talk else [talk]:
        turn = turn if isinstance(turn, dict) else {}
        who, text = WHO.get(str(turn.get("from", turn.get("role")))), turn.get("value", turn.get("content"))
        if isinstance(text, list):  # of parts, as the image may be one
            said = [part.get("text") for part in text if isinstance(part, dict)]
            text = "\n".join(part for part in said if isinstance(part, str))
        if who is None or not isinstance(text, str):
            message = f"field {field!r} must hold turns of human, gpt or system with a text, got {str(turn)[:60]}. Mend"
            raise BadRecord(f"{field!r} unusable", message)
        turns.append((who, text))
    return turns


def system_of(raw):
    """LLaMA-Factory's system message, which has a field of its own."""
    return [("system", raw["system"])] if isinstance(raw.get("system"), str) else []


def asked(turns):
    """The question of turns that end with a human's: what system messages say stands in front of it."""
    system, human = ([text for who, text in turns if who == kind and text.strip()] for kind in ("system", "human"))
    if [who for who, _ in turns if who != "system"] != ["human"] or not human:
        raise BadRecord(*SEVERAL_TURNS)
    return "\n".join([*map(str.strip, system), bare_question(human[0])])


def first_turn(raw, field):
    """The first question of a conversation, its answer, and how many further answers there are."""
    turns = [*system_of(raw), *turns_of(raw.get(field), field)]
    talk = [turn for turn in turns if turn[0] != "system"]
    if len(talk) < 2 or any(who != ("human", "gpt")[n % 2] for n, (who, _) in enumerate(talk)):
        raise BadRecord(f"{field!r} unusable", f"field {field!r} must hold turns of human and gpt in turn. Mend it")
    question = asked([turn for turn in turns if turn[0] == "system"] + talk[:1])
    return question, bare_answer(talk[1][1]), (len(talk) - 1) // 2


def preference(raw):
    """question, chosen and rejected as plain texts."""
    question, chosen, rejected = texts(raw, "question", "chosen", "rejected")
    answers = {"chosen": bare_answer(chosen), "rejected": bare_answer(rejected)}
    return {"question": bare_question(question), **answers}


def trl(raw):
    """TRL's messages or plain texts, mDPO's and LLaMA-Factory's. The question is in "prompt" or a conversation, or the
    common beginning of both answers.
    """
    talk = raw.get("prompt", raw.get("conversations", raw.get("messages")))
    said, heads = {}, []
    for name in ("chosen", "rejected"):
        answer = raw.get(name)
        if isinstance(answer, (list, dict)):
            *head, (who, answer) = turns_of(answer, name)
            heads += [head] * bool(head)
            if who != "gpt":
                raise BadRecord(f"{name!r} unusable", f"field {name!r} must end with the model's turn. Mend it")
        said[name] = answer
    if isinstance(talk, list):
        heads.append(turns_of(talk, "prompt"))
    if heads[1:] and heads[0] != heads[1]:
        raise BadRecord(*SEVERAL_TURNS)
    said["question"] = asked(system_of(raw) + heads[0]) if heads else texts({"prompt": talk}, "prompt")[0]
    return preference(said)


def swift(raw):
    """ms-swift: the chosen answer is the last message, the rejected one a text or the last of other messages."""
    if raw.get("rejected_images"):
        raise BadRecord("image preference", "'rejected_images' prefers an image, not an answer. Delete the record")
    talk, other = raw["messages"] if isinstance(raw["messages"], list) else [], raw.get("rejected_messages")
    rejected = other[-1:] if isinstance(other, list) else raw.get("rejected_response")
    return trl(raw | {"prompt": talk[:-1], "chosen": talk[-1:], "rejected": rejected})


def r1v(raw):
    """R1-V: the truth stands in <answer>: a number, yes or no, a letter of the problem's options, or a word."""
    problem, solution = texts(raw, "problem", "solution")
    answer = (re.findall("<answer>(.*?)</answer>", solution, re.DOTALL) or [solution])[-1].strip()
    record = {"question": bare_question(problem), "kind": "word", "answer": answer}
    if answer.lower() in ("yes", "no"):
        return record | {"kind": "yesno", "answer": answer.capitalize()}
    if re.fullmatch("[A-Z]", answer) and options_in(problem):
        return record | {"kind": "choice", "choices": options_in(problem)}
    return record | ({"kind": "number"} if re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", answer) else {})


def rlhf_v(raw):
    try:
        inner = json.loads(*texts(raw, "text"))
    except (json.JSONDecodeError, RecursionError):
        inner = None
    if not isinstance(inner, dict):
        raise BadRecord("'text' unusable", "field 'text' must be a JSON object in a string. Mend the record")
    return preference(inner)


def conversation(raw, field="conversations", paired=False):
    """LLaVA-mix, of which many entries have no image, and POVID, which holds a rejected conversation too."""
    question, chosen, later = first_turn(raw, field)
    record = {"question": question, "chosen": chosen, "later_turns": later}
    if paired:
        again, record["rejected"], _ = first_turn(raw, "rejected_conversations")
        if again != question:
            raise BadRecord("two questions", "its conversations ask different questions. Delete the record")
    return record


def choice(raw, field):
    """A question with its options as lettered lines, as LLaVA asks ScienceQA. The answer is an index."""
    data.check(raw, {field: list})
    options, answer, hint = raw[field], str(raw.get("answer")).strip(), raw.get("hint")  # 2 or "2"
    letters = {str(index): letter for index, letter in enumerate(data.LETTERS[: len(options)])}
    if answer not in letters:
        message = f"field 'answer' must be one of {', '.join(letters)}, got {answer[:60]!r}. Mend it"
        raise BadRecord("'answer' unusable", message)
    context = f"Context: {hint}\n" if isinstance(hint, str) and hint.strip() else ""
    lines = [f"{letter}. {option}" for letter, option in zip(letters.values(), options, strict=False)]
    question = "\n".join([context + bare_question(*texts(raw, "question")), *lines, CHOICE_PROMPT])
    return {"question": question, "kind": "choice", "answer": letters[answer], "choices": options}


def options_in(question):
    """The options in a question, after 'Options:' as 'A: a cup, B: a pen' or 'Choices:' as '(A) 10'."""
    after = re.split(r"Options:|Choices:", question, maxsplit=1)[-1]
    marks, form = [], None
    for mark in re.finditer(r"(?<!\S)(\(?)([A-Z])([:.)])\s*", after):
        # In order and all alike: neither an "A:" nor the "B." of a name inside of an option is a mark.
        if mark[2] == data.LETTERS[len(marks) : len(marks) + 1] and form in (None, (mark[1], mark[3])):
            marks.append(mark)
            form = mark[1], mark[3]
    ends = [*(mark.start() for mark in marks[1:]), len(after)]
    return [after[m.end() : end].strip().rstrip(",").strip() for m, end in zip(marks, ends, strict=False)]


def mmstar(raw):
    """The options lie in the question."""
    question, answer = texts(raw, "question", "answer")
    question = bare_question(question)
    choices = {"kind": "choice", "answer": answer.strip(), "choices": options_in(question)}
    return {"question": f"{question}\n{CHOICE_PROMPT}"} | choices


def mme(raw):
    """Asked as LLaVA does: its 'Please answer yes or no.' gives way to the usual wish for a short answer."""
    question, answer = texts(raw, "question", "answer")
    question = bare_question(question.replace("Please answer yes or no.", ""))
    return {"question": f"{question}\n{SHORT_PROMPT}", "kind": "yesno", "answer": answer.strip().capitalize()}


# name -> reader and the fields that a record must have to be taken for it, the most telling format first
FORMATS = {
    "closed": (dict, {"id", "image", "question", "kind", "answer"}),  # our own questions
    "own": (dict, {"id", "image", "question", "chosen"}),
    "mdpo": (trl, {"img_path", "prompt", "chosen", "rejected"}),
    "povid": (lambda raw: conversation(raw, paired=True), {"conversations", "rejected_conversations"}),
    "llama-factory": (trl, {"conversations", "chosen", "rejected"}),
    "ms-swift": (swift, {"messages", "rejected_response"}),
    "ms-swift talks": (swift, {"messages", "rejected_messages"}),
    "r1-v": (r1v, {"problem", "solution"}),
    "llava": (conversation, {"conversations"}),
    "rlaif-v": (preference, {"question", "chosen", "rejected"}),
    "trl": (trl, {"chosen", "rejected"}),  # image or images; messages
    "messages": (lambda raw: conversation(raw, "messages"), {"messages"}),
    "rlhf-v": (rlhf_v, {"image", "text"}),  # text: a JSON string with question, chosen, rejected
    "scienceqa": (lambda raw: choice(raw, "choices"), {"image", "question", "choices", "answer"}),
    "ai2d": (lambda raw: choice(raw, "options"), {"image", "question", "options", "answer"}),
    "mmstar": (mmstar, {"image", "question", "answer", "l2_category"}),
    "mme": (mme, {"image", "question", "answer"}),
}
OWN, CLOSED = ("own", "closed"), ("closed", "scienceqa", "ai2d", "mmstar", "mme", "r1-v")


def recognise(raw):
    """The format of a record by its fields, or ''. A question with fields that only we use is of no other."""
    fields = set(raw) if isinstance(raw, dict) else set()
    name = next((name for name, (_, needed) in FORMATS.items() if needed <= fields), "")
    return name if name in OWN or "question" not in fields or not {"kind", "objects"} & fields else ""


# ------------------------------------------------------------------------------------------------- reading


def files_of(source, split=""):
    """The files of a source, itself or the .parquet files in it: of one split, where names tell several."""
    files = sorted(source.glob("*.parquet")) or sorted(source.glob("data/*.parquet")) or [source]
    if not files[0].is_file():
        raise Mistake(f"{source}: no such file, nor a folder with .parquet files or data/*.parquet. {USAGE}")
    splits = {file: match[0] for file in files if (match := SPLIT.match(file.stem))}
    names = ", ".join(sorted(set(splits.values())))
    if not split and "," in names:
        raise Mistake(f"{source}: holds several splits. Name one with --split: {names[:100]}")
    exact = [file for file in files if split in (splits.get(file), file.name, file.stem)]  # "test" is not "testmini"
    files = exact or [file for file in files if file.name.startswith(split)]
    if not files:
        raise Mistake(f"--split {split}: no file's name says so. Splits: {names[:100] or 'none'}")
    return files


def read_parquet(file):
    """Yield (where, row) of a .parquet file, a few rows at a time. Mistake if it cannot be read."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise Mistake(f"{file}: reading .parquet needs pyarrow: pip install pyarrow") from None
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            rows = chain.from_iterable(batch.to_pylist() for batch in table.iter_batches(16))
            yield from ((f"{file}, row {number}", row) for number, row in enumerate(rows, 1))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        why = " ".join(str(error).split())[:80]
        raise Mistake(f"{file}: cannot be read as parquet ({why}). Fetch it again") from None


def image_of(value, images, folder):
    """An image field -> its name relative to `folder`, the bytes to put there (None: it is there), and the file
    they are from, if any. `value`: a path under `images`, a dataset's {"bytes", "path"}, or bytes.
    """
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if value is None or value == "":
        raise BadRecord(*TEXT_ONLY)
    file = None
    if isinstance(value, str) and (
        value.startswith("data:") or (len(value) > 100 and not re.search(r"\.\w{2,4}$", value))
    ):
        try:
            value = base64.b64decode("".join(value.removeprefix("data:").split(",")[-1].split()), validate=True)
        except ValueError:
            raise BadRecord("image unreadable", f"image {value[:40]!r}... is no base64. Mend it") from None
    if isinstance(value, str):
        value = value.removeprefix("file://")
        file = data.image_path(images, value.removeprefix(f"{images}/"))  # some write the full path
    else:
        data.check({"image": value}, {"image": bytes})
    data.load_image(file or io.BytesIO(value), file or "the image in the record")
    if file and file.resolve().is_relative_to(folder):
        return file.resolve().relative_to(folder).as_posix(), None, None
    content = file.read_bytes() if file else value
    with Image.open(io.BytesIO(content)) as image:
        suffix = {"JPEG": "jpg"}.get(image.format, image.format.lower())
    return f"images/{hashlib.sha256(content).hexdigest()[:20]}.{suffix}", content, file


def check_answers(record):
    """BadRecord unless the rejected answer and the objects of a source record, if any, can be used."""
    data.check({"rejected": "none", "objects": []} | record, {"rejected": str, "objects": list})
    if record.get("rejected", "").strip() == record["chosen"].strip():
        raise BadRecord("'rejected' unusable", "'rejected' must be a text other than 'chosen'. Mend it")
    for entry in record.get("objects", []):
        data.check(entry, {"word": str, "box": list})
        box = entry["box"]
        good = len(box) == 4 and all(type(v) in (int, float) and abs(v) < 1e9 for v in box)
        if not good or not (box[0] < box[2] > 0 and box[1] < box[3] > 0):
            message = f"'objects' needs boxes [x0, y0, x1, y1], x0 < x1, y0 < y1, got {str(box)[:60]}. Mend"
            raise BadRecord("'objects' unusable", message)


def convert(where, number, raw, name, images, folder):
    """-> where, name, the record in our own form or a BadRecord, its image's bytes and file, later turns."""
    try:
        data.check(raw, {"image": object} if name in OWN else {})
        if not name:
            message = f"no known format has the fields {', '.join(raw)[:100]}. Rename them or give --format"
            raise BadRecord("no known format", message)
        record = dict(raw) if name in OWN else {"image": image_in(raw), **FORMATS[name][0](raw)}
        later = 0 if name in OWN else record.pop("later_turns", 0)
        if name not in OWN:
            # Their own ids are known to repeat: two questions an image in MME, merged sets in LLaVA-mix.
            record = {"id": str(number), **record, "source": name}
            origin = raw.get("id", raw.get("idx", raw.get("question_id", raw.get("index"))))
            further = {"origin": origin, "category": raw.get("category", raw.get("subject"))}
            record |= {field: str(value) for field, value in further.items() if value is not None}
        record["image"], content, file = image_of(record["image"], images, folder)
        data.check(record, data.QUESTION_FIELDS if name in CLOSED else data.SOURCE_FIELDS)
        data.check_question(record) if name in CLOSED else check_answers(record)
        try:
            json.dumps(record, ensure_ascii=False).encode()
        except (TypeError, ValueError, RecursionError) as error:  # half a character; a date from parquet
            raise BadRecord("not for JSON", f"JSON cannot hold it ({str(error)[:100]}). Mend it") from None
        return where, name, record, content, file, later
    except BadRecord as error:
        return where, name, error, None, None, 0


def records(files, name, images, folder):
    """Yield what `convert` returns for each record of `files`. Empty `name`: the first good one tells it."""

    def raws(name):
        lines = ((read_parquet if file.suffix == ".parquet" else data.read_json)(file) for file in files)
        for number, (where, raw) in enumerate(chain.from_iterable(lines), 1):
            name = name or recognise(raw)
            yield where, number, raw, name

    items = raws(name)
    with ThreadPoolExecutor(8) as pool:
        while some := list(islice(items, 64)):
            yield from pool.map(lambda item: convert(*item, images, folder), some)


# ------------------------------------------------------------------------------------------------- writing


@dataclass
class Config:
    out: str = knob("", "the data folder, made where it is missing: image paths are relative to it")
    images: str = knob("", "folder that the source's image paths start in; empty: the source's own")
    split: str = knob("", "of a folder of several splits those .parquet files whose names begin so")
    records: int = knob(0, "so many of the usable records, drawn by a seed, in the source's order; 0: all")
    skip_bad: bool = knob(False, "leave bad records out and count them by reason; else the first one stops")
    format: Literal[("", *FORMATS)] = knob("", "what the source is; empty: told by its fields")

    def __post_init__(self):
        runtime.check(self, not_negative="records")
        if not self.out:
            raise Mistake(f"--out is missing: name a folder. {USAGE}")
        if self.images and not Path(self.images).is_dir():
            raise Mistake(f"--images {self.images}: no such folder. Name the one that image paths start in")


def put(path, content, file):
    """Put an image at `path`: a hard link to `file`, if there is one and the system can, else a copy."""
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    try:
        os.link(file.resolve(), path)
    except (OSError, AttributeError):
        path.write_bytes(content)


def build(source, config):
    """Write the records of `source`. A mistake leaves nothing behind: no images, no folder that was made."""
    folder = Path(config.out).resolve()
    images = Path(config.images or (source if source.is_dir() else source.parent)).resolve()
    if source.resolve() in (folder / "source.jsonl", folder / "questions.jsonl"):
        raise Mistake(f"{source}: would be written over. Name another --out, or rename the file")
    items = records(files_of(source, config.split), config.format, images, folder)
    absent = [path for path in (folder / "images", folder, *folder.parents) if not path.exists()]
    rng, most, drawn, written = random.Random(0), config.records or sys.maxsize, {}, []
    counts, ids, new_images = Counter(), set(), set()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for where, name, record, content, file, later in tqdm(items, f"reading {source}", leave=False):
            if isinstance(record, dict) and record["id"] in ids:
                record = BadRecord("id used twice", f"id {record['id'][:60]!r} was used before. Rename it")
            if isinstance(record, BadRecord):
                if not config.skip_bad and record.reason != TEXT_ONLY[0]:
                    raise Mistake(f"{where}: {record}")
                counts[record.reason] += 1
                continue
            # A draw in one pass (algorithm R, Vitter 1985): few images are put there that are not drawn.
            slot = len(ids) if len(ids) < most else rng.randrange(len(ids) + 1)
            counts["not drawn"] += slot in drawn or slot >= most
            if slot < most:
                path = folder / record["image"]
                if content is not None and not (path.is_file() and path.stat().st_size == len(content)):
                    new_images.add(path)
                    put(path, content, file)
                drawn[slot] = len(ids), record, later, name
            ids.add(record["id"])
        rows = [record for _, record, *_ in sorted(drawn.values())]
        reasons = "".join(f" + {count} {reason}" for reason, count in counts.most_common() if count)
        print(f"{source}: {len(rows) + counts.total()} records read = {len(rows)} written{reasons}")
        if turns := sum(later for *_, later, _ in drawn.values()):
            print(f"of conversations the first turn is used: {turns} later turns left out")
        if not rows:
            raise Mistake(f"{source}: no usable records. See above what was left out, and mend it")
        name = drawn[0][-1]
        out = Path(config.out) / ("questions.jsonl" if name in CLOSED else "source.jsonl")
        runtime.write_jsonl(out, rows)
        written = rows
    finally:
        items.close()  # its threads end here: joined by the garbage collector, they can wait for ever
        for path in new_images - {folder / record["image"] for record in written}:
            path.unlink(missing_ok=True)
        for path in absent:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
    print(f"wrote {out} ({name})")
    if name in CLOSED:
        print(f"next: torchrun train_mbpo.py --questions {out} --data <records mined by build_data.py mbpo>")
    else:
        method = "mfpo" if all("rejected" in record for record in rows) else "mbpo"
        to = f"--model <hf id or folder> --out {out.with_name(method)}.jsonl"
        print(f"next: python build_data.py {method} --source {out} {to}")


def main():
    """FILE and flags; rank 0 builds, the others wait."""
    argv = sys.argv[1:]
    asks = {"-h", "--help"} & set(argv)
    if not asks and (not argv or argv[0].startswith("-")):
        raise Mistake(f"FILE must come first, got {' '.join(argv[:1]) or 'nothing'}. {USAGE}")
    config = runtime.parse_config(Config, ["--help"] if asks else argv[1:], __doc__)
    runtime.start()
    runtime.first_alone(lambda: build(Path(argv[0]), config))


if __name__ == "__main__":
    runtime.run(main)
