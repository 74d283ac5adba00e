"""
Records on disk -> checked records -> token ids -> packed rows -> the order of an epoch.

A dataset is a folder with a JSONL file, one record a line, and images beside it, named by relative path. For MFPO:

    {"id": "17", "image": "images/17.png", "question": "Describe the picture.", "chosen": "...", "rejected": "...",
     "image_rejected": "distorted/17.png", "region_kind": "key", "regions": [{"word": "cup", "box": [x0, y0, x1, y1]}],
     "source": "toy"}                                                              boxes in pixels of "image"

For MBPO, pairs whose rejected answer was mined with an attack on the image, and closed-ended questions:

    {"id": "17", "image": "images/17.png", "question": "Describe the picture.", "chosen": "...", "rejected": "...",
     "image_attacked": "attacked/17.png", "iig": 2.4, "attack": {"kind": "pgd", "eps": 0.0157, "steps": 10, ...}}
    {"id": "18", "image": "images/18.png", "question": "Is there a cup?", "kind": "yesno", "answer": "Yes"}

"kind" says which answers are right (closed_answer in eval.py): yesno (Yes, No) | choice (a letter of the options in
"choices") | number (digits) | word (one of "choices", if they are given).

A packed row holds everything that shares an image and a question, so that both are computed once:

    [<s> USER: <image>...<image> question ASSISTANT:] [chosen </s>] [rejected </s>]
     segment 0, the prefix                             segment 1     segment 2

The answers do not see each other (a 4-D mask) and both count their positions from the end of the prefix, so the
log-probabilities are those of separate forward passes. Image tokens are never truncated.
"""

import json
import os
import re
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

MAX_PIXELS = 50_000_000  # larger images are refused: a decompression bomb would take the machine down (ours)
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # load_image checks MAX_PIXELS instead
MAX_SIDE, MAX_ASPECT = 14_000, 100  # so are long ones, for LLaVA pads to a square of the longer side (ours)
MFPO_FIELDS = dict.fromkeys(("id", "image", "question", "chosen", "rejected", "image_rejected"), str)
MBPO_FIELDS = dict.fromkeys(("id", "image", "question", "chosen", "rejected"), str)
QUESTION_FIELDS = dict.fromkeys(("id", "image", "question", "kind", "answer"), str)
QUESTION_KINDS = ("yesno", "choice", "number", "word")
FIRST = os.environ.get("RANK", "0") == "0"  # all processes read, one of them tells
REGION_KINDS = ("key", "random", "global")
SPACE = re.compile(r"[ \t\r\n]*")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


# ---------------------------------------------------------------------------------------------------- records


class BadRecord(ValueError):
    """A record that cannot be used: the message names value and remedy, `reason` is what drops are counted by."""

    def __init__(self, reason, message):
        super().__init__(message)
        self.reason = reason


