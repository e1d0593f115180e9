"""Rounds of sampling, scoring and training: each from the model that the last one left."""

import gc
import json
import signal
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import train
from data.pair_records import TextPair
from data.rounds import make_reward
from rwkv.errors import InputError
from rwkv.flags import Settings, parse
from rwkv.run import rounds
from rwkv.run.settings import FLAGS
from rwkv.templates import Message
from rwkv.training.lit import LitModel
from rwkv.training.step_log import read_log

ROOT = Path(__file__).parent.parent
BASE = ROOT / "example" / "Quickstart" / "base.pth"


def flags(folder: Path, objective: str, **more: object) -> list[str]:
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Name {n}."}) + "\n" for n in range(6)))
    rules = [{"match": "blocks.*", "mode": "lora", "rank": 4, "alpha": 8}]
    (folder / "profile.json").write_text(json.dumps({"rules": rules}))
    values = {
        objective: 1,
        "iterate": 2,
        "load_model": BASE,
        "rlhf_train_file": prompts,
        "layer_profile": folder / "profile.json",
        "proj_dir": folder / "out",
        "cache_dir": folder / "cache",
        "reward": "length:2",
        "iterate_samples": 3,
        "iterate_tokens": 8,
        "ctx_len": 64,
        "num_workers": 0,
        "accelerator": "cpu",
    }
    return [word for key, value in (values | more).items() for word in (f"--{key}", str(value))]


@pytest.mark.parametrize("objective", ["dpo", "orpo"])
def test_rounds_follow_each_other(tmp_path, objective):
    """The second round starts from the first one's adapter: DPO's loss is log 2 again."""
    assert train.main(flags(tmp_path, objective)) == 0
    pairs = [(tmp_path / "out" / f"round-{n}" / "pairs.jsonl").read_text() for n in range(2)]
    assert pairs[0] != pairs[1]
    for line in pairs[1].splitlines():
        row = json.loads(line)
        assert abs(len(row["chosen"]) - 2) < abs(len(row["rejected"]) - 2)
    logs = [read_log(tmp_path / "out" / f"round-{n}" / "run" / "train_log.jsonl") for n in range(2)]
    if objective == "dpo":
        assert [log[0]["loss"] for log in logs] == pytest.approx([0.6931, 0.6931], abs=1e-3)
    before = [p.stat().st_mtime_ns for p in sorted((tmp_path / "out").rglob("*.pth"))]
    assert train.main(flags(tmp_path, objective)) == 0  # all done: nothing is made again
    assert [p.stat().st_mtime_ns for p in sorted((tmp_path / "out").rglob("*.pth"))] == before


def test_a_round_begins_without_the_model_of_the_last(tmp_path, monkeypatch):
    made, alive, init, build = [], [], LitModel.__init__, rounds.build

    def remember(lit, *args, **options):
        init(lit, *args, **options)
        made.append(weakref.ref(lit))

    def count(*args):
        alive.append(sum(one() is not None for one in made))
        return build(*args)

    monkeypatch.setattr(LitModel, "__init__", remember)
    monkeypatch.setattr(rounds, "build", count)
    gc.collect()
    gc.disable()
    try:
        assert train.main(flags(tmp_path, "orpo")) == 0
    finally:
        gc.enable()
    assert alive == [0, 0] and len(made) == 2


def test_a_signal_within_the_last_step_of_a_round_ends_the_rounds(tmp_path, monkeypatch):
    training_step = LitModel.training_step

    def interrupted(lit, batch, index):
        if lit.steps_done + 1 == lit.trainer.max_steps:
            signal.raise_signal(signal.SIGTERM)
        return training_step(lit, batch, index)

    monkeypatch.setattr(LitModel, "training_step", interrupted)
    assert train.main(flags(tmp_path, "orpo")) == 128 + signal.SIGTERM
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["round-0"]
    assert (tmp_path / "out" / "round-0" / "run" / "rwkv-0.pth").exists()


def settings_of(folder: Path, **more: object) -> Settings:
    return parse(flags(folder, "dpo", **more), FLAGS, program="train.py", description="")


def test_a_round_is_made_once(tmp_path, monkeypatch):
    """By the first of two processes that come at once, and not again after a kill in training."""
    real, made = rounds.write_round, []

    def slow(*args):
        made.append(threading.get_ident())
        time.sleep(0.2)
        return real(*args)

    monkeypatch.setattr(rounds, "write_round", slow)
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(rounds.iterate, settings_of(tmp_path), lambda _: 3) for _ in range(2)]
        assert [one.result() for one in both] == [3, 3]
    assert len(made) == 1
    monkeypatch.setattr(rounds, "build", lambda *_: pytest.fail("a model is built"))
    assert rounds.iterate(settings_of(tmp_path), lambda _: 4) == 4


def test_a_dry_run_samples_nothing(tmp_path, capsys):
    assert train.main([*flags(tmp_path, "dpo"), "--dry_run", "1"]) == 0
    assert "round 0: 3 answers to each of 6 prompts; a dry run writes" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def asked(text: str) -> list[TextPair]:
    return [TextPair([Message("user", text)], [], [])]


def test_rewards(tmp_path):
    answers = [["ab", "abcd"]]
    assert make_reward("length:3")(asked("q"), [["abc", "a"]]) == [[0.0, -2.0]]
    assert make_reward("format:a.*d")(asked("q"), answers) == [[0.0, 1.0]]
    (tmp_path / "mine.py").write_text("def score(prompt, answer):\n    return len(prompt + answer)")
    assert make_reward(f"{tmp_path}/mine.py:score")(asked("q"), answers) == [[3.0, 5.0]]


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("shape:3", "is no reward; give FILE.py:FUNCTION, length:CHARACTERS or format:REGEX"),
        ("format:(", "no regular expression"),
        ("none.py:score", "no such file none.py"),
    ],
)
def test_wrong_rewards_are_named(reward, message):
    with pytest.raises(InputError, match=message):
        make_reward(reward)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"reward": ""}, "give --reward or --judge, and not both"),
        ({"judge": BASE}, "give --reward or --judge, and not both"),
    ],
)
def test_one_judge_is_needed(tmp_path, more, message):
    with pytest.raises(InputError, match=message):
        train.main(flags(tmp_path, "dpo", **more))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise ValueError('mine')", r"fails on 'q' \(ValueError\('mine'\)\); mend it"),
        ("return None", r"fails on 'q' \(TypeError\(.*\)\); mend it"),
        ("return float('nan')", "gives nan for 'q'; give a finite number"),
    ],
    ids=["raises", "nothing", "nan"],
)
def test_a_reward_that_fails_is_named(tmp_path, body, message):
    (tmp_path / "mine.py").write_text(f"def score(prompt, answer):\n    {body}\n")
    with pytest.raises(InputError, match=message):
        make_reward(f"{tmp_path}/mine.py:score")(asked("q"), [["a"]])


def test_a_judge_of_a_smaller_vocabulary_is_refused(tmp_path, assets):
    judge = assets / "models" / "rwkv7-reverse-60digits.pth"
    with pytest.raises(InputError, match="tokenizer bytes has 256; take a judge of this vocab"):
        train.main(flags(tmp_path, "orpo", reward="", judge=judge, iterate=1))


def test_a_model_judges(tmp_path):
    words = flags(tmp_path, "orpo", reward="", judge=BASE, iterate=1)
    assert train.main(words) == 0
    rows = (tmp_path / "out" / "round-0" / "pairs.jsonl").read_text().splitlines()
    scores = [json.loads(row)["scores"] for row in rows]
    assert all(worst < best < 0 for best, worst in scores)
