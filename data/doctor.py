"""Say what a preference file is and what is wrong with it; --fix writes a good one.

    python -m data.doctor pairs.csv
    python -m data.doctor old.save --fix good.save

Looks for records that cannot be read, empty or equal answers, duplicates, answers that look cut
off, chosen answers that are mostly the longer ones (a model then learns length), and reference
scores that are sums where averages are meant, or one token off. --fix leaves out what cannot be
trained on and writes .jsonl (from .jsonl, .json, .csv) or .save without reference scores (from
.save, .h5). The status is 1 if something was found and not mended.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rwkv.cli import Parser, run
from rwkv.errors import InputError

if TYPE_CHECKING:
    from rwkv.templates import Message

LONGER_SHARE = 0.7  # of pairs with the longer chosen answer, from which length is what is learned
CUT_SHARE = 0.05  # of answers without an end, from which a limit of length is likely
FORMAT_SHARE = 0.5  # of answers without an end, from which answers have none by their form
GROWTH = 0.3  # power of the length with which sums grow (near 1) and averages do not (near 0)
BETA = 0.01  # RWKV-LM-RLHF's usual one, for the size of what a wrong reference does


@dataclass
class Record:
    """A record as far as it can be compared: three texts, or three lists of tokens.

    line: its line, or its number in files of tokens.
    reference: the file's reference scores, if it has any.
    source: what --fix writes.
    """

    line: int
    prompt: Any
    chosen: Any
    rejected: Any
    reference: tuple[float, float] | None
    source: Any


@dataclass
class Findings:
    """What is known of a file.

    kind: what the file is, in words.
    unread: line and reason of each record that cannot be read.
    drop: numbers of the records that --fix leaves out, and why.
    problems, remarks: sentences for the user; remarks are no fault.
    """

    kind: str
    records: list[Record]
    unread: list[str] = field(default_factory=list)
    drop: dict[int, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m data.doctor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, help="a preference file")
    parser.add_argument(
        "--fix", type=Path, metavar="OUT", help="write a good file here; must not exist"
    )
    parser.add_argument("--tokenizer", default="world", help="of .save and .h5 files (world)")
    options = parser.parse_args(argv)

    if options.fix is not None and options.fix.resolve() == options.file.resolve():
        raise InputError(f"--fix {options.fix}: is the file itself; choose another name")
    if options.fix is not None and options.fix.exists():
        raise InputError(f"--fix {options.fix}: exists; remove it or choose another")

    findings = examine(options.file, options.tokenizer)
    print(f"{options.file}: {findings.kind}, {len(findings.records):,} records")  # noqa: T201
    for sentence in findings.remarks:
        print(f"  {sentence}")  # noqa: T201
    for sentence in findings.problems:
        print(f"  PROBLEM: {sentence}")  # noqa: T201
    if not findings.problems:
        print("  no problem found")  # noqa: T201
    if options.fix is None:
        return 1 if findings.problems else 0
    kept = write_fixed(findings, options.fix)
    print(  # noqa: T201
        f"{options.fix}: {kept:,} records written, "
        f"{len(findings.records) + len(findings.unread) - kept:,} left out"
    )
    return 0


def examine(path: Path, tokenizer: str = "world") -> Findings:
    """Read a file and look for what is wrong with it.

    Raises:
        DataError: it cannot be read at all.
    """
    findings = _read(path, tokenizer)
    _find_unusable(findings)
    pairs = [r for n, r in enumerate(findings.records) if n not in findings.drop]
    pairs = [record for record in pairs if len(record.chosen) and len(record.rejected)]
    if findings.unread:
        shown = "; ".join(findings.unread[:3])
        findings.problems.insert(0, f"{_count(findings.unread)} cannot be read: {shown}")
    elif not findings.records:
        findings.problems.append("it has no records")
    if pairs:
        _look_at_lengths(pairs, findings)
        _look_at_ends(pairs, findings)
        _look_at_references(path, pairs, findings)
    return findings


def _read(path: Path, tokenizer: str) -> Findings:
    from data.store_cache import H5_SUFFIXES
    from data.upstream_pairs import SAVE_SUFFIX, read_pairs_h5, read_save
    from rwkv.tokenizer import load_tokenizer

    if path.suffix.lower() == SAVE_SUFFIX:
        kind, found = "RWKV-LM-RLHF's .save", read_save(path, load_tokenizer(tokenizer))
    elif path.suffix.lower() in H5_SUFFIXES:
        kind = "RWKV-LM-RLHF's preference .h5"
        found = read_pairs_h5(path, load_tokenizer(tokenizer))
    else:
        return _read_texts(path)
    records = [
        Record(n, p.prompt, p.chosen, p.rejected, (p.ref_chosen, p.ref_rejected), p)
        for n, p in enumerate(found)
    ]
    return Findings(f"{kind}, tokens", records)


def _read_texts(path: Path) -> Findings:
    from data.pair_records import parse_pair
    from data.records import DataError, RecordFile, parse_json

    findings = Findings(f"{path.suffix.lstrip('.')} file of texts", [])
    for raw in RecordFile(path):
        try:
            value = parse_json(path, raw)
            pair = parse_pair(value, f"line {raw.line}")
        except DataError as error:
            findings.unread.append(str(error).removeprefix(f"{path}:"))
            continue
        prompt = "\n".join(f"{message.role}: {_said(message)}" for message in pair.prompt)
        chosen, rejected = (_said(side[0]) if side else "" for side in (pair.chosen, pair.rejected))
        findings.records.append(Record(raw.line, prompt, chosen, rejected, None, value))
    return findings


def _said(message: "Message") -> str:
    """A message's text, behind its thought if it has one."""
    return f"{message.thought}\n{message.text}" if message.thought else message.text


