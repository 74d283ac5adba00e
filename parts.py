"""
What is around the making of a record: source records in, work that may be stopped, lines and images out. Builders
and benchmarks use it; nothing here knows a method.
"""

import hashlib
import json
import os
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
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

# --------------------------------------------------------------------------------------------- source records in


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
    seed: int = knob(0, "seed of noise, random regions, draws and questions")

    def __post_init__(self):
        runtime.check(self, positive="batch", not_negative="records seed")
        out, source = Path(self.out), Path(self.source)
        also = [out.with_name(f"{out.stem}{end}.jsonl") for end in ("", "_heldout", "_dropped", "_closed")]
        if out.suffix != ".jsonl" or out.is_dir() or source.resolve() in [path.resolve() for path in also]:
            raise Mistake(f"--out {out}: must be a .jsonl file that does not write over --source {source}")
        if not source.is_file():
            raise Mistake(f"--source {source}: no such file. python -m extras.sources makes one of a public dataset")


def check_source(record, rejected=False):
    """BadRecord unless a source record can be used: its objects and, if it is needed, its rejected answer."""
    data.check(record, data.SOURCE_FIELDS)
    objects = record.get("objects", [])
    for o in objects if isinstance(objects, list) else [objects]:
        box = o.get("box") if isinstance(o, dict) and isinstance(o.get("word"), str) else None
        good = isinstance(box, list) and len(box) == 4
        good = good and all(type(v) in (int, float) and -1e9 < v < 1e9 for v in box)
        if not good or not (box[0] < box[2] and box[1] < box[3] and box[2] > 0 and box[3] > 0):
            message = 'field \'objects\' needs {"word": text, "box": [x0, y0, x1, y1]}, x0 < x1, y0 < y1, got '
            raise BadRecord("'objects' unusable", message + repr(o)[:80])
    answer = record.get("rejected")
    if answer is None and rejected and "own_answer" not in record:  # the toy world's: toy.rejected makes it
        raise BadRecord("'rejected' missing", "field 'rejected' is missing. Add it to every record")
    if answer is not None and (not isinstance(answer, str) or answer.strip() in ("", record["chosen"].strip())):
        message = f"field 'rejected' must be a text other than 'chosen', got {str(answer)[:60]!r}. Mend it"
        raise BadRecord("'rejected' unusable", message)


def read_source(config, check):
    """The usable records of config.source, on all ranks, their images named from the folder of config.out. A bad
    one, or one whose image cannot be read, is a Mistake naming file, line and remedy, or with `skip_bad` dropped and
    counted by reason. With config.records so many, drawn by the seed.
    """
    source, out = Path(config.source), Path(config.out)

    def attempt(line):
        try:
            check(line[1])
            data.load_image(data.image_path(source.parent, line[1]["image"]))
            return line[1]
        except BadRecord as error:
            return error

    def read():
        lines, records, dropped, seen = list(data.read_json(source)), [], Counter(), set()
        pool = ThreadPoolExecutor(8)  # decoding images releases the interpreter's lock
        try:
            bar = tqdm(pool.map(attempt, lines), f"checking {source}", len(lines), leave=False, delay=2)
            for (where, _), record in zip(lines, bar, strict=True):
                if isinstance(record, dict) and record["id"] in seen:
                    record = BadRecord("id used twice", f"id {record['id']!r} was used before. Rename it")
                if isinstance(record, dict):
                    seen.add(record["id"])
                    records.append(record)
                elif config.skip_bad:
                    dropped[record.reason] += 1
                else:
                    raise Mistake(f"{where}: {record}")
        finally:
            pool.shutdown(cancel_futures=True)
        drops = "".join(f"; dropped: {reason} {count}" for reason, count in dropped.most_common())
        print(f"{len(records)} records from {source}{drops}")
        if not records:
            raise Mistake(f"--source {source}: no usable records. See what was dropped, and mend them")
        draw = np.random.default_rng(config.seed).permutation(len(records))[: config.records or len(records)]
        out.parent.mkdir(parents=True, exist_ok=True)
        some = [records[i] for i in sorted(draw)]
        return [record | {"image": bring(record["image"], source.parent, out)} for record in some]

    return runtime.first_alone(read)


