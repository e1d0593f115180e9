r"""Chat templates: messages to text, and which of it the loss counts.

The built-in ones:

    world   System: ...\n\nUser: ...\n\nAssistant: ...\n\n     RWKV World models
    g1      the same, with <think>\n...\n</think>\n before an answer     RWKV-7 G1 reasoning models
    plain   the messages' texts end to end, nothing added     toy tasks, ready-made prompts

World and G1 models know a blank line as the end of a turn only, so blank lines inside a message
become one newline there. A template of one's own is a JSON file:

    {"system": {"prefix": "System: ", "suffix": "\n\n"},
     "user": {"prefix": "User: ", "suffix": "\n\n"},
     "assistant": {"prefix": "Assistant: ", "suffix": "\n\n"},
     "tool": {"prefix": "Tool: ", "suffix": "\n\n"},
     "think": {"prefix": "<think>\n", "suffix": "\n</think>\n"},
     "fold_blank_lines": true}

Only "user" and "assistant" are needed; a role without its own is refused when a record has it,
and without "think" reasoning is left out.

Spaces at the end of the assistant's prefix are the model's own first output: World's vocabulary
has " Hello" as one token, so a prompt ends in "Assistant:" and the answer begins with the space.

Source of the formats: the model cards of BlinkDL/rwkv-7-world and BlinkDL/rwkv7-g1.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from rwkv.errors import InputError
from rwkv.plain_text import parse_json, read_text
from rwkv.tokenizer import CharacterTokenizer, Tokenizer

TURN_ENDS = ("suffix", "eot", "both")
THINKING = ("off", "on", "skip")
_ROLES = ("system", "user", "assistant", "tool")
_BLANK_LINES = re.compile(r"\n(?:[^\S\n]*\n)+")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn.

    role: "system", "user", "assistant" or "tool".
    text: what is said; empty only where an assistant does no more than call tools or think.
    thought: reasoning before the text, without its marks.
    scored: whether the loss counts it, if it is the assistant's.
    """

    role: str
    text: str
    thought: str = ""
    scored: bool = True


class Segment(NamedTuple):
    """A stretch of text that is tokenized on its own, so that the mask's border is exact.

    scored: whether the loss counts it.
    end: whether the end-of-text token follows it.
    """

    text: str
    scored: bool
    end: bool = False


class Marks(NamedTuple):
    """What stands before and after a message or a thought."""

    prefix: str
    suffix: str