def read_jsonl(path):
    """Yield (where, object) for each line of a JSONL file: where names file and line, object may be a BadRecord."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file. Name an existing .jsonl file, or build one with build_data.py")
    with open(path, encoding="utf-8-sig", errors="strict") as lines:  # -sig: with or without a byte-order mark
        try:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                where = f"{path}, line {number}"
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError) as error:  # broken, a number of 5,000 digits, 100,000 brackets
                    value = BadRecord("not JSON", f"not JSON ({str(error)[:80]}). Mend or delete the line")
                yield where, value
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}). Convert it") from None


def read_json_list(path, block=1 << 20, longest=1 << 26):
    """
    Yield (where, object) for each item of a file that is one JSON list, as datasets of millions of records are: read
    block by block, so that memory does not grow with the file. ValueError where it breaks: what follows is lost.
    """
    decoder, at, number, broken = json.JSONDecoder(), 0, 0, None
    with open(path, encoding="utf-8-sig") as file:
        text = file.read(max(block, 1 << 16)).lstrip()[1:]  # after the opening bracket
        while True:
            at = SPACE.match(text, at).end()
            where = f"{path}, item {number + 1}"
            if text[at : at + 1] == "]":
                if text[at + 1 :].strip() or any(more.strip() for more in iter(lambda: file.read(block), "")):
                    raise ValueError(f"{where}: something follows the list's end. Mend the file")
                return
            try:
                value, end = decoder.raw_decode(text, at)
                end = SPACE.match(text, end).end()
            except (ValueError, RecursionError) as error:  # cut off by the end of the block, or broken
                cut = isinstance(error, json.JSONDecodeError) and len(text) - at <= longest
                if not cut:
                    raise ValueError(f"{where}: not JSON ({str(error)[:80]}). Mend the file") from None
                broken = error if error.pos < len(text) - 1 else None  # inside a text it may still be cut off
                end = len(text)
            if end < len(text):  # else a number could go on in the next block
                if text[end] not in ",]":
                    raise ValueError(
                        f"{where}: {text[end : end + 20]!r} follows it, no comma or bracket. Mend the file"
                    )
                yield where, value
                at, number = end + (text[end] == ","), number + 1
                continue
            more = file.read(block)
            if not more:
                why = f"not JSON ({broken})" if broken else "the file ends within it"
                raise ValueError(f"{where}: {why}. Mend the file, or fetch it again")
            text, at = text[at:] + more, 0


def read_json(path):
    """Yield (where, object) for each record of a JSONL file or of a file that is one JSON list."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file. Name a .jsonl file, or a .json file that holds a list")
    try:
        with open(path, encoding="utf-8-sig") as file:
            start = file.read(1 << 16).lstrip()[:1]
        yield from read_json_list(path) if start == "[" else read_jsonl(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}). Convert it") from None


def load_image(file, name=""):
    """
    An image file (a path, or an open file called `name` in messages) as upright RGB. Raises BadRecord naming the file
    if it is missing, damaged, too large, of a shape of which nothing would be left, or not of 8 bits a channel.
    """
    name = name or file
    try:
        with Image.open(file) as image:
            check_shape(name, *image.size)
            if image.mode[0] in "IF":  # their conversion to RGB clips: most of such an image would become white
                message = f"{name}: has {image.mode} pixels, of more than 8 bits. Convert it to an 8-bit image"
                raise BadRecord("image not of 8 bits", message)
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise BadRecord("image missing", f"{name}: no such image. Put it there or delete the record") from None
    except BadRecord:
        raise
    except Exception as error:  # decoders raise whatever they like on damaged files, struct.error and RuntimeError too
        message = f"{name}: cannot be read as an image ({error}). Replace it or delete the record"
        raise BadRecord("image unreadable", message) from None


def check_shape(name, width, height):
    """BadRecord unless an image of this shape can be brought to the model's square with something left to see."""
    if width * height > MAX_PIXELS:
        raise BadRecord("image too large", f"{name}: {width} x {height} is over {MAX_PIXELS} pixels. Shrink it")
    longer, shorter = max(width, height), min(width, height)
    if longer > MAX_SIDE or longer > MAX_ASPECT * shorter:
        message = (
            f"{name}: {width} x {height} is longer than {MAX_SIDE} pixels or {MAX_ASPECT} times its width: padded to a "
            "square, little of it would be left. Crop it or delete the record"
        )
        raise BadRecord("image too long", message)


def image_path(folder, name):
    """The path of a record's image; BadRecord if `name` would leave `folder` (absolute, '..', or a link out)."""
    folder = Path(folder).resolve()
    try:
        inside = not Path(name).is_absolute() and ".." not in Path(name).parts
        inside = inside and (folder / name).resolve().is_relative_to(folder)
    except (ValueError, OSError, RuntimeError):  # a zero byte, too long a name, links in a circle
        inside = False
    if not inside:
        message = f"image {name!r} lies outside {folder}. Use a path relative to the data folder, inside it"
        raise BadRecord("image outside the folder", message)
    return folder / name


