"""What lets a long run be trusted: full disks, other numbers of processes, SIGTERM, ranks that die."""

import json
import os
import resource
import shutil
import signal
import time
from pathlib import Path

import conftest
import pytest
import torch
from conftest import finished, forked, metrics, wait_for
from safetensors.torch import load_file

import data
import runtime
import train_mbpo
import train_mfpo
import warmup

MFPO = ["--pairs_per_step", 8, "--pairs_per_gpu", 4, "--warmup_steps", 2, "--eval_split", "none", "--save_every", 1]
MBPO = ["--groups_per_step", 4, "--groups_per_gpu", 2, "--group", 4, "--warmup_steps", 2, "--max_new_tokens", 5,
        "--eval_split", "none", "--save_every", 1]  # fmt: skip


def weights(run):
    return (run / "final" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("script", [train_mfpo, train_mbpo])
def test_two_processes_are_resumed_by_one(mined, tmp_path, monkeypatch, script):
    steps = [*MFPO, "--epochs", 2] if script is train_mfpo else [*MBPO, "--steps", 6]
    run, log = tmp_path / "run", tmp_path / "log"
    children = forked(script, "--data", mined, *steps, "--out", run, processes=2, log=log)
    assert finished(children) == [0, 0], log.read_text()
    both, after = metrics(run), load_file(run / "final" / "model.safetensors")
    shutil.rmtree(run / "final")
    first, last = runtime.checkpoints(run)
    assert len(list(last.glob("*.safetensors"))) == 2  # each rank wrote its share
    assert (first.name, last.name) == ("step_00005", "step_00006")
    shutil.rmtree(last)
    assert conftest.run_here(monkeypatch, script, "--resume", run) == 0
    one = metrics(run)
    assert len(one) == len(both) == 6
    for a, b in zip(one, both, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5) and a["gnorm"] == pytest.approx(b["gnorm"], rel=1e-3)
    for name, value in load_file(run / "final" / "model.safetensors").items():
        assert torch.allclose(value, after[name], atol=1e-5), name


@pytest.mark.parametrize("processes", [0, 2])
def test_sigterm_saves_once_and_stops(world, tmp_path, processes):
    args = ["--data", world, *MFPO, "--epochs", 200, "--save_every", 100000]
    children = forked(train_mfpo, *args, "--out", tmp_path / "run", processes=processes, log=tmp_path / "log")
    log = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: log.is_file() and log.read_text().count("\n") > 3)
    os.kill(children[-1], signal.SIGTERM)  # one rank alone is told; the others have to hear of it
    assert set(finished(children)) == {0}
    (saved,) = runtime.checkpoints(tmp_path / "run")
    step = int(saved.name.removeprefix("step_"))
    assert f"stopped by SIGTERM after step {step}, which is saved" in (tmp_path / "log").read_text()
    assert len(metrics(tmp_path / "run")) == step and not (tmp_path / "run" / "final").exists()


def test_a_full_disk_leaves_the_checkpoint_before_it(world, tmp_path, monkeypatch):
    run, log, save = tmp_path / "run", tmp_path / "log", runtime.save_checkpoint

    def full_disk(run, step, *rest):
        if step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
        save(run, step, *rest)

    def before(rank):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        runtime.save_checkpoint = full_disk

    args = ["--data", world, "--out", run, *MFPO, "--epochs", 2]
    assert finished(forked(train_mfpo, *args, log=log, before=before)) == [2]
    text = log.read_text()
    assert "Traceback" not in text and "step_00003: could not be written" in text
    assert "complete checkpoints there: step_00001, step_00002" in text
    assert [p.name for p in sorted(run.glob("step_*"))] == ["step_00001", "step_00002"]
    assert conftest.run_here(monkeypatch, train_mfpo, "--resume", run) == 0


