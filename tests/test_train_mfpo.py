"""The trainer's command line: a short run, kill and resume, one process and two, every mistake a user can make."""

import importlib
import json
import math
import os
import shutil
import signal
import subprocess
import time

import conftest
import pytest
import torch
import torch.distributed as dist
from conftest import finished, forked, metrics, wait_for
from transformers import LlavaForConditionalGeneration

import losses
import runtime
import train_mfpo
import warmup

SMALL = ["--pairs_per_step", "8", "--pairs_per_gpu", "4", "--warmup_steps", "2"]


def run_here(monkeypatch, *args):
    return conftest.run_here(monkeypatch, train_mfpo, *args)


def refused(monkeypatch, capsys, *args):
    return conftest.refused(monkeypatch, capsys, train_mfpo, *args)


def command(*args, processes=0):
    return conftest.command(train_mfpo, *args, processes=processes)


def test_the_real_command_line_end_to_end(world, tmp_path):
    run = tmp_path / "run"
    args = ["--data", world, "--out", run, "--epochs", 1, "--curriculum", "none", *SMALL]
    done = subprocess.run(command(*args, processes=1), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    steps = metrics(run)
    assert [s["step"] for s in steps] == [1, 2, 3]
    assert steps[0]["loss"] == pytest.approx(3 * 0.693147, abs=1e-4) and steps[2]["loss"] < steps[0]["loss"]
    assert "first loss 2.0794" in done.stdout and "next: " in done.stdout
    table = json.loads((run / "eval.json").read_text())
    keys = {"chair_s", "chair_i", "recall", "object_f1", "exact", "pope_adversarial", "pope_random", "fairness",
            "information_gain"}  # fmt: skip
    assert keys <= set(table["base"]) and keys <= set(table["final"])
    assert table["base"]["text_margin"] == 0 and table["final"]["image_margin"] != 0
    assert json.loads((run / "config.json").read_text())["pairs_per_step"] == 8
    before = LlavaForConditionalGeneration.from_pretrained(world / "base").state_dict()
    after = LlavaForConditionalGeneration.from_pretrained(run / "final").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not any("vision_tower" in name for name in changed)


@pytest.mark.parametrize("moment", ["step_00003.tmp/*.safetensors", "step_00004"])
def test_killed_and_resumed_equals_not_stopped_bit_for_bit(world, tmp_path, monkeypatch, moment):
    args = ["--data", world, "--epochs", 4, "--save_every", 1, "--eval_split", "none", *SMALL]
    assert run_here(monkeypatch, *args, "--out", tmp_path / "straight") == 0
    killed = tmp_path / "killed"
    (child,) = forked(train_mfpo, *args, "--out", killed)
    wait_for(lambda: list(killed.glob(moment)) or (killed / "final").exists())
    os.kill(child, signal.SIGKILL)
    assert finished([child]) == [-signal.SIGKILL]
    assert not (killed / "final").exists(), "the run ended before it was killed"
    first = [p.name for p in runtime.checkpoints(killed)]
    assert run_here(monkeypatch, "--resume", killed) == 0
    files = [(tmp_path / name / "final" / "model.safetensors").read_bytes() for name in ("straight", "killed")]
    assert files[0] == files[1], f"resumed from {first}"
    logs = [metrics(tmp_path / name) for name in ("straight", "killed")]
    plain = [[{k: v for k, v in s.items() if k not in ("time_s", "pairs_per_s")} for s in log] for log in logs]
    assert plain[0] == plain[1]


def test_two_processes_give_the_losses_and_the_table_of_one(world, tmp_path, monkeypatch):
    # 25 records and 13 scenes: the two processes have unequal shares of the reference pass and of the table.
    args = ["--data", world, "--epochs", 1, "--eval_split", "val", *SMALL]
    for cache in world.glob("ref_*.jsonl"):
        cache.unlink()
    log = tmp_path / "log"
    assert finished(forked(train_mfpo, *args, "--out", tmp_path / "two", processes=2, log=log)) == [0, 0], (
        log.read_text()
    )
    for cache in world.glob("ref_*.jsonl"):
        cache.unlink()
    assert run_here(monkeypatch, *args, "--out", tmp_path / "one") == 0
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert len(one) == len(two) == 3
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-5) and b["gnorm"] == pytest.approx(a["gnorm"], rel=1e-4)
    one, two = (json.loads((tmp_path / name / "eval.json").read_text())["final"] for name in ("one", "two"))
    assert two["recall"] == one["recall"] and two["image_margin"] == pytest.approx(one["image_margin"], abs=1e-4)


