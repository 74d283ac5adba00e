"""
What both trainers need and neither paper mentions: the command line, the process group, sharding, the learning rate,
checkpoints, the log. A plain `python` run is a world of one process, so that no line elsewhere asks "if distributed".
"""

import argparse
import dataclasses
import difflib
import functools
import gc
import json
import math
import os
import shutil
import signal
import sys
import time
import traceback
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import HfArgumentParser

# ----------------------------------------------------------------------------------------------- command line


def knob(default, help):
    """A field of a config dataclass, with the text that --help prints."""
    return dataclasses.field(default=default, metadata={"help": help})


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """--help shows the defaults, and the script's docstring as it was written."""


def parse_config(config_class, argv=None, description=None):
    """
    The command line as a `config_class`. A wrong flag or value prints what is wrong and exits with code 2.

    Two defaults of the parser that bite are switched off: --bet would be taken for --beta, and a file named
    <script>.args beside the script would be read without a word.
    """
    parser = HfArgumentParser(config_class, allow_abbrev=False, description=description, formatter_class=HelpFormatter)
    config, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        near = difflib.get_close_matches(unknown[0].split("=")[0], flags, 1)
        hint = f"Did you mean {near[0]}?" if near else "--help lists all flags."
        raise ValueError(f"unknown argument {unknown[0]!r}. {hint}")
    return config


def is_mistake(error):
    """Is this a user's mistake (a ValueError that our own code raised), or trouble outside (OSError: a full disk)?"""
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve().parent
    return isinstance(error, OSError) or (
        isinstance(error, ValueError) and raised_in == Path(__file__).resolve().parent
    )


def run(main):
    """
    Run a script's `main`, then leave the process group. A mistake is told in one line with exit code 2; anything else
    is our bug and keeps its traceback.
    """
    try:
        main()
    except (Exception, CheckpointException) as error:  # torch's CheckpointException is not an Exception
        if is_mistake(error):
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(2)
        # Told before the process group is left, which makes the other ranks fail and speak.
        traceback.print_exc()
        sys.stderr.flush()
        sys.exit(1)
    finally:
        heed_sigterm(False)
        gc.collect()  # FSDP objects alive at the end can abort the process after all work is done
        if dist.is_initialized():
            dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------- files


@contextmanager
def whole_file(path):
    """A text file to write into, which appears under its name whole or not at all: aside, synced, renamed."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.tmp")
    try:
        with open(aside, "w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_text(path, text):
    """Write a file whole or not at all."""
    with whole_file(path) as file:
        file.write(text)


def write_jsonl(path, rows):
    """Write `rows`, one JSON object a line, whole or not at all. Returns how many there were."""
    count = 0
    with whole_file(path) as file:
        for count, row in enumerate(rows, 1):  # noqa: B007
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return count


# ------------------------------------------------------------------------------------------- process group


ASKED_TO_STOP = []  # filled by SIGTERM: a job that is preempted is told so some time before it is killed


def heed_sigterm(heed):
    """While a loop runs that asks `stopping`, a SIGTERM is only noted; before and after, it ends the process."""
    signal.signal(signal.SIGTERM, (lambda *_: ASKED_TO_STOP.append(True)) if heed else signal.SIG_DFL)


def stopping():
    """Has any rank got a SIGTERM? All ranks hear the same, so that all of them save and stop at the same step."""
    asked = torch.tensor(float(bool(ASKED_TO_STOP)))
    if world() > 1:
        dist.all_reduce(asked, dist.ReduceOp.MAX)
    return bool(asked)


def device():
    """This rank's device."""
    cuda = torch.cuda.is_available()
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")


def start():
    """Join the process group (torchrun's, or a world of one) and return this rank's device."""
    mine = device()
    if mine.type == "cuda":
        if mine.index >= torch.cuda.device_count():
            raise ValueError(
                f"process {mine.index} of this machine has no GPU: there are {torch.cuda.device_count()}. "
                f"Start torchrun with --nproc_per_node={torch.cuda.device_count()}"
            )
        torch.cuda.set_device(mine)
    backend = "cpu:gloo,cuda:nccl" if mine.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        # Rank 0 hashes, builds and exports alone at times, 13B from a slow disk too, while the others wait.
        dist.init_process_group(backend, timeout=timedelta(hours=2))
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return mine


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def say(*text):
    """Print on rank 0 only."""
    if rank() == 0:
        print(*text, flush=True)


