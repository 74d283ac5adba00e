"""The trainer's command line: a short run, kill and resume, one process and two, every mistake a user can make."""

import json
import shutil
import signal
import subprocess
import sys
import time

import conftest
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, metrics
from transformers import LlavaForConditionalGeneration

import runtime
import toy
import train_mfpo

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


def test_killed_and_resumed_equals_not_stopped_bit_for_bit(world, tmp_path, monkeypatch):
    args = ["--data", world, "--epochs", 6, "--save_every", 1, "--eval_split", "none", *SMALL]
    assert run_here(monkeypatch, *args, "--out", tmp_path / "straight") == 0
    killed = tmp_path / "killed"
    process = subprocess.Popen(command(*args, "--out", killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not (killed / "step_00004").is_dir() and time.time() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "final").exists(), "the run ended before it was killed"
    first = runtime.checkpoints(killed)[-1].name
    assert run_here(monkeypatch, "--resume", killed) == 0
    files = [(tmp_path / name / "final" / "model.safetensors").read_bytes() for name in ("straight", "killed")]
    assert files[0] == files[1], f"resumed from {first}"
    logs = [metrics(tmp_path / name) for name in ("straight", "killed")]
    plain = [[{k: v for k, v in step.items() if k not in ("time_s", "pairs_per_s")} for step in log] for log in logs]
    assert plain[0] == plain[1]


def test_two_processes_give_the_losses_and_the_table_of_one(world, tmp_path, monkeypatch):
    # 25 records and 13 scenes: the two processes have unequal shares of the reference pass and of the table.
    args = ["--data", world, "--epochs", 1, "--eval_split", "val", *SMALL]
    for cache in world.glob("ref_*.jsonl"):
        cache.unlink()
    done = subprocess.run(command(*args, "--out", tmp_path / "two", processes=2), capture_output=True, text=True)
    assert (tmp_path / "two" / "final").is_dir(), done.stderr
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
        (["--beta", "nan"], "--beta must be a finite number"),
        (["--eta", "inf"], "--eta must be a finite number"),
        (["--seed", "-1"], "--seed must not be negative"),
        (["--data", "nowhere/other.jsonl"], "nowhere/other.jsonl: no such file"),
        (["--image_weight", "-1"], "--image_weight must not be negative"),
        (["--curriculum", "easy"], "use one of easy_to_hard"),
        (["--pairs_per_step", "10", "--pairs_per_gpu", "4"], "the nearest sizes that do are 8 and 12"),
        (["--resume", "nowhere"], "holds no config.json"),
        (["--resume", "nowhere", "--beta", "1"], "Drop --beta"),
        (["--model", "toy", "--data", "."], "holds neither mfpo.jsonl nor the toy world"),
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
        ({"chosen": "red " * 300}, "raise it, shorten the answer"),
    ],
)
def test_mistakes_in_the_records(monkeypatch, capsys, bad_data, tmp_path, change, message):
    spoil(bad_data, **change)
    args = ["--data", bad_data, "--out", tmp_path / "run", "--max_length", 200, "--eval_split", "none", *SMALL]
    told = refused(monkeypatch, capsys, *args)
    assert message in told or message.capitalize() in told
    assert "line 3" in told or "preference-2" in told
    assert not (tmp_path / "run").exists() and not list(bad_data.glob("ref_*"))
    assert run_here(monkeypatch, *args, "--skip_bad", "True", "--epochs", 1) == 0
    assert "1 records dropped" in capsys.readouterr().out


def test_too_few_records_leave_no_run_behind(monkeypatch, capsys, world, tmp_path):
    told = refused(monkeypatch, capsys, "--data", world, "--out", tmp_path / "run", "--pairs_per_step", 4096)
    assert "25 records make no step" in told and not (tmp_path / "run").exists()