def _find_unusable(findings: Findings) -> None:
    """Empty and equal answers and duplicates: what --fix leaves out."""
    seen: dict[Any, int] = {}
    prompts = Counter[Any]()
    for number, record in enumerate(findings.records):
        key = tuple(_hashable(part) for part in (record.prompt, record.chosen, record.rejected))
        labelled = isinstance(record.source, dict) and "label" in record.source
        if not record.prompt or not (labelled or (record.chosen and record.rejected)):
            findings.drop[number] = "with an empty prompt or answer"
        elif key[1] == key[2]:
            findings.drop[number] = "whose answers are equal"
        elif key in seen:
            findings.drop[number] = "that repeat an earlier one"
        seen.setdefault(key, number)
        prompts[key[0]] += 1
    for reason in dict.fromkeys(findings.drop.values()):
        numbers = [number for number, why in findings.drop.items() if why == reason]
        where = ", ".join(str(findings.records[number].line) for number in numbers[:5])
        findings.problems.append(f"{_count(numbers)} {reason} (at {where})")
    again = sum(count - 1 for count in prompts.values())
    if again:
        findings.remarks.append(f"{again:,} records have a prompt that came before")


def _look_at_lengths(pairs: Sequence[Record], findings: Findings) -> None:
    unit = "characters" if isinstance(pairs[0].chosen, str) else "tokens"
    means = [sum(len(getattr(p, n)) for p in pairs) / len(pairs) for n in ("chosen", "rejected")]
    findings.remarks.append(f"{unit} on average: {means[0]:,.0f} chosen, {means[1]:,.0f} rejected")
    longer = sum(len(pair.chosen) > len(pair.rejected) for pair in pairs) / len(pairs)
    shorter = sum(len(pair.chosen) < len(pair.rejected) for pair in pairs) / len(pairs)
    if len(pairs) >= 10 and longer >= LONGER_SHARE:
        findings.problems.append(
            f"chosen is the longer answer in {longer:.0%} of the pairs, so that length is learned; "
            "use --dpo_loss length-normalized or --simpo, or balance the data"
        )
    elif len(pairs) >= 10 and shorter >= LONGER_SHARE:
        findings.problems.append(
            f"rejected is the longer answer in {shorter:.0%} of the pairs, so that shortness is "
            "learned; use --dpo_loss length-normalized or --simpo, or balance the data"
        )