def first_alone(work):
    """Let rank 0 do `work()` while the others wait; its result (or its ValueError) reaches every rank."""
    box = [None]
    if rank() == 0:
        try:
            box = [work()]
        except (ValueError, OSError) as error:
            if not is_mistake(error):
                raise
            box = [error]
    if world() > 1:
        dist.broadcast_object_list(box)
    if isinstance(box[0], Exception):
        raise ValueError(str(box[0]))
    return box[0]


def barrier():
    """Every rank waits here for the others."""
    if world() > 1:
        dist.barrier()


def my_share(items):
    """This rank's items: every world-size-th."""
    return items[rank() :: world()]


def gather(mine):
    """The reverse of `my_share`: all ranks' lists, interleaved back into one, on every rank."""
    shares = [None] * world()
    dist.all_gather_object(shares, mine) if world() > 1 else shares.__setitem__(0, mine)
    total = sum(map(len, shares))
    return [shares[i % world()][i // world()] for i in range(total)]


def open_parts(parts, settings, unimportant=(), folders=()):
    """
    Rank 0 makes `parts`, the folder of work that can be stopped, or finds the one that is there: ValueError unless it
    is of the same settings, but for the `unimportant`. `folders` are made in it.
    """
    parts = Path(parts)
    path, aside = parts / "settings.json", parts.with_suffix(".parts.new")
    if path.is_file():
        before = json.loads(path.read_text())
        others = [name for name in settings if before.get(name) != settings[name] and name not in unimportant]
        if others:
            told = [
                "another source or model" if name == "fingerprint" else f"--{name} {before.get(name)}"
                for name in others
            ]
            raise ValueError(f"{parts}: unfinished work with {', '.join(told)}. Finish it so, or delete that folder")
        print(f"going on with the unfinished work in {parts}")
    elif parts.exists():
        raise ValueError(f"{parts}: is none of our folders of unfinished work. Move it away, or name another file")
    else:
        shutil.rmtree(aside, ignore_errors=True)  # of work that was stopped before it began
        for folder in ("", *folders):
            (aside / folder).mkdir(parents=True)
        write_text(aside / "settings.json", json.dumps(settings))
        aside.rename(parts)


def discard(parts):
    """Delete the parts. Renamed first: half of them must never be taken for unfinished work."""
    gone = Path(parts).with_suffix(".parts.tmp")
    shutil.rmtree(gone, ignore_errors=True)
    Path(parts).rename(gone)
    shutil.rmtree(gone)


def in_parts(parts, name, title, items, batch, work):
    """
    work(items of a part) -> one line (a dict) for each item. All ranks call it; returns an iterator over all lines.

    A part is `batch` items, whatever the number of processes, and its file <parts>/<name>_000000.jsonl appears once it
    is whole: so the same lines come out of any number of processes, and a part that is there already is not done again.
    """
    starts = range(0, len(items), batch)
    files = [Path(parts) / f"{name}_{number:06}.jsonl" for number in range(len(starts))]
    todo = first_alone(lambda: [number for number, file in enumerate(files) if not file.is_file()])
    bar = tqdm(total=len(items), desc=title, leave=False, unit="record", disable=rank() > 0)
    bar.update(len(items) - sum(len(items[starts[n] : starts[n] + batch]) for n in todo))
    for number in my_share(todo):
        part = items[starts[number] : starts[number] + batch]
        write_jsonl(files[number], work(part))
        bar.update(min(world() * len(part), bar.total - bar.n))
    bar.close()
    barrier()
    return (json.loads(line) for file in files for line in open(file, encoding="utf-8"))


def per_pass(per_step, per_gpu, name):
    """
    Records per forward pass of a rank: `per_gpu`, or with 0 the rank's whole share of `per_step`. ValueError, with the
    nearest sizes that do, if they do not divide.

    The user sets the global batch; accumulation is derived, so that the number of GPUs changes nothing but speed.
    """
    together = world() * (per_gpu or 1)
    if per_step % together:
        below = max(together, per_step // together * together)
        each = f" x --{name}_per_gpu {per_gpu}" if per_gpu else ""
        raise ValueError(
            f"--{name}_per_step {per_step} does not divide into {world()} processes{each}; "
            f"the nearest sizes that do are {below} and {below + together}"
        )
    return per_gpu or per_step // world()


# ------------------------------------------------------------------------------------------------- sharding


def shard(policy, device, recompute=False):
    """
    Put a model where it is trained: FSDP2 over the layers and the root, so that each rank keeps its slice of weights,
    gradients and optimiser state in float32; on GPUs the computation runs in bfloat16. A model without memory yet
    (model.load with `place`) gets it here, its slice only. One process needs no slices and holds the model whole.

    recompute   keep only the inputs of the language model's layers for the backward pass and compute the rest again:
                a third more time for a small part of the memory
    """
    if recompute:
        for layer in policy.hf.model.language_model.layers:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    if world() == 1:
        return whole(policy, device)
    if device.type == "cuda" and not any(p.requires_grad for p in policy.parameters()):
        halve(policy)  # the weights of one slice must be of one kind: a model that is trained in part stays in float32
    slice_layers(policy, init_device_mesh(device.type, (world(),)), half=device.type == "cuda")
    return put(policy, device)


def whole(policy, device):
    """
    Put a whole model on this rank's device. A GPU computes in bfloat16 and keeps those weights in it that are not
    trained; a CPU computes in float32.
    """
    if device.type == "cuda":
        policy.autocast = True
        halve(policy)
    return put(policy, device)


def halve(policy):
    """Weights that are not trained in bfloat16."""
    for parameter in policy.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)


def put(policy, device):
    """Memory on `device`, with the weights if there are any yet."""
    return policy.to_empty(device=device) if any(p.is_meta for p in policy.parameters()) else policy.to(device)


def slice_layers(policy, mesh, half):
    """FSDP2 over all layers and the root; with `half` the computation runs in bfloat16."""
    layers = [*policy.hf.model.vision_tower.encoder.layers, *policy.hf.model.language_model.layers]
    # The root's arguments stay as they are: pixels in bfloat16 lose an attack's small steps, and numbers that pick
    # tokens lose all but 8 bits.
    options = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32} if half else {}
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=MixedPrecisionPolicy(**options))
    fully_shard(policy, mesh=mesh, mp_policy=MixedPrecisionPolicy(**options, cast_forward_inputs=False))


