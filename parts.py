"""
What is around the making of a record: source records in, work that may be stopped, lines and images out.
Builders and benchmarks use it; nothing here knows a method.
"""

import hashlib
import json
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from tqdm import tqdm

import data
import hub
import runtime
from data import BadRecord
from runtime import Mistake, knob


@dataclass
class Config:
    """The knobs of both builders; Mistake unless `out` is a JSONL other than the source, which is there."""

    source: str = knob("data/toy/preference.jsonl", "source records, with a true answer each")
    model: str = knob("data/toy/base", "the model to be trained: what it sees, would say, can be made to say")
    out: str = knob("", "where the records go")
    records: int = knob(0, "so many source records, drawn by the seed; 0: all")
    skip_bad: bool = knob(False, "drop bad source records, counted by reason, instead of stopping at the first")
    batch: int = knob(32, "records at a time; lower it when memory runs out")
    convention: Literal["", "original", "hub"] = knob("", "how it sees and is asked; empty: its folder's own")
    max_length: int = knob(2048, "tokens of image, question and answer; a longer record is bad, never cut")
    seed: int = knob(0, "seed of noise, random regions, draws and questions")

    def __post_init__(self):
        runtime.check(self, positive="batch max_length", not_negative="records seed")
        out, source = Path(self.out), Path(self.source)
        also = [out.with_name(f"{out.stem}{end}.jsonl") for end in ("", "_heldout", "_dropped", "_closed")]
        if out.suffix != ".jsonl" or out.is_dir() or source.resolve() in [path.resolve() for path in also]:
            raise Mistake(f"--out {out}: must be a .jsonl file that does not write over --source {source}")
        if not source.is_file():
            raise Mistake(f"--source {source}: no such file. python -m extras.sources makes one of a public dataset")


def check_source(record, rejected=False):
    """BadRecord unless a source record can be used: its objects and, if it is needed, its rejected answer."""
    data.check(record, data.SOURCE_FIELDS)
    data.check({"objects": []} | record, {"objects": list})
    for o in record.get("objects", []):
        box = o.get("box") if isinstance(o, dict) and isinstance(o.get("word"), str) else None
        good = isinstance(box, list) and len(box) == 4
        good = good and all(type(v) in (int, float) and -1e9 < v < 1e9 for v in box)
        if not good or not (box[0] < box[2] and box[1] < box[3]):
            need = '{"word": text, "box": [x0, y0, x1, y1]}, x0 < x1, y0 < y1'
            raise BadRecord("'objects' unusable", f"field 'objects' needs {need}, got {repr(o)[:80]}")
    # Of the toy world's records toy.rejected makes it, from "own_answer".
    if record.get("rejected") is not None or (rejected and "own_answer" not in record):
        data.check(record, data.PAIR_FIELDS)
        if record["rejected"].strip() == record["chosen"].strip():
            message = "'chosen' and 'rejected' are the same: such a pair teaches nothing. Delete the record"
            raise BadRecord("chosen equal to rejected", message)


def cut_boxes(record, size):
    """Cut a record's boxes to its image of `size` (width, height); returns how many were. BadRecord if less than a
    pixel of one is left: it is in other units.
    """
    count, limits = 0, np.tile(size, 2)
    for o in record.get("objects", []):
        box = np.clip(o["box"], 0, limits)
        sides = box[2:] - box[:2]
        if sides.min() < 1 or sides.max() <= 1:  # [0, 0, 1, 1] is all of an image, in shares
            message = (
                f"box {str(o['box'])[:60]} of {o['word'][:40]!r} holds no pixel of its image, {size[0]} x {size[1]}. "
            )
            raise BadRecord("'objects' unusable", message + "Boxes are in pixels, not in shares or thousandths")
        if (box != o["box"]).any():
            o["box"], count = box.tolist(), count + 1
    return count


def read_source(config, check):
    """The usable records of config.source, on all ranks, their images named from the folder of `out`; with
    config.records so many, drawn by the seed. A bad one, or one with a bad image, is a Mistake naming file,
    line and remedy, or with `skip_bad` dropped and counted by reason.
    """
    source, out, cuts = Path(config.source), Path(config.out), []

    def fault(line):
        try:
            check(line[1])
            cuts.append(cut_boxes(line[1], data.load_image(data.image_path(source.parent, line[1]["image"])).size))
        except BadRecord as error:
            return error

    def read():
        """Rank 0: check, count, draw, bring the images."""
        lines, records, dropped = list(data.read_json(source)), {}, Counter()
        # Threads, as decoding releases the interpreter's lock; closing lets them stop at the first error.
        with ThreadPoolExecutor(8) as pool, closing(pool.map(fault, lines)) as faults:
            bar = tqdm(faults, f"checking {source}", len(lines), leave=False, delay=2)
            for (where, record), error in zip(lines, bar, strict=True):
                if not error and record["id"] in records:
                    error = BadRecord("id used twice", f"id {record['id']!r} was used before. Rename it")
                if not error:
                    records[record["id"]] = record
                elif config.skip_bad:
                    dropped[error.reason] += 1
                else:
                    raise Mistake(f"{where}: {error}")
        drops = "".join(f"; dropped: {reason} {count}" for reason, count in dropped.most_common())
        cut = f"; {sum(cuts)} boxes reached out of their image and were cut" if sum(cuts) else ""
        print(f"{len(records)} records from {source}{drops}{cut}")
        if not records:
            raise Mistake(f"--source {source}: no usable records. See what was dropped, and mend them")
        draw = np.random.default_rng(config.seed).permutation(len(records))[: config.records or None]
        records = list(records.values())
        some = [records[i] for i in sorted(draw)]
        return [record | {"image": bring(record["image"], source.parent, out)} for record in some]

    return runtime.first_alone(read)


