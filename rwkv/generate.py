"""Let a model write: many texts at once, or one as a stream; each keeps a state and nothing else.

    python -m rwkv.generate --load_model MODEL.pth --prompt "Once upon a time" --tokens 100
    python -m rwkv.generate --load_model MODEL.pth --prompt_file PROMPTS.jsonl > ANSWERS.jsonl

A .jsonl file has an object with a `prompt` a line; the output has the same objects with
`completion` and `ended` (whether it stopped by itself) added, in the same order. Any other file is
one prompt. The prompt is continued as it is, without a template; for dialogue see rwkv.chat.
"""

import argparse
import json
import sys
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rwkv.errors import InputError
from rwkv.runner import add_model_arguments, open_model
from rwkv.sampling_flags import GREEDY, Sampling, add_sampling_arguments, sampling_of

if TYPE_CHECKING:
    from torch import Tensor

    from rwkv.model import RWKV
    from rwkv.state import State
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
) -> list[Continuation]:
    """Continue every prompt.

    Prompts are read packed; a row that has ended leaves the batch, and once half of the rows are
    free the next prompts take their place. What a row draws depends on `seed` and its number
    alone, so that `batch_size` changes the speed but not the texts.

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

    Returns:
        a continuation a prompt, in their order.

    Raises:
        ValueError: a prompt is empty, or a stop is a string and there is no tokenizer.
    """
    import torch

    from rwkv.reading import join, read_to_the_end, select

    _check_prompts(prompts)
    writings = [Writing(tokenizer, stop, max_tokens) for _ in prompts]
    picker = Picker(model, sampling, seed, banned_tokens(model, tokenizer, forbidden))
    waiting = deque(range(len(prompts) if max_tokens > 0 else 0))
    rows: list[int] = []
    state: State = []
    with evaluating(model), torch.no_grad():
        hidden = model.ln_out.weight.new_zeros(0, model.config.n_embd)
        while rows or waiting:
            if waiting and len(rows) <= batch_size // 2:
                new = [waiting.popleft() for _ in range(min(len(waiting), batch_size - len(rows)))]
                found, after = read_to_the_end(model, [prompts[row] for row in new])
                hidden = torch.cat([hidden, found])
                state = join([state, after] if rows else [after])
                rows += new
                picker.add_rows(new)
            tokens = picker.pick(hidden)
            for row, token in zip(rows, tokens.tolist(), strict=True):
                writings[row].add(token)
            going = [n for n, row in enumerate(rows) if not writings[row].done]
            if len(going) < len(rows):
                rows = [rows[n] for n in going]
                state, tokens = select(state, going), tokens[going]
                picker.keep_rows(going)
            if rows:
                out, state = model(tokens.unsqueeze(1), state)
                hidden = out[:, 0]
            else:
                hidden = hidden[:0]
    return [Continuation(w.tokens, w.text, w.ended_by is not None) for w in writings]


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
        self.model, self.tokenizer = model, tokenizer
        self.state: State | None = None
        self._hidden: Tensor | None = None
        self._unread: list[int] = []  # the state does not know of these tokens yet
        self._picker = Picker(model, sampling, seed, banned_tokens(model, tokenizer))
        self._picker.add_rows([0])

    def read(self, tokens: Sequence[int]) -> None:
        """Append tokens to the text; they are read when something is to follow them."""
        self._unread += tokens

    def forget_last(self) -> None:
        """Take back the last token that was written, if the state does not hold it yet."""
        self._unread = self._unread[:-1]

    def settle(self) -> "State":
        """The state after all tokens of the text."""
        from rwkv.reading import read_to_the_end

        if self._unread:
            with evaluating(self.model):
                self._hidden, self.state = read_to_the_end(self.model, [self._unread], self.state)
            self._unread = []
        if self.state is None:
            self.state = self.model.initial_state(1)
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


