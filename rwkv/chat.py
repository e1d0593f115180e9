"""Talk with a model in the shell.

    python -m rwkv.chat --load_model MODEL.pth [--adapter ADAPTER.pth] [--state STATE.pth]

The model keeps the dialogue in its state: each turn reads what is new and nothing else. Dialogues
are written as in training (--template). Lines may come from a pipe; then only answers are printed.
"""

import argparse
import json
import sys
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rwkv.cli import Parser, run
from rwkv.errors import InputError
from rwkv.runner import add_model_arguments, add_template_arguments, open_model
from rwkv.sampling_flags import GREEDY, Sampling, add_sampling_arguments, sampling_of

if TYPE_CHECKING:
    from rwkv.model import RWKV
    from rwkv.templates import Template
    from rwkv.tokenizer import Tokenizer

HELP = """\
/reset       forget the dialogue and begin anew
/save FILE   .pth or .safetensors: the state, for --state; else the dialogue, a line of JSON;
             again after /reset: one more line; a file of other origin is not written over
/help        this list
/quit        leave, as does the end of the input
Ctrl-C stops an answer."""


class _Saved(NamedTuple):
    """A file that /save wrote.

    mark: of the file as it was written; see _mark.
    earlier: the lines of the dialogues before the last reset.
    text: all that the file holds; "" for a state.
    """

    mark: tuple[int, ...]
    earlier: str
    text: str


class Chat:
    """A dialogue with a model.

    Attributes:
        messages: all that was said.
    """

    def __init__(
        self,
        model: "RWKV",
        tokenizer: "Tokenizer",
        template: "Template",
        *,
        system: str = "",
        think: str = "off",
        max_tokens: int = 1000,
        stop: Sequence[str] = (),
        sampling: Sampling = GREEDY,
        seed: int = 0,
    ):
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.system, self.think, self.max_tokens = system, think, max_tokens
        self.sampling, self.seed = sampling, seed
        self._suffix = template.roles["assistant"].suffix
        self._ending = [] if template.turn_end == "eot" else tokenizer.encode(self._suffix)
        if template.turn_end != "suffix":
            assert tokenizer.end_of_text is not None  # load_template has seen to it
            self._ending.append(tokenizer.end_of_text)
        self._stop = [*stop, *([self._suffix] if template.turn_end != "eot" else [])]
        self._saved: dict[Path, _Saved] = {}
        self.reset()

    def reset(self) -> None:
        """Forget the dialogue."""
        from rwkv.generate import TextStream
        from rwkv.templates import Message

        self.messages: list[Message] = []
        self._new = [Message("system", self.system)] if self.system else []
        self._stream = TextStream(
            self.model, self.tokenizer, sampling=self.sampling, seed=self.seed
        )
        self._saved = {
            path: saved._replace(earlier=saved.text)
            for path, saved in self._saved.items()
            if saved.text  # a state of the forgotten dialogue is not to be replaced
        }

    def say(self, text: str) -> Generator[str, None, None]:
        """Say something; yields the answer as the model writes it.

        An answer that is not taken to its end is kept as far as it was taken.

        Raises:
            InputError: the tokenizer cannot write the text; the dialogue is as before.
        """
        from rwkv.templates import Message

        said = [*self._new, Message("user", text)]
        prompt = self.template.encode_prompt(said, self.tokenizer, self.think)
        opening = self.template.render_prompt([], self.think)
        opening = opening.removeprefix(self.template.roles["assistant"].prefix.rstrip(" ")).lstrip()
        self._stream.read(prompt)
        self.messages += said
        self._new = []
        taken = opening
        ended_by: int | str | None = None
        try:
            if opening:
                yield opening
            writing = self._stream.write(max_tokens=self.max_tokens, stop=self._stop)
            while True:
                try:
                    piece = next(writing)
                except StopIteration as end:
                    ended_by = end.value.ended_by
                    break
                if not taken:
                    piece = piece.lstrip(" ")
                if piece:
                    taken += piece
                    yield piece
        finally:
            self._close(ended_by)
            self.messages.append(Message("assistant", taken.strip()))

    def _close(self, ended_by: int | str | None) -> None:
        """Make the text end as an answer ends in training, whatever stopped the model."""
        rest = self._ending
        if ended_by == self._suffix and self._suffix:
            rest = rest[len(self.tokenizer.encode(self._suffix)) :]
        elif ended_by is not None and ended_by == self.tokenizer.end_of_text:
            self._stream.forget_last()
        self._stream.read(rest)

    def save(self, path: Path) -> None:
        """Write the state or the dialogue, as the file's ending says; see HELP.

        What this dialogue wrote before is replaced; the lines of earlier dialogues stay.

        Raises:
            InputError: the file cannot be written, or is there and of other origin.
        """
        from rwkv.checkpoint import write_tensors
        from rwkv.files import replacing
        from rwkv.state import state_tensors

        saved = self._saved.get(path.resolve())
        if path.exists() and (saved is None or saved.mark != _mark(path)):
            raise InputError(f"/save {path}: is there, and not of this dialogue; name another file")
        earlier = saved.earlier if saved else ""
        if path.suffix in (".pth", ".safetensors"):
            state, text = self._stream.settle(), ""
            facts = {"kind": "state", "turns": len(self.messages)}
            write_tensors(path, state_tensors(state), facts)
        else:
            record = {"messages": [{"role": m.role, "content": m.text} for m in self.messages]}
            text = earlier + json.dumps(record, ensure_ascii=False) + "\n"
            with replacing(path) as part:
                part.write_text(text, encoding="utf-8")
        self._saved[path.resolve()] = _Saved(_mark(path), earlier, text)


