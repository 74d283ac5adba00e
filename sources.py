"""
Public datasets -> source records, streamed: what build_data.py reads.

    format     container          known by its fields
    own        JSONL              id, image, question, chosen [, rejected, objects: [{"word", "box"}]]
    rlhf-v     parquet            image, text: a JSON string with question, chosen, rejected
    rlaif-v    parquet, JSON      image, question, chosen, rejected
    mdpo       JSON               img_path, prompt (templated), chosen, rejected
    povid      JSON               image, conversations, rejected_conversations
    trl        parquet, JSONL     image or images, [prompt,] chosen, rejected as messages
    llava      JSON               image, conversations                              (LLaVA-mix; no rejected answer)
    closed     JSONL              image, question, kind, answer                     (this project's own questions)
    scienceqa  parquet, JSONL     image, question, choices, answer: an index
    ai2d       parquet, JSONL     image, question, options, answer: an index
    mmstar     parquet, JSONL     image, question with its options inside, answer: a letter, category
    mme        parquet, JSONL     image, question, answer: Yes or No, category

The last five are closed-ended questions; the others are answers to train on. A .json file holds one list, a .parquet
source may be a folder of them. Images are files under `images`, or bytes inside the records; those that do not lie
under the output's folder are copied there, under a name made of their content.

Foreign records are named by their row, for their own ids are known to repeat (two questions an image in MME, merged
sets in LLaVA-mix); what they called it is kept in "origin".
"""

import base64
import binascii
import contextlib
import hashlib
import io
import json
import re
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

import data
from data import BadRecord

SURROGATE = re.compile("[\ud800-\udfff]")
MAGIC = (b"\x89P", b"\xff\xd8", b"GI", b"RI", b"BM")  # how PNG, JPEG, GIF, WebP and BMP files begin
CHOICE_PROMPT = "Answer with the option's letter from the given choices directly."
SHORT_PROMPT = "Answer the question using a single word or phrase."


class TextOnly(BadRecord):
    """A record without an image, of which a good dataset may have many: it is left out and counted, never an error."""

    def __init__(self):
        super().__init__("text only", "has no image")


# ------------------------------------------------------------------------------------------------ the fields


def text(raw, field):
    """A field that must be a text with something in it."""
    value = raw.get(field)
    if value is None:
        raise BadRecord(f"{field!r} missing", f"field {field!r} is missing. Add it or delete the record")
    if not isinstance(value, str):
        got = f"{type(value).__name__}: {str(value)[:60]!r}. Mend it"
        raise BadRecord(f"{field!r} of the wrong type", f"field {field!r} must be a text, got {got}")
    if not value.strip():
        raise BadRecord(f"{field!r} empty", f"field {field!r} is empty. Give it a text or delete the record")
    return value


TEMPLATES = [  # what a prompt may be wrapped in: the mark of a user's turn, and the whole, the question in its group
    ("USER:", r".*?USER: ?(.*?) ?ASSISTANT:\s*"),
    ("### Human:", r".*?### Human: ?(.*?)\s*### Assistant:\s*"),
    ("[INST]", r"\s*(?:<s>)?\s*\[INST\] ?(?:<<SYS>>.*?<</SYS>>\s*)?(.*?) ?\[/INST\]\s*"),
    ("<|user|>", r".*?<\|user\|>\s*(.*?)<\|end\|>\s*<\|assistant\|>\s*"),
    ("<|im_start|>user", r".*?<\|im_start\|>user\n(.*?)<\|im_end\|>\s*<\|im_start\|>assistant\s*"),
]


def bare_question(prompt):
    """The question alone: without a chat template around it and without its image token."""
    for mark, whole in TEMPLATES:
        if found := re.fullmatch(whole, prompt, re.DOTALL):
            if prompt.count(mark) > 1:
                raise BadRecord(*SEVERAL_TURNS)
            prompt = found[1]
            break
    if prompt.count("<image>") > 1:
        raise BadRecord("several images", "the prompt holds several <image>; this project trains on one. Delete it")
    question = prompt.replace("<image>", "").strip()
    if not question:
        raise BadRecord("question empty", f"the prompt {prompt[:60]!r} holds no question. Delete the record")
    return question


