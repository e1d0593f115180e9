"""Let a model answer held-out prompts greedily and count the answers that are right.

    python example/check_answers.py --load_model M.pth --data val.jsonl --template world

Prints one line of JSON: rows, exact answers, and with --form the share of answers that match that
regular expression. --by_length LIST also counts them by the prompt's length.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main() -> int:
    from rwkv.runner import add_model_arguments

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_arguments(parser)
    parser.add_argument("--data", type=Path, required=True, help="rows of prompt and completion")
    parser.add_argument("--template", default="auto", help="as in train.py")
    parser.add_argument("--stop", default="\n\n", help="what ends an answer")
    parser.add_argument("--tokens", type=int, default=200, help="longest answer")
    parser.add_argument("--form", default="", help="a regular expression that answers should match")
    parser.add_argument("--show", type=int, default=0, help="answers to print")
    parser.add_argument("--by_length", default="", help="borders of prompt lengths, as 20,60,70")
    options = parser.parse_args()

    from rwkv.errors import InputError
    from rwkv.generate import generate
    from rwkv.runner import open_model
    from rwkv.sampling_flags import Sampling
    from rwkv.templates import prompt_tokens

    rows = [json.loads(line) for line in options.data.read_text(encoding="utf-8").splitlines()]
    if not rows:
        raise InputError(f"--data {options.data}: the file is empty; is it the right one?")
    try:
        re.compile(options.form)
    except re.error as error:
        raise InputError(
            f"--form {options.form}: is no regular expression ({error}); mend it"
        ) from None
    model, tokenizer = open_model(options, merged=True)
    flags = SimpleNamespace(template=options.template)
    written = generate(
        model,
        [prompt_tokens(row["prompt"], flags, tokenizer) for row in rows],
        max_tokens=options.tokens,
        tokenizer=tokenizer,
        stop=[options.stop],
        sampling=Sampling(temperature=0.0),
        batch_size=128,
    )
    wanted = [row["completion"].removesuffix(options.stop).strip() for row in rows]
    answers = [answer.text.strip() for answer in written]
    right = [want == answer for want, answer in zip(wanted, answers, strict=True)]
    result = {"rows": len(rows), "exact": sum(right) / len(rows)}
    if options.form:
        matching = [bool(re.fullmatch(options.form, answer)) for answer in answers]
        result["in form"] = sum(matching) / len(rows)
    if options.by_length:
        borders = [0, *map(int, options.by_length.split(","))]
        for low, high in zip(borders, borders[1:], strict=False):
            some = [
                ok
                for ok, row in zip(right, rows, strict=True)
                if low < len(row["prompt"].rstrip(",")) <= high
            ]
            result[f"exact, length {low + 1} to {high}"] = f"{sum(some)} of {len(some)}"
    for row, answer in list(zip(rows, answers, strict=True))[: options.show]:
        print(f"  {row['prompt']} -> {answer!r}")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    from rwkv.cli import run

    sys.exit(run(main))
