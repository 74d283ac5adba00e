import json
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# The number of threads changes the order of sums, so bits: exactness tests need one.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


def run_here(monkeypatch, script, *args):
    """A script's command line in this process (saves the imports). Returns its exit code."""
    import runtime

    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, args)])
    try:
        runtime.run(script.main)
    except SystemExit as stop:
        return stop.code
    return 0


def refused(monkeypatch, capsys, script, *args):
    """Run, and return the message of a refusal: exit code 2, no traceback."""
    assert run_here(monkeypatch, script, *args) == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told and "error: " in told
    return told.split("error: ")[-1]


def command(script, *args, processes=0):
    """The same command line for a process of its own, or several under torchrun."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*(launch if processes else [sys.executable]), str(ROOT / f"{script.__name__}.py"), *map(str, args)]


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def policy():
    """The toy's LLaVA with random weights: real classes, small enough to build in a second."""
    import toy

    return toy.build_policy(seed=0).eval()


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A small toy world on disk, its base model barely warmed up: formats and plumbing, not results."""
    import build_data
    import model
    import toy

    folder = tmp_path_factory.mktemp("data") / "toy"
    folder.mkdir()
    stage = ("captions", 30, 0.0, 2e-3, 8, {"caption": 1}, "sloppy")
    model.save(toy.warm_up(0, vision_steps=2, stages=(stage,), images=64), folder / "base")
    build_data.build_toy(build_data.ToyConfig(out=str(folder), preference=25, heldout=13))
    base = build_data.prepare_toy(folder, 0)
    source, out = str(folder / "preference.jsonl"), str(folder / "mfpo.jsonl")
    build_data.build_mfpo(build_data.MfpoConfig(source=source, out=out, model=base))
    return folder


@pytest.fixture(scope="session")
def mined(world):
    """MBPO records in that world: a weak attack, every answer of the barely trained model, 60 questions."""
    import build_data

    config = build_data.MbpoConfig(
        source=str(world / "preference.jsonl"),
        model=str(world / "base"),
        out=str(world / "mbpo.jsonl"),
        iig_keep=0.8,
        steps=2,
        questions=60,
        batch=8,
    )
    build_data.build_mbpo(config)
    return world
