"""
Records on disk -> checked records -> token ids -> packed rows -> the order of an epoch.

A dataset is a folder with a JSONL file, one record a line, and images beside it, named by relative path. For MFPO:

    {"id": "17", "image": "images/17.png", "question": "Describe the picture.", "chosen": "...", "rejected": "...",
     "image_rejected": "distorted/17.png", "negative": "noise ddpm t=400", "region_kind": "key",
     "regions": [{"word": "cup", "box": [x0, y0, x1, y1]}], "source": "toy"}          boxes in pixels of "image"

Any picture named in "image_rejected" is an image negative; "negative" says what it is. MBPO's pairs and questions:

    {"id": "17", "image": "images/17.png", "question": "Describe the picture.", "chosen": "...", "rejected": "...",
     "image_attacked": "attacked/17.png", "iig": 2.4, "attack": {"kind": "pgd", "eps": 0.0157, "steps": 10, ...}}
    {"id": "18", "image": "images/18.png", "question": "Is there a cup?", "kind": "yesno", "answer": "Yes"}

"kind" says which answers are right (rewards.py): yesno (Yes, No) | choice (a letter of the options in "choices") |
number (digits) | word (one of "choices", if they are given).

A packed row holds everything that shares an image and a question, so that both are computed once:

    [<s> USER: <image>...<image> question ASSISTANT:] [chosen </s>] [rejected </s>]
     segment 0, the prefix                             segment 1     segment 2

The answers do not see each other (a 4-D mask) and both count their positions from the end of the prefix, so the
log-probabilities are those of separate forward passes. Image tokens are never truncated.
"""

import json
import math
import re
import struct
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from runtime import Mistake

MAX_PIXELS = 50_000_000  # larger images are refused: a decompression bomb would take the machine down (ours)
Image.MAX_IMAGE_PIXELS = None  # load_image checks MAX_PIXELS instead of Pillow, which warns
MAX_ASPECT = 16  # longer strips are refused: padded to a square little of them is left, and grounders fail (ours)
PAIR_FIELDS = dict.fromkeys(("id", "image", "question", "chosen", "rejected"), str)  # of MBPO
MFPO_FIELDS = PAIR_FIELDS | {"image_rejected": str}
SOURCE_FIELDS = dict.fromkeys(("id", "image", "question", "chosen"), str)
QUESTION_FIELDS = dict.fromkeys(("id", "image", "question", "kind", "answer"), str)
QUESTION_KINDS = ("yesno", "choice", "number", "word")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class BadRecord(Mistake):
    """A record that cannot be used: the message names value and remedy, `reason` is what drops are counted by."""

    def __init__(self, reason, message):
        super().__init__(message)
        self.reason = reason


def parsed(text):
    """The object of a line; a BadRecord where it is not JSON, or where bytes were not UTF-8 (half a character each)."""
    try:
        text.encode()
        return json.loads(text)
    except UnicodeEncodeError:
        return BadRecord("not UTF-8", "holds a byte that is not UTF-8. Mend or delete the line")
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 100,000 brackets
        return BadRecord("not JSON", f"not JSON ({str(error)[:80]}). Mend or delete the line")


def whole(text):
    """The items of a text that is not a record a line: of a JSON list, of a dict with one list in it, or objects over
    several lines. A BadRecord where it is none of these.
    """
    text = text.strip()
    items = parsed(text if text[:1] == "[" else "[" + re.sub(r"\}\s*\n\s*\{", "},{", text) + "]")
    if isinstance(items, list) and len(items) == 1 and isinstance(items[0], dict):
        lists = [value for value in items[0].values() if isinstance(value, list)]
        items = lists[0] if len(lists) == len(items[0]) == 1 else items
    return items