SEVERAL_TURNS = ("several turns", "the prompt is a conversation of several turns. Cut it to one question")


def bare_answer(answer):
    """An answer without the end-of-sequence mark that some datasets have written into it."""
    answer = re.sub(r"\s*(</s>|<\|im_end\|>|<\|end\|>)\s*$", "", answer).strip()
    if not answer:
        raise BadRecord("answer empty", "an answer is empty but for an end mark. Delete the record")
    return answer


def first_turn(raw, field):
    """LLaVA's conversations: the first question, its answer, and how many further answers there are."""
    turns, said = raw.get(field), []
    for turn in turns if isinstance(turns, list) else []:
        who = turn.get("from") if isinstance(turn, dict) and isinstance(turn.get("value"), str) else None
        if who not in ("human", "user", "gpt", "assistant", "system"):
            said = []
            break
        if who != "system":
            said.append((who in ("human", "user"), turn["value"]))
    if len(said) < 2 or [human for human, _ in said] != [n % 2 == 0 for n in range(len(said))]:
        message = f'field {field!r} must hold turns {{"from": human | gpt, "value": text}} in turn. Mend the record'
        raise BadRecord(f"{field!r} unusable", message)
    return bare_question(said[0][1]), bare_answer(said[1][1]), (len(said) - 1) // 2


def message_text(message):
    """The text of one message of TRL's: its content is a text, or a list of parts, one of which may be the image."""
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        content = "\n".join(part["text"] for part in content if isinstance(part.get("text"), str))
    if not isinstance(content, str):
        raise BadRecord(
            "message unusable", f"a message must have a role and a content, got {str(message)[:60]}. Mend it"
        )
    return content


def trl(raw):
    """TRL's preference records, conversational or plain; the prompt may be the common beginning of both answers."""
    chosen, rejected, prompt = (raw.get(name) for name in ("chosen", "rejected", "prompt"))
    if prompt is None and isinstance(chosen, list) and isinstance(rejected, list):
        same = 0
        while same < min(len(chosen), len(rejected)) - 1 and chosen[same] == rejected[same]:
            same += 1
        prompt, chosen, rejected = chosen[:same], chosen[same:], rejected[same:]
    if isinstance(prompt, list):
        prompt = [m for m in prompt if not (isinstance(m, dict) and m.get("role") == "system")]
        if len(prompt) != 1:
            raise BadRecord(*SEVERAL_TURNS)
        prompt = message_text(prompt[0])
    answers = {}
    for name, value in (("chosen", chosen), ("rejected", rejected)):
        if isinstance(value, list):
            if len(value) != 1:
                raise BadRecord(*SEVERAL_TURNS)
            value = message_text(value[0])
        answers[name] = bare_answer(text({name: value}, name))
    images = raw.get("images") or raw.get("image")
    if isinstance(images, list):
        if len(images) > 1:
            raise BadRecord(
                "several images", f"has {len(images)} images; this project trains on one. Delete the record"
            )
        images = images[0] if images else None
    return {"image": images, "question": bare_question(text({"prompt": prompt}, "prompt")), **answers}


def preference(raw):
    """question, chosen and rejected as plain texts (RLAIF-V)."""
    if "objects" in raw:
        raise BadRecord("'id' missing", "field 'id' is missing, and 'objects' is not RLAIF-V's. Add it")
    answers = {name: bare_answer(text(raw, name)) for name in ("chosen", "rejected")}
    return {"question": bare_question(text(raw, "question")), **answers}


def rlhf_v(raw):
    try:
        inner = json.loads(text(raw, "text"))
    except (json.JSONDecodeError, RecursionError, ValueError) as error:
        if isinstance(error, BadRecord):
            raise
        inner = None
    if not isinstance(inner, dict):
        raise BadRecord("'text' unusable", "field 'text' must be a JSON object in a string. Mend the record")
    return preference(inner)


