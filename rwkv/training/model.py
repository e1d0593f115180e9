"""The sizes of the model that the flags ask for: a file's, or a new one's."""

from rwkv.checkpoint import config_of, read_tensors
from rwkv.config import RWKVConfig, default_ffn, default_ranks
from rwkv.errors import InputError
from rwkv.training.flags import ModelFlags

VERSIONS = {"x060": 6, "x070": 7}


def read_config(flags: ModelFlags, vocab_size: int = 0) -> RWKVConfig:
    """The model's sizes: the file's, with which given flags must agree, or the flags' own.

    Args:
        flags: --load_model and the sizes.
        vocab_size: for a new model without --vocab_size, the tokenizer's.

    Raises:
        InputError: a flag disagrees with the file, or a new model lacks a size.
    """
    if flags.my_testing not in ("", *VERSIONS):
        raise InputError(
            f"--my_testing {flags.my_testing}: is not supported; x060 and x070 are RWKV-6 and -7"
        )
    if not flags.load_model:
        return _new_config(flags, vocab_size)
    config = config_of(read_tensors(flags.load_model))
    given = {
        "n_layer": (flags.n_layer, config.n_layer),
        "n_embd": (flags.n_embd, config.n_embd),
        "dim_att": (flags.dim_att, config.dim_att),
        "dim_ffn": (flags.dim_ffn, config.dim_ffn),
        "vocab_size": (flags.vocab_size, config.vocab_size),
        "head_size_a": (flags.head_size_a, config.head_size),
        "my_testing": (flags.my_testing, {6: "x060", 7: "x070"}[config.version]),
    }
    for name, (value, found) in given.items():
        if value and value != found:
            raise InputError(
                f"--load_model {flags.load_model}: has {name} {found}, --{name} says {value}; "
                f"drop --{name}"
            )
    return config


def _new_config(flags: ModelFlags, vocab_size: int) -> RWKVConfig:
    version = VERSIONS[flags.my_testing or "x070"]
    sizes = {
        "n_layer": flags.n_layer,
        "n_embd": flags.n_embd,
        "vocab_size": flags.vocab_size or vocab_size,
    }
    for name, value in sizes.items():
        if value < 1:
            raise InputError(f"--{name}: a new model needs it; or name a file with --load_model")
    head_size = flags.head_size_a or 64
    width = flags.dim_att or flags.n_embd
    if width % head_size:
        raise InputError(
            f"--head_size_a {head_size}: does not divide {width} channels; change one of them"
        )
    return RWKVConfig(
        version=version,
        dim_att=width,
        dim_ffn=flags.dim_ffn or default_ffn(version, flags.n_embd),
        head_size=head_size,
        ranks=default_ranks(version, flags.n_embd),
        **sizes,
    )
