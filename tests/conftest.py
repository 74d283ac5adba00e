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
    import train_mfpo

    folder = tmp_path_factory.mktemp("data") / "toy"
    folder.mkdir()
    stage = ("captions", 30, 0.0, 2e-3, 8, {"caption": 1}, "sloppy")
    model.save(toy.warm_up(0, vision_steps=2, stages=(stage,), images=64), folder / "base")
    build_data.build_toy(build_data.ToyConfig(out=str(folder), preference=25, heldout=13))
    train_mfpo.prepare_toy(folder, 0)
    return folder