def mdpo(raw):
    return {"image": raw.get("img_path"), **preference({**raw, "question": text(raw, "prompt")})}


def povid(raw):
    question, chosen, more = first_turn(raw, "conversations")
    again, rejected, _ = first_turn(raw, "rejected_conversations")
    if again != question:
        message = "'conversations' and 'rejected_conversations' ask different questions. Delete the record"
        raise BadRecord("two questions", message)
    return {"question": question, "chosen": chosen, "rejected": rejected, "left_out": more}


def llava(raw):
    if not raw.get("image"):
        raise TextOnly
    question, chosen, more = first_turn(raw, "conversations")
    return {"question": question, "chosen": chosen, "left_out": more}


def choice(raw, field):
    """A question with its options as lettered lines, as LLaVA asks ScienceQA. The answer is an index into them."""
    options, answer, hint = raw.get(field), raw.get("answer"), raw.get("hint")
    if not isinstance(options, list) or not all(isinstance(option, str) and option.strip() for option in options):
        raise BadRecord(
            f"{field!r} unusable", f"field {field!r} must be a list of texts, got {str(options)[:60]}. Mend it"
        )
    if isinstance(answer, str) and answer.strip().isascii() and answer.strip().isdigit():
        answer = int(answer)
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(options[:26]):
        message = f"field 'answer' must be an index into the {len(options)} {field}, got {answer!r}. Mend the record"
        raise BadRecord("'answer' unusable", message)
    context = f"Context: {hint}\n" if isinstance(hint, str) and hint.strip() else ""
    lines = [f"{letter}. {option}" for letter, option in zip(data.LETTERS, options, strict=False)]
    question = "\n".join([context + bare_question(text(raw, "question")), *lines, CHOICE_PROMPT])
    return {"question": question, "kind": "choice", "answer": data.LETTERS[answer], "choices": options}


def mmstar(raw):
    """Its options lie inside the question, after 'Options:' as 'A: a cup, B: a pen' or 'Choices:' as '(A) 10'."""
    question, answer = bare_question(text(raw, "question")), text(raw, "answer").strip()
    after = re.split(r"Options:|Choices:", question, maxsplit=1)[-1]
    marks, form = [], None
    for mark in re.finditer(r"(?<!\S)(\(?)([A-Z])([:.)])\s*", after):
        # In order and all alike: neither an "A:" nor the "B." of a name inside of an option is a mark.
        if mark[2] == data.LETTERS[len(marks) : len(marks) + 1] and form in (None, (mark[1], mark[3])):
            marks.append(mark)
            form = mark[1], mark[3]
    ends = [*(mark.start() for mark in marks[1:]), len(after)]
    options = [after[m.end() : end].strip().rstrip(",").strip() for m, end in zip(marks, ends, strict=False)]
    if len(options) < 2 or not all(options) or answer not in list(data.LETTERS[: len(options)]):
        message = f"found the options {options} in the question, and the answer is {answer!r}. Mend the record"
        raise BadRecord("options unusable", message)
    return {"question": f"{question}\n{CHOICE_PROMPT}", "kind": "choice", "answer": answer, "choices": options}


def mme(raw):
    """Asked as LLaVA does: its own 'Please answer yes or no.' gives way to the usual wish for a short answer."""
    answer = text(raw, "answer").strip().capitalize()
    if answer not in ("Yes", "No"):
        raise BadRecord("'answer' unusable", f"field 'answer' must be Yes or No, got {answer!r}. Mend the record")
    if {"kind", "choices", "options"} & raw.keys():
        raise BadRecord("no format", "is no question of MME. Name the --source_format, or add the fields that it lacks")
    question = bare_question(bare_question(text(raw, "question")).replace("Please answer yes or no.", ""))
    return {"question": f"{question}\n{SHORT_PROMPT}", "kind": "yesno", "answer": answer}


def own(raw):
    raw = {name: value for name, value in raw.items() if name != "left_out"}
    return {**raw, "id": text(raw, "id"), "question": text(raw, "question"), "chosen": text(raw, "chosen")}


