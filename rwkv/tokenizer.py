"""Text to token ids and back: the RWKV World vocabulary, plain bytes, or a list of characters.

World encodes greedily: at each place the longest entry of its vocabulary. Any bytes can be
encoded, also those that are no text, because the 256 single bytes are entries too.
"""

import ast
import codecs
import functools
import hashlib
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from rwkv.errors import InputError, RunError

WORLD_IDS = 65530
PADDED_WORLD_IDS = 65536  # rows of the published models' embedding; the last six are never used
NAMES = "world, bytes, bytes:ENCODING or chars:CHARACTERS"


class Tokenizer(ABC):
    """A vocabulary and its encoding.

    name: what `load_tokenizer` makes it from.
    fingerprint: equal exactly where all texts get equal tokens; stored beside tokenized data.
    vocab_size: number of ids, all of them below it.
    end_of_text: the id that ends a document, or None where the vocabulary has none.
    encoding: the codec in which the tokens' bytes are text.
    """

    name: str
    fingerprint: str
    vocab_size: int
    end_of_text: int | None
    encoding = "utf-8"

    @abstractmethod
    def encode_bytes(self, data: bytes) -> list[int]:
        """Tokens whose bytes, joined, are `data`."""

    @abstractmethod
    def decode_bytes(self, tokens: Sequence[int]) -> bytes:
        """The tokens' bytes, joined; the inverse of `encode_bytes`."""

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, without any end of text.

        Raises:
            InputError: the text has half of a surrogate pair, or a character that this
                vocabulary lacks.
        """
        return self.encode_bytes(self.text_bytes(text))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, tokens: Sequence[int]) -> str:
        """The tokens' text; bytes that are no text become U+FFFD."""
        return self.decode_bytes(tokens).decode(self.encoding, "replace")

    def text_bytes(self, text: str) -> bytes:
        try:
            return text.encode(self.encoding)
        except UnicodeEncodeError as error:
            raise InputError(
                f"character {error.start} of the text, {text[error.start]!r}, cannot be written "
                f"in {self.encoding} ({error.reason}); mend the text"
            ) from None


class WorldTokenizer(Tokenizer):
    """RWKV World's 65,529 entries; id 0 ends a text and has no bytes.

    Texts are encoded by pyrwkv-tokenizer, in Rust, which also brings the vocabulary. Its decoder
    stops the process on an incomplete character, so decoding is done here.
    """

    name = "world"
    vocab_size = WORLD_IDS
    end_of_text = 0

    def __init__(self) -> None:
        spec = importlib.util.find_spec("pyrwkv_tokenizer")
        if spec is None or spec.origin is None:
            raise RunError(
                "tokenizer world: the package pyrwkv-tokenizer, which has the vocabulary, is "
                "missing; pip install pyrwkv-tokenizer"
            )
        self._vocabulary = Path(spec.origin).with_name("rwkv_vocab_v20230424.txt").read_bytes()
        self.fingerprint = f"world-{hashlib.blake2b(self._vocabulary, digest_size=8).hexdigest()}"

    @functools.cached_property
    def _rust(self):
        import pyrwkv_tokenizer

        return pyrwkv_tokenizer.RWKVTokenizer()

    @functools.cached_property
    def _bytes(self) -> list[bytes]:
        """The bytes of each id. A line of the file is `id literal length`."""
        lines = self._vocabulary.decode("utf-8").splitlines()
        literals = (line[line.index(" ") + 1 : line.rindex(" ")] for line in lines)
        entries = ast.literal_eval(f"[{','.join(literals)}]")
        table = [b""] * WORLD_IDS
        for line, entry in zip(lines, entries, strict=True):
            table[int(line[: line.index(" ")])] = (
                entry if isinstance(entry, bytes) else entry.encode()
            )
        return table

    @functools.cached_property
    def _search(self) -> tuple[dict[bytes, int], dict[bytes, tuple[int, ...]]]:
        """Id of each entry, and the lengths of the entries with given first two bytes."""
        ids = {entry: token for token, entry in enumerate(self._bytes) if token}
        lengths: dict[bytes, set[int]] = {}
        for entry in ids:
            lengths.setdefault(entry[:2], {1}).add(len(entry))
        return ids, {start: tuple(sorted(found, reverse=True)) for start, found in lengths.items()}

    def encode(self, text: str) -> list[int]:
        try:
            return self._rust.encode(text)
        except UnicodeEncodeError:
            return super().encode(text)  # names the character

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        try:
            return self._rust.encode_batch(list(texts))
        except UnicodeEncodeError:
            return super().encode_batch(texts)

    def encode_bytes(self, data: bytes) -> list[int]:
        ids, lengths = self._search
        tokens, start = [], 0
        while start < len(data):
            for length in lengths.get(data[start : start + 2], (1,)):
                token = ids.get(data[start : start + length])
                if token is not None:
                    break
            assert token is not None  # every single byte is an entry
            tokens.append(token)
            start += length
        return tokens

    def decode_bytes(self, tokens: Sequence[int]) -> bytes:
        """The tokens' bytes; ids that only pad the models' vocabulary give U+FFFD."""
        table = self._bytes
        return b"".join(
            table[token] if 0 <= token < WORLD_IDS else _padding_bytes(token) for token in tokens
        )


