"""Templates by hand, exact mask borders, and prompts that equal training's prefix."""

import json
import random

import pytest

from data.tokenizing import Recipe, encode_record
from rwkv.errors import InputError
from rwkv.templates import TEMPLATES, Message, encode_segments, load_template, read_template
from rwkv.tokenizer import load_tokenizer

DIALOGUE = [
    Message("system", "s"),
    Message("user", "q"),
    Message("assistant", "a", "t"),
    Message("user", "r"),
    Message("assistant", "b"),
]
WORLD, BYTES = load_tokenizer("world"), load_tokenizer("bytes")


def marked(messages, template="world", tokenizer=BYTES, turn_end=None, mask_prompt=True):
    """The record's text with each scored stretch in brackets and the end of text as $."""
    recipe = Recipe(tokenizer.name, load_template(template, tokenizer, turn_end), mask_prompt)
    tokens, mask = encode_record(messages, recipe, tokenizer)
    text, before = "", False
    for token, scored in zip(tokens, mask, strict=True):
        text += ("[" if scored and not before else "]" if before and not scored else "") + (
            "$" if token == tokenizer.end_of_text else tokenizer.decode([token])
        )
        before = scored
    return text + ("]" if before else "")


def test_world_by_hand():
    expected = "System: s\n\nUser: q\n\nAssistant:[ a\n\n]User: r\n\nAssistant:[ b\n\n$]"
    assert marked(DIALOGUE) == marked(DIALOGUE, tokenizer=WORLD) == expected


def test_g1_by_hand():
    expected = "User: q\n\nAssistant:[ <think>\nt\n</think>\na\n\n]User: r\n\nAssistant:[ b\n\n$]"
    assert marked(DIALOGUE[1:], "g1") == marked(DIALOGUE[1:], "g1", WORLD) == expected


@pytest.mark.parametrize(
    "turn_end, expected",
    [
        ("suffix", "User: q\n\nAssistant:[ a\n\n]User: r\n\nAssistant:[ b\n\n$]"),
        ("eot", "User: q\n\nAssistant:[ a$]User: r\n\nAssistant:[ b$]"),
        ("both", "User: q\n\nAssistant:[ a\n\n$]User: r\n\nAssistant:[ b\n\n$]"),
    ],
)
def test_turn_ends_by_hand(turn_end, expected):
    assert marked(DIALOGUE[1:], turn_end=turn_end) == expected


def test_plain_text_is_scored_but_for_its_first_token():
    assert marked("abc") == "a[bc$]"


def test_all_tokens_count_without_the_mask():
    assert marked(DIALOGUE[3:], mask_prompt=False) == "U[ser: r\n\nAssistant: b\n\n$]"


def test_unscored_answers_are_prompt():
    messages = [Message("assistant", "x", scored=False), *DIALOGUE[3:]]
    assert marked(messages) == "Assistant: x\n\nUser: r\n\nAssistant:[ b\n\n$]"


def test_characters_have_no_marks_and_no_end():
    digits = load_tokenizer("chars:0123456789,#")
    messages = [Message("user", "12,"), Message("assistant", "21#")]
    assert marked(messages, "auto", digits) == "12,[21#]"


def test_tool_results_are_not_scored():
    messages = [Message("user", "q"), Message("tool", "2"), Message("assistant", "a")]
    assert marked(messages) == "User: q\n\nTool: 2\n\nAssistant:[ a\n\n$]"


@pytest.mark.parametrize(
    "text", ["a\n\nb", "a\r\n\r\nb", "\n a\n \t\n\n\nb \n", "a\rb", "a\n\u3000\nb"]
)
def test_blank_lines_fold(text):
    assert marked([Message("user", text), DIALOGUE[4]]).startswith("User: a\nb\n\nAssistant:")


def test_indentation_survives_folding():
    text = "def f():\n\n    return 1"
    assert "def f():\n    return 1\n\n" in marked([Message("user", text), DIALOGUE[4]])


def random_dialogue(draw: random.Random) -> list[Message]:
    words = [
        "Hi",
        "。",
        "\n",
        "\n\n",
        " ",
        "User:",
        "if x:\n\n    y",
        "é",
        "{}",
        "\t",
        "<think>",
        "7",
    ]

    def text() -> str:
        return "".join(draw.choices(words, k=draw.randrange(1, 8))) + "."

    turns = [Message("system", text())] if draw.random() < 0.5 else []
    for _ in range(draw.randrange(1, 4)):
        thought = text() if draw.random() < 0.5 else ""
        turns += [Message("user", text()), Message("assistant", text(), thought)]
    return turns