def _mark(path: Path) -> tuple[int, ...]:
    """Equal as long as nobody writes the file again."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def converse(chat: Chat, lines: Iterator[str]) -> None:
    """Answer each line, or obey it if it is a command, until the lines or the user end."""
    for line in lines:
        text = line.strip()
        word, _, rest = text.partition(" ")
        try:
            if word == "/quit":
                return
            if not text:
                continue
            if word == "/reset":
                chat.reset()
            elif word == "/help":
                print(HELP)  # noqa: T201
            elif word == "/save":
                if not rest.strip():
                    raise InputError("/save: names no file; write one behind it")
                chat.save(Path(rest.strip()).expanduser())
                print(f"saved {rest.strip()}", file=sys.stderr)  # noqa: T201
            elif word.startswith("/"):
                raise InputError(f"{word}: no such command; /help lists them")
            else:
                _answer(chat, text)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)  # noqa: T201


def _answer(chat: Chat, text: str) -> None:
    answer = chat.say(text)
    try:
        for piece in answer:
            print(piece, end="", flush=True)  # noqa: T201
    except KeyboardInterrupt:
        answer.close()
    print(flush=True)  # noqa: T201


def _lines() -> Iterator[str]:
    """What the user types, line by line; with a sign to type at on a terminal."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    import readline  # noqa: F401 (makes input() a line editor)

    while True:
        try:
            yield input("> ")
        except EOFError:
            print()  # noqa: T201
            return


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m rwkv.chat",
        description=f"{__doc__}\n{HELP}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(parser)
    add_template_arguments(
        parser, "auto", "how dialogues are written: auto, world, g1, plain or a .json file (auto)"
    )
    parser.add_argument("--system", default="", help="a system message to begin with")
    parser.add_argument(
        "--think", choices=("off", "on", "skip"), default="off", help="for reasoning models (off)"
    )
    parser.add_argument("--tokens", type=int, default=1000, help="of an answer at most (1000)")
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="ends an answer; may be repeated",
    )
    add_sampling_arguments(parser, top_p=0.5)
    options = parser.parse_args(argv)
    if options.tokens < 1:
        raise InputError(f"--tokens {options.tokens}: needs to be at least 1; raise it")
    sampling = sampling_of(options)

    from rwkv.templates import load_template

    model, tokenizer = open_model(options, merged=True)
    chat = Chat(
        model,
        tokenizer,
        load_template(options.template, tokenizer, options.turn_end or None),
        system=options.system,
        think=options.think,
        max_tokens=options.tokens,
        stop=options.stop,
        sampling=sampling,
        seed=options.seed,
    )
    if sys.stdin.isatty():
        device = model.device
        print(f"{model.config.name} on {device}; /help lists commands", file=sys.stderr)  # noqa: T201
    converse(chat, _lines())
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