def closed(raw):
    kept = {name: text(raw, name) for name in ("id", "question", "kind", "answer")}
    return {**raw, **kept}


# name -> reader and the fields that a record must have to be taken for it, the most telling format first
FORMATS = {
    "closed": (closed, {"id", "image", "question", "kind", "answer"}),
    "own": (own, {"id", "image", "question", "chosen"}),
    "mdpo": (mdpo, {"img_path", "prompt", "chosen", "rejected"}),
    "povid": (povid, {"image", "conversations", "rejected_conversations"}),
    "llava": (llava, {"conversations"}),
    "rlaif-v": (preference, {"image", "question", "chosen", "rejected"}),
    "trl": (trl, {"chosen", "rejected"}),
    "rlhf-v": (rlhf_v, {"image", "text"}),
    "scienceqa": (lambda raw: choice(raw, "choices"), {"image", "question", "choices", "answer"}),
    "ai2d": (lambda raw: choice(raw, "options"), {"image", "question", "options", "answer"}),
    "mmstar": (mmstar, {"image", "question", "answer", "l2_category"}),
    "mme": (mme, {"image", "question", "answer"}),
}
CLOSED = ("closed", "scienceqa", "ai2d", "mmstar", "mme")


def recognise(raw, where):
    """The format of a record by its fields."""
    if isinstance(raw, BadRecord):
        raise ValueError(f"{where}: {raw}")
    if isinstance(raw, dict):
        for name, (_, fields) in FORMATS.items():
            if fields <= raw.keys():
                return name
    known = "; ".join(f"{name}: {', '.join(sorted(fields))}" for name, (_, fields) in FORMATS.items())
    got = f"the fields {', '.join(raw)}" if isinstance(raw, dict) else f"a {type(raw).__name__}"
    raise ValueError(f"{where}: no known format has {got}. Rename them, or use --source_format. Known are {known}")


# --------------------------------------------------------------------------------------------------- reading


