"""Let a model write: many texts at once, or one as a stream; each keeps a state and nothing else.

    python -m rwkv.generate --load_model MODEL.pth --prompt "Once upon a time" --tokens 100
    python -m rwkv.generate --load_model MODEL.pth --prompt_file PROMPTS.jsonl > ANSWERS.jsonl

A .jsonl file has an object with a `prompt` a line; the output has the same objects with
`completion` and `ended` (whether it stopped by itself) added, in the same order. Any other file is
one prompt. The prompt is continued as it is; with --template it is what a user says, and the
answer's end is that of training. For dialogue see rwkv.chat.
"""

import argparse
import json
import sys
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rwkv.cli import Parser, run
from rwkv.errors import InputError, not_finite
from rwkv.plain_text import parse_json, read_text
from rwkv.runner import add_model_arguments, add_template_arguments, open_model
from rwkv.sampling_flags import GREEDY, Sampling, add_sampling_arguments, sampling_of

if TYPE_CHECKING:
    from torch import Tensor

    from rwkv.decoder import Decoder, Pace, Written
    from rwkv.model import RWKV
    from rwkv.state import State
    from rwkv.templates import Template
    from rwkv.tokenizer import Tokenizer

Stop = Sequence[int | str]


class Continuation(NamedTuple):
    """What a model wrote after a prompt.

    tokens: all of it, the stop included.
    text: what the tokens before the stop say; "" without a tokenizer.
    ended: whether it came to a stop, and not to the limit.
    """

    tokens: list[int]
    text: str
    ended: bool


def generate(
    model: "RWKV",
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    tokenizer: "Tokenizer | None" = None,
    stop: Stop = (),
    sampling: Sampling = GREEDY,
    seed: int = 0,
    batch_size: int = 64,
    forbidden: Sequence[int] = (),
    pace: "Pace | None" = None,
) -> list[Continuation]:
    """Continue every prompt.

    Prompts are read packed, the next ones when rows have ended. What a row draws depends on `seed`
    and its number alone: `batch_size` changes the speed, and the texts no more than the rounding
    of products of another size does.

    Args:
        model: on any device; it is in eval mode meanwhile.
        prompts: token ids, at least one each.
        max_tokens: written after each prompt, at most.
        tokenizer: for the texts and for stops that are strings. Its end of text always stops, and
            ids beyond its vocabulary are never written.
        stop: token ids, and strings wherever they appear in the text.
        sampling: how tokens are drawn.
        seed: of the draws.
        batch_size: rows at once, at most.
        forbidden: token ids that are never written.
        pace: how closely the host follows; None for what suits the device.

    Returns:
        a continuation a prompt, in their order.

    Raises:
        ValueError: a prompt is empty, or a stop is a string and there is no tokenizer.
    """
    from rwkv.decoder import Decoder, Picker, pace_for

    _check_prompts(prompts)
    writings = [Writing(tokenizer, stop, max_tokens) for _ in prompts]
    size = min(batch_size, len(prompts))
    if size and max_tokens > 0:
        banned = banned_tokens(model, tokenizer, forbidden)
        decoder = Decoder(model, Picker(model, sampling, seed, banned, size), size)
        with evaluating(model):
            write_all(decoder, prompts, writings, pace or pace_for(decoder.hidden.device, size))
    return [Continuation(w.tokens, w.text, w.ended_by is not None) for w in writings]


def write_all(
    decoder: "Decoder",
    prompts: Sequence[Sequence[int]],
    writings: "Sequence[Writing]",
    pace: "Pace",
) -> None:
    """Let the decoder continue the prompts until every writing is done.

    A row that has ended is written on until the host looks, and while it waits for a prompt; what
    it writes then is thrown away. When no prompt waits, rows that have ended leave the batch.
    """
    from rwkv.reading import read_to_the_end

    waiting = deque(range(len(prompts)))
    places: list[int | None] = [None] * len(decoder.hidden)  # the prompt in each row of the batch
    flying: deque[tuple[list[int | None], Written]] = deque()
    while True:
        busy = [n for n, row in enumerate(places) if row is not None and not writings[row].done]
        free = sorted(set(range(len(places))) - set(busy))
        if waiting and (len(free) >= pace.patience or not busy):
            new = [waiting.popleft() for _ in range(min(len(waiting), len(free)))]
            for place, row in zip(free, new, strict=False):
                places[place] = row
            hidden, state = read_to_the_end(decoder.model, [prompts[row] for row in new])
            _check_finite(decoder.model, hidden)
            decoder.put(free[: len(new)], new, hidden, state)
            continue
        if not busy:
            return
        if not waiting and len(free) >= max(pace.patience, pace.ahead * len(busy)):
            decoder.keep(busy)
            places = [places[n] for n in busy]
        flying.append((list(places), decoder.run(pace.steps)))
        if len(flying) > pace.ahead:
            then, written = flying.popleft()
            for number, tokens in zip(then, written.rows(), strict=True):
                for token in tokens:
                    if number is not None and not writings[number].done:
                        writings[number].add(token)