def _padding_bytes(token: int) -> bytes:
    if WORLD_IDS <= token < PADDED_WORLD_IDS:
        return "\ufffd".encode()
    raise ValueError(f"token {token} is outside the vocabulary, 0 to {PADDED_WORLD_IDS - 1}")


class ByteTokenizer(Tokenizer):
    """Each byte of the text's encoding is its own id.

    In UTF-8 no text but the NUL character has the byte 0, so there it ends a text; in encodings
    of two bytes a character it is half of every Latin letter, and there is no end of text.
    """

    vocab_size = 256

    def __init__(self, encoding: str = "utf-8"):
        try:
            self.encoding = codecs.lookup(encoding).name
        except LookupError:
            raise InputError(
                f"--tokenizer bytes:{encoding}: no such encoding; for example bytes:utf-16-le"
            ) from None
        self.name = "bytes" if self.encoding == "utf-8" else f"bytes:{self.encoding}"
        self.fingerprint = self.name
        self.end_of_text = 0 if self.encoding == "utf-8" else None

    def encode_bytes(self, data: bytes) -> list[int]:
        return list(data)

    def decode_bytes(self, tokens: Sequence[int]) -> bytes:
        return bytes(tokens)


class CharacterTokenizer(Tokenizer):
    """The given characters, in their order, are the ids 0, 1, ...; there is no end of text."""

    end_of_text = None

    def __init__(self, characters: str):
        if not characters or len(set(characters)) != len(characters):
            raise InputError(
                f"--tokenizer chars:{characters}: has a character twice or none at all; write each "
                "of the model's characters once"
            )
        self.name = self.fingerprint = f"chars:{characters}"
        self.vocab_size = len(characters)
        self._ids = {character: token for token, character in enumerate(characters)}
        self._bytes = [character.encode() for character in characters]

    def encode(self, text: str) -> list[int]:
        try:
            return [self._ids[character] for character in text]
        except KeyError as error:
            raise InputError(
                f"the character {error.args[0]!r} is not in --tokenizer {self.name}; mend the text "
                "or name all characters of the model"
            ) from None

    def encode_bytes(self, data: bytes) -> list[int]:
        return self.encode(data.decode("utf-8", "replace"))

    def decode_bytes(self, tokens: Sequence[int]) -> bytes:
        return b"".join(self._bytes[token] for token in tokens)


class StreamDecoder:
    """Tokens one at a time to text, holding back the start of a character until it is whole."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder(tokenizer.encoding)("replace")

    def push(self, token: int) -> str:
        """The text that is complete with this token; often empty within a character."""
        return self._decoder.decode(self._tokenizer.decode_bytes([token]))

    def finish(self) -> str:
        """What was held back: U+FFFD for an incomplete character, else nothing."""
        text = self._decoder.decode(b"", True)
        self._decoder.reset()
        return text


@functools.cache
def load_tokenizer(name: str | None = None, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer of that name, or the one that fits the model.

    Args:
        name: "world", "bytes", "bytes:ENCODING" such as bytes:utf-16-le, or "chars:" and the
            characters; None (or "") to go by the vocabulary: 65,530 to 65,536 is World, 256 bytes.
        vocab_size: rows of the model's embedding; None or 0 where no model is at hand.

    Raises:
        InputError: no such tokenizer, or the model has fewer ids than it makes.
        RunError: the package with World's vocabulary is missing.
    """
    if not name:
        if WORLD_IDS <= (vocab_size or 0) <= PADDED_WORLD_IDS:
            name = "world"
        elif vocab_size == 256:
            name = "bytes"
        else:
            unknown = f"a vocabulary of {vocab_size}" if vocab_size else "the model alone"
            raise InputError(f"--tokenizer: cannot be told from {unknown}; give {NAMES}")
    kind, colon, rest = name.partition(":")
    tokenizer: Tokenizer
    if name == "world":
        tokenizer = WorldTokenizer()
    elif kind == "bytes" and (rest or not colon):
        tokenizer = ByteTokenizer(rest or "utf-8")
    elif kind == "chars" and colon:
        tokenizer = CharacterTokenizer(rest)
    else:
        raise InputError(f"--tokenizer {name}: no such tokenizer; choose {NAMES}")
    if vocab_size and vocab_size < tokenizer.vocab_size:
        raise InputError(
            f"--tokenizer {name}: makes {tokenizer.vocab_size} ids, the model's vocabulary has "
            f"{vocab_size}; choose another"
        )
    return tokenizer
