"""Make numbers to reverse, for the toy model whose vocabulary is `0123456789,#`.

    python example/SFT/make_numbers.py --output numbers.jsonl --shortest 55 --longest 72

A row is {"prompt": "1203,", "completion": "3021#"}; lengths are drawn evenly.
"""

import argparse
import json
import random
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=20000)
    parser.add_argument("--shortest", type=int, default=55, help="digits of the shortest number")
    parser.add_argument("--longest", type=int, default=72, help="digits of the longest number")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with options.output.open("w", encoding="utf-8") as file:
        for _ in range(options.rows):
            length = draw.randint(options.shortest, options.longest)
            digits = "".join(draw.choice("0123456789") for _ in range(length))
            row = {"prompt": f"{digits},", "completion": f"{digits[::-1]}#"}
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
