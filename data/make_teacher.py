"""Write a teacher's scores of every token of a data set, for --distillation.

    python -m data.make_teacher --load_model TEACHER.pth --data chats.jsonl --output chats.teacher

TEACHER is an RWKV model (with --adapter or --state if it has them), or the folder of a Hugging
Face causal model (it has a config.json; needs the package transformers) with the student's
vocabulary. Data are what train.py --train_data_file takes for --sft.

The output is a folder of shards. A command that was stopped goes on where it was when it is given
again; with --part 0/4, 1/4 and so on, several processes make the shards of one folder.
"""

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rwkv.cli import Parser, run
from rwkv.errors import InputError, RunError, not_finite
from rwkv.runner import add_model_arguments

if TYPE_CHECKING:
    from torch import Tensor

    from data.teacher_store import Scores
    from data.token_store import TokenStore
    from rwkv.tokenizer import Tokenizer

GROUP = 2**16  # tokens of texts handed to the teacher together
MAX_LOGITS = 2**26  # logits of a model of ours at once: 256 MiB in float32

# from texts to the teacher's logits of all their tokens, end to end, in parts [m, V]
Teacher = Callable[[Sequence[Sequence[int]]], "Iterator[Tensor]"]


class Shard(NamedTuple):
    """The records [first, last) and the folder of their scores."""

    name: str
    first: int
    last: int


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)

    from data.progress import Progress
    from data.store_cache import open_store
    from data.teacher_store import finish
    from data.token_store import META

    part, parts = _part(options.part)
    if options.top_k < 1 or options.shard_tokens < 1:
        raise InputError("--top_k and --shard_tokens: must be at least 1; raise them")
    if not all(0 < T < math.inf for T in options.temperature):
        given = " ".join(f"{T:g}" for T in options.temperature)
        raise InputError(f"--temperature {given}: must be above 0; give what train.py will have")
    teacher, tokenizer, fingerprint = open_teacher_model(options)
    store = open_store(options.data, options, tokenizer)
    k = min(options.top_k, tokenizer.vocab_size)
    meta = {
        **store_meta(store, tokenizer),
        "teacher": fingerprint,
        "k": k,
        "temperatures": sorted({T for T in options.temperature if T != 1}),
        "normalized": True,
        "shard_tokens": options.shard_tokens,
    }
    shards = plan_shards(store, options.shard_tokens)
    progress = Progress(f"scores into {options.output}")
    total = int(store.lengths.sum())
    done = 0
    for number, shard in enumerate(shards):
        if number % parts == part:
            make_shard(options.output, shard, store, teacher, meta)
        done += int(store.lengths[shard.first : shard.last].sum())
        progress(done, total, shard.last)
    progress.finish()
    names = [shard.name for shard in shards]
    missing = [name for name in names if not (options.output / name / META).is_file()]
    if missing:
        print(f"{options.output}: {len(missing)} of {len(names)} shards are still to come")  # noqa: T201
        return 0
    finish(options.output, names, meta)
    size = sum(file.stat().st_size for file in options.output.rglob("*") if file.is_file())
    print(  # noqa: T201
        f"{options.output}: {len(store):,} records, {total:,} tokens, k = {k}, "
        f"{len(names)} shard{'s' * (len(names) != 1)}, {size / total:.0f} bytes a token"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m data.make_teacher",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(parser)
    parser.add_argument("--data", required=True, help="files or token stores, commas between them")
    parser.add_argument("--output", type=Path, required=True, help="the folder to make")
    parser.add_argument("--top_k", type=int, default=50, help="scores a token (50)")
    parser.add_argument(
        "--temperature",
        type=float,
        nargs="+",
        default=[2.0],
        help="train.py --temperature, one or several, that the scores are to be exact for; 1 "
        "always is (2)",
    )
    parser.add_argument("--shard_tokens", type=int, default=2**20, help="tokens of a shard (2^20)")
    parser.add_argument("--part", default="0/1", help="make every N-th shard from the I-th: I/N")
    parser.add_argument("--template", default="auto", help="as train.py has it")
    parser.add_argument("--turn_end", default="", help="as train.py has it")
    parser.add_argument("--mask_prompt", type=int, choices=(0, 1), default=1, help="as train.py")
    parser.add_argument("--cache_dir", default="~/.cache/rwkv-lm-rlhf", help="as train.py has it")
    return parser


def _part(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise InputError(
            f"--part {text}: is no part; write I/N with I from 0 to N - 1, such as 0/4"
        )
    return int(part), int(parts)


def store_meta(store: "TokenStore", tokenizer: "Tokenizer") -> dict[str, Any]:
    """What meta.json of scores says of the tokens that they belong to."""
    first = store.metas[0]
    return {
        "tokenizer": tokenizer.name,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "end_of_text": tokenizer.end_of_text,
        "template_fingerprint": first["template_fingerprint"],
        "mask_prompt": first["mask_prompt"],
        "sources": [source for meta in store.metas for source in meta["sources"]],
        "text": store.fingerprint,
    }


def plan_shards(store: "TokenStore", shard_tokens: int) -> list[Shard]:
    """Neighbouring records together, until a shard has `shard_tokens`."""
    shards: list[Shard] = []
    first = tokens = 0
    for number, length in enumerate(store.lengths.tolist(), start=1):
        tokens += length
        if tokens >= shard_tokens or number == len(store):
            shards.append(Shard(f"shard-{len(shards):05}", first, number))
            first, tokens = number, 0
    return shards


def make_shard(
    output: Path, shard: Shard, store: "TokenStore", teacher: Teacher, meta: dict[str, Any]
) -> None:
    """Make a shard, unless it is there.

    Raises:
        InputError: it is there, of another teacher, text or other settings.
    """
    from data.teacher_store import TeacherStore, encoded, write_shard
    from data.token_store import is_store, read_meta
    from rwkv.files import remove

    folder = output / shard.name
    if is_store(folder):
        found = read_meta(folder, TeacherStore.kind)
        differ = [key for key, value in meta.items() if found.get(key) != value]
        if differ:
            key = differ[0]
            raise InputError(
                f"{folder}: was made with {key} {found.get(key)!r}, now it is {meta[key]!r}; "
                "choose another --output, or remove the folder"
            )
        return
    for left in output.glob(f".*{shard.name}.*.part"):  # of a command that was killed
        remove(left)
    groups = list(_groups(store, shard))
    write_shard(
        folder,
        (encoded(store, numbers) for numbers in groups),
        _scores(store, groups, teacher, meta["k"], meta["temperatures"]),
        meta,
    )


def _groups(store: "TokenStore", shard: Shard) -> Iterator[list[int]]:
    """The shard's records in groups of about GROUP tokens."""
    group: list[int] = []
    tokens = 0
    for number in range(shard.first, shard.last):
        group.append(number)
        tokens += int(store.lengths[number])
        if tokens >= GROUP:
            yield group
            group, tokens = [], 0
    if group:
        yield group


def _scores(
    store: "TokenStore",
    groups: list[list[int]],
    teacher: Teacher,
    k: int,
    temperatures: list[float],
) -> "Iterator[Scores]":
    for numbers in groups:
        texts = [store.record(number)[0].tolist() for number in numbers]
        for logits in teacher(texts):
            if not logits.isfinite().all():
                raise not_finite("scores")
            yield top_k_scores(logits, k, temperatures)


def top_k_scores(logits: "Tensor", k: int, temperatures: Sequence[float]) -> "Scores":
    """What is kept of logits [n, V]: see data/teacher_store.py."""
    import numpy as np
    import torch

    from data.teacher_store import Scores

    log_probs = torch.log_softmax(logits.float(), dim=-1)
    values, ids = log_probs.topk(k, dim=-1)
    lse = {T: torch.logsumexp(log_probs / T, dim=-1).cpu().numpy() for T in temperatures}
    return Scores(ids.cpu().numpy().astype(np.uint16), values.half().cpu().numpy(), lse)


def open_teacher_model(options: argparse.Namespace) -> "tuple[Teacher, Tokenizer, str]":
    """The teacher of --load_model, its tokenizer, and a hash of all that decides its scores."""
    if (options.load_model / "config.json").is_file():
        return _hugging_face(options)
    from rwkv.checkpoint import fingerprint, read_tensors
    from rwkv.reading import read_texts
    from rwkv.runner import open_model

    model, tokenizer = open_model(options)
    files = [options.load_model, *(f for f in (options.adapter, options.state) if f)]
    stored = {n: entry["storage"] for n, entry in read_tensors(files[0]).quantized.items()}
    made_of: list[Any] = [*(fingerprint(read_tensors(file)) for file in files), options.dtype]
    made_of += [stored] if stored else []
    made_of += [options.alpha] if options.alpha is not None else []

    def logits(texts: Sequence[Sequence[int]]) -> "Iterator[Tensor]":
        import torch

        rows = max(1, MAX_LOGITS // model.config.vocab_size)
        with torch.no_grad():
            for piece in read_texts(model, texts):
                for hidden in piece.hidden.split(rows):
                    yield model.logits(hidden)

    return (
        logits,
        tokenizer,
        hashlib.blake2b(json.dumps(made_of).encode(), digest_size=8).hexdigest(),
    )


def _hugging_face(options: argparse.Namespace) -> "tuple[Teacher, Tokenizer, str]":
    """A causal model of the package transformers, one text at a time.

    Raises:
        RunError: the package is missing.
        InputError: the folder cannot be read, or the vocabulary does not suit the tokenizer.
    """
    import torch

    from rwkv.runner import DTYPES
    from rwkv.tokenizer import load_tokenizer

    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise RunError(
            f"--load_model {options.load_model}: is a Hugging Face model, which needs the package "
            f"transformers ({error}); pip install transformers"
        ) from None
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    name = DTYPES.get(options.dtype, "bfloat16" if device.startswith("cuda") else "float32")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            options.load_model, torch_dtype=getattr(torch, name)
        )
    except (OSError, ValueError, KeyError) as error:
        why = " ".join(str(error).split())[:200]
        raise InputError(
            f"--load_model {options.load_model}: transformers cannot read it ({why}); is the "
            "folder whole?"
        ) from error
    model = model.to(device).eval()
    V = int(model.config.vocab_size)
    tokenizer = load_tokenizer(options.tokenizer or None, V)
    if tokenizer.vocab_size > V:
        raise InputError(
            f"--load_model {options.load_model}: scores {V} tokens, tokenizer {tokenizer.name} has "
            f"{tokenizer.vocab_size}; a teacher needs the student's vocabulary"
        )

    def logits(texts: Sequence[Sequence[int]]) -> "Iterator[Tensor]":
        rows = max(1, MAX_LOGITS // V)
        with torch.no_grad():
            for text in texts:
                found = model(torch.tensor([text], device=device)).logits[0]
                yield from found[:, : tokenizer.vocab_size].split(rows)

    digest = hashlib.blake2b((options.load_model / "config.json").read_bytes(), digest_size=8)
    for parameter in model.parameters():
        sample = parameter.detach().flatten()[:: max(1, parameter.numel() // 64)][:64].float()
        digest.update(sample.cpu().numpy().tobytes())
    return logits, tokenizer, digest.hexdigest()


if __name__ == "__main__":
    sys.exit(run(main))