def bring(name, folder, out):
    """An image's name in the folder of the file `out`: its own if it lies there, else that of a link or a copy."""
    if folder.resolve().is_relative_to(out.parent.resolve()):
        return (folder.resolve().relative_to(out.parent.resolve()) / name).as_posix()
    link = out.parent / f"{out.stem}_images" / name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    try:
        os.link((folder / name).resolve(), link)
    except OSError:  # another file system
        shutil.copy(folder / name, link)
    return link.relative_to(out.parent).as_posix()


# ------------------------------------------------------------------------------------- work that may be stopped


def key_of(record):
    """A name for a record's content: what was made of it is found again under this name."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:20]


SAME = {"source", "model", "out", "records", "heldout", "skip_bad", "batch", "questions", "iig_keep", "iig_min"}


def parts_of(out, policy, config):
    """The folder of parts of the file `out`, named by the model and all knobs but those that change no line (SAME)."""
    settings = {name: value for name, value in vars(config).items() if name not in SAME}
    mark = runtime.first_alone(lambda: hub.fingerprint(policy, out.parent, [settings]))
    return out.with_name(f"{out.name}.parts-{mark}")


def in_parts(parts, name, title, records, batch, work):
    """work(records of a batch) -> one line (a dict) a record; returns all lines, in order. All ranks call it.

    Each rank appends what it has done to a file of its own in the folder `parts`, a line a record under the record's
    key. So work that was stopped goes on with what is left, whatever the batch, the number of processes and the other
    records are now; a line that was cut off by a kill is done again.
    """
    keys = [key_of(record) for record in records]

    def read():
        lines = {}
        for path in parts.glob(f"{name}-*.jsonl"):
            for text in path.read_text(encoding="utf-8").split("\n"):
                with suppress(ValueError):
                    lines |= [json.loads(text)]
        return lines

    def begin():
        parts.mkdir(parents=True, exist_ok=True)
        done = set(read()) & set(keys)
        if done:
            print(f"going on with the unfinished work in {parts}: {len(done)} of {len(keys)} are done")
        return done, len(list(parts.glob(f"{name}-*.jsonl")))

    done, files = runtime.first_alone(begin)
    runtime.check_shared(parts)
    left = [(key, record) for key, record in zip(keys, records, strict=True) if key not in done]
    chunks = runtime.my_share([left[i : i + batch] for i in range(0, len(left), batch)])
    bar = tqdm(total=len(keys), initial=len(done), desc=title, leave=False, disable=runtime.rank() > 0)
    with open(parts / f"{name}-{files + runtime.rank():04}.jsonl", "w", encoding="utf-8") as file:
        for chunk in chunks:
            for (key, _), line in zip(chunk, work([record for _, record in chunk]), strict=True):
                file.write(json.dumps([key, line]) + "\n")
            file.flush()
            bar.update(min(runtime.world() * len(chunk), bar.total - bar.n))
    bar.close()
    runtime.gather([])  # all have written: first_alone, a broadcast, does not wait for the last of 8 ranks
    lines = read()
    runtime.gather([])  # all have read, so that the parts may go
    if not lines.keys() >= set(keys):
        raise Mistake(f"{parts}: changed meanwhile. Let another build of the same file end, then start again")
    return [lines[key] for key in keys]


# --------------------------------------------------------------------------------------------- lines and images out


def save_image(image, folder, record, parts):
    """Write an image (H, W, 3) uint8 made of a record, under the parts' mark and its key; returns its name."""
    folder.mkdir(exist_ok=True)
    name = f"{parts.name[-16:]}-{key_of(record)}.png"
    aside = folder / f"{name}.tmp"  # a kill must not leave half of an image that an older build's records name
    Image.fromarray(image).save(aside, "PNG")
    os.replace(aside, folder / name)
    return f"{folder.name}/{name}"


def publish(files, folder, parts):
    """Write {path: rows}; then delete the parts, and in `folder` what no row and no other unfinished build names."""
    for path, rows in files.items():
        runtime.write_jsonl(path, rows)
    names = {str(value) for rows in files.values() for row in rows for value in row.values()}
    for image in folder.iterdir():
        maker = parts.with_name(parts.name[:-16] + image.name[:16])
        if f"{folder.name}/{image.name}" not in names and (maker == parts or not maker.exists()):
            image.unlink()
    discard(parts)


def discard(parts):
    """Delete finished parts. Renamed first: half of them must never be taken for unfinished work."""
    gone = parts.with_name(f"{parts.name}.tmp")
    shutil.rmtree(gone, ignore_errors=True)
    parts.rename(gone)
    shutil.rmtree(gone)
