"""Scores by hand and against the oracle, packing, masks, files and the command."""

import gzip
import json
import math

import pytest
import torch
from oracle import Oracle, random_tensors

from rwkv.checkpoint import load_model, write_tensors
from rwkv.errors import InputError
from rwkv.score import Score, Text, add, main, read_records, score_texts, text_of
from rwkv.templates import TEMPLATES
from rwkv.tokenizer import load_tokenizer

BYTES = load_tokenizer("bytes")
DIGITS = load_tokenizer("chars:0123456789,#")
LONG = "The quick brown fox jumps over the lazy dog. " * 3
TEXTS = [Text(BYTES.encode(text), [True] * len(text)) for text in ("one", LONG, "x", "two three")]


@pytest.fixture
def model_file(tmp_path):
    tensors = random_tensors(7, V=256)
    write_tensors(tmp_path / "m.pth", {name: torch.from_numpy(t) for name, t in tensors.items()})
    return tmp_path / "m.pth"


def test_the_loss_is_the_oracles(model_file):
    found = score_texts(load_model(model_file), TEXTS, BYTES)
    oracle = Oracle(random_tensors(7, V=256))
    for text, score in zip(TEXTS, found, strict=True):
        scored = len(text.tokens) - 1
        assert (score.tokens, score.bytes) == (scored, scored)
        if scored:
            assert score.loss / scored == pytest.approx(oracle.loss(text.tokens), rel=1e-5)


@pytest.mark.parametrize("piece", [1, 7, 10_000])
def test_pieces_and_packing_change_no_score(model_file, monkeypatch, piece):
    model = load_model(model_file)
    want = [score_texts(model, [text])[0] for text in TEXTS]
    monkeypatch.setattr("rwkv.score.MAX_LOGITS", 3 * 256)
    for got, alone in zip(score_texts(model, TEXTS, piece=piece), want, strict=True):
        assert got.loss == pytest.approx(alone.loss, rel=1e-5)
        assert got[1:] == alone[1:]


def test_masked_tokens_are_read_but_not_counted(model_file):
    model = load_model(model_file)
    tokens = BYTES.encode("question answer")
    mask = [False] * 9 + [True] * 6
    part = score_texts(model, [Text(tokens, mask)])[0]
    whole = score_texts(model, [Text(tokens, [True] * 15)])[0]
    first = score_texts(model, [Text(tokens[:9], [True] * 9)])[0]
    assert part.tokens == 6
    assert part.loss == pytest.approx(whole.loss - first.loss, rel=1e-5)
    assert score_texts(model, [Text(tokens, [True] + [False] * 14)])[0] == Score()


def test_a_model_that_knows_nothing_needs_eight_bits_a_byte(tmp_path):
    tensors = random_tensors(7, V=256)
    tensors["head.weight"][:] = 0
    write_tensors(tmp_path / "m.pth", {name: torch.from_numpy(t) for name, t in tensors.items()})
    summary = add(score_texts(load_model(tmp_path / "m.pth"), TEXTS, BYTES)).summary()
    assert summary["loss"] == pytest.approx(math.log(256))
    assert summary["perplexity"] == pytest.approx(256)
    assert summary["bits_per_byte"] == pytest.approx(8)


def test_nothing_to_score_is_named():
    with pytest.raises(InputError, match="the texts have no token to score; give longer ones"):
        Score().summary()


@pytest.mark.parametrize(
    "record, text, scored",
    [
        ("ab", "\0ab", "ab"),
        ({"text": "ab"}, "\0ab", "ab"),
        ({"prompt": "q", "completion": "a"}, "User: q\n\nAssistant: a\n\n\0", " a\n\n\0"),
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
            "User: q\n\nAssistant: a\n\n\0",
            " a\n\n\0",
        ),
    ],
    ids=["string", "text", "prompt and completion", "messages"],
)
def test_records(record, text, scored):
    found = text_of(record, "f:1", BYTES, TEMPLATES["world"])
    assert bytes(found.tokens).decode() == text
    chosen = [token for token, s in zip(found.tokens, found.scored, strict=True) if s]
    assert bytes(chosen).decode() == scored


def test_without_an_end_of_text_the_first_token_is_given():
    found = text_of("12", "f:1", DIGITS, TEMPLATES["plain"])
    assert found == Text([1, 2], [True, True])


@pytest.mark.parametrize(
    "record, message",
    [
        (3, "f:1: has nothing to score; needs a string, 'text', 'prompt' and 'completion', or"),
        ({"prompt": "q"}, "f:1: has nothing to score; needs a string"),
        ({"messages": [{"role": "user"}]}, "f:1: 'messages' is no dialogue; write a list of"),
        ({"prompt": 1, "completion": "a"}, "f:1: 'messages' is no dialogue; write a list of"),
        ("x", "f:1: the character 'x' is not in --tokenizer chars:0123456789,#"),
    ],
)
def test_records_that_cannot_be_scored_are_named(record, message):
    with pytest.raises(InputError, match=message):
        text_of(record, "f:1", DIGITS, TEMPLATES["plain"])


def test_files(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo")
    (tmp_path / "a.jsonl").write_text('"one"\n\n{"text": "two"}\n')
    (tmp_path / "a.json").write_text('["one", {"text": "two"}]')
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'"one"\n'))
    assert list(read_records(tmp_path / "a.txt")) == [(str(tmp_path / "a.txt"), "one\ntwo")]
    two = ["one", {"text": "two"}]
    lines = list(read_records(tmp_path / "a.jsonl"))
    assert [record for _, record in lines] == two and lines[1][0].endswith("a.jsonl:3")
    assert [record for _, record in read_records(tmp_path / "a.json")] == two
    assert [record for _, record in read_records(tmp_path / "a.jsonl.gz")] == ["one"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", b"x", "a.csv: unknown kind of file; give .txt, .jsonl or .json"),
        ("a.jsonl", b'"one"\n{', r"a.jsonl:2: not JSON \(Expecting property name"),
        ("a.json", b'{"text": "x"}', "a.json: is no list of records; write it as .jsonl"),
        ("a.txt", b"one\n\xff", r"a.txt:2: not UTF-8 \(byte 0xff\); save the file as UTF-8"),
        ("a.txt.gz", b"nothing", "a.txt.gz: not a whole gzip file"),
        ("b.txt", None, "b.txt: no such file; check the path"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        list(read_records(tmp_path / name))


def test_the_command_prints_json(assets, tmp_path, capsys):
    """The trained model reverses numbers, so answers cost nothing and prompts are not counted."""
    model = assets / "models" / "rwkv7-reverse-60digits.pth"
    path = tmp_path / "pairs.jsonl"
    path.write_text(
        "".join(
            json.dumps({"prompt": f"{n},", "completion": f"{str(n)[::-1]}#"}) + "\n"
            for n in (123, 4567, 89012)
        )
    )
    flags = ["--load_model", str(model), "--tokenizer", DIGITS.name, "--data", str(path)]
    assert main(flags) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["texts"], found["tokens"], found["bytes"]) == (3, 15, 15)
    assert found["token_accuracy"] == 1 and found["loss"] < 1e-3
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["bits_per_byte"] == pytest.approx(found["loss"] / math.log(2))
    assert main([*flags, "--limit", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 4
    with pytest.raises(InputError, match="--limit 0: needs to be at least 1"):
        main([*flags, "--limit", "0"])