@contextmanager
def summoned(policy):
    """Hold all weights on every rank, so that ranks may answer at different lengths, or attack, without waiting."""
    modules = [module for module in policy.modules() if isinstance(module, FSDPModule)]
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.set_reshard_after_backward(False, recurse=False)  # attacks go backward in here
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.set_reshard_after_forward(module is not policy, recurse=False)
            module.set_reshard_after_backward(True, recurse=False)
            module.reshard()


# ---------------------------------------------------------------------------------------------- optimisation


def cosine(step, steps, peak, warm, floor):
    """Learning rate of update `step` (from 0) of `steps`: linear over `warm`, then a half cosine to floor * peak."""
    if step < warm:
        return peak * (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))


def adamw(policy, weight_decay):
    """AdamW over the trainable parameters, with weight decay on matrices only. The caller sets the learning rate."""
    trained = [p for p in policy.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, fused=True)


def clip_gradients(policy, limit):
    """Scale the gradients to a global norm of at most `limit`; returns the norm before, a float."""
    norm = torch.nn.utils.clip_grad_norm_([p for p in policy.parameters() if p.requires_grad], limit)
    return (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()


# ----------------------------------------------------------------------------------------------- checkpoints


def training_state(policy, optimizer):
    """Name -> tensor for all that a resumed run needs: trained weights and both moments of AdamW, by reference."""
    state = {}
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            moments = optimizer.state[parameter]
            if not moments:  # before the first update
                moments["step"] = torch.zeros((), device=parameter.device if parameter.is_cuda else "cpu")
                moments["exp_avg"] = torch.zeros_like(parameter)
                moments["exp_avg_sq"] = torch.zeros_like(parameter)
            state[f"weight.{name}"] = parameter.detach()
            state |= {f"{key}.{name}": value for key, value in moments.items()}
    return state


def fsync_folder(folder):
    """Files and folder entries on disk, not in a cache, before a rename makes them count."""
    for path in [*folder.iterdir(), folder]:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def last_line(error):
    """What an error says in the end, or what it is."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


def save_checkpoint(run_folder, step, policy, optimizer, reference, keep):
    """
    Write run_folder/step_00050: safetensors, each rank its shards, with a list of the files and their sizes.

    Written aside, synced and renamed by rank 0, so that a run killed at any moment leaves the last complete
    checkpoint in place. Then all but the newest `keep` are deleted. `reference` names the base model and the records.
    """
    run_folder = Path(run_folder)
    final = run_folder / f"step_{step:05}"
    aside = run_folder / f"step_{step:05}.tmp"
    writer = HuggingFaceStorageWriter(path=str(aside), save_distributed=True)

    def begin():
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)

    def finish():
        files = {file.name: file.stat().st_size for file in aside.iterdir()}
        write_text(aside / "checkpoint.json", json.dumps({"step": step, "reference": reference, "files": files}))
        fsync_folder(aside)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(aside, final)
        fsync_folder(run_folder)
        for old in checkpoints(run_folder)[:-keep]:
            shutil.rmtree(old)

    try:
        first_alone(begin)
        dcp.save(training_state(policy, optimizer), storage_writer=writer)
        first_alone(finish)
    except (OSError, ValueError, CheckpointException) as error:  # of any rank: all of them get here
        if rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)  # what it takes may be what is missing
        whole = [folder.name for folder in checkpoints(run_folder)]
        raise ValueError(
            f"{final}: could not be written ({last_line(error)}). Make room and continue with "
            f"--resume {run_folder}; whole checkpoints there: {', '.join(whole) or 'none'}"
        ) from None


def checkpoints(run_folder):
    """The complete checkpoints of a run, oldest first."""
    found = [p for p in Path(run_folder).glob("step_*") if p.name[5:].isdigit() and (p / "checkpoint.json").is_file()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step_")))


def load_checkpoint(folder, policy, optimizer, reference):
    """Load a checkpoint in place and return its step. ValueError if it is incomplete, or of other data or model."""
    folder = Path(folder)
    state, reader = training_state(policy, optimizer), HuggingFaceStorageReader(str(folder))
    try:
        recorded = json.loads((folder / "checkpoint.json").read_text())
        for name, size in recorded["files"].items():
            if (folder / name).stat().st_size != size:
                raise OSError(f"{name} is cut")
        stored = reader.read_metadata().state_dict_metadata
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        message = f"{folder}: missing or damaged ({error}). Delete this folder to resume from the checkpoint before it"
        raise ValueError(message) from None
    for name, tensor in state.items():
        if name not in stored or tuple(stored[name].size) != tuple(tensor.shape):
            has = f"of shape {tuple(stored[name].size)}" if name in stored else "absent"
            raise ValueError(
                f"{folder}: is a checkpoint of another model: {name} is {has}, this model has {tuple(tensor.shape)}. "
                "Resume with the --model and settings of that run"
            )
    if recorded["reference"] != reference:
        raise ValueError(
            f"{folder}: was trained from another base model or on other records (fingerprint {recorded['reference']}, "
            f"now {reference}). Restore what has changed, or start a new run"
        )
    try:
        dcp.load(state, storage_reader=reader)
    except (OSError, SafetensorError, CheckpointException) as error:
        message = f"{folder}: damaged ({last_line(error)}). Delete this folder to resume from the checkpoint before it"
        raise ValueError(message) from None
    return recorded["step"]


# ---------------------------------------------------------------------------------------------------- runs


def name_run(config, prefix):
    """
    The folder of this run, as text. An empty --out takes the next free out/<prefix>-<n>; a folder that already
    holds something is an error, unless it is to be resumed, and nothing in it is touched.
    """
    if config.resume:
        return config.resume
    if config.out:
        folder = Path(config.out)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(
                f"--out {folder}: exists already. Continue that run with --resume {folder}, or name another folder"
            )
        return config.out
    number = 1
    while Path(f"out/{prefix}-{number}").exists():
        number += 1
    return f"out/{prefix}-{number}"


def open_run(folder, config):
    """Make the folder of a new run with its config.json, written from the parsed config. A resumed one stays."""
    folder = Path(folder)
    if config.resume:
        return
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "config.json").exists():
        raise ValueError(f"{folder}: another run has taken this folder meanwhile. Start again, or name one with --out")
    write_text(folder / "config.json", json.dumps({**dataclasses.asdict(config), "out": str(folder)}, indent=2))


def resumed_config(config_class, config, argv):
    """The config of the run in config.resume. Its settings hold: any other flag beside --resume is an error."""
    others = [flag for flag in argv if flag.startswith("--") and flag.split("=")[0] != "--resume"]
    if others:
        raise ValueError(f"--resume takes all settings from the run's config.json. Drop {' '.join(others)}")
    path = Path(config.resume) / "config.json"
    if not path.is_file():
        raise ValueError(f"--resume {config.resume}: holds no config.json, so no run. Name a folder such as out/mfpo-1")
    try:
        stored = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(
            f"{path}: not JSON ({error}). Without it this run cannot be resumed: start a new one"
        ) from None
    knobs = {f.name: type(f.default) for f in dataclasses.fields(config_class)}
    fits = isinstance(stored, dict) and set(stored) == set(knobs)
    if not fits or any(not isinstance(stored[n], (kind, int) if kind is float else kind) for n, kind in knobs.items()):
        raise ValueError(f"{path}: is not the config of this script. Resume with the script that wrote it")
    return config_class(**{**stored, "out": config.resume, "resume": config.resume})


def ahead(make, items, device, workers=4):
    """
    make(item) of each item, in order, made by `workers` threads some items ahead: images are decoded while a GPU
    computes. What make raises is raised here, at its item's turn. On a CPU there are no threads: they would only take
    time from the computation (measured: a step of the built-in world took 1.2 to 1.5 times as long).
    """
    if device.type == "cpu":
        yield from map(make, items)
        return
    pool, waiting = ThreadPoolExecutor(workers), deque()
    try:
        for item in items:
            waiting.append(pool.submit(make, item))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


class Clock:
    """Where the time goes: each call ends a part, clock("optimizer"), and adds to it what has passed since the last."""

    def __init__(self):
        self.last, self.spent = time.perf_counter(), {}

    def __call__(self, part):
        """On a GPU call it behind something that waits for it, or the time goes to a later part. Returns seconds."""
        now = time.perf_counter()
        passed, self.last = now - self.last, now
        self.spent[part] = self.spent.get(part, 0.0) + passed
        return passed

    def summary(self):
        """'12.0 s: forward and backward 95.0 %, optimizer 3.0 %, ...', the largest first."""
        total = sum(self.spent.values())
        parts = sorted(self.spent.items(), key=lambda part: -part[1])
        return f"{total:.1f} s: " + ", ".join(f"{part} {100 * spent / total:.1f} %" for part, spent in parts)


class Log:
    """One line a step for people and, unrounded, for machines (metrics.jsonl). Only rank 0 writes."""

    def __init__(self, folder, steps, first_step, every):
        self.steps, self.every, self.path = steps, every, Path(folder) / "metrics.jsonl"
        self.began, self.first_step = time.perf_counter(), first_step
        if rank() == 0:
            lines = self.path.read_text().splitlines() if self.path.exists() else []
            # Later steps are done again; the line of each step before is whole, for its checkpoint came after it.
            kept = lines[:first_step]
            write_text(self.path, "".join(line + "\n" for line in kept))

    def __call__(self, step, text, **values):
        """`step` counts finished updates. Every value goes to the file; every `every`-th step prints `text`."""
        if rank() != 0:
            return
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if step % self.every == 0 or step in (1, self.steps):
            spent = time.perf_counter() - self.began
            left = spent / (step - self.first_step) * (self.steps - step)
            eta = f"{left / 60:.0f}m" if left > 90 else f"{left:.0f}s"
            print(f"step {step:05}/{self.steps:05} | {text} | {memory_gb():.1f} GB | eta {eta}", flush=True)


def memory_gb():
    """Peak memory of this rank in GB: the GPU's, or on a CPU the process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    import resource  # absent on Windows, where nothing else of this would work either

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
