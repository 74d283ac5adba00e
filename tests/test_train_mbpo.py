"""MBPO's command line: a short run, kill and resume, one process and two, rewards, every mistake a user can make."""

import json
import shutil
import signal
import subprocess
import time

import conftest
import pytest
import torch
from conftest import metrics
from transformers import LlavaForConditionalGeneration

import data
import model
import runtime
import toy
import train_mbpo
import train_mfpo

# 2 pairs and 2 questions a step, in two forward passes.
SMALL = ["--groups_per_step", 4, "--groups_per_gpu", 2, "--group", 4, "--warmup_steps", 1, "--steps", 3,
         "--max_new_tokens", 5, "--log_every", 1]  # fmt: skip
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
    assert all(s["sampler_gap"] < 1e-4 for s in steps)
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
    args = ["--data", mined, "--save_every", 1, "--eval_split", "none", *SMALL, "--steps", 30]
    assert run_here(monkeypatch, *args, "--out", tmp_path / "straight") == 0
    killed = tmp_path / "killed"
    process = subprocess.Popen(command(*args, "--out", killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not (killed / "step_00004").is_dir() and time.time() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
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
    done = subprocess.run(command(*args, "--out", tmp_path / "two", processes=2), capture_output=True, text=True)
    assert (tmp_path / "two" / "final").is_dir(), done.stderr
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
    settings = (policy.tokenizer, policy.template, policy.image_tokens, 999)
    rows = [data.question_row(QUESTION, *settings)]
    (group,), sums = train_mbpo.rollout(policy, policy, [QUESTION], rows, [0], torch.zeros(1, 3, 64, 64), config, 0)
    rewards = [1.5, 0.5, 1.0, 1.0]
    mean, n = sum(rewards) / 4, 4
    std = (sum((r - mean) ** 2 for r in rewards) / n) ** 0.5
    assert group.advantages.tolist() == pytest.approx([(r - mean) / (std + 1e-4) for r in rewards], rel=1e-4)
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
    assert group.advantages.tolist() == [0.0] * 4
    assert sums["unparsed"] == 4 and sums["equal"] == 4 and sums["reward"] == 0


def test_samples_are_scored_under_the_reference(policy):
    config = train_mbpo.Config(group=2, max_new_tokens=3, groups_per_gpu=1)
    other = toy.build_policy(seed=1).eval()
    rows = [data.question_row(QUESTION, policy.tokenizer, policy.template, policy.image_tokens, 999)]
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
    policy = model.load(mined / "base").train()
    loss = 0
    for group in (pair, question):
        advantages = [0.9999, -0.9999] if group is pair else group.advantages.tolist()
        for answer, advantage in zip(group.row.answers, advantages, strict=True):
            batch = data.pack([data.Row(group.row.prefix, [answer])], group.pixels[None])
            logp = policy.logps(batch)[0]
            # The ratio's gradient where it is 1 is that of logp; the KL's is 0 where policy and reference are one.
            loss = loss - advantage * logp.mean() / len(advantages) / 2
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in policy.parameters() if p.grad is not None]).norm().item()
    assert metrics(tmp_path / "run")[0]["gnorm"] == pytest.approx(norm, rel=1e-3)
    # AdamW's first update moves every weight by the learning rate, here a quarter of its peak.
    after = model.load(tmp_path / "run" / "final")
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
    before, after = model.load(mined / "base"), model.load(tmp_path / "run" / "final")
    change = after.hf.model.language_model.layers[0].self_attn.q_proj.weight
    change = change - before.hf.model.language_model.layers[0].self_attn.q_proj.weight
    assert change.abs().max() > 0 and torch.linalg.matrix_rank(change, rtol=1e-3) <= 2
    assert torch.equal(before.hf.lm_head.weight, after.hf.lm_head.weight)


