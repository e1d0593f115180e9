"""The flags of drawing tokens, apart from what draws them so that --help needs no torch."""

import argparse
import math
from dataclasses import dataclass, fields

from rwkv.errors import InputError
from rwkv.flags import flag


@dataclass(frozen=True)
class Sampling:
    """Drawing tokens"""

    temperature: float = flag(
        1.0, "0 takes the likeliest token; below 1 sharpens, above 1 flattens"
    )
    top_p: float = flag(1.0, "draw among the likeliest tokens that together have this probability")
    top_k: int = flag(0, "draw among this many likeliest tokens; 0 for all")
    presence_penalty: float = flag(0.0, "taken off the logit of every token written before")
    frequency_penalty: float = flag(0.0, "taken off it for each time the token was written")
    penalty_decay: float = flag(1.0, "share of those times that each further token leaves; 0 to 1")

    def __post_init__(self) -> None:
        for name, fine, range_ in (
            ("temperature", 0 <= self.temperature < math.inf, "at least 0"),
            ("top_p", 0 <= self.top_p <= 1, "between 0 and 1"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("presence_penalty", math.isfinite(self.presence_penalty), "a number"),
            ("frequency_penalty", math.isfinite(self.frequency_penalty), "a number"),
            ("penalty_decay", 0 <= self.penalty_decay <= 1, "between 0 and 1"),
        ):
            if not fine:
                raise InputError(f"--{name} {getattr(self, name)}: needs to be {range_}; change it")

    @property
    def counts(self) -> bool:
        """Whether it matters how often a token was written before."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0


GREEDY = Sampling(temperature=0.0)


def add_sampling_arguments(parser: argparse.ArgumentParser, **defaults: float) -> None:
    """Add a flag for each field of Sampling, and --seed; `defaults` replace the fields' own."""
    group = parser.add_argument_group(str(Sampling.__doc__).lower())
    for field in fields(Sampling):
        default = defaults.get(field.name, field.default)
        group.add_argument(
            f"--{field.name}",
            type=type(field.default),
            default=default,
            metavar="X",
            help=f"{field.metadata['help']} ({default:g})",
        )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (0)")


def sampling_of(options: argparse.Namespace) -> Sampling:
    """The settings that `add_sampling_arguments` asked for.

    Raises:
        InputError: a value is out of its range.
    """
    return Sampling(**{field.name: getattr(options, field.name) for field in fields(Sampling)})