def test_a_rank_that_dies_takes_the_others_down(world, tmp_path):
    honest, calls = train_mfpo.mfpo, []

    def dying(*args):
        calls.append(1)
        if len(calls) == 3 and runtime.rank() == 1:
            raise RuntimeError("this rank dies")
        return honest(*args)

    def before(rank):
        train_mfpo.mfpo = dying

    args = ["--data", world, "--out", tmp_path / "run", *MFPO, "--epochs", 2]
    began = time.time()
    children = forked(train_mfpo, *args, processes=2, log=tmp_path / "log", before=before)
    assert 0 not in finished(children) and time.time() - began < 60
    text = (tmp_path / "log").read_text()
    first = text.index("RuntimeError: this rank dies")
    others = [text.find(words) for words in ("Connection closed by peer", "Connection reset by peer")]
    assert all(at == -1 or at > first for at in others), "another rank's error hides the one that matters"


def test_what_rank_0_alone_did_wrong_every_rank_tells(tmp_path):
    class Script:
        __name__ = "script"

        @staticmethod
        def main():
            runtime.start()

            def work():
                raise runtime.Mistake("--x 1: cannot be. Use 2")

            runtime.first_alone(work)

    assert finished(forked(Script, processes=2, log=tmp_path / "log")) == [2, 2]
    assert (tmp_path / "log").read_text().count("error: --x 1: cannot be. Use 2") == 2


def test_more_processes_than_gpus_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(runtime.Mistake, match="there are 2. Start torchrun with --nproc_per_node=2"):
        runtime.start()


def test_a_run_that_ended_without_its_export_is_exported(world, tmp_path, monkeypatch):
    run = tmp_path / "run"
    args = ["--data", world, *MFPO, "--save_every", 100, "--epochs", 1, "--out", run]
    assert conftest.run_here(monkeypatch, train_mfpo, *args) == 0
    before = weights(run)
    shutil.rmtree(run / "final")
    assert conftest.run_here(monkeypatch, train_mfpo, "--resume", run) == 0
    assert weights(run) == before and len(metrics(run)) == 3


def test_nodes_without_a_shared_file_system_are_told(tmp_path):
    with pytest.raises(runtime.Mistake, match="does not see .*nowhere.*shared file system"):
        runtime.check_shared(tmp_path / "nowhere")


def test_recomputing_runs_the_layers_again():
    calls = []
    other = warmup.build_policy(0)
    other.hf.model.language_model.layers[0].mlp.register_forward_pre_hook(lambda *args: calls.append(1))
    runtime.shard(other, torch.device("cpu"), recompute=True)
    row = data.Row(other.encoding.prompt("What do you see?"), [[7, 8]])
    logp = other.logps(data.pack([row], torch.rand(1, 3, 64, 64)))
    assert len(calls) == 1
    logp.sum().backward()
    assert len(calls) == 2


def test_recomputing_changes_memory_and_not_numbers(world, tmp_path, monkeypatch):
    args = ["--data", world, *MFPO, "--epochs", 1]
    for name, value in (("once", "False"), ("again", "True")):
        assert conftest.run_here(monkeypatch, train_mfpo, *args, "--recompute", value, "--out", tmp_path / name) == 0
    assert weights(tmp_path / "once") == weights(tmp_path / "again")
    losses = [[json.dumps(s["loss"]) for s in metrics(tmp_path / name)] for name in ("once", "again")]
    assert losses[0] == losses[1]


def test_the_same_pass_on_any_number_of_ranks(tmp_path):
    """Shares, batches and the gathering of over_records, with unequal shares."""

    class Script:
        __name__ = "script"

        @staticmethod
        def main():
            runtime.start()
            values = runtime.over_records("x", list(range(7)), 2, lambda some: some, lambda some: [v * v for v in some])
            Path(tmp_path / f"rank{runtime.rank()}").write_text(json.dumps(values))

    assert finished(forked(Script, processes=3, log=tmp_path / "log")) == [0] * 3, (tmp_path / "log").read_text()
    assert [json.loads((tmp_path / f"rank{r}").read_text()) for r in range(3)] == [[v * v for v in range(7)]] * 3