@pytest.fixture
def bad_data(world, tmp_path):
    """A copy of the records, to be spoilt."""
    folder = tmp_path / "data"
    shutil.copytree(world, folder)
    for cache in folder.glob("ref_*.jsonl"):
        cache.unlink()
    return folder


def spoil(folder, **change):
    lines = (folder / "mfpo.jsonl").read_text().splitlines()
    lines[2] = json.dumps({**json.loads(lines[2]), **change})
    (folder / "mfpo.jsonl").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--betaa", "1"], "unknown argument '--betaa'. Did you mean --beta?"),
        (["--bet", "1"], "unknown argument '--bet'. Did you mean --beta?"),
        (["--beta", "-0.1"], "--beta must be positive, got -0.1"),
        (["--beta", "x"], "invalid float value: 'x'"),
        (["--steps", "-1"], "--steps must not be negative"),
        (["--log_every", "3"], "unknown argument '--log_every'"),
        (["--beta", "nan"], "--beta must be a finite number"),
        (["--eta", "inf"], "--eta must be a finite number"),
        (["--seed", "-1"], "--seed must not be negative"),
        (["--data", "nowhere/other.jsonl"], "--data nowhere: no such folder"),
        (["--data", "no/such/folder"], "--data no/such/folder: no such folder"),
        (["--data", "data/toy/other.jsonl"], "--data data/toy/other.jsonl: no such file"),
        (["--image_weight", "-1"], "--image_weight must not be negative"),
        (["--curriculum", "easy"], "invalid choice: 'easy' (choose from"),
        (["--pairs_per_step", "10", "--pairs_per_gpu", "4"], "the nearest sizes that do are 8 and 12"),
        (["--resume", "nowhere"], "holds no config.json"),
        (["--resume", "nowhere", "--beta", "1"], "Drop --beta"),
        (["--model", "toy", "--data", "."], "is not of the built-in world"),
        (["--model", "nowhere", "--data", "nowhere"], "nowhere/mfpo.jsonl: no such file"),
    ],
)
def test_mistakes_on_the_command_line(monkeypatch, capsys, tmp_path, args, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(monkeypatch, capsys, *args)
    assert list(tmp_path.iterdir()) == [], "something was left behind"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen": ""}, "field 'chosen' is empty"),
        ({"image": "../x.png"}, "lies outside"),
        ({"image_rejected": "none.png"}, "no such image"),
        ({"chosen": "red " * 300}, "Raise it, or shorten"),
    ],
)
def test_mistakes_in_the_records(monkeypatch, capsys, bad_data, tmp_path, change, message):
    spoil(bad_data, **change)
    args = ["--data", bad_data, "--out", tmp_path / "run", "--max_length", 200, "--eval_split", "none", *SMALL]
    text = refused(monkeypatch, capsys, *args)
    assert message in text and ("line 3" in text or "preference-2" in text)
    assert not (tmp_path / "run").exists() and not list(bad_data.glob("ref_*"))


def test_a_damaged_image_is_named_where_it_is_met(monkeypatch, capsys, bad_data, tmp_path):
    image = json.loads((bad_data / "mfpo.jsonl").read_text().splitlines()[4])["image_rejected"]
    (bad_data / image).write_bytes((bad_data / image).read_bytes()[:200])
    text = refused(monkeypatch, capsys, "--data", bad_data, "--out", tmp_path / "run", *SMALL)
    assert image in text and "cannot be read as an image" in text and not (tmp_path / "run").exists()