@contextlib.contextmanager
def parquet(file):
    """An open .parquet file; ValueError if it cannot be read, or pyarrow is missing."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{file}: reading .parquet needs pyarrow: pip install pyarrow") from None
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            yield table
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:80]
        raise ValueError(f"{file}: cannot be read as parquet ({reason}). Fetch it again") from None


def read_parquet(path):
    """Yield (where, row) of a .parquet file, or of all those in a folder, a few rows at a time."""
    for file in files_of(path):
        with parquet(file) as table:
            rows = (row for batch in table.iter_batches(16) for row in batch.to_pylist())  # with images: a few MB
            for number, row in enumerate(rows, 1):
                yield f"{file}, row {number}", row


def read(path):
    """Yield (where, raw record) of a source file, or of a folder of .parquet files."""
    path = Path(path)
    if path.suffix == ".parquet" or (path.is_dir() and any(path.glob("*.parquet"))):
        if not path.exists():
            raise ValueError(f"{path}: no such file. Check --source")
        yield from read_parquet(path)
    else:
        yield from data.read_json(path)


def count(path):
    """How many records a source has, for a progress bar; None where only reading it would tell (one JSON list)."""
    files = files_of(path)
    if files[0].suffix == ".parquet":
        rows = 0
        for file in files:
            with parquet(file) as table:
                rows += table.metadata.num_rows
        return rows
    with open(files[0], "rb") as file:
        if file.read(1 << 10).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"[":
            return None
        return 1 + sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 24), b""))


def files_of(path):
    """The files that a source is made of."""
    return sorted(Path(path).glob("*.parquet")) if Path(path).is_dir() else [Path(path)]


def place_image(value, images, folder, copies):
    """
    An image field -> the image's name relative to `folder`, where it lies from now on. Raises BadRecord.

    value    a path under `images`; or a dataset's {"bytes", "path"}; or the file's bytes, as such or in base64
    copies   folder inside `folder` for images that do not lie under `folder` yet
    """
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if value is None or value == "":
        raise TextOnly
    if isinstance(value, str) and len(value) > 60 and re.fullmatch(r"[A-Za-z0-9+/\s]+=*\s*", value):
        with contextlib.suppress(binascii.Error, ValueError):  # else it is a path after all
            decoded = base64.b64decode("".join(value.split()), validate=True)
            value = decoded if decoded[:2] in MAGIC else value
    if isinstance(value, str):
        inside = Path(value).is_absolute() and Path(value).is_relative_to(images.resolve())
        path = data.image_path(images, str(Path(value).relative_to(images.resolve())) if inside else value)
        data.load_image(path)
        if path.resolve().is_relative_to(folder.resolve()):
            return path.resolve().relative_to(folder.resolve()).as_posix()
        value = path.read_bytes()
    elif isinstance(value, bytes):
        data.load_image(io.BytesIO(value), "the image in the record")
    else:
        raise BadRecord("'image' of the wrong type", f"field 'image' is a {type(value).__name__}. Give a path or bytes")
    with Image.open(io.BytesIO(value)) as image:
        suffix = {"JPEG": "jpg"}.get(image.format, image.format.lower())
    copies.mkdir(parents=True, exist_ok=True)
    path = copies / f"{hashlib.sha256(value).hexdigest()[:20]}.{suffix}"
    if not path.is_file() or path.stat().st_size != len(value):
        path.write_bytes(value)
    return path.relative_to(folder).as_posix()


def in_threads(work, items, ahead=256):
    """work(item) for each item, in order, by 8 threads that are never more than `ahead` items in front."""
    with ThreadPoolExecutor(8) as pool:
        waiting = deque()
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def records(path, source_format, images, folder, copies, check, skip_bad=False):
    """
    Yield (where, record or BadRecord) for each record of a source: in this project's form, checked, image in place.

    source_format   a name in FORMATS; empty: recognised from the first record
    copies          None leaves the images alone
    check           check(record) raises BadRecord unless the builder can use it
    skip_bad        the first record that some format fits tells the format; else the first of all must
    """
    reader, seen, name = None, set(), source_format

    def raws():
        nonlocal name, reader
        for number, (where, raw) in enumerate(read(path), 1):
            if not name:
                try:
                    name = recognise(raw, where)
                except ValueError as error:
                    if not skip_bad or number == 100:
                        raise
                    raw = raw if isinstance(raw, BadRecord) else BadRecord("no known format", str(error))
            reader = FORMATS[name][0] if name else None
            yield number, where, raw

    def finished(item):
        number, where, raw = item
        try:
            if isinstance(raw, BadRecord):
                raise raw
            if not isinstance(raw, dict):
                raise BadRecord("not an object", f"a record must be a JSON object, this is a {type(raw).__name__}")
            record = {"image": raw.get("image"), **reader(raw)}
            if name not in ("own", "closed"):
                theirs = raw.get("id", raw.get("idx", raw.get("question_id", raw.get("index"))))
                category = raw.get("category", raw.get("subject"))
                record = {"id": str(number), **record, "source": name}
                record |= {"origin": str(theirs)} if theirs is not None else {}
                record |= {"category": str(category)} if category is not None else {}
            elif not raw.get("image"):
                raise BadRecord("'image' missing", "field 'image' is missing. Add it or delete the record")
            for field, value in record.items():
                told = value if isinstance(value, str) else repr(value)
                if SURROGATE.search(told) or (not isinstance(value, str) and "\\ud" in told):
                    raise BadRecord(f"{field!r} not text", f"field {field!r} holds half a character. Mend the text")
            check(record)
            if copies:
                record["image"] = place_image(record["image"], images, folder, copies)
            return where, record
        except BadRecord as error:
            return where, error

    for where, record in in_threads(finished, raws()):
        if isinstance(record, dict):
            if hash(record["id"]) in seen:
                record = BadRecord("id used twice", f"field 'id': {record['id']!r} was used before. Rename it")
            else:
                seen.add(hash(record["id"]))
        yield where, record