def bring(name, folder, out):
    """An image's name in the folder of the file `out`: its own or that of a link or a copy."""
    folder, home = folder.resolve(), out.parent.resolve()
    if folder.is_relative_to(home):
        return (folder.relative_to(home) / name).as_posix()
    link = home / f"{out.stem}_images" / name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    try:
        link.hardlink_to((folder / name).resolve())
    except OSError:  # another file system
        shutil.copy(folder / name, link)
    return link.relative_to(home).as_posix()


def key_of(record):
    """A name for a record's content: what was made of it is found again under this name."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:20]


def parts_of(out, policy, config, more=()):
    """The folder of parts of the file `out`, named by the model, all knobs that change a line, and what `more` does."""
    others = "source model out records heldout skip_bad batch questions iig_keep iig_min".split()
    settings = {name: value for name, value in vars(config).items() if name not in others}
    settings |= {"more": more} if more else {}
    mark = runtime.first_alone(lambda: hub.fingerprint(policy, out.parent, [settings]))
    return out.with_name(f"{out.name}.parts-{mark}")


def in_parts(parts, name, title, records, batch, work):
    """work(records of a batch) -> one line (a dict) a record; returns all lines, in order. All ranks call it.

    Each rank writes what it has done to a file of its own in the folder `parts`, under the record's key. So
    work that was stopped goes on with what is left, whatever batch, processes and other records are now.
    """
    keys = [key_of(record) for record in records]
    record_of = dict(zip(keys, records, strict=True))

    def begin():
        """Rank 0: what an earlier build has left, {key: line}, and in how many files."""
        parts.mkdir(parents=True, exist_ok=True)
        files, lines = list(parts.glob(f"{name}-*.jsonl")), {}
        for file in files:
            for text in file.read_text(encoding="utf-8").splitlines():
                with suppress(ValueError):  # a line that was cut off by a kill is made again
                    lines |= [json.loads(text)]
        done = {key: lines[key] for key in keys if key in lines}
        if done:
            print(f"going on with the unfinished work in {parts}: {len(done)} of {len(keys)} are done")
        return done, len(files)

    lines, files = runtime.first_alone(begin)
    runtime.check_shared(parts)
    left, made = [key for key in record_of if key not in lines], []
    chunks = runtime.my_share([left[i : i + batch] for i in range(0, len(left), batch)])
    with open(parts / f"{name}-{files + runtime.rank():04}.jsonl", "w", encoding="utf-8") as file:
        for chunk in tqdm(chunks, title, leave=False, disable=runtime.rank() > 0):
            made.append(dict(zip(chunk, work([record_of[key] for key in chunk]), strict=True)))
            file.writelines(json.dumps(pair) + "\n" for pair in made[-1].items())
            file.flush()
    for new in runtime.gather(made):  # waits for all ranks (a broadcast does not): then the parts may go
        lines |= new
    return [lines[key] for key in keys]


def save_image(image, folder, record, parts):
    """Write an image (H, W, 3) uint8 made of a record; returns its name, of the parts' mark and the key."""
    folder.mkdir(exist_ok=True)
    name = f"{parts.name[-16:]}-{key_of(record)}.png"
    aside = folder / f"{name}.tmp"  # no kill leaves half of an image that an older build's records name
    Image.fromarray(image).save(aside, "PNG")
    aside.replace(folder / name)
    return f"{folder.name}/{name}"


def publish(files, folder, parts):
    """Write {path: rows}, then delete the parts, and images that no row and no unfinished build names."""
    for path, rows in files.items():
        runtime.write_jsonl(path, rows)
    names = {str(value) for rows in files.values() for row in rows for value in row.values()}
    for image in folder.iterdir():
        maker = parts.with_name(parts.name[:-16] + image.name[:16])
        if f"{folder.name}/{image.name}" not in names and (maker == parts or not maker.exists()):
            image.unlink()
    discard(parts)


def discard(parts):
    """Delete finished parts. If a kill leaves some, the same build makes the others again."""
    shutil.rmtree(parts)
