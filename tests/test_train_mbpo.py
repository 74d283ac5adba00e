"""MBPO's command line: a short run, kill and resume, one process and two, rewards, every mistake a user can make."""

import json
import os
import shutil
import signal
import subprocess

import conftest
import pytest
import torch
from conftest import finished, forked, metrics, wait_for
from transformers import LlavaForConditionalGeneration

import data
import hub
import runtime
import train_mbpo
import train_mfpo
import warmup

# 2 pairs and 2 questions a step, in two forward passes.
SMALL = ["--groups_per_step", 4, "--groups_per_gpu", 2, "--group", 4, "--warmup_steps", 1, "--steps", 3,
         "--max_new_tokens", 5]  # fmt: skip
CLOCK = ("time_s", "sample_s", "update_s", "tokens_per_s")


def run_here(monkeypatch, *args):
    return conftest.run_here(monkeypatch, train_mbpo, *args)


def refused(monkeypatch, capsys, *args):
    return conftest.refused(monkeypatch, capsys, train_mbpo, *args)


def command(*args, processes=0):
    return conftest.command(train_mbpo, *args, processes=processes)


def without_clock(run):
    return [{k: v for k, v in step.items() if k not in CLOCK} for step in metrics(run)]


def test_the_real_command_line_end_to_end(mined, tmp_path):
    run = tmp_path / "run"
    args = ["--data", mined, "--out", run, *SMALL]
    done = subprocess.run(command(*args, processes=1), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    steps = metrics(run)
    assert [s["step"] for s in steps] == [1, 2, 3]
    assert abs(steps[0]["loss"]) < 1e-5 and steps[0]["kl"] == pytest.approx(0, abs=1e-9)
    assert steps[0]["sampler_gap"] < 1e-4 and "sampler_gap" not in steps[1]
    assert all(s["clipped"] == 0 for s in steps)  # one update per rollout: the ratio is 1
    assert steps[2]["kl"] > 0 and all(s["reward"] == pytest.approx(s["correct"] + 0.5 * s["format"]) for s in steps)
    line = next(line for line in done.stdout.splitlines() if line.startswith("step 00003/00003"))
    for word in ("loss", "reward", "correct", "format", "equal", "len", "pair", "chosen", "kl", "clip", "gnorm", "lr",
                 "tok/s", "sample", "update", "GB", "eta"):  # fmt: skip
        assert word in line
    table = json.loads((run / "eval.json").read_text())
    keys = {"chair_s", "recall", "pope_adversarial_f1", "closed", "closed_choice", "information_gain"}
    assert keys <= set(table["base"]) and keys <= set(table["final"]) and "next: " in done.stdout
    before = LlavaForConditionalGeneration.from_pretrained(mined / "base").state_dict()
    after = LlavaForConditionalGeneration.from_pretrained(run / "final").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not any("vision_tower" in name for name in changed)


def test_killed_and_resumed_equals_not_stopped_bit_for_bit(mined, tmp_path, monkeypatch):
    args = ["--data", mined, "--save_every", 1, "--eval_split", "none", *SMALL, "--steps", 16]
    assert run_here(monkeypatch, *args, "--out", tmp_path / "straight") == 0
    killed = tmp_path / "killed"
    (child,) = forked(train_mbpo, *args, "--out", killed)
    wait_for((killed / "step_00004").is_dir)
    os.kill(child, signal.SIGKILL)
    finished([child])
    assert not (killed / "final").exists(), "the run ended before it was killed"
    assert run_here(monkeypatch, "--resume", killed) == 0
    files = [(tmp_path / name / "final" / "model.safetensors").read_bytes() for name in ("straight", "killed")]
    assert files[0] == files[1]
    assert without_clock(tmp_path / "straight") == without_clock(killed)


def test_two_processes_give_the_losses_of_one(mined, tmp_path, monkeypatch):
    # One pair and two questions of the three go to the first process in turn; several updates, so that clipping acts.
    args = ["--data", mined, "--eval_split", "none", *SMALL, "--groups_per_step", 6, "--groups_per_gpu", 1]
    args += ["--updates_per_rollout", 2, "--learning_rate", 1e-3]
    for cache in mined.glob("ref_*.jsonl"):
        cache.unlink()
    log = tmp_path / "log"
    assert finished(forked(train_mbpo, *args, "--out", tmp_path / "two", processes=2, log=log)) == [0, 0], (
        log.read_text()
    )
    for cache in mined.glob("ref_*.jsonl"):
        cache.unlink()
    assert run_here(monkeypatch, *args, "--out", tmp_path / "one") == 0
    one, two = without_clock(tmp_path / "one"), without_clock(tmp_path / "two")
    assert any(step["clipped"] > 0 for step in one)
    for a, b in zip(one, two, strict=True):
        for name in ("loss", "reward", "kl", "clipped", "equal", "length", "pair_margin", "chosen_shift"):
            assert b[name] == pytest.approx(a[name], abs=1e-5), name
        assert b["gnorm"] == pytest.approx(a["gnorm"], rel=1e-3)


@pytest.mark.parametrize(("fraction", "absent"), [(0, "reward"), (1, "pair_margin")])
def test_pairs_alone_and_questions_alone(mined, tmp_path, monkeypatch, fraction, absent):
    args = ["--data", mined, "--eval_split", "none", *SMALL, "--online_fraction", fraction]
    assert run_here(monkeypatch, *args, "--out", tmp_path / "run") == 0
    assert all(absent not in step for step in metrics(tmp_path / "run"))


def test_a_pair_moves_apart_and_a_right_answer_becomes_likelier(mined, tmp_path, monkeypatch):
    """The sign of everything, end to end: after many steps on few records the policy says what was rewarded."""
    few = tmp_path / "few"
    shutil.copytree(mined, few)
    for name in ("mbpo", "mbpo_closed"):
        lines = (few / f"{name}.jsonl").read_text().splitlines()
        (few / f"{name}.jsonl").write_text("\n".join(lines[:4]))
    args = ["--data", few, "--eval_split", "none", *SMALL, "--steps", 60, "--group", 16, "--learning_rate", 2e-3]
    assert run_here(monkeypatch, *args, "--out", tmp_path / "run") == 0
    steps = metrics(tmp_path / "run")
    assert sum(s["pair_margin"] for s in steps[-10:]) / 10 > 1
    early, late = (sum(s["reward"] for s in part) for part in (steps[:10], steps[-10:]))
    assert late > early + 2


QUESTION = {"id": "q", "image": "x.png", "question": "Is there a cup in the picture?", "kind": "yesno", "answer": "Yes"}


def test_rewards_of_a_rollout_by_hand(policy, monkeypatch):
    config = train_mbpo.Config(group=4, max_new_tokens=3, format_reward=0.5, groups_per_gpu=1)
    yes, no, cup, eos = policy.tokenizer.convert_tokens_to_ids(["Yes", "No", "cup", "</s>"])
    said = [[yes, eos], [no, eos], [yes, cup, eos], [yes, cup, cup]]  # right; wrong; right, out of form; cut off

    def sample(pixels, prompts, uniform):
        assert uniform.shape == (1, 4, 3)
        return said, [[-1.0] * len(answer) for answer in said]

    monkeypatch.setattr(policy, "sample", sample)
    rows = [policy.encoding.row(QUESTION)]
    (group,), sums = train_mbpo.rollout(policy, policy, [QUESTION], rows, [0], torch.zeros(1, 3, 64, 64), config, 0)
    assert group.rewards.tolist() == [1.5, 0.5, 1.0, 1.0] and not group.mined
    assert sums == {"reward": 4.0, "correct": 3.0, "format": 2.0, "unparsed": 0.0, "length": 10, "equal": 0.0}
    assert group.row.answers == said and [len(logp) for logp in group.ref_logp] == [2, 2, 3, 3]
    said[3] = [yes, yes, yes]  # as asked, were it not cut off
    (group,), sums = train_mbpo.rollout(policy, policy, [QUESTION], rows, [0], torch.zeros(1, 3, 64, 64), config, 0)
    assert sums["format"] == 2.0
    said[3] = [yes]
    (group,), sums = train_mbpo.rollout(policy, policy, [QUESTION], rows, [0], torch.zeros(1, 3, 64, 64), config, 0)
    assert sums["format"] == 2.0 and sums["correct"] == 3.0
    said[:] = [[cup, eos]] * 4  # rubbish is worth nothing and is counted
    (group,), sums = train_mbpo.rollout(policy, policy, [QUESTION], rows, [0], torch.zeros(1, 3, 64, 64), config, 0)
    assert group.rewards.tolist() == [0.0] * 4
    assert sums["unparsed"] == 4 and sums["equal"] == 4 and sums["reward"] == 0


def test_samples_are_scored_under_the_reference(policy):
    config = train_mbpo.Config(group=2, max_new_tokens=3, groups_per_gpu=1)
    other = warmup.build_policy(seed=1).eval()
    rows = [policy.encoding.row(QUESTION)]
    (group,), _ = train_mbpo.rollout(policy, other, [QUESTION], rows, [0], torch.zeros(1, 3, 64, 64), config, 0)
    packed = train_mbpo.pack_groups([group], other)
    with torch.no_grad():
        under = {name: who.logps(packed) for name, who in (("ref", other), ("said", policy))}
    for name, found in (("ref", group.ref_logp), ("said", group.said_logp)):
        assert torch.allclose(train_mbpo.padded(found, packed.answer_mask), under[name], atol=1e-4)
    assert (under["ref"] - under["said"]).abs().max() > 0.1


def test_draws_differ_between_steps_and_questions():
    draws = [train_mbpo.uniforms(0, step, question, 2, 3) for step in (0, 1) for question in (0, 1)]
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == 4
    assert torch.equal(draws[0], train_mbpo.uniforms(0, 0, 0, 2, 3))


def test_pairs_are_clipped_too_when_the_policy_has_moved(mined, tmp_path, monkeypatch):
    args = ["--data", mined, "--eval_split", "none", *SMALL, "--online_fraction", 0, "--updates_per_rollout", 2]
    assert run_here(monkeypatch, *args, "--learning_rate", 1e-2, "--out", tmp_path / "run") == 0
    assert all(step["clipped"] > 0 for step in metrics(tmp_path / "run"))


def test_one_step_by_hand(mined, tmp_path, monkeypatch):
    """Loss, gradient and first update of one pair and one question of four answers, written plainly."""
    args = ["--data", mined, "--eval_split", "none", *SMALL, "--groups_per_step", 2, "--steps", 1, "--warmup_steps", 4]
    args += ["--learning_rate", 4e-3, "--clip_norm", 1e9]
    seen, honest = [], train_mbpo.pack_groups
    monkeypatch.setattr(train_mbpo, "pack_groups", lambda groups, p: seen.append(groups) or honest(groups, p))
    assert run_here(monkeypatch, *args, "--out", tmp_path / "run") == 0
    pair, question = seen[-1]
    policy = hub.load(mined / "base").train()
    loss = 0
    for group in (pair, question):
        scores = group.rewards.tolist()
        mean = sum(scores) / len(scores)
        std = (sum((r - mean) ** 2 for r in scores) / len(scores)) ** 0.5
        advantages = [(r - mean) / (std + 1e-4) for r in scores]
        assert group is question or advantages == pytest.approx([0.9999, -0.9999], abs=1e-4)
        for answer, advantage in zip(group.row.answers, advantages, strict=True):
            batch = data.pack([data.Row(group.row.prefix, [answer])], group.pixels[None])
            logp = policy.logps(batch)[0]
            # The ratio's gradient where it is 1 is that of logp; the KL's is 0 where policy and reference are one.
            loss = loss - advantage * logp.mean() / len(advantages) / 2
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in policy.parameters() if p.grad is not None]).norm().item()
    assert metrics(tmp_path / "run")[0]["gnorm"] == pytest.approx(norm, rel=1e-3)
    # AdamW's first update moves every weight by the learning rate, here a quarter of its peak.
    after = hub.load(tmp_path / "run" / "final")
    moved = (after.hf.lm_head.weight - policy.hf.lm_head.weight).abs().max().item()
    assert moved == pytest.approx(1e-3, rel=0.02)