@pytest.mark.parametrize("tokenizer", [WORLD, BYTES], ids=lambda t: t.name)
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("turn_end", ["suffix", "eot", "both"])
def test_prompts_are_the_prefix_of_training(name, turn_end, tokenizer):
    """What chat feeds before an answer is what stood before it in training, token for token."""
    draw, template = random.Random(0), load_template(name, tokenizer, turn_end)
    for _ in range(100):
        messages = random_dialogue(draw)
        tokens, _ = encode_record(messages, Recipe(tokenizer.name, template), tokenizer)
        for turn, message in enumerate(messages):
            if message.role == "assistant":
                prompt = template.encode_prompt(messages[:turn], tokenizer)
                assert tokens[: len(prompt)] == prompt


@pytest.mark.parametrize("name", ["world", "g1"])
def test_world_tokens_are_those_of_the_whole_text(name):
    """No entry of the vocabulary crosses a border, so other runners see the same tokens."""
    draw, template = random.Random(1), TEMPLATES[name]
    for _ in range(200):
        messages = random_dialogue(draw)
        segments = template.segments(messages)
        whole = WORLD.encode("".join(segment.text for segment in segments))
        assert encode_segments(segments, WORLD)[0] == whole
        prompt = template.render_prompt(messages[:-1])
        assert prompt.endswith("Assistant:")
        assert WORLD.encode(prompt) == template.encode_prompt(messages[:-1], WORLD)


def test_thinking_prompts_by_hand():
    template, question = TEMPLATES["g1"], [Message("user", "q")]
    assert template.render_prompt(question) == "User: q\n\nAssistant:"
    assert template.render_prompt(question, "on") == "User: q\n\nAssistant: <think"
    assert template.render_prompt(question, "skip") == "User: q\n\nAssistant: <think>\n</think"


def test_a_thinking_prompt_is_the_prefix_of_training():
    template, messages = TEMPLATES["g1"], DIALOGUE[1:3]
    tokens, _ = encode_record(messages, Recipe("world", template), WORLD)
    prompt = template.encode_prompt(messages[:1], WORLD, "on")
    assert tokens[: len(prompt)] == prompt


def template_file(tmp_path, content):
    path = tmp_path / "mine.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


MINE = {
    "user": {"prefix": "<u>", "suffix": "\n"},
    "assistant": {"prefix": "<a> ", "suffix": "</a>\n"},
    "fold_blank_lines": False,
}


def test_a_template_of_ones_own(tmp_path):
    path = template_file(tmp_path, MINE)
    messages = [Message("user", "q\n\nr"), Message("assistant", "a")]
    assert marked(messages, str(path)) == "<u>q\n\nr\n<a>[ a</a>\n$]"


def test_fingerprints_tell_templates_apart(tmp_path):
    own = read_template(template_file(tmp_path, MINE))
    templates = [*TEMPLATES.values(), own, load_template("world", BYTES, "eot")]
    assert len({template.fingerprint for template in templates}) == len(templates)


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", r"mine\.json:1: not JSON"),
        ("[]", r"mine\.json: is not an object"),
        ({"usr": {}}, r"mine\.json: unknown key 'usr'; did you mean 'user'\?"),
        ({"user": MINE["user"]}, r"mine\.json: lacks 'assistant'; write an object with 'prefix'"),
        ({**MINE, "user": "x"}, r"mine\.json: 'user' has no two strings; write an object with"),
        ({**MINE, "fold_blank_lines": 1}, r"mine\.json: 'fold_blank_lines' is 1; write true or"),
        ({**MINE, "turn_end": "x"}, r"mine\.json: 'turn_end' is 'x'; choose one of suffix, eot"),
    ],
)
def test_mistakes_in_templates_are_named(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        read_template(template_file(tmp_path, content))


def test_mistakes_in_flags_are_named(tmp_path):
    digits = load_tokenizer("chars:01")
    with pytest.raises(InputError, match=r"--template wrld: no such template; choose auto, world"):
        load_template("wrld", WORLD)
    with pytest.raises(InputError, match=r"no\.json: no such file; --template also takes world"):
        load_template(str(tmp_path / "no.json"), WORLD)
    with pytest.raises(InputError, match=r"--turn_end eot: tokenizer chars:01 has no end of text"):
        load_template("plain", digits, "eot")
    with pytest.raises(InputError, match=r"--turn_end x: is not one of suffix, eot, both"):
        load_template("plain", digits, "x")
    with pytest.raises(InputError, match=r"template mine: has no 'system', only user, assistant"):
        read_template(template_file(tmp_path, MINE)).segments(DIALOGUE)
    with pytest.raises(InputError, match=r"template world: has no marks for thoughts; use g1"):
        TEMPLATES["world"].render_prompt([], "on")
