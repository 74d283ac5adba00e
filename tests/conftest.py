import json
import os
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# The number of threads changes the order of sums, so bits: exactness tests need one. Forked children too: a pool
# of threads does not survive a fork.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


def run_here(monkeypatch, script, *args):
    """A script's command line in this process (saves the imports). Returns its exit code."""
    import runtime

    monkeypatch.setattr(sys, "argv", [f"{script.__name__.split('.')[-1]}.py", *map(str, args)])
    try:
        runtime.run(script.main)
    except SystemExit as stop:
        return stop.code or 0
    return 0


def refused(monkeypatch, capsys, script, *args):
    """Run, and return the message of a refusal: exit code 2, one line of at most 300 characters, no traceback."""
    assert run_here(monkeypatch, script, *args) == 2
    text = capsys.readouterr().err.split("error: ")[-1]
    assert "Traceback" not in text and text.count("\n") == 1 and len(text) <= 301, text
    return text


def command(script, *args, processes=0):
    """The same command line for a process of its own, or several under torchrun."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*(launch if processes else [sys.executable]), str(ROOT / f"{script.__name__}.py"), *map(str, args)]


def forked(script, *args, processes=0, log=os.devnull, before=None):
    """
    A script's command line in children of this process, which have its imports: ranks of a group, or with 0 a process
    that knows of none. Returns their process ids; `finished` waits for them. `before(rank)` runs in the child first.
    """
    import runtime

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children = []
    for rank in range(processes or 1):
        child = os.fork()
        if child:
            children.append(child)
            continue
        code = 1
        try:
            sys.stdout = sys.stderr = open(log, "a")  # noqa: SIM115
            if processes:
                here = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
                os.environ.update(here, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            sys.argv = [f"{script.__name__.split('.')[-1]}.py", *map(str, args)]
            tqdm.set_lock(threading.RLock())  # its own lock is shared over the fork, and a killed child may hold it
            if before:
                before(rank)
            runtime.run(script.main)
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        finally:
            sys.stdout.flush()
            os._exit(code)
    return children


def finished(children):
    """Their exit codes, negative for a signal."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def wait_for(condition, seconds=120):
    deadline = time.time() + seconds
    while not condition() and time.time() < deadline:
        time.sleep(0.002)
    assert condition(), "waited in vain"


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def policy():
    """The toy's LLaVA with random weights: real classes, small enough to build in a second."""
    import warmup

    return warmup.build_policy(seed=0).eval()


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A small toy world on disk, its base model barely warmed up: formats and plumbing, not results."""
    import build_data
    import hub
    import toy
    import warmup

    folder = tmp_path_factory.mktemp("data") / "toy"
    folder.mkdir()
    stage = ("captions", 30, 0.0, 2e-3, 8, {"caption": 1}, "sloppy")
    hub.save_new(warmup.warm_up(0, vision_steps=2, stages=(stage,), images=64), folder / "base")
    build_data.build_toy(toy.Config(out=str(folder), preference=25, heldout=13))
    source, out, base = (str(folder / name) for name in ("preference.jsonl", "mfpo.jsonl", "base"))
    build_data.build_mfpo(build_data.MfpoConfig(source=source, out=out, model=base))
    return folder


@pytest.fixture(scope="session")
def mined(world):
    """MBPO records in that world: a weak attack, every answer of the barely trained model, 60 questions."""
    import build_data

    source, out, base = (str(world / name) for name in ("preference.jsonl", "mbpo.jsonl", "base"))
    small = {"iig_keep": 0.8, "steps": 2, "questions": 60, "batch": 8}
    build_data.build_mbpo(build_data.MbpoConfig(source=source, out=out, model=base, **small))
    return world