def read_json(path):
    """Yield (where, object) for each record of a file: one a line (JSONL), or what `whole` reads. `where` names file
    and line or item; a bad line is a BadRecord. Mistake if the file cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise Mistake(f"{path}: no such file. Name an existing .jsonl or .json file")
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:  # -sig: with a byte-order mark or without
        start = next((line for line in file if line.strip()), "").strip()
        file.seek(0)
        one = None if start[:1] == "[" else parsed(start)
        lists = [name for name, value in one.items() if isinstance(value, list)] if isinstance(one, dict) else []
        if not isinstance(one, dict) or (len(lists) == len(one) and lists[0] not in ("messages", "conversations")):
            items = whole(file.read())
            file.seek(0)
            if isinstance(items, list) or start[:1] == "[":
                if isinstance(items, BadRecord):
                    raise Mistake(f"{path}: {items}")
                yield from ((f"{path}, item {n}", item) for n, item in enumerate(items, 1))
                return
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path}, line {number}", parsed(line)


def read_lines(path):
    """The objects of a JSONL file that our own code has written, as a list."""
    return [record for _, record in read_json(path)]


def check(record, fields):
    """BadRecord, naming field, value and remedy, unless `record` is an object whose `fields` are {name: type}."""
    if isinstance(record, BadRecord):
        raise record
    if not isinstance(record, dict):
        message = f"a record must be a JSON object, this is a {type(record).__name__}. Mend it"
        raise BadRecord("not an object", message)
    for name, kind in fields.items():
        value = record.get(name)
        if value is None:
            raise BadRecord(f"{name!r} missing", f"field {name!r} is missing. A record has {', '.join(fields)}")
        if not isinstance(value, kind):
            message = f"field {name!r} must be a {kind.__name__}, got {str(value)[:60]!r}. Mend it"
            raise BadRecord(f"{name!r} of the wrong type", message)
        if kind is str and not value.strip():
            raise BadRecord(f"{name!r} empty", f"field {name!r} is empty. Give it a text or delete the record")
        if kind is str and any(0xD800 <= ord(c) < 0xE000 for c in value):
            raise BadRecord(f"{name!r} not text", f"field {name!r} holds half a character. Mend the text")


def check_question(record):
    """BadRecord unless a closed-ended question is of a kind that can be verified, its answer one of that kind."""
    kind, answer, choices = record["kind"], record["answer"], record.get("choices", [])
    if kind not in QUESTION_KINDS:
        message = f"field 'kind': no verifier for {kind[:60]!r}. Use one of {', '.join(QUESTION_KINDS)}"
        raise BadRecord("'kind' without a verifier", message)
    texts = isinstance(choices, list) and all(isinstance(choice, str) and choice.strip() for choice in choices)
    if not texts or (kind == "choice" and not 2 <= len(choices) <= len(LETTERS)):
        need = f"a list of {'2 to 26 ' if kind == 'choice' else ''}texts"
        raise BadRecord("'choices' unusable", f"field 'choices' must be {need}, got {str(choices)[:60]}. Mend it")
    right = {
        "yesno": ("Yes", "No"),
        "choice": tuple(LETTERS[: len(choices)]),
        "number": (answer,) if re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", answer) else ("digits",),
        "word": choices or (answer,),
    }[kind]
    if answer not in right:
        message = (
            f"field 'answer' of a {kind} question must be one of {', '.join(right)[:99]}, got {answer[:60]!r}. Mend it"
        )
        raise BadRecord("'answer' unusable", message)


def read_records(path, fields):
    """The records of a JSONL file to train on: `fields` and types, unique ids, images present and inside the
    folder. Returns a list of dicts; the first bad one is a Mistake naming file, line, field and remedy.
    """
    records, seen = [], {}
    for where, record in read_json(path):
        try:
            check(record, fields)
            if seen.setdefault(record["id"], where) != where:
                message = f"field 'id': {record['id'][:60]!r} was already used in {seen[record['id']]}. Rename it"
                raise BadRecord("id used twice", message)
            if "rejected" in fields and record["chosen"].strip() == record["rejected"].strip():
                message = "'chosen' and 'rejected' are the same: such a pair teaches nothing. Delete the record"
                raise BadRecord("chosen equal to rejected", message)
            if "kind" in fields:
                check_question(record)
            for name in [name for name in ("image", "image_rejected") if name in fields]:
                image = image_path(Path(path).parent, record[name])
                if not image.is_file():
                    message = f"field {name!r}: {image}: no such image. Put it there or delete the record"
                    raise BadRecord("image missing", message)
        except BadRecord as error:
            raise Mistake(f"{where}: {error}") from None
        records.append(record)
    if not records:
        raise Mistake(f"{path}: holds no records. Build it with build_data.py")
    return records


def load_image(file, name=""):
    """An image file (a path, or an open file called `name` in messages) as upright RGB. BadRecord, naming the
    file, if it is missing, damaged, too large, of a shape of which nothing would be left, or not of 8 bits a channel.
    """
    name = name or file
    with decoding(name):
        image = Image.open(file)
    with image:
        longer, shorter = max(image.size), min(image.size)
        if longer * shorter > MAX_PIXELS:
            raise BadRecord("image too large", f"{name}: {image.size} is over {MAX_PIXELS} pixels. Shrink it")
        if longer > MAX_ASPECT * shorter:
            message = f"{name}: {image.size} is over {MAX_ASPECT} times as long as wide. Crop or delete it"
            raise BadRecord("image too long", message)
        if image.mode[0] in "IF":  # their conversion to RGB clips: most of such an image would become white
            message = f"{name}: has {image.mode} pixels, of more than 8 bits. Convert it to an 8-bit image"
            raise BadRecord("image not of 8 bits", message)
        with decoding(name):
            image = ImageOps.exif_transpose(image)
            if image.has_transparency_data:  # what is drawn in black on nothing is seen black on white
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")


DAMAGED = (OSError, SyntaxError, ValueError, EOFError, TypeError, LookupError, ArithmeticError, RuntimeError)
DAMAGED += (AttributeError, struct.error, zlib.error)  # what decoders were seen to raise


@contextmanager
def decoding(name):
    """What Pillow's decoders raise on damaged files (struct.error and others) as a BadRecord that names the image."""
    try:
        yield
    except FileNotFoundError:
        raise BadRecord("image missing", f"{name}: no such image. Put it there or delete the record") from None
    except DAMAGED as error:
        reason = str(error).replace(str(name), "it")[:80]
        message = f"{name}: cannot be read as an image ({reason}). Replace it or delete the record"
        raise BadRecord("image unreadable", message) from None