def _check_finite(model: "RWKV", hidden: "Tensor") -> None:
    """Stop where the scores of the next tokens are no numbers: nothing can be drawn from them."""
    import torch

    with torch.no_grad():
        if not model.logits(hidden).isfinite().all():
            raise not_finite("scores")


class TextStream:
    """One text that is read and written in turns. Of what went before, only the state is kept."""

    def __init__(
        self,
        model: "RWKV",
        tokenizer: "Tokenizer",
        *,
        sampling: Sampling = GREEDY,
        seed: int = 0,
    ):
        from rwkv.decoder import Picker

        self.model, self.tokenizer = model, tokenizer
        self.state: State | None = None
        self._hidden: Tensor | None = None
        self._unread: list[int] = []  # the state does not know of these tokens yet
        self._picker = Picker(model, sampling, seed, banned_tokens(model, tokenizer))

    def read(self, tokens: Sequence[int]) -> None:
        """Append tokens to the text; they are read when something is to follow them."""
        self._unread += tokens

    def forget_last(self) -> None:
        """Take back the last token that was written, if the state does not hold it yet."""
        self._unread = self._unread[:-1]

    def settle(self) -> "State":
        """The state after all tokens of the text; it moves on with the text."""
        import torch

        from rwkv.decoder import owned, read_one
        from rwkv.reading import read_to_the_end

        with evaluating(self.model):
            if len(self._unread) == 1 and self.state is not None:
                tokens = torch.tensor(self._unread, device=self.model.device)
                self._hidden = read_one(self.model, tokens, self.state)
            elif self._unread:
                self._hidden, state = read_to_the_end(self.model, [self._unread], self.state)
                _check_finite(self.model, self._hidden)
                self.state = owned(state)
        self._unread = []
        if self.state is None:
            self.state = owned(self.model.initial_state(1))
        return self.state

    def write(self, *, max_tokens: int, stop: Stop = ()) -> "Generator[str, None, Writing]":
        """Let the model continue.

        Yields:
            the text as it becomes certain, the stop not included.

        Returns:
            the finished Writing.

        Raises:
            ValueError: nothing was read yet.
        """
        import torch

        writing = Writing(self.tokenizer, stop, max_tokens)
        self._picker.forget_counts()
        while not writing.done:
            self.settle()
            if self._hidden is None:
                raise ValueError("the text is empty; read a token first")
            with torch.no_grad():
                token = int(self._picker.pick(self._hidden))
            self._unread = [token]
            if piece := writing.add(token):
                yield piece
        return writing