def test_an_existing_run_is_not_overwritten(monkeypatch, capsys, world, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    told = refused(monkeypatch, capsys, "--data", world, "--out", tmp_path / "run", *SMALL)
    assert "exists already" in told and "--resume" in told
    assert (tmp_path / "run" / "config.json").read_text() == "{}"


def test_a_loss_that_is_not_finite_stops_before_the_update(monkeypatch, capsys, world, tmp_path):
    def spoilt(*args):
        loss, margin = runtime_dpo(*args)
        return loss * float("nan"), margin

    runtime_dpo = train_mfpo.dpo_loss
    monkeypatch.setattr(train_mfpo, "dpo_loss", spoilt)
    told = refused(monkeypatch, capsys, "--data", world, "--out", tmp_path / "run", "--eval_split", "none", *SMALL)
    assert "step 1: loss nan" in told and told.count("preference-") == 8
    assert not (tmp_path / "run" / "final").exists()


@pytest.fixture
def group():
    """A process group of one, for checkpoints."""
    runtime.start()
    yield
    dist.destroy_process_group()


def test_checkpoints_of_another_model_or_with_a_missing_file_are_refused(group, tmp_path):
    policy = toy.build_policy(0)
    optimizer = runtime.adamw(policy, 0.0)
    for step in (1, 2, 3):
        runtime.save_checkpoint(tmp_path, step, policy, optimizer, "abc", keep=2)
    (tmp_path / "step_00004.tmp").mkdir()  # killed while writing
    assert [p.name for p in runtime.checkpoints(tmp_path)] == ["step_00002", "step_00003"]
    assert runtime.load_checkpoint(tmp_path / "step_00003", policy, optimizer, "abc") == 3
    with pytest.raises(ValueError, match="fingerprint abc, now xyz"):
        runtime.load_checkpoint(tmp_path / "step_00003", policy, optimizer, "xyz")
    other = toy.build_policy(0)
    other.hf.lm_head = torch.nn.Linear(128, 7, bias=False)
    with pytest.raises(ValueError, match="checkpoint of another model: weight.hf.lm_head.weight"):
        runtime.load_checkpoint(tmp_path / "step_00003", other, runtime.adamw(other, 0.0), "abc")
    (tmp_path / "step_00003.bak").mkdir()
    file = next((tmp_path / "step_00003").glob("*.safetensors"))
    whole = file.read_bytes()
    for damage in (lambda: file.write_bytes(whole[:-9]), lambda: file.write_bytes(bytes(len(whole))), file.unlink,
                   lambda: (tmp_path / "step_00003" / "checkpoint.json").write_text("{")):  # fmt: skip
        damage()
        with pytest.raises(ValueError, match="step_00003: missing or damaged"):
            runtime.load_checkpoint(runtime.checkpoints(tmp_path)[-1], policy, optimizer, "abc")
        file.write_bytes(whole)


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"beta": 0.1}'])
def test_a_config_that_is_not_of_this_script_is_refused(monkeypatch, capsys, tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    told = refused(monkeypatch, capsys, "--resume", tmp_path)
    assert "config.json: " in told and [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_rank_0_alone_can_build_a_model_while_the_others_wait(tmp_path):
    script = tmp_path / "build.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import model, runtime, toy\n"
        "runtime.start()\n"
        f"folder = runtime.first_alone(lambda: model.save(toy.build_policy(0), {str(tmp_path / 'base')!r}))\n"
        f"open({str(tmp_path)!r} + f'/rank_{{runtime.rank()}}', 'w').close()\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=90)
    assert (tmp_path / "rank_0").exists() and (tmp_path / "rank_1").exists(), done.stderr


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
    log = runtime.Log(tmp_path, steps=5, first_step=2, every=1)
    log(3, "again", loss=1.0)
    assert [s["step"] for s in metrics(tmp_path)] == [1, 2, 3] and metrics(tmp_path)[-1]["loss"] == 1.0


def test_learning_rate_by_hand():
    rates = [runtime.cosine(step, 12, 1.0, warm=2, floor=0.1) for step in range(12)]
    assert rates[:3] == pytest.approx([0.5, 1.0, 1.0])
    assert rates[7] == pytest.approx(0.55)  # half way through the cosine
    assert rates[11] == pytest.approx(0.1 + 0.9 * 0.5 * (1 - 0.9510565), abs=1e-6)


@pytest.mark.parametrize("device", ["cpu", "cuda"])  # on a GPU threads make them; which needs no GPU to be tried
def test_what_is_made_ahead_comes_in_order_and_not_too_early(device):
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

    found = []
    with pytest.raises(ValueError, match="nine"):
        for value in runtime.ahead(make, items(), torch.device(device), workers=2):
            found.append(value)
            assert len(asked) - len(found) == (0 if device == "cpu" else 2)
    assert found == [i * i for i in range(9)]


def test_the_clock_adds_up(monkeypatch):
    times = iter([0.0, 1.0, 4.0, 6.0, 10.0])
    monkeypatch.setattr(runtime.time, "perf_counter", lambda: next(times))
    clock = runtime.Clock()
    assert [clock("images"), clock("optimizer"), clock("images"), clock("optimizer")] == [1, 3, 2, 4]
    assert clock.summary() == "10.0 s: optimizer 70.0 %, images 30.0 %"