@dataclass(frozen=True)
class Template:
    """How a dialogue is written.

    roles: the marks of each role.
    think: the marks of a thought, or None to leave thoughts out.
    fold_blank_lines: blank lines inside a message become one newline, its ends are stripped.
    turn_end: what ends the assistant's turn, and is learned: "suffix" its suffix, "eot" the
        end-of-text token in the suffix's place, "both" one after the other.
    """

    name: str
    roles: dict[str, Marks]
    think: Marks | None = None
    fold_blank_lines: bool = True
    turn_end: str = "suffix"

    @property
    def fingerprint(self) -> str:
        """Equal where every dialogue is written the same."""
        text = json.dumps({**asdict(self), "name": ""}, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def segments(self, messages: Iterable[Message]) -> list[Segment]:
        """The dialogue as segments; answers and what ends them are scored.

        Raises:
            InputError: a message has a role that this template lacks.
        """
        segments = []
        for message in messages:
            marks = self._marks(message.role)
            if message.role != "assistant":
                text = marks.prefix + self._fold(message.text) + marks.suffix
                segments.append(Segment(text, scored=False))
                continue
            opening = marks.prefix.rstrip(" ")
            answer = marks.prefix[len(opening) :] + self.answer(message)
            if self.turn_end != "eot":
                answer += marks.suffix
            segments.append(Segment(opening, scored=False))
            segments.append(Segment(answer, message.scored, end=self.turn_end != "suffix"))
        return segments

    def answer(self, message: Message) -> str:
        """The assistant's message as it is written between its marks, thought included."""
        return self._thought(message) + self._fold(message.text)

    def render_prompt(self, messages: Sequence[Message], think: str = "off") -> str:
        """The text after which the model writes the next answer.

        Args:
            messages: the dialogue so far.
            think: "off" ends in "Assistant:"; "on" makes a reasoning model think, "skip" hands it
                an empty thought. The last two end within a mark, as the model's card asks, for
                the tokens across its end would differ from what the model has seen.

        Raises:
            InputError: this template has no marks for thoughts and `think` is not "off".
        """
        return "".join(segment.text for segment in self._prompt(messages, think))

    def encode_prompt(
        self, messages: Sequence[Message], tokenizer: Tokenizer, think: str = "off"
    ) -> list[int]:
        """The prompt's tokens: exactly those that stand before the answer in training."""
        return encode_segments(self._prompt(messages, think), tokenizer)[0]

    def _prompt(self, messages: Sequence[Message], think: str) -> list[Segment]:
        if think not in THINKING:
            raise ValueError(f"think: {think!r} is not one of {', '.join(THINKING)}")
        prefix = self._marks("assistant").prefix
        if think == "off":
            prefix = prefix.rstrip(" ")
        elif self.think is None:
            raise InputError(f"template {self.name}: has no marks for thoughts; use g1")
        elif think == "on":
            prefix += self.think.prefix.rstrip("\n").removesuffix(">")
        else:
            marks = self.think.prefix.rstrip("\n") + "\n" + self.think.suffix.strip("\n")
            prefix += marks.removesuffix(">")
        return [*self.segments(messages), Segment(prefix, scored=False)]

    def _marks(self, role: str) -> Marks:
        if role not in self.roles:
            raise InputError(
                f"template {self.name}: has no {role!r}, only {', '.join(self.roles)}; add it to "
                "the template or choose another"
            )
        return self.roles[role]

    def _thought(self, message: Message) -> str:
        if self.think is None or not message.thought.strip():
            return ""
        return self.think.prefix + self._fold(message.thought) + self.think.suffix

    def _fold(self, text: str) -> str:
        if not self.fold_blank_lines:
            return text
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        return _BLANK_LINES.sub("\n", text).strip()


_WORLD = {role: Marks(f"{role.capitalize()}: ", "\n\n") for role in _ROLES}
TEMPLATES = {
    "world": Template("world", _WORLD),
    "g1": Template("g1", _WORLD, think=Marks("<think>\n", "\n</think>\n")),
    "plain": Template("plain", dict.fromkeys(_ROLES, Marks("", "")), fold_blank_lines=False),
}


def load_template(name: str, tokenizer: Tokenizer, turn_end: str | None = None) -> Template:
    """A template by name, or from a JSON file.

    Args:
        name: "world", "g1", "plain", a path ending in .json, or "auto": plain for a list of
            characters, else world.
        tokenizer: what will encode the text.
        turn_end: replaces the template's own; see Template.

    Raises:
        InputError: no such template, an error in the file, or a turn end that the tokenizer lacks.
    """
    if name == "auto":
        name = "plain" if isinstance(tokenizer, CharacterTokenizer) else "world"
    if name.endswith(".json"):
        template = read_template(Path(name))
    elif name in TEMPLATES:
        template = TEMPLATES[name]
    else:
        raise InputError(
            f"--template {name}: no such template; choose auto, {', '.join(TEMPLATES)} or a .json "
            "file"
        )
    if turn_end:
        template = replace(template, turn_end=turn_end)
    if template.turn_end not in TURN_ENDS:
        raise InputError(
            f"--turn_end {template.turn_end}: is not one of {', '.join(TURN_ENDS)}; take one"
        )
    if template.turn_end != "suffix" and tokenizer.end_of_text is None:
        raise InputError(
            f"--turn_end {template.turn_end}: tokenizer {tokenizer.name} has no end of text; use "
            "suffix"
        )
    return template


def prompt_tokens(text: str, flags: Any, tokenizer: Tokenizer, think: str = "off") -> list[int]:
    """Tokens of a user's message up to where the answer begins.

    Args:
        text: what the user says.
        flags: has `template`, as DataFlags.
        tokenizer: the model's.
        think: see Template.render_prompt.
    """
    template = load_template(flags.template, tokenizer)
    return template.encode_prompt([Message("user", text)], tokenizer, think)


def read_template(path: Path) -> Template:
    """A template from the JSON file described above.

    Raises:
        InputError: the file is missing, no JSON, or has a key or value that is not understood.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; --template also takes {', '.join(TEMPLATES)}")
    given = parse_json(path, read_text(path))
    if not isinstance(given, dict):
        raise InputError(f"{path}: is not an object; see python -m data.make_sft --help")
    known = (*_ROLES, "think", "fold_blank_lines", "turn_end")
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"keys are {', '.join(known)}"
            raise InputError(f"{path}: unknown key {key!r}; {hint}")
    marks = {key: _read_marks(path, key, given[key]) for key in (*_ROLES, "think") if key in given}
    for key in ("user", "assistant"):
        if key not in marks:
            raise InputError(f"{path}: lacks {key!r}; write an object with 'prefix' and 'suffix'")
    fold = given.get("fold_blank_lines", True)
    if not isinstance(fold, bool):
        raise InputError(f"{path}: 'fold_blank_lines' is {fold!r}; write true or false")
    turn_end = given.get("turn_end", "suffix")
    if turn_end not in TURN_ENDS:
        raise InputError(
            f"{path}: 'turn_end' is {turn_end!r}; choose one of {', '.join(TURN_ENDS)}"
        )
    think = marks.pop("think", None)
    return Template(path.stem, marks, think, fold, turn_end)


def _read_marks(path: Path, key: str, value: object) -> Marks:
    if isinstance(value, dict) and set(value) == {"prefix", "suffix"}:
        prefix, suffix = value["prefix"], value["suffix"]
        if isinstance(prefix, str) and isinstance(suffix, str):
            return Marks(prefix, suffix)
    raise InputError(
        f"{path}: {key!r} has no two strings; write an object with 'prefix' and 'suffix'"
    )


def encode_dialogue(
    messages: Sequence[Message], template: Template, tokenizer: Tokenizer
) -> tuple[list[int], list[bool]]:
    """Tokens of a dialogue, closed by an end of text, and whether each is scored."""
    segments = template.segments(messages)
    tokens, mask = encode_segments(segments, tokenizer)
    if tokenizer.end_of_text is not None and not segments[-1].end:
        tokens.append(tokenizer.end_of_text)
        mask.append(messages[-1].scored)
    return tokens, mask


def encode_segments(
    segments: Iterable[Segment], tokenizer: Tokenizer
) -> tuple[list[int], list[bool]]:
    """Tokens of the segments and, for each token, whether it is scored.

    Neighbours of one kind are encoded together, for so the tokens are those of the whole text.
    """
    tokens: list[int] = []
    mask: list[bool] = []
    text, scored = "", False

    def flush() -> None:
        if text:
            found = tokenizer.encode(text)
            tokens.extend(found)
            mask.extend([scored] * len(found))

    for segment in segments:
        if segment.scored != scored:
            flush()
            text, scored = "", segment.scored
        text += segment.text
        if segment.end and tokenizer.end_of_text is not None:
            flush()
            text = ""
            tokens.append(tokenizer.end_of_text)
            mask.append(scored)
    flush()
    return tokens, mask
