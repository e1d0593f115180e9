"""One round of iterative preference training: answers of the model, scored, as pairs.

Source: the loop is that of arXiv:2404.19733, with the best and the worst answer of a prompt.
"""

import importlib.util
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from data.make_rejected import pair_line, sample_answers
from data.pair_records import TextPair, parse_question, read_text_pairs
from rwkv.errors import InputError
from rwkv.files import replacing
from rwkv.sampling_flags import Sampling
from rwkv.templates import Message, Template
from rwkv.tokenizer import Tokenizer

if TYPE_CHECKING:
    from data.flags import IterateFlags
    from rwkv.model import RWKV

Reward = Callable[[Sequence[TextPair], Sequence[Sequence[str]]], list[list[float]]]


class Round(NamedTuple):
    """What a round of sampling gave: pairs written, prompts asked, and the mean score."""

    pairs: int
    prompts: int
    mean_score: float


def write_round(
    output: Path,
    prompts: Path,
    model: "RWKV",
    tokenizer: Tokenizer,
    template: Template,
    flags: "IterateFlags",
    reward: Reward,
    seed: int,
) -> Round:
    """Sample answers to every prompt and write the best and the worst of each as pairs.

    Prompts whose answers all have one score give no pair.

    Raises:
        InputError: no prompt gives a pair.
    """
    asked = [pair for _, pair in read_text_pairs(prompts, parse=parse_question)]
    found = sample_answers(
        model,
        [template.encode_prompt(pair.context(), tokenizer) for pair in asked],
        tokenizer,
        template,
        samples=flags.iterate_samples,
        tokens=flags.iterate_tokens,
        sampling=Sampling(temperature=flags.iterate_temperature, top_p=flags.iterate_top_p),
        seed=seed,
    )
    answers = [
        list(dict.fromkeys(c.text.strip() for c in some if c.text.strip())) for some in found
    ]
    scores = reward(asked, answers)
    lines = []
    for pair, texts, values in zip(asked, answers, scores, strict=True):
        if not texts or max(values) == min(values):
            continue
        best, worst = texts[values.index(max(values))], texts[values.index(min(values))]
        chosen = replace(pair, chosen=[Message("assistant", best)])
        line = pair_line(chosen, worst, ended=True)
        lines.append(line | {"scores": [max(values), min(values)]})
    if not lines:
        raise InputError(
            f"{prompts}: no prompt has answers of different scores; raise --iterate_samples or "
            "--iterate_temperature, or look at the reward"
        )
    with replacing(output) as beside:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        beside.write_text(text, encoding="utf-8")
    every = [value for values in scores for value in values]
    return Round(len(lines), len(asked), sum(every) / len(every))


def make_reward(text: str) -> Reward:
    """The reward that --reward names.

    Raises:
        InputError: it is none of the three forms, or the function is not there.
    """
    kind, _, value = text.partition(":")
    score: Callable[[str, str], float]
    if kind == "length" and value.isdigit():
        wanted = int(value)

        def score(prompt: str, answer: str) -> float:
            return -abs(len(answer) - wanted)

    elif kind == "format":
        try:
            form = re.compile(value, re.DOTALL)
        except re.error as error:
            raise InputError(f"--reward {text}: no regular expression ({error}); mend it") from None

        def score(prompt: str, answer: str) -> float:
            return float(form.fullmatch(answer) is not None)

    elif text.rpartition(":")[0].endswith(".py"):
        score = _load_function(text)
    else:
        raise InputError(
            f"--reward {text}: is no reward; give FILE.py:FUNCTION, length:CHARACTERS or "
            "format:REGEX"
        )

    def reward(asked: Sequence[TextPair], answers: Sequence[Sequence[str]]) -> list[list[float]]:
        return [
            [_number(text, score, pair.prompt[-1].text, answer) for answer in some]
            for pair, some in zip(asked, answers, strict=True)
        ]

    return reward


def _number(text: str, score: Callable[[str, str], float], prompt: str, answer: str) -> float:
    """The reward of an answer.

    Raises:
        InputError: the user's function fails, or gives no finite number.
    """
    try:
        found = float(score(prompt, answer))
    except Exception as error:  # the user's own code
        raise InputError(f"--reward {text}: fails on {prompt!r} ({error!r}); mend it") from error
    if not math.isfinite(found):
        raise InputError(f"--reward {text}: gives {found} for {prompt!r}; give a finite number")
    return found


def _load_function(text: str) -> Callable[[str, str], float]:
    path, _, name = text.rpartition(":")
    if not Path(path).is_file():
        raise InputError(f"--reward {text}: no such file {path}; check the path")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's own code
        raise InputError(f"--reward {text}: {path} fails ({error!r}); mend it") from error
    if not callable(getattr(module, name, None)):
        raise InputError(f"--reward {text}: {path} has no function {name!r}; check the name")
    return getattr(module, name)


def make_judge(judge: Any, tokenizer: Tokenizer, template: Template) -> Reward:
    """The average log-probability of an answer's tokens under the model `judge`."""
    import numpy as np
    import torch

    from data.pair_pieces import Pair, make_batch
    from data.pair_records import encode_pair
    from data.tokenizing import Recipe
    from losses.preference import answer_log_probs

    recipe, nothing = Recipe(tokenizer.name, template), np.zeros(0, np.int64)

    def score(pair: TextPair, answer: str) -> float:
        given = TextPair(pair.prompt, [Message("assistant", answer)], [])
        prompt, tokens, _ = encode_pair(given, recipe, tokenizer)
        batch = make_batch([Pair(np.array(prompt), np.array(tokens), nothing)])
        device = judge.device
        moved = {n: t.to(device) for n, t in batch._asdict().items() if t is not None}
        with torch.no_grad():
            return answer_log_probs(judge, batch._replace(**moved)).item() / len(tokens)

    return lambda asked, answers: [
        [score(pair, answer) for answer in some] for pair, some in zip(asked, answers, strict=True)
    ]