def _look_at_ends(pairs: Sequence[Record], findings: Findings) -> None:
    """Answers that look cut off: no end of a sentence, or not the token that ends most answers."""
    answers = {name: [getattr(pair, name) for pair in pairs] for name in ("chosen", "rejected")}
    both = answers["chosen"] + answers["rejected"]
    common = None
    if not isinstance(both[0], str):
        common, times = Counter(answer[-1] for answer in both).most_common(1)[0]
        if times < len(both) / 2:
            findings.remarks.append("the answers have no last token in common")
            return
    for name, some in answers.items():
        cut = sum(_is_cut(answer, common) for answer in some)
        lengths = sorted(len(answer) for answer in some)
        longest, usual = lengths[-1], lengths[len(lengths) // 2]
        at_limit = lengths.count(longest) if longest > 2 * usual else 0
        if CUT_SHARE < cut / len(some) < FORMAT_SHARE and len(some) >= 10:
            findings.problems.append(
                f"{cut:,} of {len(some):,} {name} answers look cut off (no end of a sentence or of "
                "a turn); a model learns to stop there"
            )
        elif at_limit >= 3 and at_limit / len(some) > CUT_SHARE:
            findings.problems.append(
                f"{at_limit:,} {name} answers have the same greatest length of {longest:,}: cut at "
                "a limit?"
            )


def _is_cut(answer: Any, common: Any) -> bool:
    if isinstance(answer, str):
        text = answer.rstrip()
        return len(text.split()) > 5 and (text[-1].islower() or text[-1] in ",;-")
    return answer[-1] != common


def _look_at_references(path: Path, pairs: Sequence[Record], findings: Findings) -> None:
    import numpy as np

    if pairs[0].reference is None:
        return
    scores = np.array([pair.reference for pair in pairs])
    lengths = np.array([[len(pair.chosen), len(pair.rejected)] for pair in pairs])
    if np.unique(scores).size == 1:
        findings.remarks.append(f"no reference scores (all are {scores[0, 0]:g})")
        return
    if path.suffix != ".save":
        findings.problems.append(
            "reference scores are averages that RWKV-LM-RLHF's script takes one token off; score "
            "the pairs again with python -m data.make_reference"
        )
        return
    slope = _growth_with_length(lengths.ravel(), -scores.ravel())
    a_token = float(np.median(-scores / lengths))
    if slope < GROWTH:
        findings.problems.append(
            "reference scores are averages over an answer's tokens; DPO needs sums: score the "
            "pairs again with python -m data.make_reference"
        )
        return
    offset = BETA * (scores[:, 1] - scores[:, 0])
    findings.problems.append(
        f"reference scores are SUMS over an answer's tokens (they grow with length to the power "
        f"{slope:.2f}, {a_token:.2f} nats a token), and RWKV-LM-RLHF's trainer compares them with "
        f"averages: at beta {BETA} pairs start {offset.min():+.1f} to {offset.max():+.1f} from "
        "where they belong, by length and not by preference; train.py does not use them, score "
        "the pairs with python -m data.make_reference"
    )


def _growth_with_length(lengths: Any, values: Any) -> float:
    """p of the best fit of values to length^p: near 1 for sums, near 0 for averages."""
    import numpy as np

    fine = (values > 0) & (lengths > 0)
    if np.unique(lengths[fine]).size < 2:
        return 0.0
    return float(np.polyfit(np.log(lengths[fine]), np.log(values[fine]), 1)[0])


def write_fixed(findings: Findings, output: Path) -> int:
    """Write the records that can be trained on; returns how many.

    Raises:
        InputError: the ending of `output` does not suit the file, or there is nothing to write.
    """
    import json

    from data.upstream_pairs import NO_REFERENCE, SAVE_SUFFIX, write_save
    from rwkv.files import replacing

    tokens = findings.kind.endswith("tokens")
    wanted = SAVE_SUFFIX if tokens else ".jsonl"
    if output.suffix.lower() != wanted:
        raise InputError(
            f"--fix {output}: needs the ending {wanted} for this kind of file; rename it"
        )
    kept = [record for n, record in enumerate(findings.records) if n not in findings.drop]
    if not kept:
        raise InputError(
            f"--fix {output}: not written, for no record can be trained on; is it the right file?"
        )
    if tokens:
        bare = {"ref_chosen": NO_REFERENCE, "ref_rejected": NO_REFERENCE}
        write_save(output, [record.source._replace(**bare) for record in kept])
        return len(kept)
    with replacing(output) as beside, beside.open("w", encoding="utf-8") as file:
        for line in map(_good_line, kept):
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    return len(kept)


def _good_line(record: Record) -> dict[str, Any]:
    """The record with `rejected` in the place of `reject`."""
    items: Iterator[tuple[str, Any]] = iter(record.source.items())
    return {"rejected" if key == "reject" else key: value for key, value in items}


def _hashable(part: Any) -> Any:
    return part.strip() if isinstance(part, str) else tuple(part)


def _count(some: Sequence[Any]) -> str:
    return f"{len(some):,} record{'' if len(some) == 1 else 's'}"


if __name__ == "__main__":
    sys.exit(run(main))
