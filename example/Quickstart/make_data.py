"""Make the quickstart's instruction data: three small tasks in fixed forms, from a seed.

    python example/Quickstart/make_data.py --output FOLDER

writes train.jsonl, val.jsonl and prompts.txt. The words of the held-out file's last quarter never
occur in training, so that copying them has to be learned and cannot be remembered.
"""

import argparse
import json
import random
from pathlib import Path

VERBS = (
    "open close clean paint move carry wash fix lift find bring hide sell buy draw push pull "
    "check count fill cover watch turn hold keep leave show take send store"
).split()
QUALITIES = (
    "red blue green black white small large heavy light old new clean broken warm cold round "
    "flat long short wooden plastic empty quiet simple strange bright dark soft hard thin"
).split()
THINGS = (
    "door window table chair box book lamp cup plate bottle clock key coat shirt shoe hat bag "
    "boat car train bike ball kite drum bell flag map ring rope stone brush basket bucket ladder "
    "mirror pillow carpet candle hammer spoon fork knife pan oven garden fence gate bridge tower "
    "wall roof floor paper letter card coin stamp ticket picture camera radio phone engine wheel "
    "saddle tent anchor sail net pencil ruler needle button ribbon blanket curtain drawer shelf"
).split()
NEW_THINGS = "wagon violin kettle barrel lantern cabinet helmet jacket magnet marble".split()


def polite(verb: str, quality: str, thing: str) -> tuple[str, str]:
    return (
        f"Ask politely: {verb} the {quality} {thing}.",
        f"Could you please {verb} the {quality} {thing}? Thank you!",
    )


def describe(verb: str, quality: str, thing: str) -> tuple[str, str]:
    article = "an" if quality[0] in "aeiou" else "a"
    return (
        f"Describe {article} {quality} {thing}.",
        f"This is the {thing}. It is {quality}.",
    )


def refuse(verb: str, quality: str, thing: str) -> tuple[str, str]:
    return (
        f"Say that you will not {verb} the {thing}.",
        f"I am sorry, but I will not {verb} the {thing}.",
    )


TASKS = (polite, describe, refuse)


def pairs(draw: random.Random, rows: int, things: list[str], known: set[str]) -> list[dict]:
    """`rows` prompts with their answers, none of them in `known` and none twice."""
    made = []
    while len(made) < rows:
        words = draw.choice(VERBS), draw.choice(QUALITIES), draw.choice(things)
        prompt, answer = draw.choice(TASKS)(*words)
        if prompt not in known:
            known.add(prompt)
            made.append({"prompt": prompt, "completion": answer})
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument("--rows", type=int, default=2400, help="training rows")
    parser.add_argument("--held_out", type=int, default=120, help="held-out rows")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    draw, known = random.Random(options.seed), set[str]()
    new = options.held_out // 4
    held_out = pairs(draw, options.held_out - new, list(THINGS), known)
    held_out += pairs(draw, new, list(NEW_THINGS), known)
    files = {"val.jsonl": held_out, "train.jsonl": pairs(draw, options.rows, list(THINGS), known)}
    options.output.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (options.output / name).write_text(lines, encoding="utf-8")
    shown = [held_out[i]["prompt"] for i in (0, 1, 2, -1, -2, -3)]
    (options.output / "prompts.txt").write_text("\n".join(shown) + "\n", encoding="utf-8")
    print(f"{options.output}: {options.rows} training and {options.held_out} held-out rows")


if __name__ == "__main__":
    main()
