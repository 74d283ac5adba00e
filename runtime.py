"""
What both trainers need and neither paper mentions: the command line, mistakes, ranks, sharding, the learning
rate, checkpoints, the log. A plain `python` run is a world of one process, so that no line elsewhere asks
"if distributed". Nothing here knows a method or a record.
"""

import argparse
import dataclasses
import difflib
import functools
import gc
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Literal, get_args, get_origin

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

CHECKPOINTS = 2  # complete checkpoints that a run keeps
LOG_EVERY = 10  # steps between printed lines; metrics.jsonl has every step
ASKED_TO_STOP = []  # filled by SIGTERM: a job that is preempted is told so some time before it is killed
OPENED = []  # folders of runs that this process has opened

# ----------------------------------------------------------------------------------------------- command line


class Mistake(ValueError):
    """What a user did wrong, with name, value and remedy in one line; told with exit code 2."""


def knob(default, help):
    """A field of a config dataclass, with the text that --help prints."""
    return dataclasses.field(default=default, metadata={"help": help})


def check(config, positive="", not_negative=""):
    """Mistake unless all floats are finite and the knobs named, separated by blanks, are in range."""
    for field in dataclasses.fields(config):  # a config.json is checked here only, flags by the parser too
        name, value = field.name, getattr(config, field.name)
        if get_origin(field.type) is Literal and value not in get_args(field.type):
            raise Mistake(f"--{name} {value!r}: use one of {', '.join(map(repr, get_args(field.type)))}")
        if isinstance(value, float) and not math.isfinite(value):
            raise Mistake(f"--{name} must be a finite number, got {value}")
        if name in positive.split() and not value > 0:
            raise Mistake(f"--{name} must be positive, got {value}")
        if name in not_negative.split() and not value >= 0:
            raise Mistake(f"--{name} must not be negative, got {value}")


def parse_config(config_class, argv=None, description=None):
    """The command line as a `config_class`; words before all flags are its `paths`. Two defaults that bite
    are off: --bet would be taken for --beta, and a file <script>.args beside the script be read in silence.
    """
    from transformers import HfArgumentParser  # here: tests of pure arithmetic need no transformers

    class Parser(HfArgumentParser):
        def error(self, message):
            raise Mistake(f"{message}. --help lists all flags")

    class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass  # --help shows the defaults, and the script's docstring as it was written

    argv = sys.argv[1:] if argv is None else argv
    knobs = [field.name for field in dataclasses.fields(config_class)]
    if "paths" in knobs and argv and not argv[0].startswith("-"):
        argv = ["--paths", *argv]
    parser = Parser(config_class, description=description, formatter_class=Formatter, allow_abbrev=False)
    config, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        near = difflib.get_close_matches(unknown[0].split("=")[0], flags, 1)
        raise Mistake(f"unknown argument {unknown[0]!r}. " + (f"Did you mean {near[0]}?" if near else "See --help"))
    return config


def parse_command(doc, commands, moved=()):
    """(name, config) of a script with commands {name: config class}; `moved` has old flags' new commands."""
    argv = sys.argv[1:]
    if gone := [flag for flag in (word.split("=")[0] for word in argv) if flag in moved]:
        raise Mistake(f"{gone[0]} is gone: it is now {moved[gone[0]]}")
    if argv[:1] in (["-h"], ["--help"]):
        print(f"{doc}\nEach of {', '.join(commands)} takes --help.")
        sys.exit(0)
    if not argv or argv[0] not in commands:
        script, got = Path(sys.argv[0]).name, repr(argv[0]) if argv else "nothing"
        raise Mistake(f"{script} needs what to do first: {' | '.join(commands)}; got {got}")
    return argv[0], parse_config(commands[argv[0]], argv[1:], doc)