class Lines:
    """The records of a JSONL file by index, read when asked for: only where each line begins is kept in memory."""

    def __init__(self, path):
        self.path, starts = Path(path), [0]
        with open(path, "rb") as file:
            starts += (file.tell() for _ in iter(file.readline, b""))
        self.starts = np.array(starts[:-1], dtype=np.int64)

    def __len__(self):
        return len(self.starts)

    def __getitem__(self, index):
        with open(self.path, "rb") as file:
            file.seek(self.starts[index])
            return json.loads(file.readline())


def check_record(record, fields, folder):
    """Raise BadRecord, naming field, value and remedy, unless `record` has `fields` and its images can be read."""
    if isinstance(record, BadRecord):
        raise record
    if not isinstance(record, dict):
        raise BadRecord("not an object", f"a record must be a JSON object, this is a {type(record).__name__}. Mend it")
    for name, kind in fields.items():
        if name not in record:
            raise BadRecord(f"{name!r} missing", f"field {name!r} is missing. A record has {', '.join(fields)}")
        if not isinstance(record[name], kind):
            got = f"{type(record[name]).__name__}: {str(record[name])[:60]!r}. Mend it"
            raise BadRecord(f"{name!r} of the wrong type", f"field {name!r} must be {kind.__name__}, got {got}")
        if kind is str and not record[name].strip():
            raise BadRecord(f"{name!r} empty", f"field {name!r} is empty. Give it a text or delete the record")
        if kind is str and any(0xD800 <= ord(c) < 0xE000 for c in record[name]):
            raise BadRecord(f"{name!r} not text", f"field {name!r} holds half a character (a surrogate). Mend the text")
    if "rejected" in fields and record["chosen"].strip() == record["rejected"].strip():
        message = "'chosen' and 'rejected' are the same: such a pair teaches nothing. Delete the record"
        raise BadRecord("chosen equal to rejected", message)
    if record.get("region_kind", "global") not in REGION_KINDS:
        message = f"field 'region_kind' must be one of {', '.join(REGION_KINDS)}, got {record['region_kind']!r}"
        raise BadRecord("'region_kind' unknown", message)
    if not isinstance(record.get("regions", []), list):
        raise BadRecord("'regions' of the wrong type", f"field 'regions' must be a list, got {record['regions']!r}")
    if "kind" in fields:
        check_question(record)
    for name in ("image", "image_rejected"):
        if name in fields:
            load_image(image_path(folder, record[name]))


def check_question(record):
    """Raise BadRecord unless a closed-ended question is of a kind that can be verified, with an answer of that kind."""
    kind, answer, choices = record["kind"], record["answer"], record.get("choices", [])
    if kind not in QUESTION_KINDS:
        message = f"field 'kind': no verifier for {kind!r}. Use one of {', '.join(QUESTION_KINDS)}"
        raise BadRecord("'kind' without a verifier", message)
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise BadRecord(
            "'choices' unusable", f"field 'choices' must be a list of texts, got {str(choices)[:60]}. Mend it"
        )
    if kind == "choice" and not 2 <= len(choices) <= len(LETTERS):
        message = f"field 'choices' has {len(choices)} options, letters tell 2 to 26. Mend or delete the record"
        raise BadRecord("'choices' unusable", message)
    right = {
        "yesno": ("Yes", "No"),
        "choice": LETTERS[: len(choices)],
        "number": (answer,) if answer.isascii() and answer.isdigit() else ("digits",),
        "word": choices or (answer,),
    }[kind]
    if answer not in tuple(right):
        message = f"field 'answer' of a {kind} question must be one of {', '.join(right)}"
        raise BadRecord("'answer' unusable", f"{message}, got {answer!r}. Mend or delete the record")


