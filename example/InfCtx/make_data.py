"""Make texts that can be learned only by remembering: a key, noise, and the question for the key.

    python example/InfCtx/make_data.py --output FOLDER

writes train.jsonl and val.jsonl. A prompt is `#`, the key's digits, random digits as noise and `?`;
the answer is the key. Where the noise is longer than a chunk, no gradient that ends at the chunk's
border can teach the model to keep the key.
"""

import argparse
import json
import random
from pathlib import Path

DIGITS = "0123456789"


def row(draw: random.Random, key: int, noise: int) -> dict[str, str]:
    """A prompt and its answer."""
    answer = "".join(draw.choices(DIGITS, k=key))
    between = "".join(draw.choices(DIGITS, k=noise))
    return {"prompt": f"#{answer}{between}?", "completion": answer}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument("--rows", type=int, default=20000, help="training rows")
    parser.add_argument("--held_out", type=int, default=200, help="held-out rows")
    parser.add_argument("--key", type=int, default=1, help="digits of the key")
    parser.add_argument("--noise", type=int, default=40, help="digits between key and question")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    draw = random.Random(options.seed)
    options.output.mkdir(parents=True, exist_ok=True)
    for name, count in (("val.jsonl", options.held_out), ("train.jsonl", options.rows)):
        rows = (row(draw, options.key, options.noise) for _ in range(count))
        lines = "".join(json.dumps(one) + "\n" for one in rows)
        (options.output / name).write_text(lines, encoding="utf-8")
    print(f"{options.output}: {options.rows} training and {options.held_out} held-out rows")


if __name__ == "__main__":
    main()
