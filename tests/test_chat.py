"""Chat: what the model reads equals training's tokens; turns, commands, pipes."""

import json
import subprocess
import sys

import pytest
import torch
from oracle import random_tensors

from rwkv.chat import Chat, converse, main
from rwkv.checkpoint import load_model, read_metadata, read_tensors, write_tensors
from rwkv.decoder import Picker
from rwkv.errors import InputError
from rwkv.model import RWKV
from rwkv.names import ROOT
from rwkv.reading import read_to_the_end
from rwkv.runner import load_state
from rwkv.sampling_flags import Sampling
from rwkv.templates import TEMPLATES, Message, encode_segments, load_template
from rwkv.tokenizer import load_tokenizer

BYTES = load_tokenizer("bytes")


@pytest.fixture
def model(tmp_path) -> RWKV:
    tensors = random_tensors(7, V=256)
    write_tensors(tmp_path / "m.pth", {name: torch.from_numpy(t) for name, t in tensors.items()})
    return load_model(tmp_path / "m.pth")


@pytest.fixture
def scripted(monkeypatch):
    """Let the model write the given bytes instead of what it would."""

    def script(text: bytes) -> None:
        rest = iter(text)
        monkeypatch.setattr(Picker, "pick", lambda self, hidden: torch.tensor([next(rest)]))

    return script


def talk(chat: Chat, *said: str) -> list[str]:
    return ["".join(chat.say(text)) for text in said]


def assert_read(chat: Chat, tokens: list[int]) -> None:
    """The chat's state is that of exactly these tokens."""
    _, want = read_to_the_end(chat.model, [tokens])
    for got, layer in zip(chat._stream.settle(), want, strict=True):
        torch.testing.assert_close(tuple(got), tuple(layer), rtol=1e-4, atol=1e-5)


DIALOGUE = [
    Message("system", "Be brief."),
    Message("user", "Hello?"),
    Message("assistant", "Hi"),
    Message("user", "And\n\nnow"),
    Message("assistant", "Bye"),
]
ANSWERS = {
    "suffix": b" Hi\n\n Bye\n\n",
    "eot": b" Hi\x00 Bye\x00",
    "both": b" Hi\n\n Bye\n\n",
}


@pytest.mark.parametrize("turn_end", ANSWERS)
def test_the_model_reads_what_training_would(model, scripted, turn_end):
    """Each way to end a turn; the state after two turns is that of the dialogue's tokens."""
    template = load_template("world", BYTES, turn_end)
    chat = Chat(model, BYTES, template, system="Be brief.")
    scripted(ANSWERS[turn_end])
    assert talk(chat, "Hello?", "And\n\nnow") == ["Hi", "Bye"]
    assert chat.messages == DIALOGUE
    assert_read(chat, encode_segments(template.segments(DIALOGUE), BYTES)[0])


@pytest.mark.parametrize(
    "written, limit, answer",
    [
        (b" Hi there", 3, "Hi"),
        (b" Hi\x00", 99, "Hi"),
        (b" Hi\n", 4, "Hi"),
        (b" Hi\n\n", 99, "Hi"),
    ],
    ids=["limit", "end of text", "limit within the end", "its own end"],
)
def test_every_answer_is_brought_to_its_end(model, scripted, written, limit, answer):
    """Whatever stopped the model, the next turn follows the end that training has."""
    chat = Chat(model, BYTES, TEMPLATES["world"], max_tokens=limit)
    scripted(written)
    assert talk(chat, "Hello?")[0].strip() == answer
    ending = b"\n\n\n" if limit == 4 else b"\n\n"
    assert_read(chat, BYTES.encode("User: Hello?\n\nAssistant: Hi") + list(ending))


def test_an_answer_that_is_interrupted_is_kept(model, scripted):
    chat = Chat(model, BYTES, TEMPLATES["world"])
    scripted(b" One two three")
    answer = chat.say("Count")
    assert [next(answer) for _ in range(3)] == ["O", "n", "e"]
    answer.close()
    assert chat.messages[-1] == Message("assistant", "One")
    assert_read(chat, BYTES.encode("User: Count\n\nAssistant: One\n\n"))