def keep_good(items, attempt, where, skip_bad, title):
    """
    attempt(item) for each item -> (the items that passed, their results).

    A BadRecord stops the run, named by where(item); with `skip_bad` it is dropped, and drops are counted and printed.
    """
    kept, results, dropped = [], [], Counter()

    def tried(item):
        try:
            return attempt(item)
        except BadRecord as error:
            return error

    with ThreadPoolExecutor(8) as pool:  # decoding images releases the interpreter's lock
        bar = tqdm(pool.map(tried, items), title, len(items), leave=False, delay=2, disable=not FIRST)
        for item, result in zip(items, bar, strict=True):
            if not isinstance(result, BadRecord):
                kept.append(item)
                results.append(result)
            elif skip_bad:
                dropped[result.reason] += 1
            else:
                pool.shutdown(cancel_futures=True)  # else the rest would be read before anybody is told
                raise ValueError(f"{where(item)}: {result}")
    for reason, count in dropped.items():
        if FIRST:
            print(f"{title}: {count} records dropped: {reason}")
    return kept, results


def read_records(path, fields, skip_bad=False):
    """
    All records of a JSONL file, checked: fields and types, unique ids, images present, whole and inside the folder.

    A bad record raises ValueError naming file, line, field and remedy; with `skip_bad` it is dropped, and the
    drops are printed, counted by reason. Returns a list of dicts.
    """
    lines = list(read_jsonl(path))
    folder, seen = Path(path).parent, {}
    for i, (where, record) in enumerate(lines):
        if isinstance(record, dict) and isinstance(record.get("id"), str):
            before = seen.setdefault(record["id"], where)
            if before != where:
                message = f"field 'id': {record['id']!r} was already used in {before}. Rename it"
                lines[i] = where, BadRecord("id used twice", message)
    kept, _ = keep_good(
        lines,
        lambda line: check_record(line[1], fields, folder),
        lambda line: line[0],
        skip_bad,
        f"checking {path}",
    )
    if not kept:
        raise ValueError(f"{path}: no usable records ({len(lines)} lines read). Build it with build_data.py")
    return [record for _, record in kept]


# ------------------------------------------------------------------------------------------------ token ids


@dataclass
class Row:
    """What one packed row is made of: a prompt, and answers that share it and its image."""

    prefix: list  # token ids of the prompt, the image token repeated once a patch
    answers: list  # token ids of each answer, ending with end-of-sequence
    id: str = ""


def encode_prompt(tokenizer, question, template, image_tokens):
    """Token ids of `template` filled with `question`, its one image token repeated `image_tokens` times."""
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    ids = tokenizer(template.format(question=question))["input_ids"]
    if ids.count(image_id) != 1:
        message = f"the question {question[:60]!r} holds an image token. The template adds the image: delete it"
        raise BadRecord("image token in the question", message)
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    if sum(i in special for i in ids) != sum(
        i in special for i in tokenizer(template.format(question=""))["input_ids"]
    ):
        raise BadRecord(
            "special token in the question", f"the question {question[:60]!r} holds a special token: delete it"
        )
    at = ids.index(image_id)
    return ids[:at] + [image_id] * image_tokens + ids[at + 1 :]


def encode_answer(tokenizer, question, answer, template):
    """
    Token ids of `answer` as they follow the prompt, ending with end-of-sequence.

    Prompt and answer are tokenised as one text and cut apart: tokenised alone, an answer may begin with another
    token, and the model would be scored on a text that it never says.
    """
    prompt = template.format(question=question)
    prompt_ids = tokenizer(prompt)["input_ids"]
    ids = tokenizer(prompt + " " + answer.strip())["input_ids"]
    if ids[: len(prompt_ids)] != prompt_ids:
        message = f"the tokenizer merges the prompt's end with the answer {answer[:60]!r}. Change its first character"
        raise BadRecord("answer merges with the prompt", message)
    ids = ids[len(prompt_ids) :]
    special = set(ids) & set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    if special:
        names = tokenizer.convert_ids_to_tokens(sorted(special))
        message = f"the answer {answer[:60]!r} holds the special tokens {names}. Delete them from the text"
        raise BadRecord("special token in an answer", message)
    return ids + [tokenizer.eos_token_id]


