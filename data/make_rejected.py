"""Let a model write the rejected answers of preference data, many prompts at once.

    python -m data.make_rejected --input prompts.csv --output pairs.jsonl --load_model MODEL.pth

Reads records with a prompt and a chosen answer (.jsonl, .json or .csv, as for make_pairs; an old
`rejected` or `reject` is written anew) and writes JSON Lines with `rejected` added, `samples` lines
a record. Answers equal to the chosen one, its thought included where the template writes thoughts,
empty ones and repeated ones are left out and counted. Thoughts and weights stay.
A command that was killed goes on where it stopped; what a prompt gets depends on --seed and its
place in the file alone.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rwkv.cli import Parser, run
from rwkv.errors import InputError

if TYPE_CHECKING:
    from data.pair_records import TextPair
    from rwkv.generate import Continuation
    from rwkv.model import RWKV
    from rwkv.sampling_flags import Sampling
    from rwkv.templates import Message, Template
    from rwkv.tokenizer import Tokenizer

PROMPTS_A_PART = 1024  # prompts between two writes: what a kill can lose


def main(argv: list[str] | None = None) -> int:
    from data.make_pairs import add_template_arguments
    from rwkv.runner import add_model_arguments, open_model
    from rwkv.sampling_flags import add_sampling_arguments, sampling_of

    parser = Parser(
        prog="python -m data.make_rejected",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--input", type=Path, required=True, help="prompts with chosen answers")
    parser.add_argument("--output", type=Path, required=True, help="the .jsonl file to write")
    parser.add_argument("--samples", type=int, default=1, help="rejected answers a prompt (1)")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of an answer at most (512)")
    parser.add_argument("--batch_size", type=int, default=256, help="answers at once (256)")
    add_template_arguments(parser)
    add_model_arguments(parser)
    add_sampling_arguments(parser, top_p=0.3, presence_penalty=0.3, frequency_penalty=0.3)
    options = parser.parse_args(argv)
    for name in ("samples", "tokens", "batch_size"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name} {getattr(options, name)}: needs to be at least 1; raise it")
    if options.output.suffix != ".jsonl":
        raise InputError(f"--output {options.output}: is no .jsonl file; give it that ending")
    if options.output.exists():
        raise InputError(f"--output {options.output}: exists; remove it or choose another")

    from rwkv.templates import load_template

    sampling = sampling_of(options)
    model, tokenizer = open_model(options, merged=True)
    template = load_template(options.template, tokenizer, options.turn_end)
    counts = write_rejected(options, model, tokenizer, template, sampling)
    notes = "".join(f"; {count:,} {what}" for what, count in counts.items() if what != "written")
    print(f"{options.output}: {counts['written']:,} pairs{notes}")  # noqa: T201
    return 0


def write_rejected(
    options: argparse.Namespace,
    model: "RWKV",
    tokenizer: "Tokenizer",
    template: "Template",
    sampling: "Sampling",
) -> Counter[str]:
    """Write the file; returns how many pairs were written, and how many left out and why.

    Finished parts are kept beside the output until all are there.

    Raises:
        InputError: the input has no records, or one that cannot be read.
    """
    from data.pair_records import parse_prompt, read_text_pairs
    from data.progress import Progress
    from rwkv.files import remove, replacing

    records = list(read_text_pairs(options.input, parse=parse_prompt))
    if not records:
        raise InputError(f"{options.input}: has no records; is it the right file?")
    prompts = [template.encode_prompt(pair.context(), tokenizer) for _, pair in records]
    folder = options.output.with_name(f".{options.output.name}.parts-{run_key(options)}")
    progress, counts = Progress(f"answering {options.input.name}"), Counter[str]()
    for first in range(0, len(records), PROMPTS_A_PART):
        part = folder / f"{first}.jsonl"
        if not part.exists():
            last = min(first + PROMPTS_A_PART, len(records))
            answers = [
                json.dumps(line, ensure_ascii=False) + "\n"
                for line in answer(
                    options, model, tokenizer, template, sampling, records, prompts, first, last
                )
            ]
            with replacing(part) as beside:
                beside.write_text("".join(answers), encoding="utf-8")
        progress(first + PROMPTS_A_PART, max(len(records), first + PROMPTS_A_PART), first)
    progress.finish()
    with replacing(options.output) as beside, beside.open("w", encoding="utf-8") as output:
        for first in range(0, len(records), PROMPTS_A_PART):
            with (folder / f"{first}.jsonl").open(encoding="utf-8") as lines:
                for text in lines:
                    skipped = json.loads(text).get("left out")
                    counts[skipped or "written"] += 1
                    if not skipped:
                        output.write(text)
    remove(folder)
    return counts


def run_key(options: argparse.Namespace) -> str:
    """Equal where a killed command may be gone on with: all that decides the answers."""
    import hashlib

    from data.reference_scores import file_fingerprint
    from rwkv.checkpoint import fingerprint, read_tensors

    given = {name: str(value) for name, value in vars(options).items() if name != "batch_size"}
    given["input"] = file_fingerprint(options.input)
    given["load_model"] = fingerprint(read_tensors(options.load_model))
    for name in ("adapter", "state"):
        given[name] = file_fingerprint(given[name]) if getattr(options, name) else ""
    return hashlib.blake2b(json.dumps(given).encode(), digest_size=6).hexdigest()


def answer(
    options: argparse.Namespace,
    model: "RWKV",
    tokenizer: "Tokenizer",
    template: "Template",
    sampling: "Sampling",
    records: list[Any],
    prompts: list[list[int]],
    first: int,
    last: int,
) -> Iterator[dict[str, Any]]:
    """The lines of the records first to last - 1; a sample that is left out says why."""
    written = sample_answers(
        model,
        prompts[first:last],
        tokenizer,
        template,
        samples=options.samples,
        tokens=options.tokens,
        sampling=sampling,
        seed=options.seed + first,
        batch_size=options.batch_size,
    )
    for (_, pair), found in zip(records[first:last], written, strict=True):
        chosen, known = template.answer(pair.chosen[0]).strip(), set[str]()
        for continuation in found:
            text = continuation.text.strip()
            reason = why_left_out(text, chosen, known)
            known.add(text)
            yield {"left out": reason} if reason else pair_line(pair, text, continuation.ended)


def sample_answers(
    model: "RWKV",
    prompts: list[list[int]],
    tokenizer: "Tokenizer",
    template: "Template",
    *,
    samples: int,
    tokens: int,
    sampling: "Sampling",
    seed: int,
    batch_size: int = 256,
) -> "list[list[Continuation]]":
    """`samples` answers to each prompt, each up to what ends an answer in the template."""
    from rwkv.generate import generate

    stop = [template.roles["assistant"].suffix] if template.roles["assistant"].suffix else []
    found = generate(
        model,
        [prompt for prompt in prompts for _ in range(samples)],
        max_tokens=tokens,
        tokenizer=tokenizer,
        stop=stop,
        sampling=sampling,
        seed=seed,
        batch_size=batch_size,
    )
    return [found[n : n + samples] for n in range(0, len(found), samples)]


def why_left_out(text: str, chosen: str, known: set[str]) -> str:
    """Why a sampled answer makes no pair; "" where it does."""
    if not text:
        return "left out, empty"
    if text == chosen:
        return "left out, equal to chosen"
    return "left out, written before" if text in known else ""


def pair_line(pair: "TextPair", rejected: str, ended: bool) -> dict[str, Any]:
    """A record of the output; `ended` says whether the answer came to its end by itself."""
    prompt: Any = [_turn(message) for message in pair.prompt]
    answer = _turn(pair.chosen[0])
    line: dict[str, Any] = {}
    if len(pair.prompt) > 1 and pair.prompt[0].role == "system":
        line["system"], prompt = pair.prompt[0].text, prompt[1:]
    if len(prompt) == 1 and prompt[0]["role"] == "user":
        prompt = prompt[0]["content"]
    return line | {
        "prompt": prompt,
        "chosen": answer["content"] if len(answer) == 2 else [answer],
        "rejected": rejected,
        "ended": ended,
        **({} if pair.weight is None else {"weight": pair.weight}),
    }


def _turn(message: "Message") -> dict[str, Any]:
    """A message as a record has it: role and content; thought and weight where there are any."""
    turn: dict[str, Any] = {"role": message.role, "content": message.text}
    if message.thought:
        turn["reasoning_content"] = message.thought
    return turn if message.scored else turn | {"weight": 0}


if __name__ == "__main__":
    sys.exit(run(main))
