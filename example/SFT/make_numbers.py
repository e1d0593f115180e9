"""Make numbers to reverse, for the toy model whose vocabulary is `0123456789,#`.

    python example/SFT/make_numbers.py --output numbers.jsonl --lengths 55-72
    python example/SFT/make_numbers.py --output mixed.jsonl --lengths 1-50:1,51-60:2,61-72:3

A row is {"prompt": "1203,", "completion": "3021#"}. Within a range lengths are drawn evenly; the
number behind its colon says how often the range is drawn, beside the others.
"""

import argparse
import json
import random
import re
import sys
from pathlib import Path


def ranges(text: str) -> tuple[list[range], list[float]]:
    """The ranges of `1-50:1,51-60:2`, and their weights."""
    found, weights = [], []
    for word in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?(?::(\d+(?:\.\d+)?))?", word)
        some = range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)
        if match is None or not some:
            sys.exit(
                f"error: --lengths {word}: is no range of digits; write one as 55-72 or 1-50:2"
            )
        found.append(some)
        weights.append(float(match[3] or 1))
    return found, weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=20000)
    parser.add_argument("--lengths", default="55-72", help="ranges of digits, with weights")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    lengths, weights = ranges(options.lengths)
    with options.output.open("w", encoding="utf-8") as file:
        for _ in range(options.rows):
            length = draw.choice(draw.choices(lengths, weights)[0])
            digits = "".join(draw.choice("0123456789") for _ in range(length))
            row = {"prompt": f"{digits},", "completion": f"{digits[::-1]}#"}
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