def run(main):
    """Run a script's `main`, then leave the process group. A Mistake, or trouble outside (OSError: a full disk),
    is told in one line of at most 300 characters with exit code 2; anything else is our bug and keeps its traceback,
    exit code 1. A reader that closes our pipe (`| head`) has seen enough.
    """
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except (Mistake, OSError) as error:
        text = " ".join(str(error).split())
        text = text if len(text) <= 290 else f"{text[:150]} ... {text[-130:]}"  # the remedy stands at the end
        print(f"error: {text}", file=sys.stderr, flush=True)
        sys.exit(2)
    except (Exception, dcp.CheckpointException):  # torch's CheckpointException is not an Exception
        # Told before the process group is left, which makes the other ranks fail and speak.
        print(traceback.format_exc(), file=sys.stderr, flush=True)
        sys.exit(1)
    finally:
        heed_sigterm(False)
        for folder in OPENED:  # a run that ended before its first step frees its name
            if [path.name for path in folder.glob("*")] == ["config.json"]:
                shutil.rmtree(folder)
        if dist.is_initialized():
            gc.collect()  # FSDP objects alive at the end can abort the process after all work is done
            dist.destroy_process_group()


def write_text(path, text):
    """Write a file complete or not at all: aside, synced, renamed."""
    aside = Path(path).with_name(f".{Path(path).name}.tmp")
    try:
        with open(aside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_jsonl(path, rows):
    """Write `rows`, one JSON object a line, complete or not at all."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


# ------------------------------------------------------------------------------------------- process group


def heed_sigterm(heed):
    """While a loop runs that asks `stopping`, a SIGTERM is only noted; else it ends the process."""
    signal.signal(signal.SIGTERM, (lambda *_: ASKED_TO_STOP.append(True)) if heed else signal.SIG_DFL)


def stopping():
    """Has any rank got a SIGTERM? All hear the same, so that all save and stop at the same step."""
    asked = torch.tensor(len(ASKED_TO_STOP))
    dist.all_reduce(asked)
    return asked.item() > 0


def device():
    """This rank's device."""
    cuda = torch.cuda.is_available()
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")


def start():
    """Join the process group (torchrun's, or a world of one) and return this rank's device."""
    here = device()
    if here.type == "cuda":
        if here.index >= (count := torch.cuda.device_count()):
            remedy = f"Start torchrun with --nproc_per_node={count}"
            raise Mistake(f"process {here.index} of this machine has no GPU: there are {count}. {remedy}")
        torch.cuda.set_device(here)
    # Rank 0 hashes, builds and exports alone at times, 13B from a slow disk too, while the others wait.
    options = {"backend": "cpu:gloo,cuda:nccl" if here.type == "cuda" else "gloo", "timeout": timedelta(hours=2)}
    if "RANK" not in os.environ:
        options |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(**options)
    return here


def rank():
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def say(*text):
    """Print on rank 0 only."""
    if rank() == 0:
        print(*text, flush=True)


def first_alone(work):
    """Let rank 0 do `work()` while the others wait; its result (or its Mistake) reaches every rank."""
    box = [None]
    if rank() == 0:
        try:
            box = [work()]
        except BrokenPipeError:
            raise
        except (Mistake, OSError) as error:
            box = [error]
    if world() > 1:
        dist.broadcast_object_list(box)
    if isinstance(box[0], Exception):
        raise Mistake(str(box[0]))
    return box[0]


def my_share(items):
    """This rank's items: every world-size-th."""
    return items[rank() :: world()]


def gather(share):
    """The reverse of `my_share`: all ranks' lists, interleaved back into one, on every rank."""
    shares = [share] * world()
    if world() > 1:
        dist.all_gather_object(shares, share)
    return [shares[i % world()][i // world()] for i in range(sum(map(len, shares)))]


def ahead(make, items, workers=4):
    """make(item) of each item, in order. On a GPU `workers` threads are some items ahead: images are decoded
    while it computes; on a CPU they would slow that down (measured: a step of the toy by 1.2 to 1.5).
    """
    if device().type == "cpu":
        yield from map(make, items)
        return
    waiting = deque()
    with ThreadPoolExecutor(workers) as pool:
        for item in items:
            waiting.append(pool.submit(make, item))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def over_records(title, items, batch, load, work):
    """One pass without gradients over `items` on all ranks: work(load(some of them)) gives one value an item.
    Returns all values, in order, on every rank. On a GPU `load` decodes ahead while `work` computes.
    """
    share, values = my_share(items), []
    chunks = [share[i : i + batch] for i in range(0, len(share), batch)]
    loaded, bar = ahead(load, chunks), tqdm(total=len(share), desc=title, leave=False, disable=rank() > 0)
    with torch.no_grad(), closing(loaded), bar:  # closed here: a pool that is collected elsewhere may hang
        for item, chunk in zip(loaded, chunks, strict=True):
            values += work(item)
            bar.update(len(chunk))
    return gather(values)


def per_pass(per_step, per_gpu, name):
    """Records per forward pass of a rank: `per_gpu`, or with 0 its share of `per_step`. Mistake if they do not
    divide: the user sets the global batch, and the number of GPUs changes nothing but speed.
    """
    together = world() * (per_gpu or 1)
    if per_step % together:
        below = max(together, per_step // together * together)
        parts = f"{world()} processes x {per_gpu or 1} a forward pass"
        remedy = f"the nearest sizes that do are {below} and {below + together}"
        raise Mistake(f"--{name}_per_step {per_step} does not divide into {parts}; {remedy}")
    return per_gpu or per_step // world()


# ------------------------------------------------------------------------------------------------- sharding


def shard(policy, here, recompute=False):
    """Put a model on the device `here`. One process holds it complete; of several, each keeps its slice of
    weights, gradients and optimiser state in float32 (FSDP2), as rank 0 has them. GPUs compute in bfloat16.
    With `recompute` only the inputs of the language model's layers are kept for the backward pass: a third
    more time for a small part of the memory.
    """
    if recompute:
        for layer in policy.hf.model.language_model.layers:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    if here.type == "cuda" and (world() == 1 or not any(p.requires_grad for p in policy.parameters())):
        halve(policy)  # the weights of a slice must be of one kind: a model trained in part is sliced in float32
    if world() == 1:
        for name in policy.ENTRIES if here.type == "cuda" else ():
            setattr(policy, name, torch.autocast("cuda", torch.bfloat16)(getattr(policy, name)))
        return policy.to(here)
    full = policy.state_dict() if rank() == 0 else {}
    slice_layers(policy, init_device_mesh(here.type, (world(),)), half=here.type == "cuda")
    if any(p.is_meta for p in policy.parameters()):
        policy.to_empty(device=here)
    set_model_state_dict(policy, full, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    for buffer in policy.buffers():  # no file holds them, and memory from to_empty is garbage
        dist.broadcast(buffer, 0)
    return policy


def halve(policy):
    """Weights that are not trained in bfloat16."""
    for parameter in policy.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)


def slice_layers(policy, mesh, half):
    """FSDP2 over all layers and the root; with `half` the computation runs in bfloat16."""
    layers = [*policy.hf.model.vision_tower.encoder.layers, *policy.hf.model.language_model.layers]
    options = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32} if half else {}
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=MixedPrecisionPolicy(**options))
    # The root's arguments stay as they are: pixels in bfloat16 lose an attack's small steps.
    fully_shard(policy, mesh=mesh, mp_policy=MixedPrecisionPolicy(**options, cast_forward_inputs=False))
    for name in policy.ENTRIES:  # FSDP gathers weights in `forward`; these are entered by name
        register_fsdp_forward_method(policy, name)


@contextmanager
def summoned(policy):
    """Hold all weights on every rank: ranks may answer at different lengths, or attack, without waiting."""
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


def cosine(step, steps, peak, warm, floor):
    """Learning rate of update `step` (from 0): linear over `warm`, then a half cosine to floor * peak."""
    if step < warm:
        return peak * (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))


def adamw(policy, weight_decay):
    """AdamW over what is trained, with weight decay on matrices only. The caller sets the learning rate."""
    trained = [p for p in policy.parameters() if p.requires_grad]
    decayed, rest = [p for p in trained if p.ndim >= 2], [p for p in trained if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, fused=True)


def clip_gradients(policy, limit):
    """Scale the gradients to a global norm of at most `limit`; returns the norm before, a float."""
    norm = torch.nn.utils.clip_grad_norm_([p for p in policy.parameters() if p.requires_grad], limit)
    return (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()


def check_step(step, numbers, ids):
    """Mistake, on all ranks and before the update, unless {name: number} of the complete batch are finite."""
    if not all(map(math.isfinite, numbers.values())):
        text = ", ".join(f"{name} {number}" for name, number in numbers.items())
        remedy = f"Lower --learning_rate, or look at the records of this step: {', '.join(ids)}"
        raise Mistake(f"step {step + 1}: {text}: stopped before the update. {remedy}")


def check_first(loss, expected, ref_path):
    """The first loss must be that of policy = reference, which the method itself computes."""
    exact = 1e-3 if device().type == "cpu" else 5e-2  # bfloat16 kernels depend on the shape of the batch
    remedy = f"Delete {ref_path} if the code has changed; a record must not depend on its batch"
    text = f"first loss {loss:.4f}, but {expected:.4f} with policy = reference, as cached. {remedy}"
    assert abs(loss - expected) < exact * max(1, abs(expected)), text
    say(f"first loss {loss:.4f}, as it must be with policy = reference: {expected:.4f}")


# ----------------------------------------------------------------------------------------------- checkpoints


def training_state(policy, optimizer):
    """Name -> tensor of all that a resumed run needs: trained weights and AdamW's moments, by reference."""
    state = {}
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            moments = optimizer.state[parameter]
            if not moments:  # before the first update
                moments["step"] = torch.zeros((), device=parameter.device)
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
    return (str(error).strip() or type(error).__name__).splitlines()[-1][:100]


def checkpoints(run):
    """The complete checkpoints of a run, oldest first."""
    paths = [p for p in Path(run).glob("step_*") if p.name[5:].isdigit() and (p / "checkpoint.json").is_file()]
    return sorted(paths, key=lambda p: int(p.name[5:]))


def save_checkpoint(run, step, policy, optimizer, reference):
    """Write <run>/step_00050: each rank's slices as safetensors; checkpoint.json, which names base and
    records. It is written aside, synced and renamed: a kill leaves the last complete one. Older ones then go.
    """
    final = Path(run) / f"step_{step:05}"
    aside = final.with_name(f"{final.name}.tmp")

    def finish():
        write_text(aside / "checkpoint.json", json.dumps({"step": step, "reference": reference}))
        fsync_folder(aside)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(aside, final)
        fsync_folder(final.parent)
        for old in checkpoints(run)[:-CHECKPOINTS]:
            shutil.rmtree(old)

    try:
        first_alone(lambda: shutil.rmtree(aside, ignore_errors=True))
        writer = dcp.HuggingFaceStorageWriter(path=str(aside), save_distributed=True)
        dcp.save(training_state(policy, optimizer), storage_writer=writer)
        first_alone(finish)
    except (OSError, Mistake, dcp.CheckpointException) as error:  # of any rank: all of them get here
        if rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)  # what it takes may be what is missing
        names = ", ".join(folder.name for folder in checkpoints(run)) or "none"
        remedy = f"Make room and continue with --resume {run}; complete checkpoints there: {names}"
        raise Mistake(f"{final}: could not be written ({last_line(error)}). {remedy}") from None


def load_checkpoint(folder, policy, optimizer, reference):
    """Load a checkpoint in place; returns its step. Mistake if it is damaged, or of other records or models."""
    try:
        recorded = json.loads((folder / "checkpoint.json").read_text())
        if recorded["reference"] != reference:
            marks = f"fingerprint {recorded['reference']}, now {reference}"
            reason = f"was trained from another base model or on other records ({marks})"
            raise Mistake(f"{folder}: {reason}. Restore what has changed, or start a new run")
        dcp.load(training_state(policy, optimizer), storage_reader=dcp.HuggingFaceStorageReader(str(folder)))
    except (json.JSONDecodeError, OSError, dcp.CheckpointException) as error:
        remedy = "Delete this folder to resume from the checkpoint before it"
        raise Mistake(f"{folder}: missing or damaged ({last_line(error)}). {remedy}") from None
    return recorded["step"]


# ---------------------------------------------------------------------------------------------------- runs


def resumed(config, argv):
    """With --resume the config of that run, whose settings hold: another flag is a Mistake. Else `config`. Of a run of
    another version, a knob that is gone is left out with a line, a new one has its default.
    """
    if not config.resume:
        return config
    if others := [flag for flag in argv if flag.startswith("--") and flag.split("=")[0] != "--resume"]:
        raise Mistake(f"--resume takes all settings from the run's config.json. Drop {' '.join(others)}")
    path = Path(config.resume) / "config.json"
    if not path.is_file():
        raise Mistake(f"--resume {config.resume}: holds no config.json, so no run. Name one such as out/mfpo-1")
    knobs = [field.name for field in dataclasses.fields(config)]
    try:
        stored = json.loads(path.read_text())
        settings = {name: stored[name] for name in knobs if name in stored}
        if len(settings) < 0.75 * max(len(stored), len(knobs)):
            raise TypeError(f"{len(settings)} of its {len(stored)} knobs are known")
        if gone := ", ".join(name for name in stored if name not in knobs):
            say(f"{path}: this version does not have {gone}")
        return type(config)(**settings | {"out": config.resume, "resume": config.resume})
    except (json.JSONDecodeError, TypeError) as error:  # another script's; a value that no knob has
        remedy = "Resume with the script and version that wrote it"
        raise Mistake(f"{path}: is not the config of this script ({error}). {remedy}") from None


def name_run(config, prefix):
    """The folder of this run: that of --resume, an empty one of --out, or the next free out/<prefix>-<n>."""
    number, folder = 1, Path(config.out or f"out/{prefix}-1")
    while not config.out and folder.exists():
        number += 1
        folder = Path(f"out/{prefix}-{number}")
    if not config.resume and folder.exists() and any(folder.iterdir()):
        raise Mistake(f"--out {folder}: exists already. Continue it with --resume {folder}, or name another")
    return folder


def open_run(folder, config):
    """Make the folder of a new run with its config.json, from the parsed config. A resumed one stays as it is."""

    def make():
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "config.json").exists():
            raise Mistake(f"{folder}: another run has taken this folder meanwhile. Start again, or name --out")
        settings = dataclasses.asdict(config) | {"out": str(folder)}
        write_text(folder / "config.json", json.dumps(settings, indent=2))
        OPENED.append(folder)

    if not config.resume:
        first_alone(make)
    check_shared(folder)


