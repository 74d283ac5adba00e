"""The house: how long its files may be, who may import whom, that extras can be deleted, that docs name what is."""

import ast
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

# file -> lines at most, and the files of ours that it may import. A file that is not named here is free (a fork's copy
# of a trainer, a scratch script). A budget is raised only with a dated reason in LOG.md.
METHOD = {
    "losses": (175, ""),
    "rewards": (100, "data"),
    "data": (375, "runtime"),
    "model": (325, "data runtime"),
    "build_data": (630, "data grounding hub losses model parts rewards runtime toy warmup"),
    "train_mfpo": (245, "build_data data eval hub losses model runtime"),
    "train_mbpo": (350, "build_data data eval hub losses model rewards runtime"),
}
BELOW = {
    "runtime": (550, ""),
    "hub": (170, "data families model runtime"),
    "parts": (200, "data hub runtime"),
    "grounding": (160, "runtime"),
    "toy": (340, "data rewards runtime"),
    "warmup": (200, "data hub model runtime toy"),
    "tables": (100, ""),
    "eval": (380, "data hub losses model rewards runtime tables toy"),
    "bench": (270, "data families hub losses model runtime train_mfpo train_mbpo warmup"),
}
EXTRAS = {
    "sources": (420, "data rewards runtime"),
    "benchmarks": (540, "data hub model parts rewards runtime tables"),
    "pictures": (260, "build_data data eval hub model runtime tables toy"),
    "contest": (300, "bench build_data data hub losses model runtime train_mfpo train_mbpo warmup"),
}
HOUSE = {f"{name}.py": row for name, row in (METHOD | BELOW).items()}
HOUSE |= {f"extras/{name}.py": row for name, row in EXTRAS.items()}
OURS = {*METHOD, *BELOW, "extras"}


def lines_of(path):
    return (ROOT / path).read_text().count("\n")


def imports_of(path, top=False):
    """The modules that a file imports: anywhere, or with `top` when it is imported itself."""
    tree = ast.parse((ROOT / path).read_text())
    for node in tree.body if top else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name.split(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def test_budgets_of_lines():
    """Prints the three sums; -s shows them."""
    method = sum(lines_of(f"{name}.py") for name in METHOD)
    top = method + sum(lines_of(f"{name}.py") for name in BELOW)
    everything = top + sum(lines_of(f"extras/{name}.py") for name in EXTRAS)
    print(f"\nlines: method {method} of {SUMS[0]}, top level {top} of {SUMS[1]}, all {everything} of {SUMS[2]}")
    assert (method <= SUMS[0], top <= SUMS[1], everything <= SUMS[2]) == (True, True, True)
    over = {path: lines_of(path) for path, (most, _) in HOUSE.items() if lines_of(path) > RAISED.get(path, 1.1 * most)}
    assert not over, over


SUMS = (2312, 4940, 6705)
RAISED = {"hub.py": 234, "warmup.py": 234, "eval.py": 478, "tables.py": 119, "rewards.py": 133}  # LOG.md, 2026-11-27
RAISED |= {"extras/sources.py": 510, "extras/benchmarks.py": 652}


@pytest.mark.parametrize("path", HOUSE)
def test_imports_are_those_of_the_table(path):
    ours = set(imports_of(path)) & OURS
    assert ours <= set(HOUSE[path][1].split()), ours
    if not path.startswith("extras/"):
        assert "extras" not in ours


def test_the_table_has_no_circles():
    """Who imports nothing of ours is taken away, again and again, until nobody is left."""
    rows = {name: set(row[1].split()) & OURS for name, row in (METHOD | BELOW).items()}
    while rows:
        free = [name for name, ours in rows.items() if not ours & rows.keys()]
        assert free, rows
        for name in free:
            del rows[name]


def test_losses_know_tensors_only():
    assert set(imports_of("losses.py")) == {"torch"}


def test_pure_files_need_no_transformers():
    """Nothing that tests of plain arithmetic import brings transformers with it."""
    code = "import sys, losses, data, tables, rewards, runtime; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_both_trainers_run_without_extras(mined, tmp_path):
    """The top level, copied without extras/: two steps of each."""
    for path in HOUSE:
        if not path.startswith("extras/"):
            shutil.copy(ROOT / path, tmp_path)
    small = {
        "mfpo": "--pairs_per_step 8 --pairs_per_gpu 4 --steps 2",
        "mbpo": "--groups_per_step 4 --group 4 --max_new_tokens 5 --steps 2",
    }
    code = "import sys, runtime, train_mfpo, train_mbpo\n"
    for method, flags in small.items():
        args = [f"train_{method}.py", "--data", str(mined), "--out", str(tmp_path / method), "--eval_split", "none"]
        code += f"sys.argv = {args + flags.split()}\nruntime.run(train_{method}.main)\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for method in small:
        assert len((tmp_path / method / "metrics.jsonl").read_text().splitlines()) == 2


VAGUE = {"found", "kept", "told", "mine", "whole", "place", "things"}  # STYLE: what the thing is, not these


@pytest.mark.parametrize("path", HOUSE)
def test_names_of_variables_say_what_the_thing_is(path):
    tree = ast.parse((ROOT / path).read_text())
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    names |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    assert not names & VAGUE, names & VAGUE


def test_nothing_is_ascribed_to_the_papers_that_nobody_read():
    words = re.compile(r"(does|do) not (say|state|name|print)|(gives?|prints?) no formula", re.IGNORECASE)
    for path in [*HOUSE, "README.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]:
        for number, line in enumerate((ROOT / path).read_text().splitlines(), 1):
            assert not (words.search(line) and re.search("paper|MFPO|MBPO", line)), f"{path}:{number} {line}"


DOCS = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("path", DOCS)
def test_docs_name_what_exists(path):
    """Each file, script and picture that a page speaks of is there, and each `file.py:function`."""
    text = (ROOT / path).read_text()
    for name in set(re.findall(r"(?:(?:runs|tests|docs|extras)/)?[\w/]+\.(?:py|sh|png)\b", text)):
        if name.startswith(("runs/", "docs/", "extras/")) or (name in HOUSE):
            assert (ROOT / name).is_file(), name
    for file, function in re.findall(r"`((?:extras/)?\w+\.py):(\w+)`", text):
        defined = {node.name for node in ast.walk(ast.parse((ROOT / file).read_text())) if hasattr(node, "name")}
        assert function in defined, f"{file}:{function}"


def test_the_front_door_is_small():
    """220 lines, 16,000 characters, no line over 120 outside of code and links, no table wider than 100 columns."""
    text, code = (ROOT / "README.md").read_text(), False
    assert text.count("\n") <= 220 and len(text) <= 16_000, (text.count("\n"), len(text))
    for line in text.splitlines():
        code ^= line.startswith("```")
        shown = re.sub(r"\]\([^)]*\)", "]", line)
        if not code:
            assert len(shown) <= (100 if line.startswith("|") else 120), line