class Writing:
    """What one row has written.

    Attributes:
        tokens: all tokens so far.
        text: what they say, as far as it cannot become part of a stop any more.
        ended_by: the stop that ended it, a token id or a string; None for none yet.
        done: whether it has ended or reached its limit.
    """

    def __init__(self, tokenizer: "Tokenizer | None", stop: Stop, max_tokens: int):
        self.tokens: list[int] = []
        self.text = ""
        self.ended_by: int | str | None = None
        self._limit = max_tokens
        self._stop_tokens = {mark for mark in stop if isinstance(mark, int)}
        self._stop_texts = [mark for mark in stop if isinstance(mark, str) and mark]
        self._held = ""  # may be the beginning of a stop
        self._decoder = None
        if tokenizer is not None:
            from rwkv.tokenizer import StreamDecoder

            self._decoder = StreamDecoder(tokenizer)
            if tokenizer.end_of_text is not None:
                self._stop_tokens.add(tokenizer.end_of_text)
        elif self._stop_texts:
            raise ValueError(f"stop {self._stop_texts[0]!r}: needs the tokenizer to be found")

    @property
    def done(self) -> bool:
        return self.ended_by is not None or len(self.tokens) >= self._limit

    def add(self, token: int) -> str:
        """Append a token; returns the text that became certain, often none."""
        self.tokens.append(token)
        if token in self._stop_tokens:
            self.ended_by = token
        elif self._decoder is not None:
            self._held += self._decoder.push(token)
        if self.done and self._decoder is not None:
            self._held += self._decoder.finish()
        certain = self._certain()
        self.text, self._held = self.text + certain, self._held[len(certain) :]
        return certain

    def _certain(self) -> str:
        """The part of the held text before a stop, or before what may become one."""
        found = [(self._held.find(mark), mark) for mark in self._stop_texts if mark in self._held]
        if found:
            at, self.ended_by = min(found)
            return self._held[:at]
        if self.done:
            return self._held
        longest = max((len(mark) for mark in self._stop_texts), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(mark.startswith(self._held[-length:]) for mark in self._stop_texts):
                return self._held[:-length]
        return self._held


def banned_tokens(
    model: "RWKV", tokenizer: "Tokenizer | None", forbidden: Sequence[int] = ()
) -> "Tensor | None":
    """True for the ids, [V], that must not be written: those given, and what no tokenizer knows."""
    import torch

    known = model.config.vocab_size if tokenizer is None else tokenizer.vocab_size
    banned = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    banned[list(forbidden)] = True
    banned[known:] = True
    return banned.to(model.device) if banned.any() else None


@contextmanager
def evaluating(model: "RWKV") -> Iterator[None]:
    """Within the block the model is in eval mode: no dropout."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _check_prompts(prompts: Sequence[Sequence[int]]) -> None:
    for number, prompt in enumerate(prompts, start=1):
        if not prompt:
            raise ValueError(f"prompt {number} is empty; give at least one token")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m rwkv.generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(parser)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="the text to continue")
    prompt.add_argument("--prompt_file", type=Path, help="a .jsonl file of prompts, or one prompt")
    parser.add_argument("--tokens", type=int, default=200, help="tokens to write at most (200)")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="stop here; may be repeated"
    )
    parser.add_argument("--batch_size", type=int, default=64, help="prompts at once (64)")
    add_template_arguments(
        parser, "", "answer the prompts as rwkv.chat does: auto, world, g1, plain or a .json file"
    )
    add_sampling_arguments(parser)
    options = parser.parse_args(argv)
    for name in ("tokens", "batch_size"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name} {getattr(options, name)}: needs to be at least 1; raise it")
    if options.turn_end and not options.template:
        raise InputError("--turn_end: has no effect without --template; add it, or drop it")
    sampling = sampling_of(options)

    many = options.prompt_file is not None and options.prompt_file.suffix == ".jsonl"
    if many:
        records = read_prompts(options.prompt_file)
    else:
        text = options.prompt if options.prompt is not None else read_text(options.prompt_file)
        records = [{"prompt": text}]
    model, tokenizer = open_model(options, merged=True)
    template = None
    if options.template:
        from rwkv.templates import load_template

        template = load_template(options.template, tokenizer, options.turn_end or None)
        if template.turn_end != "eot":
            options.stop.append(template.roles["assistant"].suffix)
    prompts = [_prompt_tokens(record["prompt"], tokenizer, template) for record in records]
    if not many:
        stream = TextStream(model, tokenizer, sampling=sampling, seed=options.seed)
        stream.read(prompts[0])
        begun = template is None  # an answer begins behind the blank that the template has there
        for piece in stream.write(max_tokens=options.tokens, stop=options.stop):
            shown = piece if begun else piece.lstrip(" ")
            begun = begun or bool(shown)
            print(shown, end="", flush=True)  # noqa: T201
        print()  # noqa: T201
        return 0
    written = generate(
        model,
        prompts,
        max_tokens=options.tokens,
        tokenizer=tokenizer,
        stop=options.stop,
        sampling=sampling,
        seed=options.seed,
        batch_size=options.batch_size,
    )
    for record, answer in zip(records, written, strict=True):
        text = answer.text if template is None else answer.text.strip()
        record |= {"completion": text, "ended": answer.ended}
        print(json.dumps(record, ensure_ascii=False))  # noqa: T201
    return 0


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file, each with a string `prompt`.

    Raises:
        InputError: a line is no such object; the message names it.
    """
    records = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        record = parse_json(path, line, number)
        if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
            raise InputError(
                f"{path}:{number}: is no prompt; write an object with a string 'prompt'"
            )
        records.append(record)
    if not records:
        raise InputError(f"{path}: has no prompts; write an object with a 'prompt' a line")
    return records


def _prompt_tokens(
    text: str, tokenizer: "Tokenizer", template: "Template | None" = None
) -> list[int]:
    """The prompt's tokens, with a template those up to the answer; an empty one is the end of
    the text before."""
    if template is None:
        tokens = tokenizer.encode(text)
    else:
        from rwkv.templates import Message

        tokens = template.encode_prompt([Message("user", text)], tokenizer)
    if not tokens and tokenizer.end_of_text is None:
        raise InputError(
            f"--prompt: is empty, and the tokenizer {tokenizer.name} has no end of text to begin "
            "from; give at least one character"
        )
    return tokens or [int(tokenizer.end_of_text or 0)]


if __name__ == "__main__":
    sys.exit(run(main))