def image_path(folder, name):
    """The path of a record's image; BadRecord if `name`, as it is written, would leave `folder` (absolute or '..'). It
    may be a link: hub caches and LLaVA's own folders are full of them.
    """
    parts = Path(name).parts
    inside = parts and not Path(name).is_absolute() and ".." not in parts and name.isprintable()
    if not inside or any(len(part.encode(errors="replace")) > 255 for part in parts):
        message = f"image {name[:100]!r} lies outside {folder}. Use a path relative to the data folder, inside it"
        raise BadRecord("image outside the folder", message)
    return Path(folder) / name


# ------------------------------------------------------------------------------------------------ token ids


@dataclass
class Row:
    """What one packed row is made of: a prompt, and answers that share it and its image."""

    prefix: list  # token ids of the prompt, the image token repeated once a patch
    answers: list  # token ids of each answer, ending with end-of-sequence
    id: str = ""


@dataclass
class Encoding:
    """How a model's records become token ids: its tokenizer, its template, the number of its image tokens."""

    tokenizer: object
    template: str  # "USER: <image>\n{question} ASSISTANT:", which an answer follows after a space
    image_tokens: int
    max_length: float = math.inf  # of prompt and any one answer; nothing is ever cut

    def special(self, ids):
        """The special tokens among `ids`, which no text of a record may hold."""
        marks = set(self.tokenizer.all_special_ids) - {self.tokenizer.unk_token_id}
        return [i for i in ids if i in marks]

    def prompt(self, question):
        """Token ids of the template filled with `question`, its one image token repeated for each patch."""
        image_id = self.tokenizer.convert_tokens_to_ids("<image>")
        ids, empty = (self.tokenizer(self.template.format(question=q))["input_ids"] for q in (question, ""))
        if ids.count(image_id) != 1:
            message = f"the question {question[:60]!r} holds an image token. The template adds the image: delete it"
            raise BadRecord("image token in the question", message)
        if len(self.special(ids)) != len(self.special(empty)):
            message = f"the question {question[:60]!r} holds a special token: delete it"
            raise BadRecord("special token in the question", message)
        at = ids.index(image_id)
        return ids[:at] + [image_id] * self.image_tokens + ids[at + 1 :]

    def answer(self, question, text):
        """Token ids of an answer as they follow the prompt, ending with end-of-sequence.

        Prompt and answer are tokenised as one text and cut apart: tokenised alone, an answer may begin with another
        token, and the model would be scored on a text that it never says.
        """
        prompt = self.template.format(question=question)
        start = self.tokenizer(prompt)["input_ids"]
        ids = self.tokenizer(f"{prompt} {text.strip()}")["input_ids"]
        if ids[: len(start)] != start:
            message = f"the tokenizer merges the prompt's end with the answer {text[:60]!r}. Change its beginning"
            raise BadRecord("answer merges with the prompt", message)
        ids = ids[len(start) :]
        if special := self.special(ids):
            names = self.tokenizer.convert_ids_to_tokens(sorted(set(special)))
            message = f"the answer {text[:60]!r} holds the special tokens {names}. Delete them from the text"
            raise BadRecord("special token in an answer", message)
        return ids + [self.tokenizer.eos_token_id]

    def spans(self, question, text):
        """Where each token of an answer stands in it, [(start, end)] in characters; end-of-sequence at (0, 0)."""
        prompt = self.template.format(question=question)
        options = {"return_offsets_mapping": True}
        offsets = self.tokenizer(f"{prompt} {text.strip()}", **options)["offset_mapping"]
        start = len(self.tokenizer(prompt)["input_ids"])
        return [(a - len(prompt) - 1, b - len(prompt) - 1) for a, b in offsets[start:]] + [(0, 0)]

    def row(self, record, *names):
        """A record's row: its image and question, then the answers in its fields `names` (none: to be sampled)."""
        row = Row(self.prompt(record["question"]), [], record["id"])
        row.answers = [self.answer(record["question"], record[name]) for name in names]
        if len(names) > 1 and row.answers[0] == row.answers[1]:
            message = "'chosen' and 'rejected' become the same tokens: such a pair teaches nothing. Delete the record"
            raise BadRecord("chosen equal to rejected", message)
        length = len(row.prefix) + max(map(len, row.answers), default=0)
        if length > self.max_length:
            message = f"image, question and answer take {length} tokens, --max_length is {self.max_length}. "
            raise BadRecord("longer than --max_length", message + "Raise it, or shorten or delete the record")
        return row

    def rows(self, records, path, *names):
        """The rows of records that were read from `path`; the first that does not fit is a Mistake naming it."""
        rows = []
        for record in records:
            try:
                rows.append(self.row(record, *names))
            except BadRecord as error:
                raise Mistake(f"{path}, record {record['id']!r}: {error}") from None
        return rows


