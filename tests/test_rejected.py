"""Rejected answers: sampled wide, the same however they are batched, gone on with after a kill."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from data import make_rejected
from data.pair_records import parse_pair, parse_prompt
from data.records import DataError
from rwkv.errors import InputError
from rwkv.generate import Continuation
from rwkv.training.step_log import read_log

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "example" / "Quickstart" / "base.pth"
ROWS = [
    {"prompt": f"Describe a {thing}.", "chosen": f"This is the {thing}.", "reject": ""}
    for thing in ("red door", "blue cup", "new key", "old coat", "soft bag")
]


def words(tmp_path: Path, output: str | Path, **more: object) -> list[str]:
    source = tmp_path / "prompts.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    values = {
        "input": source,
        "output": tmp_path / output if isinstance(output, str) else output,
        "load_model": MODEL,
        "tokens": 12,
        "samples": 2,
        "top_p": 0.9,
        "batch_size": 4,
    }
    return [word for key, value in (values | more).items() for word in (f"--{key}", str(value))]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rejected")
    assert make_rejected.main(words(folder, "whole.jsonl")) == 0
    return folder / "whole.jsonl"


def test_each_prompt_gets_its_answers(whole):
    rows = lines(whole)
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in ROWS for _ in range(2)]
    assert all(row["rejected"] and row["rejected"] != row["chosen"] for row in rows)


def test_batch_size_changes_nothing(whole, tmp_path):
    make_rejected.main(words(tmp_path, "one.jsonl", batch_size=1))
    assert lines(tmp_path / "one.jsonl") == lines(whole)


def test_another_seed_gives_other_answers(whole, tmp_path):
    make_rejected.main(words(tmp_path, "other.jsonl", seed=7))
    assert lines(tmp_path / "other.jsonl") != lines(whole)


def test_a_stopped_command_goes_on(tmp_path, monkeypatch):
    """What was finished is not sampled again, and the file is that of an uninterrupted command."""
    monkeypatch.setattr(make_rejected, "PROMPTS_A_PART", 2)
    make_rejected.main(words(tmp_path, "a.jsonl"))
    expected = lines(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").unlink()
    sample, calls = make_rejected.sample_answers, []

    def stopping(*arguments, **more):
        calls.append(len(arguments[1]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return sample(*arguments, **more)

    monkeypatch.setattr(make_rejected, "sample_answers", stopping)
    with pytest.raises(KeyboardInterrupt):
        make_rejected.main(words(tmp_path, "a.jsonl"))
    make_rejected.main(words(tmp_path, "a.jsonl"))
    assert calls == [2, 2, 2, 1]
    assert lines(tmp_path / "a.jsonl") == expected
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "prompts.jsonl"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"samples": 0}, "--samples 0: needs to be at least 1"),
        ({"output": Path("a.csv")}, r"--output a\.csv: is no \.jsonl file"),
    ],
)
def test_wrong_flags_are_named(tmp_path, more, message):
    with pytest.raises(InputError, match=message):
        make_rejected.main(words(tmp_path, **{"output": "a.jsonl"} | more))


def test_a_file_without_records_is_named(tmp_path):
    arguments = words(tmp_path, "a.jsonl")
    (tmp_path / "prompts.jsonl").write_text("\n")
    with pytest.raises(InputError, match=r"prompts\.jsonl: has no records"):
        make_rejected.main(arguments)
    assert not (tmp_path / "a.jsonl").exists()


def test_answers_may_hold_unicode_line_ends(tmp_path):
    arguments = words(tmp_path, "a.jsonl")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "q", "chosen": "one\u2028two"}\n')
    make_rejected.main(arguments)
    with (tmp_path / "a.jsonl").open() as file:
        assert {json.loads(line)["chosen"] for line in file} == {"one\u2028two"}


def test_a_record_without_a_good_answer_is_named(tmp_path):
    arguments = words(tmp_path, "a.jsonl")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "q"}\n')
    with pytest.raises(DataError, match=r"prompts\.jsonl:1: has no good answer; needs prompt and"):
        make_rejected.main(arguments)


def thinking(content: str, thought: str, **more: object) -> dict:
    return {"role": "assistant", "content": content, "reasoning_content": thought, **more}


def test_thoughts_and_weights_are_written_again():
    """Those of the chosen answer, of earlier turns, and the record's own weight."""
    asked = [
        {"role": "user", "content": "2+2?"},
        thinking("5", "Hm.", weight=0),
        {"role": "user", "content": "Sure?"},
    ]
    record = {"prompt": asked, "chosen": [thinking("4", "2 and 2.")], "weight": 0.5}
    line = make_rejected.pair_line(parse_prompt(record, "f:1"), "5", ended=True)
    assert line == record | {"rejected": "5", "ended": True}
    assert parse_pair(line, "f:1").chosen == parse_prompt(record, "f:1").chosen


@pytest.mark.parametrize(
    ("template", "kept"),
    [("world", ["<think>\nT\n</think>\nA"]), ("g1", ["A"])],
)
def test_answers_are_compared_as_the_template_writes_them(tmp_path, monkeypatch, template, kept):
    """With their thoughts, where the template has marks for them."""
    sampled = [Continuation([], text, True) for text in ("A", "<think>\nT\n</think>\nA")]
    monkeypatch.setattr(make_rejected, "sample_answers", lambda *_, **__: [sampled])
    arguments = words(tmp_path, "a.jsonl", template=template)
    record = {"prompt": "q", "chosen": [thinking("A", "T")]}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(record) + "\n")
    make_rejected.main(arguments)
    assert [row["rejected"] for row in lines(tmp_path / "a.jsonl")] == kept


@pytest.mark.parametrize("name", ["DPO", "ORPO"])
def test_the_examples_steps_run(tmp_path, name):
    """Three scripts in their order, on few rows: pairs, a trained adapter, a merged model."""
    environment = {**os.environ, "OUT": str(tmp_path / "out"), "OMP_NUM_THREADS": "1"}
    scripts = sorted((ROOT / "example" / name).glob("step-*.sh"))
    assert len(scripts) == 3
    arguments = {0: ["--rows", "12", "--held_out", "4"], 2: ["--num_workers", "0"]}
    for number, script in enumerate(scripts):
        done = subprocess.run(
            ["bash", script, *arguments.get(number, [])],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "out" / "merged.pth").exists()
    log = read_log(tmp_path / "out" / "run" / "train_log.jsonl")
    assert "val_rewards/accuracies" in log[-1]