def test_too_few_records_leave_no_run_behind(monkeypatch, capsys, world, tmp_path):
    text = refused(monkeypatch, capsys, "--data", world, "--out", tmp_path / "run", "--pairs_per_step", 4096)
    assert "25 records make 0 steps" in text and not (tmp_path / "run").exists()


def test_an_existing_run_is_not_overwritten(monkeypatch, capsys, world, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    text = refused(monkeypatch, capsys, "--data", world, "--out", tmp_path / "run", *SMALL)
    assert "exists already" in text and "--resume" in text
    assert (tmp_path / "run" / "config.json").read_text() == "{}"


def test_a_loss_that_is_not_finite_stops_before_the_update(monkeypatch, capsys, world, tmp_path):
    def spoilt(*args):
        loss, margin = runtime_dpo(*args)
        return loss * float("nan"), margin

    runtime_dpo = train_mfpo.dpo_loss
    monkeypatch.setattr(train_mfpo, "dpo_loss", spoilt)
    text = refused(monkeypatch, capsys, "--data", world, "--out", tmp_path / "run", "--eval_split", "none", *SMALL)
    assert "step 1: loss nan" in text and text.count("preference-") == 8
    assert not (tmp_path / "run" / "final").exists()


@pytest.fixture
def group():
    """A process group of one, for checkpoints."""
    runtime.start()
    yield
    dist.destroy_process_group()


def test_checkpoints_of_another_model_or_with_a_missing_file_are_refused(group, tmp_path):
    policy = warmup.build_policy(0)
    optimizer = runtime.adamw(policy, 0.0)
    for step in (1, 2, 3):
        runtime.save_checkpoint(tmp_path, step, policy, optimizer, "abc")
    (tmp_path / "step_00004.tmp").mkdir()  # killed while writing
    assert [p.name for p in runtime.checkpoints(tmp_path)] == ["step_00002", "step_00003"]
    assert runtime.load_checkpoint(tmp_path / "step_00003", policy, optimizer, "abc") == 3
    with pytest.raises(runtime.Mistake, match="fingerprint abc, now xyz"):
        runtime.load_checkpoint(tmp_path / "step_00003", policy, optimizer, "xyz")
    (tmp_path / "step_00003.bak").mkdir()
    file = next((tmp_path / "step_00003").glob("*.safetensors"))
    content = file.read_bytes()
    for damage in (lambda: file.write_bytes(content[:-9]), lambda: file.write_bytes(bytes(len(content))), file.unlink,
                   lambda: (tmp_path / "step_00003" / "checkpoint.json").write_text("{")):  # fmt: skip
        damage()
        with pytest.raises(runtime.Mistake, match="step_00003: missing or damaged"):
            runtime.load_checkpoint(runtime.checkpoints(tmp_path)[-1], policy, optimizer, "abc")
        file.write_bytes(content)


@pytest.mark.parametrize("text", ["{", "[]", '{"group": 8}', '{"beta": "x"}'])
def test_a_config_that_is_not_of_this_script_is_refused(monkeypatch, capsys, tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    text = refused(monkeypatch, capsys, "--resume", tmp_path)
    assert "config.json: " in text and [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_the_reference_cache_is_found_again_and_never_stale(monkeypatch, capsys, bad_data, tmp_path):
    args = ["--data", bad_data, "--eval_split", "none", "--epochs", 1, *SMALL]

    def caches():
        return set(bad_data.glob("ref_*.jsonl"))

    assert run_here(monkeypatch, *args, "--out", tmp_path / "a") == 0
    first = caches()
    assert run_here(monkeypatch, *args, "--out", tmp_path / "b") == 0 and caches() == first
    noisy = sorted((bad_data / "mfpo_distorted").iterdir())
    shutil.copy(noisy[0], noisy[1])  # another picture under the same name
    assert run_here(monkeypatch, *args, "--out", tmp_path / "c") == 0 and len(caches()) == 2
    config = json.loads((bad_data / "base" / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] = 1e-5
    (bad_data / "base" / "config.json").write_text(json.dumps(config))
    assert run_here(monkeypatch, *args, "--out", tmp_path / "d") == 0 and len(caches()) == 3


def test_log_is_cut_back_to_the_checkpoint(group, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n')
    log = runtime.Log(tmp_path, steps=5, first_step=2)
    log(3, "again", {"loss": 1.0})
    assert [s["step"] for s in metrics(tmp_path)] == [1, 2, 3] and metrics(tmp_path)[-1]["loss"] == 1.0


def test_learning_rate_by_hand():
    rates = [runtime.cosine(step, 12, 1.0, warm=2, floor=0.1) for step in range(12)]
    assert rates[:3] == pytest.approx([0.5, 1.0, 1.0])
    assert rates[7] == pytest.approx(0.55)  # half way through the cosine
    assert rates[11] == pytest.approx(0.1 + 0.9 * 0.5 * (1 - 0.9510565), abs=1e-6)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])  # on a GPU threads make them; which needs no GPU to be tried
def test_what_is_made_ahead_comes_in_order_and_not_too_early(monkeypatch, kind):
    monkeypatch.setattr(runtime, "device", lambda: torch.device(kind))
    asked = []

    def make(i):
        time.sleep(0.002 * (i % 3))
        if i == 9:
            raise ValueError("nine")
        return i * i

    def items():
        for i in range(20):
            asked.append(i)
            yield i

    made = []
    with pytest.raises(ValueError, match="nine"):
        for value in runtime.ahead(make, items(), workers=2):
            made.append(value)
            assert len(asked) - len(made) == (0 if kind == "cpu" else 2)
    assert made == [i * i for i in range(9)]


def test_the_clock_adds_up(monkeypatch):
    times = iter([0.0, 1.0, 4.0, 6.0, 10.0])
    monkeypatch.setattr(runtime.time, "perf_counter", lambda: next(times))
    clock = runtime.Clock()
    assert [clock("images"), clock("optimizer"), clock("images"), clock("optimizer")] == [1, 3, 2, 4]
    assert clock.summary() == "10.0 s: optimizer 70.0 %, images 30.0 %"


def test_the_method_in_one_place_equals_plain_floats():
    """The three losses and their weights, from six numbers a pair."""
    config = train_mfpo.Config(beta=0.5, eta=0.2, text_weight=2.0, image_weight=0.5, margin_weight=3.0)
    logp, ref = (
        torch.tensor([[-5.0, -9.0, -7.0], [-3.0, -2.0, -1.0]]),
        torch.tensor([[-6.0, -8.0, -6.5], [-3.0, -2.5, -4.0]]),
    )
    loss, parts = train_mfpo.mfpo(logp, ref, config)
    for i in range(2):
        w, lost, d = ((logp - ref)[i]).tolist()
        terms = [math.log1p(math.exp(-z)) for z in (0.5 * (w - lost), 0.5 * (w - d), 0.5 * w - 0.2)]
        assert loss[i].item() == pytest.approx(2 * terms[0] + 0.5 * terms[1] + 3 * terms[2], rel=1e-5)
        assert parts["image_margin"][i].item() == pytest.approx(0.5 * (w - d), abs=1e-6)
    two, parts = train_mfpo.mfpo(logp[:, :2], ref, train_mfpo.Config(image_weight=0.0))
    assert two.shape == (2,) and "image_loss" not in parts


def test_a_fork_with_another_loss_passes_the_first_check(monkeypatch, capsys, world, tmp_path):
    """IPO's loss is not ln 2 at the start: what is expected comes from the method itself."""

    def ipo(policy_w, policy_l, ref_w, ref_l, beta):
        h = (policy_w - ref_w) - (policy_l - ref_l)
        return (h - 1 / (2 * beta)) ** 2, h.detach()

    monkeypatch.setattr(train_mfpo, "dpo_loss", ipo)
    args = ["--data", world, "--out", tmp_path / "run", "--eval_split", "none", *SMALL, "--steps", 2]
    assert run_here(monkeypatch, *args) == 0
    assert "first loss 4.1641, as it must be" in capsys.readouterr().out and len(metrics(tmp_path / "run")) == 2


def test_a_wrong_reference_is_told_with_its_file(monkeypatch, capsys, world, tmp_path):
    args = ["--data", world, "--eval_split", "none", *SMALL, "--steps", 1]
    assert run_here(monkeypatch, *args, "--out", tmp_path / "a") == 0
    (path,) = {p for p in world.glob("ref_*.jsonl") if "mbpo" not in p.name and p.stat().st_mtime == max(
        q.stat().st_mtime for q in world.glob("ref_*.jsonl") if "mbpo" not in q.name)}  # fmt: skip
    honest = path.read_text()
    lines = [json.loads(line) for line in honest.splitlines()]
    path.write_text("".join(json.dumps({**line, "chosen": line["chosen"] - 2}) + "\n" for line in lines))
    try:
        assert run_here(monkeypatch, *args, "--out", tmp_path / "b") == 1
        text = capsys.readouterr().err
        assert "AssertionError" in text and path.name in text and "Delete " in text
        assert not (tmp_path / "b").exists(), "a run without a step keeps its name"
    finally:
        path.write_text(honest)


def test_the_first_steps_of_the_order(monkeypatch, capsys, world, tmp_path):
    args = ["--data", world, "--eval_split", "none", *SMALL]
    assert run_here(monkeypatch, *args, "--steps", 2, "--out", tmp_path / "run") == 0
    steps = metrics(tmp_path / "run")
    assert len(steps) == 2 and steps[1]["lr"] == pytest.approx(2e-4)  # the cosine is over them: warm-up takes both
    assert "not 99. Lower it" in refused(monkeypatch, capsys, *args, "--steps", 99, "--out", tmp_path / "b")


@pytest.mark.parametrize("bug", [lambda *a: int("x"), lambda *a: list(zip([1], [], strict=True)), lambda *a: {}["x"]])
def test_our_own_bug_keeps_its_traceback(monkeypatch, capsys, world, tmp_path, bug):
    """Also one that is a ValueError, as int("x") and a zip that does not fit are."""
    monkeypatch.setattr(losses, "_check", bug)
    args = ["--data", world, "--out", tmp_path / "run", "--eval_split", "none", *SMALL]
    assert run_here(monkeypatch, *args) == 1
    text = capsys.readouterr().err
    assert "Traceback" in text and "error: " not in text.split("Traceback")[0] and not (tmp_path / "run").exists()


def test_a_copied_trainer_runs_and_tells_mistakes_in_one_line(world, tmp_path, monkeypatch, capsys):
    """`cp train_mfpo.py train_mine.py`, wherever the copy lies."""
    shutil.copy(conftest.ROOT / "train_mfpo.py", tmp_path / "train_mine.py")
    monkeypatch.syspath_prepend(tmp_path)
    copy = importlib.import_module("train_mine")
    args = ["--data", world, "--eval_split", "none", *SMALL, "--steps", 1, "--out", tmp_path / "run"]
    assert conftest.run_here(monkeypatch, copy, *args) == 0
    assert conftest.refused(monkeypatch, capsys, copy, "--beta", "-1").strip() == "--beta must be positive, got -1.0"


def test_a_run_of_an_older_version_is_resumed(monkeypatch, capsys, world, tmp_path):
    """Knobs that are gone are told, those that are new have their default."""
    run = tmp_path / "run"
    args = ["--data", world, "--out", run, "--save_every", 1, "--eval_split", "none", *SMALL]
    assert run_here(monkeypatch, *args) == 0
    config = json.loads((run / "config.json").read_text())
    del config["steps"]
    (run / "config.json").write_text(json.dumps(config | {"keep": 2, "log_every": 10, "skip_bad": False}))
    shutil.rmtree(run / "final")
    shutil.rmtree(runtime.checkpoints(run)[-1])
    capsys.readouterr()
    assert run_here(monkeypatch, "--resume", run) == 0
    assert "this version does not have keep, log_every, skip_bad" in capsys.readouterr().out
    assert (run / "final").is_dir()