class Picker:
    """Picks the next token of each row of a batch whose rows come and go."""

    def __init__(self, model: "RWKV", sampling: Sampling, seed: int, banned: "Tensor | None"):
        import torch

        self.model, self.sampling, self.seed, self.banned = model, sampling, seed, banned
        device = model.emb.weight.device
        self._rows = torch.zeros(0, dtype=torch.long, device=device)
        self._steps = self._rows
        width = model.config.vocab_size if sampling.counts else 0
        self._counts = torch.zeros(0, width, device=device)

    def add_rows(self, numbers: Sequence[int]) -> None:
        """Append rows that have written nothing yet; their draws depend on their numbers."""
        import torch

        new = torch.tensor(numbers, device=self._rows.device)
        self._rows = torch.cat([self._rows, new])
        self._steps = torch.cat([self._steps, torch.zeros_like(new)])
        self._counts = torch.cat([self._counts, self._counts.new_zeros(len(new), self._width)])

    @property
    def _width(self) -> int:
        return self._counts.shape[1]

    def keep_rows(self, places: Sequence[int]) -> None:
        """Keep these of the rows, in this order."""
        self._rows, self._steps = self._rows[places], self._steps[places]
        self._counts = self._counts[places]

    def forget_counts(self) -> None:
        """Penalties start anew."""
        self._counts = self._counts.new_zeros(self._counts.shape)

    def pick(self, hidden: "Tensor") -> "Tensor":
        """The rows' next tokens [B], from the hidden states [B, C] after their last."""
        from rwkv.sampling import count_tokens, pick_tokens, uniform_numbers

        counts = self._counts if self.sampling.counts else None
        tokens = pick_tokens(
            self.model.logits(hidden),
            self.sampling,
            uniform_numbers(self.seed, self._rows, self._steps),
            counts=counts,
            forbidden=self.banned,
        )
        self._steps = self._steps + 1
        if counts is not None:
            self._counts = count_tokens(counts, tokens, self.sampling)
        return tokens


def banned_tokens(
    model: "RWKV", tokenizer: "Tokenizer | None", forbidden: Sequence[int] = ()
) -> "Tensor | None":
    """The ids that must not be written: those given and those that the tokenizer lacks."""
    import torch

    known = model.config.vocab_size if tokenizer is None else tokenizer.vocab_size
    banned = sorted({*forbidden, *range(known, model.config.vocab_size)})
    return torch.tensor(banned, device=model.emb.weight.device) if banned else None


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
    parser = argparse.ArgumentParser(
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
    add_sampling_arguments(parser)
    options = parser.parse_args(argv)
    if options.batch_size < 1:
        raise InputError(f"--batch_size {options.batch_size}: needs to be at least 1")
    sampling = sampling_of(options)

    many = options.prompt_file is not None and options.prompt_file.suffix == ".jsonl"
    if many:
        records = read_prompts(options.prompt_file)
    else:
        text = options.prompt if options.prompt is not None else read_text(options.prompt_file)
        records = [{"prompt": text}]
    model, tokenizer = open_model(options, merged=True)
    prompts = [_prompt_tokens(record["prompt"], tokenizer) for record in records]
    if not many:
        stream = TextStream(model, tokenizer, sampling=sampling, seed=options.seed)
        stream.read(prompts[0])
        for piece in stream.write(max_tokens=options.tokens, stop=options.stop):
            print(piece, end="", flush=True)  # noqa: T201
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
        record |= {"completion": answer.text, "ended": answer.ended}
        print(json.dumps(record, ensure_ascii=False))  # noqa: T201
    return 0


def read_text(path: Path) -> str:
    """The text of a file in UTF-8.

    Raises:
        InputError: it is missing or not UTF-8.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; check the path")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not UTF-8 (byte 0x{error.object[error.start]:02x}); save the file as UTF-8"
        ) from None


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file, each with a string `prompt`.

    Raises:
        InputError: a line is no such object; the message names it.
    """
    records = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{path}:{number}: not JSON ({error.msg} at column {error.colno})"
            ) from None
        if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
            raise InputError(f"{path}:{number}: needs an object with a string 'prompt'")
        records.append(record)
    return records


def _prompt_tokens(text: str, tokenizer: "Tokenizer") -> list[int]:
    """The prompt's tokens; an empty one is the end of the text before."""
    tokens = tokenizer.encode(text)
    if not tokens and tokenizer.end_of_text is None:
        raise InputError(
            f"--prompt: is empty, and the tokenizer {tokenizer.name} has no end of text to begin "
            "from; give at least one character"
        )
    return tokens or [int(tokenizer.end_of_text or 0)]


if __name__ == "__main__":
    from rwkv.cli import run

    sys.exit(run(main))