def test_the_reference_of_adapters_is_the_model_without_them(policy, tmp_path):
    model.save(policy, tmp_path / "m")
    config = train_mbpo.Config(group=2, max_new_tokens=3)
    tuned = model.load(tmp_path / "m", lora_rank=2)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if name.endswith("lora_b"):
                parameter.normal_()
    rows = [data.question_row(QUESTION, tuned.tokenizer, tuned.template, tuned.image_tokens, 999)]
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
        (["--convention", "mine"], "--convention 'mine': use one of original, hub"),
        (["--group", "1"], "--group 1: an answer is judged against the others"),
        (["--online_fraction", "1.5"], "--online_fraction 1.5: a share in [0, 1]"),
        (["--online_fraction=-0.1"], "--online_fraction -0.1: a share in [0, 1]"),
        (["--online_fraction", "nan"], "--online_fraction must be a finite number"),
        (["--online_fraction", "0.3"], "the nearest fractions are 0.25 and 0.3125"),
        (["--clip", "0"], "--clip must be positive"),
        (["--kl=-1"], "--kl must not be negative"),
        (["--updates_per_rollout", "0"], "--updates_per_rollout must be positive"),
        (["--groups_per_step", "10", "--groups_per_gpu", "4"], "--groups_per_step 10 does not divide"),
        (["--eval_split", "train"], "use one of test, val, none"),
        (["--grup", "4"], "Did you mean --group?"),
        (["--questions", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--data", "nowhere/other.jsonl"], "nowhere/other.jsonl: no such file"),
        (["--model", "toy", "--data", "."], "holds neither mbpo.jsonl nor the toy world"),
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
        ({"kind": "yesno", "answer": "maybe"}, "must be one of Yes, No, got 'maybe'"),
        ({"kind": "choice", "answer": "E", "choices": ["a", "b"]}, "must be one of A, B, got 'E'"),
        ({"kind": "choice", "answer": "A", "choices": []}, "'choices' has 0 options"),
        ({"kind": "number", "answer": "two"}, "must be one of digits, got 'two'"),
        ({"kind": "word", "answer": "pink", "choices": ["red"]}, "must be one of red, got 'pink'"),
        ({"choices": "red"}, "field 'choices' must be a list of texts"),
        ({"answer": 3}, "field 'answer' must be str"),
        ({"image": "none.png"}, "no such image"),
        ({"question": "<image>?"}, "holds an image token"),
    ],
)
def test_mistakes_in_the_questions(monkeypatch, capsys, mined, tmp_path, change, message):
    lines = (mined / "mbpo_closed.jsonl").read_text().splitlines()
    lines[1] = json.dumps({**json.loads(lines[1]), **change})
    bad = mined / "bad_questions.jsonl"
    bad.write_text("\n".join(lines))
    args = [
        "--data",
        mined,
        "--questions",
        bad,
        "--out",
        tmp_path / "run",
        "--eval_split",
        "none",
        *SMALL,
        "--steps",
        1,
    ]
    told = refused(monkeypatch, capsys, *args)
    assert message in told and str(bad) in told and not (tmp_path / "run").exists()
    assert run_here(monkeypatch, *args, "--skip_bad", "True") == 0
    assert "1 records dropped" in capsys.readouterr().out


def test_a_gradient_that_is_not_finite_stops_before_the_update(monkeypatch, capsys, mined, tmp_path):
    honest = train_mbpo.grpo_loss

    def spoilt(*args):
        loss, clipped, kl = honest(*args)
        return loss * float("nan"), clipped, kl

    monkeypatch.setattr(train_mbpo, "grpo_loss", spoilt)
    told = refused(monkeypatch, capsys, "--data", mined, "--out", tmp_path / "run", "--eval_split", "none", *SMALL)
    assert "step 1: gradient norm nan" in told and told.count("preference-") == 2 and told.count("closed-") == 2
    assert not (tmp_path / "run" / "final").exists()


def test_a_resumed_run_with_other_questions_is_refused(monkeypatch, capsys, mined, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(mined, folder)
    args = ["--data", folder, "--out", tmp_path / "run", "--save_every", 1, "--eval_split", "none", *SMALL]
    assert run_here(monkeypatch, *args) == 0
    lines = (folder / "mbpo_closed.jsonl").read_text().splitlines()
    (folder / "mbpo_closed.jsonl").write_text("\n".join(lines[1:]))
    told = refused(monkeypatch, capsys, "--resume", tmp_path / "run")
    assert runtime.checkpoints(tmp_path / "run")[-1].name in told and "on other records" in told