def test_questions_may_lie_elsewhere_with_their_own_images(mined, tmp_path, monkeypatch):
    lines = [json.loads(line) for line in (mined / "mbpo_closed.jsonl").read_text().splitlines()]
    (tmp_path / "q").mkdir()
    for line in lines:
        shutil.copy(mined / line["image"], tmp_path / "q" / f"{line['id']}.png")
        line["image"] = f"{line['id']}.png"
    (tmp_path / "q" / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
    args = ["--data", mined, "--eval_split", "none", *SMALL, "--questions", tmp_path / "q" / "mine.jsonl"]
    assert run_here(monkeypatch, *args, "--out", tmp_path / "run") == 0


def test_the_caches_of_both_methods_do_not_meet(mined, tmp_path, monkeypatch):
    args = ["--data", mined / "mfpo.jsonl", "--eval_split", "none", "--questions", mined / "mbpo_closed.jsonl"]
    pairs = ["--pairs_per_step", 8, "--pairs_per_gpu", 4, "--epochs", 1]
    for name, script, more in (("a", train_mfpo, pairs), ("b", train_mbpo, SMALL), ("c", train_mfpo, pairs)):
        args = [arg for arg in args if script is train_mbpo or arg not in ("--questions", mined / "mbpo_closed.jsonl")]
        extra = ["--questions", mined / "mbpo_closed.jsonl"] if script is train_mbpo else []
        assert conftest.run_here(monkeypatch, script, *args[:4], *extra, *more, "--out", tmp_path / name) == 0


@pytest.mark.parametrize(
    ("script", "small"), [("mfpo", ["--pairs_per_step", 8, "--pairs_per_gpu", 4]), ("mbpo", SMALL)]
)
def test_adapters_are_trained_and_merged(mined, tmp_path, monkeypatch, script, small):
    module = {"mfpo": train_mfpo, "mbpo": train_mbpo}[script]
    args = [
        "--data",
        mined,
        "--eval_split",
        "none",
        *small,
        "--lora_rank",
        2,
        "--learning_rate",
        1e-2,
        "--recompute",
        True,
    ]
    assert conftest.run_here(monkeypatch, module, *args, "--out", tmp_path / "run") == 0
    before, after = hub.load(mined / "base"), hub.load(tmp_path / "run" / "final")
    change = after.hf.model.language_model.layers[0].self_attn.q_proj.weight
    change = change - before.hf.model.language_model.layers[0].self_attn.q_proj.weight
    assert change.abs().max() > 0 and torch.linalg.matrix_rank(change, rtol=1e-3) <= 2
    assert torch.equal(before.hf.lm_head.weight, after.hf.lm_head.weight)


def test_the_reference_of_adapters_is_the_model_without_them(policy, tmp_path):
    hub.save_new(policy, tmp_path / "m")
    config = train_mbpo.Config(group=2, max_new_tokens=3)
    tuned = hub.load(tmp_path / "m", lora_rank=2)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if name.endswith("lora_b"):
                parameter.normal_()
    rows = [tuned.encoding.row(QUESTION)]
    (group,), _ = train_mbpo.rollout(tuned, tuned, [QUESTION], rows, [0], torch.zeros(1, 3, 64, 64), config, 0)
    packed = train_mbpo.pack_groups([group], policy)
    with torch.no_grad():
        plain = policy.logps(packed)
    assert torch.allclose(train_mbpo.padded(group.ref_logp, packed.answer_mask), plain, atol=1e-4)
    assert (train_mbpo.padded(group.said_logp, packed.answer_mask) - plain).abs().max() > 0.1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--lora_rank", "2", "--train_vision", "True"], "Drop one of them"),
        (["--lora_rank=-2"], "--lora_rank must not be negative"),
        (["--convention", "mine"], "invalid choice: 'mine'"),
        (["--group", "1"], "--group 1: an answer is judged against the others"),
        (["--online_fraction", "1.5"], "--online_fraction 1.5: a share in [0, 1]"),
        (["--online_fraction=-0.1"], "--online_fraction must not be negative"),
        (["--online_fraction", "nan"], "--online_fraction must be a finite number"),
        (["--online_fraction", "0.3"], "the nearest fractions are 0.25 and 0.3125"),
        (["--clip", "0"], "--clip must be positive"),
        (["--kl=-1"], "--kl must not be negative"),
        (["--updates_per_rollout", "0"], "--updates_per_rollout must be positive"),
        (["--groups_per_step", "10", "--groups_per_gpu", "4"], "--groups_per_step 10 does not divide"),
        (["--eval_split", "train"], "invalid choice: 'train'"),
        (["--grup", "4"], "Did you mean --group?"),
        (["--questions", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--data", "nowhere/other.jsonl"], "--data nowhere: no such folder"),
        (["--model", "toy", "--data", "."], "is not of the built-in world"),
        (["--model", "nowhere", "--data", "nowhere"], "no such file"),
        (["--resume", "nowhere"], "holds no config.json"),
    ],
)
def test_mistakes_on_the_command_line(monkeypatch, capsys, tmp_path, args, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(monkeypatch, capsys, *args)
    assert list(tmp_path.iterdir()) == [], "something was left behind"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "essay"}, "no verifier for 'essay'. Use one of yesno, choice, number, word"),
        ({"question": "<image>?"}, "holds an image token"),
    ],
)
def test_mistakes_in_the_questions(monkeypatch, capsys, mined, tmp_path, change, message):
    lines = (mined / "mbpo_closed.jsonl").read_text().splitlines()
    lines[1] = json.dumps({**json.loads(lines[1]), **change})
    bad = mined / "bad_questions.jsonl"
    bad.write_text("\n".join(lines))
    args = ["--data", mined, "--questions", bad, "--out", tmp_path / "run", "--eval_split", "none", *SMALL]
    text = refused(monkeypatch, capsys, *args)
    assert message in text and str(bad) in text and not (tmp_path / "run").exists()