def check_length(row, max_length):
    """Raise BadRecord if prefix and any one answer exceed `max_length`: nothing is ever cut."""
    longest = len(row.prefix) + max(map(len, row.answers))
    if longest > max_length:
        raise BadRecord(
            "longer than --max_length",
            f"image, question and answer take {longest} tokens, --max_length is {max_length}. "
            "Raise it, shorten the answer, or drop such records with --skip_bad",
        )


def pair_row(record, tokenizer, template, image_tokens, max_length):
    """A record's one row for MBPO: the image with chosen and rejected."""
    prefix = encode_prompt(tokenizer, record["question"], template, image_tokens)
    chosen, rejected = (
        encode_answer(tokenizer, record["question"], record[name], template) for name in ("chosen", "rejected")
    )
    if chosen == rejected:
        message = "'chosen' and 'rejected' become the same tokens: such a pair teaches nothing. Delete the record"
        raise BadRecord("chosen equal to rejected", message)
    row = Row(prefix, [chosen, rejected], record["id"])
    check_length(row, max_length)
    return row


def mfpo_rows(record, *settings):
    """A record's two rows for MFPO: the image with chosen and rejected, the distorted image with chosen."""
    clean = pair_row(record, *settings)
    return clean, Row(clean.prefix, clean.answers[:1], clean.id)


def chosen_row(record, tokenizer, template, image_tokens, max_length):
    """A record's row with the chosen answer alone."""
    prefix = encode_prompt(tokenizer, record["question"], template, image_tokens)
    row = Row(prefix, [encode_answer(tokenizer, record["question"], record["chosen"], template)], record["id"])
    check_length(row, max_length)
    return row


def question_row(record, tokenizer, template, image_tokens, max_length):
    """A closed-ended question's row, without answers: those are sampled."""
    row = Row(encode_prompt(tokenizer, record["question"], template, image_tokens), [[]], record["id"])
    check_length(row, max_length)
    return row


def encode_records(rows_of, records, path, tokenizer, template, image_tokens, max_length, skip_bad=False):
    """
    Records -> (records that fit, their rows). What does not fit is an error or a counted drop, never cut.

    rows_of   mfpo_rows | pair_row | chosen_row | question_row
    """
    return keep_good(
        records,
        lambda r: rows_of(r, tokenizer, template, image_tokens, max_length),
        lambda r: f"{path}, record {r['id']!r}",
        skip_bad,
        f"tokenising {path}",
    )


# -------------------------------------------------------------------------------------------------- packing


@dataclass
class Batch:
    """
    R packed rows, the longest of L tokens, with A answers of M tokens together, T in the longest. The N tokens of all
    rows lie behind each other without padding, for nothing but attention has to know where a row ends.
    """

    pixels: torch.Tensor  # (R, 3, H, W) float32 in [0, 1]
    ids: torch.Tensor  # (N,)
    position: torch.Tensor  # (N,) restarts after the prefix for each answer
    place: torch.Tensor  # (N,) where each token stands among the R * L places of padded rows
    mask: torch.Tensor  # (R, 1, L, L) bool, True where a token may look
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
    segment = torch.from_numpy(segment)
    # A token sees earlier tokens of the prefix and of its own segment. Padding sees the prefix too, so that no row
    # of the mask is empty: softmax over nothing is nan.
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    allowed = (segment[:, None, :] == 0) | (segment[:, :, None] == segment[:, None, :])  # (R, L, L)
    sizes = torch.tensor(sizes)
    return Batch(
        pixels,
        torch.tensor(ids),
        torch.tensor(position),
        (segment >= 0).flatten().nonzero()[:, 0],
        (allowed & causal)[:, None],
        torch.tensor(before),
        torch.tensor(target),
        torch.arange(int(sizes.max()))[None] < sizes[:, None],
        [row.id for row in rows],
    )


# ------------------------------------------------------------------------------------------------ the order


def epoch_order(entropy, epochs, curriculum, seed):
    """
    The order in which records are trained, as one array of indices: a function of its arguments, so that a resumed
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