def test_own_stops_end_an_answer(model, scripted):
    chat = Chat(model, BYTES, TEMPLATES["plain"], stop=["#"])
    scripted(b"321#")
    assert talk(chat, "123,") == ["321"]


def test_thinking_is_shown_from_its_mark(model, scripted):
    chat = Chat(model, BYTES, TEMPLATES["g1"], think="on")
    scripted(b">\nwell\n</think>\nYes\n\n")
    assert talk(chat, "Really?") == ["<think>\nwell\n</think>\nYes"]
    with pytest.raises(InputError, match="template world: has no marks for thoughts; use g1"):
        talk(Chat(model, BYTES, TEMPLATES["world"], think="on"), "Really?")


def test_reset_begins_anew(model):
    """Also the draws: the same words give the same answer."""
    chat = Chat(model, BYTES, TEMPLATES["world"], max_tokens=9, sampling=Sampling(), seed=3)
    first, second = talk(chat, "Hello", "Hello")
    assert first != second
    chat.reset()
    assert not chat.messages
    assert talk(chat, "Hello") == [first]


def test_a_text_that_cannot_be_written_changes_nothing(model):
    chat = Chat(model, load_tokenizer("chars:abc"), TEMPLATES["plain"], max_tokens=2)
    talk(chat, "a")
    before, messages = chat._stream.settle(), list(chat.messages)
    with pytest.raises(InputError, match="the character 'x' is not in --tokenizer chars:abc"):
        talk(chat, "x")
    assert chat.messages == messages and chat._stream.settle() is before


def test_saving_takes_the_place_of_nothing_else(model, tmp_path):
    """Of no file but what this dialogue wrote there itself."""
    chat = Chat(model, BYTES, TEMPLATES["world"])
    names = ("model.pth", "state.pth", "notes.txt", "pairs.jsonl", "pairs.json")
    paths = [tmp_path / name for name in names]
    write_tensors(paths[0], model.state_dict())
    write_tensors(paths[1], {"x": torch.ones(1)}, {"kind": "state"})
    for path in paths[2:]:
        path.write_text("mine")
    before = [path.read_bytes() for path in paths]
    for path in paths:
        with pytest.raises(InputError, match="is there, and not of this dialogue; name another"):
            chat.save(path)
    assert [path.read_bytes() for path in paths] == before
    for name in ("s.pth", "s.pth", "d.jsonl", "d.jsonl"):
        chat.save(tmp_path / name)


def test_a_refused_save_lets_the_chat_go_on(model, tmp_path, capsys, scripted):
    path = tmp_path / "mydata.jsonl"
    path.write_text("mine\n")
    scripted(b" Hi\n\n")
    converse(Chat(model, BYTES, TEMPLATES["world"]), iter([f"/save {path}", "Hello"]))
    out, error = capsys.readouterr()
    assert error.splitlines() == [
        f"error: /save {path}: is there, and not of this dialogue; name another file"
    ]
    assert out == "Hi\n" and path.read_text() == "mine\n"


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.txt"])
def test_saving_again_keeps_the_dialogues_before_a_reset(model, tmp_path, scripted, name):
    """A grown dialogue takes its own place; one after a reset gets a line of its own."""
    chat, path = Chat(model, BYTES, TEMPLATES["world"]), tmp_path / name
    scripted(b" a\n\n b\n\n c\n\n d\n\n")
    lines = ["1", f"/save {path}", "2", f"/save {path}", "/reset"]
    lines += ["3", f"/save {path}", "4", f"/save {path}"]
    converse(chat, iter(lines))
    saved = [json.loads(line)["messages"] for line in path.read_text().splitlines()]
    said = [[message["content"] for message in messages] for messages in saved]
    assert said == [["1", "a", "2", "b"], ["3", "c", "4", "d"]]


