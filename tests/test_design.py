"""The house: who may import whom, and that the README speaks of what is there."""

import ast
import re

import pytest
from conftest import ROOT

# From the ground up: each file may import those named, and nothing else of ours.
MAY_IMPORT = {
    "losses": "",
    "data": "",
    "runtime": "",
    "sources": "data",
    "scores": "data",
    "grounding": "",
    "model": "data",
    "draw": "data model",
    "toy": "data model runtime",
    "build_data": "data draw grounding losses model runtime sources toy",
    "eval": "data draw losses model runtime scores sources toy",
    "train_mfpo": "build_data data eval losses model runtime",
    "train_mbpo": "build_data data eval losses model runtime scores",
    "bench": "build_data data losses model runtime toy train_mbpo",  # what it times is the trainer's own rollout
}


def imports_of(path):
    """The modules that a file imports anywhere, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name.split(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def test_every_file_has_its_place():
    assert {path.stem for path in ROOT.glob("*.py")} == set(MAY_IMPORT)


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_imports_run_downwards(name):
    ours = set(imports_of(ROOT / f"{name}.py")) & set(MAY_IMPORT)
    assert ours <= set(MAY_IMPORT[name].split())
    below = list(MAY_IMPORT)[: list(MAY_IMPORT).index(name)]
    assert set(MAY_IMPORT[name].split()) <= set(below)  # the table itself has no way up


def test_losses_know_tensors_only():
    assert set(imports_of(ROOT / "losses.py")) == {"torch"}


def test_the_readme_names_what_exists():
    """Each `file.py` and `runs/x.sh` that the README speaks of is there, and each function that its tables name."""
    text = (ROOT / "README.md").read_text()
    for name in set(re.findall(r"(?:(?:runs|tests|docs)/)?[\w/]+\.(?:py|sh|png)\b", text)):
        if name.startswith(("runs/", "docs/")) or (name.endswith(".py") and "/" not in name):
            assert (ROOT / name).is_file(), name
    for file, function in re.findall(r"`(\w+\.py):(\w+)`", text):
        defined = {node.name for node in ast.walk(ast.parse((ROOT / file).read_text())) if hasattr(node, "name")}
        assert function in defined, f"{file}:{function}"