def check_shared(folder):
    """Mistake where a folder that rank 0 has made is not seen: nodes need a file system that they share."""
    if not folder.is_dir():
        raise Mistake(f"rank {rank()} does not see {folder}, which rank 0 made. Nodes need a shared file system")


def restore(run, config, policy, optimizer, reference):
    """With --resume: load the last complete checkpoint of `run`. Returns the step to go on from."""
    if not config.resume:
        return 0
    complete = checkpoints(run)
    say(f"resuming from {complete[-1] if complete else 'the beginning: no checkpoint was complete'}")
    return load_checkpoint(complete[-1], policy, optimizer, reference) if complete else 0


class Clock:
    """Where the time goes: each call ends a part, clock("optimizer"), and adds what passed since the last."""

    def __init__(self):
        self.last, self.spent = time.perf_counter(), Counter()

    def __call__(self, part):
        """Returns seconds. On a GPU call it behind something that waits for it, or a later part gets the time."""
        now = time.perf_counter()
        passed, self.last = now - self.last, now
        self.spent[part] += passed
        return passed

    def summary(self):
        """'12.0 s: forward and backward 95.0 %, optimizer 3.0 %, ...', the largest first."""
        total = self.spent.total()
        parts = [f"{part} {100 * spent / total:.1f} %" for part, spent in self.spent.most_common()]
        return f"{total:.1f} s: {', '.join(parts)}"


class Log:
    """One line a step for people and, unrounded, for machines (metrics.jsonl). Only rank 0 writes."""

    def __init__(self, run, steps, first_step):
        self.steps, self.path = steps, Path(run) / "metrics.jsonl"
        self.began, self.first_step = time.perf_counter(), first_step
        if rank() == 0 and self.path.exists():
            lines = self.path.read_text().splitlines()
            # Later steps are done again; the line of each before is complete, for its checkpoint came after it.
            write_text(self.path, "".join(line + "\n" for line in lines[:first_step]))

    def __call__(self, step, text, values):
        """`step` counts finished updates. All values go to the file; every LOG_EVERY-th step prints `text`."""
        if rank() != 0:
            return
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if step % LOG_EVERY == 0 or step in (1, self.steps):
            left = (time.perf_counter() - self.began) / (step - self.first_step) * (self.steps - step)
            eta = f"{left / 60:.0f}m" if left > 90 else f"{left:.0f}s"
            print(f"step {step:05}/{self.steps:05} | {text} | {memory_gb():.1f} GB | eta {eta}", flush=True)


def memory_gb():
    """Peak memory of this rank in GB: the GPU's, or on a CPU the process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
