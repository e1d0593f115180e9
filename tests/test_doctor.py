"""The doctor finds what is wrong with a preference file and writes a good one."""

import json
from pathlib import Path

import pytest

from data import doctor
from data.records import DataError
from data.upstream_pairs import NO_REFERENCE, TokenPair, read_save, write_save
from rwkv.errors import InputError
from rwkv.tokenizer import load_tokenizer


def write(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def good(n: int, chosen: str = "Yes, it is.", rejected: str = "No, not it.") -> dict:
    return {"prompt": f"Is {n} odd?", "chosen": chosen, "rejected": rejected}


def test_a_good_file_has_no_problem(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", [good(n) for n in range(12)])
    assert doctor.main([str(path)]) == 0
    assert "no problem found" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        (good(0), "that repeat an earlier one (at 13)"),
        (good(50, "same.", "same."), "1 record whose answers are equal (at 13)"),
        (good(50, chosen=" "), "1 record cannot be read: 13: 'chosen' is empty"),
        ({"prompt": "q", "chosen": "a"}, "1 record cannot be read: line 13: has 'prompt', 'chos"),
    ],
)
def test_one_bad_record_is_found_and_left_out(tmp_path, capsys, record, problem):
    path = write(tmp_path / "a.jsonl", [*(good(n) for n in range(12)), record])
    assert doctor.main([str(path)]) == 1
    problem = problem.replace("read: 13:", "read: line 13:")
    assert problem in capsys.readouterr().out
    fixed = tmp_path / "good.jsonl"
    assert doctor.main([str(path), "--fix", str(fixed)]) == 0
    assert len(fixed.read_text().splitlines()) == 12
    assert doctor.main([str(fixed)]) == 0


def test_answers_that_differ_in_their_thought_are_two(tmp_path):
    rows = [good(n) for n in range(12)]
    sides = {
        name: [{"role": "assistant", "content": "Yes, it is.", "reasoning_content": thought}]
        for name, thought in (("chosen", "It ends in 1."), ("rejected", "It is small."))
    }
    path = write(tmp_path / "a.jsonl", [*rows, good(50) | sides])
    assert doctor.examine(path).drop == {}
    path = write(tmp_path / "b.jsonl", [*rows, good(50) | sides | {"rejected": sides["chosen"]}])
    assert doctor.examine(path).drop == {12: "whose answers are equal"}


def test_whole_dialogues_are_kept(tmp_path):
    rows = []
    for n in range(12):
        question = {"role": "user", "content": good(n)["prompt"]}
        sides = {
            name: [question, {"role": "assistant", "content": good(n)[name]}]
            for name in ("chosen", "rejected")
        }
        rows.append({"prompt": good(n)["prompt"]} | sides)
    assert doctor.main([str(write(tmp_path / "a.jsonl", rows))]) == 0


def test_length_that_tells_chosen_from_rejected(tmp_path):
    rows = [good(n, "Yes, it is odd, as you can see.", "No.") for n in range(12)]
    findings = doctor.examine(write(tmp_path / "a.jsonl", rows))
    assert any("chosen is the longer answer in 100%" in text for text in findings.problems)


def test_answers_without_an_end(tmp_path):
    rows = [good(n, "Yes, it is odd, as you.") for n in range(8)]
    rows += [good(n, "Yes, it is odd, as you can") for n in range(8, 12)]
    findings = doctor.examine(write(tmp_path / "a.jsonl", rows))
    assert any("4 of 12 chosen answers look cut off" in text for text in findings.problems)


def test_csv_gets_the_usual_column(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,chosen,reject\nq,good.,bad.\nq,good.,bad.\n")
    fixed = tmp_path / "good.jsonl"
    doctor.main([str(path), "--fix", str(fixed)])
    assert [json.loads(line) for line in fixed.read_text().splitlines()] == [
        {"prompt": "q", "chosen": "good.", "rejected": "bad."}
    ]


def token_pairs(score) -> list[TokenPair]:
    made = []
    for n in range(1, 13):
        chosen, rejected = [5] * n + [0], [6] * (14 - n) + [0]
        made.append(TokenPair([1, n], chosen, rejected, score(chosen), score(rejected)))
    return made


@pytest.mark.parametrize(
    ("score", "words"),
    [
        (lambda answer: -0.8 * len(answer), "reference scores are SUMS"),
        (lambda answer: -0.8 - 0.01 * len(answer) % 0.03, "reference scores are averages"),
        (lambda answer: NO_REFERENCE, None),
    ],
    ids=["sums", "averages", "none"],
)
def test_reference_scores_are_told_apart(tmp_path, score, words):
    write_save(tmp_path / "a.save", token_pairs(score))
    findings = doctor.examine(tmp_path / "a.save", "bytes")
    found = [text for text in findings.problems if text.startswith("reference")]
    assert len(found) == (words is not None)
    assert words is None or found[0].startswith(words)


def test_upstreams_sample(assets, tmp_path):
    """Its scores are sums; pairs start up to 6.9 logits from where they belong."""
    path = assets / "upstream" / "dpo_example.save"
    findings = doctor.examine(path)
    found = [text for text in findings.problems if text.startswith("reference scores are SUMS")]
    assert "pairs start -3.7 to +6.9 from where they belong" in found[0]
    assert doctor.main([str(path), "--fix", str(tmp_path / "good.save")]) == 0
    kept = list(read_save(tmp_path / "good.save", load_tokenizer("world")))
    assert len(kept) == 40
    assert {pair.ref_chosen for pair in kept} == {NO_REFERENCE}


@pytest.mark.parametrize("text", ["not a record\n", "\n"], ids=["none that can be read", "none"])
def test_a_file_without_a_good_record_is_not_mended(tmp_path, text):
    (tmp_path / "a.jsonl").write_text(text)
    assert doctor.main([str(tmp_path / "a.jsonl")]) == 1
    with pytest.raises(InputError, match="good.jsonl: not written, for no record can be trained"):
        doctor.main([str(tmp_path / "a.jsonl"), "--fix", str(tmp_path / "good.jsonl")])
    assert not (tmp_path / "good.jsonl").exists()


def test_the_ending_of_a_fixed_file_is_checked(tmp_path):
    path = write(tmp_path / "a.jsonl", [good(1)])
    with pytest.raises(InputError, match=r"--fix .*a\.save: needs the ending \.jsonl"):
        doctor.main([str(path), "--fix", str(tmp_path / "a.save")])


def test_a_file_is_not_mended_in_place(tmp_path):
    path = write(tmp_path / "a.jsonl", [good(1), good(1)])
    before = path.read_bytes()
    with pytest.raises(InputError, match="is the file itself; choose another name"):
        doctor.main([str(path), "--fix", str(path)])
    assert path.read_bytes() == before


def test_mending_writes_over_no_file(tmp_path, capsys):
    """Said before the file is looked at."""
    path, other = write(tmp_path / "a.jsonl", [good(1), good(1)]), tmp_path / "other.jsonl"
    other.write_text("mine")
    with pytest.raises(InputError, match=r"--fix .*other\.jsonl: exists; remove it or choose"):
        doctor.main([str(path), "--fix", str(other)])
    assert other.read_text() == "mine"
    assert capsys.readouterr().out == ""


def test_what_is_no_preference_file_is_said(tmp_path):
    (tmp_path / "a.save").write_bytes(b"nothing")
    with pytest.raises(DataError, match="holds pickled code or is damaged"):
        doctor.examine(tmp_path / "a.save")
