"""Tokenizers give back every byte, and the Rust encoder agrees with the table."""

import gzip
import json
import random

import pytest

from rwkv.errors import InputError
from rwkv.tokenizer import StreamDecoder, WorldTokenizer, load_tokenizer

ODD_BYTES = [
    b"",
    b"\x00",
    b"\xff\xfe",
    b"\xe6\xb1",  # two of a character's three bytes
    b"\xed\xa0\x80",  # half of a surrogate pair
    b"\xc0\x80",
    b"\xf5" * 9,
    bytes(range(256)),
    b"a" * 1000,
    b"\n" * 37,
    "汉字 \U0001f600 e\u0301".encode(),
]


def random_text(draw: random.Random) -> str:
    ranges = [(9, 128), (0x80, 0x800), (0x3000, 0xA000), (0xE000, 0x110000)]
    return "".join(chr(draw.randrange(*draw.choice(ranges))) for _ in range(draw.randrange(40)))


@pytest.fixture(scope="module")
def world():
    return load_tokenizer("world")


@pytest.mark.parametrize("name", ["world", "bytes"])
@pytest.mark.parametrize("data", ODD_BYTES, ids=range(len(ODD_BYTES)))
def test_odd_bytes_come_back(name, data):
    tokenizer = load_tokenizer(name)
    tokens = tokenizer.encode_bytes(data)
    assert tokenizer.decode_bytes(tokens) == data
    assert all(0 <= token < tokenizer.vocab_size for token in tokens)
    assert tokenizer.decode(tokens) == data.decode("utf-8", "replace")


def test_random_bytes_come_back(world):
    draw = random.Random(0)
    for _ in range(500):
        data = draw.randbytes(draw.randrange(60))
        assert world.decode_bytes(world.encode_bytes(data)) == data


def test_rust_encodes_as_the_table_does(world):
    draw = random.Random(1)
    texts = [random_text(draw) for _ in range(1000)]
    assert world.encode_batch(texts) == [world.encode_bytes(text.encode()) for text in texts]
    assert [world.decode(world.encode(text)) for text in texts] == texts


def test_real_texts_come_back(world, assets):
    with gzip.open(assets / "data/text/wikipedia_english_20240801to20240815.json.gz") as file:
        texts = json.load(file)[:60]
    for text in texts:
        tokens = world.encode(text)
        assert world.decode(tokens) == text
        assert tokens == world.encode_bytes(text.encode())


def test_world_ids_by_hand(world):
    """As in RWKV-LM's vocabulary file: a single byte b is id b + 1, and a blank line is 261."""
    assert world.encode("User: hi\n\nAssistant:") == [24281, 59, 4571, 261, 5585, 41693, 59]
    assert world.encode_bytes(b"\xff") == [256]
    assert (world.vocab_size, world.end_of_text) == (65530, 0)


def test_end_of_text_has_no_bytes_and_nul_is_another_id(world):
    assert world.decode_bytes([0, 34, 0]) == b"!"
    assert world.encode("\0") == [1]


@pytest.mark.parametrize("token", [65530, 65535])
def test_padding_ids_show_as_unknown(world, token):
    assert world.decode([token]) == "\ufffd"


@pytest.mark.parametrize("token", [-1, 65536])
def test_ids_outside_the_vocabulary_are_refused(world, token):
    with pytest.raises(ValueError, match=f"token {token} is outside the vocabulary"):
        world.decode_bytes([token])


@pytest.mark.parametrize("name", ["world", "bytes", "bytes:utf-16-le"])
def test_stream_gives_whole_characters_only(name):
    tokenizer, text = load_tokenizer(name), "a\U0001f600汉e\u0301."
    data = text.encode(tokenizer.encoding)
    single = [tokenizer.encode_bytes(bytes([byte]))[0] for byte in data]  # a token for each byte
    stream = StreamDecoder(tokenizer)
    pieces = [stream.push(token) for token in single]
    assert "".join(pieces) + stream.finish() == text
    assert "\ufffd" not in "".join(pieces)


def test_stream_ends_within_a_character(world):
    stream = StreamDecoder(world)
    assert stream.push(world.encode_bytes(b"\xe6")[0]) == ""
    assert stream.finish() == "\ufffd"
    assert stream.push(34) == "!"


def test_utf16_bytes_have_no_end_of_text():
    tokenizer = load_tokenizer("bytes:UTF-16-LE")
    assert tokenizer.encode("hi") == [104, 0, 105, 0]
    assert tokenizer.end_of_text is None
    assert load_tokenizer("bytes").end_of_text == 0


def test_characters_are_numbered_in_order():
    tokenizer = load_tokenizer("chars:0123456789,#")
    assert tokenizer.encode("10,01#") == [1, 0, 10, 0, 1, 11]
    assert tokenizer.decode([1, 0, 10, 0, 1, 11]) == "10,01#"
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (12, None)


@pytest.mark.parametrize(
    "vocab_size, name", [(65530, "world"), (65535, "world"), (65536, "world"), (256, "bytes")]
)
def test_chosen_by_the_vocabulary(vocab_size, name):
    assert load_tokenizer(None, vocab_size).name == name


def test_fingerprints_differ():
    names = ["world", "bytes", "bytes:utf-16-le", "chars:01", "chars:10"]
    assert len({load_tokenizer(name).fingerprint for name in names}) == len(names)


@pytest.mark.parametrize(
    "name, vocab_size, message",
    [
        (None, 12, r"--tokenizer: cannot be told from a vocabulary of 12; give world, bytes"),
        (None, None, r"--tokenizer: cannot be told from the model alone"),
        ("word", 65536, r"--tokenizer word: no such tokenizer; choose world"),
        ("world", 256, r"--tokenizer world: makes 65530 ids, the model's vocabulary has 256"),
        ("chars:00", 12, r"--tokenizer chars:00: has a character twice or none at all"),
        ("bytes:utf-99", 256, r"bytes:utf-99: no such encoding; for example bytes:utf-16-le"),
    ],
)
def test_mistakes_are_named(name, vocab_size, message):
    with pytest.raises(InputError, match=message):
        load_tokenizer(name, vocab_size)


@pytest.mark.parametrize("name", ["world", "bytes"])
def test_half_a_surrogate_pair_is_named(name):
    with pytest.raises(InputError, match=r"character 2 of the text, '\\ud83d', cannot be written"):
        load_tokenizer(name).encode("ab\ud83dc")


def test_unknown_character_is_named():
    with pytest.raises(InputError, match="the character 'x' is not in --tokenizer chars:01"):
        load_tokenizer("chars:01").encode("0x")


def test_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="pip install pyrwkv-tokenizer"):
        WorldTokenizer()