def test_saving_again_after_others_wrote_there_is_refused(model, tmp_path):
    chat, path = Chat(model, BYTES, TEMPLATES["world"]), tmp_path / "d.jsonl"
    chat.save(path)
    path.write_text("mine")
    with pytest.raises(InputError, match="is there, and not of this dialogue"):
        chat.save(path)
    assert path.read_text() == "mine"


def test_a_state_is_not_replaced_by_one_after_a_reset(model, tmp_path):
    chat, path = Chat(model, BYTES, TEMPLATES["world"], max_tokens=5), tmp_path / "s.pth"
    talk(chat, "Remember 7")
    chat.save(path)
    before = path.read_bytes()
    chat.reset()
    with pytest.raises(InputError, match="is there, and not of this dialogue"):
        chat.save(path)
    assert path.read_bytes() == before


def test_a_saved_state_is_where_a_later_chat_begins(model, tmp_path):
    chat = Chat(model, BYTES, TEMPLATES["world"], max_tokens=5)
    talk(chat, "Remember 7")
    chat.save(tmp_path / "s.pth")
    assert read_metadata(tmp_path / "s.pth") == {"kind": "state", "turns": 2}
    load_state(model, read_tensors(tmp_path / "s.pth"))
    for got, want in zip(model.initial_state(1), chat._stream.settle(), strict=True):
        assert torch.equal(got.wkv, want.wkv)


def test_commands(model, tmp_path, capsys, scripted):
    chat = Chat(model, BYTES, TEMPLATES["world"])
    scripted(b" Hi\n\n Bye\n\n")
    path = tmp_path / "talk.jsonl"
    lines = ["Hello", "", "/help", "/hepl", "/save", f"/save {path}", "/reset", "Again", "/quit"]
    converse(chat, iter([*lines, "never read"]))
    out, error = capsys.readouterr()
    assert out.splitlines()[0] == "Hi" and out.splitlines()[-1] == "Bye"
    assert "/reset       forget the dialogue" in out
    assert "error: /hepl: no such command; /help lists them" in error
    assert "error: /save: names no file; write one behind it" in error
    assert json.loads(path.read_text()) == {
        "messages": [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hi"},
        ]
    }
    assert len(chat.messages) == 2


def test_an_interrupt_stops_the_answer_only(model, monkeypatch, capsys):
    chat = Chat(model, BYTES, TEMPLATES["world"], max_tokens=9)
    written = []

    def pick(self, hidden):
        written.append(1)
        if len(written) == 3:
            raise KeyboardInterrupt
        return torch.tensor([ord("a")])

    monkeypatch.setattr(Picker, "pick", pick)
    converse(chat, iter(["Hello", "Again"]))
    assert capsys.readouterr().out == "aa\naaaaaaaaa\n"
    assert [message.text for message in chat.messages] == ["Hello", "aa", "Again", "aaaaaaaaa"]


def test_a_pipe_gives_answers_alone(assets):
    """As a process: numbers in, reversed numbers out, one a line."""
    model = assets / "models" / "rwkv7-reverse-60digits.pth"
    done = subprocess.run(
        [sys.executable, "-m", "rwkv.chat", "--load_model", str(model), "--stop", "#"]
        + ["--tokenizer", "chars:0123456789,#", "--temperature", "0"],
        cwd=ROOT,
        input="12345,\n/reset\n9081726354,\n",
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "54321\n4536271809\n", "")


def test_mistakes_on_the_command_line_are_named(model, tmp_path):
    flags = ["--load_model", str(tmp_path / "m.pth")]
    with pytest.raises(InputError, match="--template wrld: no such template; choose auto, world"):
        main([*flags, "--template", "wrld"])
    with pytest.raises(InputError, match="--turn_end x: is not one of suffix, eot, both"):
        main([*flags, "--turn_end", "x"])