# -------------------------------------------------------------------------------------------------- packing


@dataclass
class Batch:
    """R packed rows, the longest of L tokens, with A answers of M tokens together, T in the longest. The N tokens
    of all rows lie behind each other without padding: only attention has to know where a row ends (model.row_mask).
    """

    pixels: torch.Tensor  # (R, 3, H, W) float32 in [0, 1]
    ids: torch.Tensor  # (N,)
    position: torch.Tensor  # (N,) position ids, which restart after the prefix for each answer
    segment: torch.Tensor  # (R, L) of each slot of padded rows: -1 padding, 0 the prefix, k the k-th answer
    slot: torch.Tensor  # (N,) where each token stands among these R * L slots
    before: torch.Tensor  # (M,) which of the N tokens predicts each answer token, and the token
    target: torch.Tensor  # (M,)
    answer_mask: torch.Tensor  # (A, T) bool, True at answer tokens; answers in the order of the rows
    ids_of: list  # record id of each row, for messages

    def to(self, device):
        return Batch(*(v.to(device, non_blocking=True) if torch.is_tensor(v) else v for v in vars(self).values()))


def pack(rows, pixels):
    """Pack `rows` (list of Row) with their images, `pixels` (R, 3, H, W), into one Batch."""
    length = max(len(r.prefix) + sum(map(len, r.answers)) for r in rows)
    segment = np.full((len(rows), length), -1)  # -1 padding, 0 prefix, k the k-th answer
    ids, position, before, target, sizes = [], [], [], [], []
    for r, row in enumerate(rows):
        start, first = len(row.prefix), len(ids)
        ids += row.prefix
        position += range(start)
        segment[r, :start] = 0
        last = len(ids) - 1  # the prefix's last token predicts the first of each answer
        for k, answer in enumerate(row.answers, 1):
            end = len(ids) - first
            segment[r, end : end + len(answer)] = k
            before += [last, *range(len(ids), len(ids) + len(answer) - 1)]
            ids += answer
            position += range(start, start + len(answer))
            target += answer
            sizes.append(len(answer))
    sizes = torch.tensor(sizes)
    return Batch(
        pixels,
        torch.tensor(ids),
        torch.tensor(position),
        torch.from_numpy(segment),
        torch.from_numpy(np.flatnonzero(segment >= 0)),
        torch.tensor(before),
        torch.tensor(target),
        torch.arange(int(sizes.max()))[None] < sizes[:, None],
        [row.id for row in rows],
    )


def epoch_order(entropy, epochs, curriculum, seed):
    """The order in which records are trained, as one array of indices: a function of its arguments, so that a resumed
    run needs no saved sampler. MFPO section "easy to hard": thirds by entropy, each trained `epochs` times.

    entropy      (N,) nats per token, the mean entropy of the reference's predictions over the chosen answer
    curriculum   easy_to_hard | hard_to_easy | none (all records in one mix)
    """
    rng = np.random.default_rng(seed)
    ranked = np.argsort(np.asarray(entropy), kind="stable")
    if curriculum == "none":
        stages = [ranked]
    else:
        stages = np.array_split(ranked, 3)
        if curriculum == "hard_to_easy":
            stages = stages[::-1]
    return np.concatenate([rng.permutation(stage) for stage in stages for _ in range(epochs)])