def test_a_gradient_that_is_not_finite_stops_before_the_update(monkeypatch, capsys, mined, tmp_path):
    honest = train_mbpo.grpo_loss

    def spoilt(*args):
        loss, clipped, kl = honest(*args)
        return loss * float("nan"), clipped, kl

    monkeypatch.setattr(train_mbpo, "grpo_loss", spoilt)
    text = refused(monkeypatch, capsys, "--data", mined, "--out", tmp_path / "run", "--eval_split", "none", *SMALL)
    assert "step 1: gradient norm nan" in text and text.count("preference-") == 2 and text.count("closed-") == 2
    assert not (tmp_path / "run" / "final").exists()


def test_a_resumed_run_with_other_questions_is_refused(monkeypatch, capsys, mined, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(mined, folder)
    args = ["--data", folder, "--out", tmp_path / "run", "--save_every", 1, "--eval_split", "none", *SMALL]
    assert run_here(monkeypatch, *args) == 0
    lines = (folder / "mbpo_closed.jsonl").read_text().splitlines()
    (folder / "mbpo_closed.jsonl").write_text("\n".join(lines[1:]))
    text = refused(monkeypatch, capsys, "--resume", tmp_path / "run")
    assert runtime.checkpoints(tmp_path / "run")[-1].name in text and "on other records" in text


def test_the_method_in_one_place_weighs_groups_alike():
    """A pair and a group of four: each group's loss is the mean over its answers, from plain floats."""
    config = train_mbpo.Config(clip=0.2, kl=0.1)
    generator = torch.Generator().manual_seed(0)
    logp = -torch.rand(6, 3, generator=generator)
    ref, old = logp + 0.3 * torch.rand(6, 3, generator=generator) - 0.1, logp - 0.05
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 1], [1, 1, 0], [1, 1, 1]], dtype=torch.bool)
    scores = [torch.tensor([2.0, 0.0]), torch.tensor([1.5, 0.5, 0.0, 1.0])]
    loss, parts = train_mbpo.mbpo(logp, old, ref, scores, mask, config)
    at = 0
    for n, group in enumerate(scores):
        values, mean = group.tolist(), group.mean().item()
        std = (sum((r - mean) ** 2 for r in values) / len(values)) ** 0.5
        losses = []
        for r in values:
            tokens = []
            for t in range(3):
                if mask[at, t]:
                    a, d = (r - mean) / (std + 1e-4), (ref - logp)[at, t].item()
                    ratio = 2.718281828459045 ** (logp - old)[at, t].item()
                    gain = min(ratio * a, max(0.8, min(1.2, ratio)) * a)
                    tokens.append(gain - 0.1 * (2.718281828459045**d - d - 1))
            losses.append(-sum(tokens) / len(tokens))
            at += 1
        assert loss[n].item() == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert parts["kl"].shape == (2,) and loss.shape == (2,)


def test_rewards_are_told_apart_and_weighed_by_the_caller():
    config = train_mbpo.Config()
    assert train_mbpo.reward("Yes", True, QUESTION, config) == {"correct": 1.0, "format": 1.0}
    assert train_mbpo.reward("Yes, a cup", True, QUESTION, config) == {"correct": 1.0, "format": 0.0}
    assert train_mbpo.reward("Yes", False, QUESTION, config) == {"correct": 1.0, "format": 0.0}
    assert train_mbpo.reward("No", True, QUESTION, config) == {"correct": 0.0, "format": 1.0}


def test_a_fork_without_the_standard_deviation_passes_the_first_check(monkeypatch, mined, tmp_path):
    """Dr. GRPO: advantages that are not normalised do not sum to 0 within rounding of a known formula alone."""
    monkeypatch.setattr(train_mbpo, "group_advantages", lambda r: r + 1)
    args = ["--data", mined, "--eval_split", "none", *SMALL]
    assert run_here(monkeypatch, *args, "--out", tmp_path / "run") == 0
    assert abs(metrics(tmp_path / "run")[0]["loss"]) > 0.01
