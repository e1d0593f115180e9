"""The flags of the data: files, template, packing."""

from dataclasses import dataclass

from rwkv.flags import flag


@dataclass(frozen=True)
class DataFlags:
    """Data"""

    train_data_file: str = flag(
        "",
        "training data: .jsonl .json .csv (each also .gz), .h5, or a folder made by "
        "python -m data.make_sft; several with commas between them",
    )
    val_data_file: str = flag("", "validation data, given as --train_data_file is")
    val_fraction: float = flag(
        0.0, "share of the training records held out for validation", within="[0, 1)"
    )
    ctx_len: int = flag(2048, "tokens a row has room for", within="[1, inf)")
    overlong: str = flag(
        "auto",
        "records longer than ctx_len: split into pieces, cut at ctx_len, or drop; auto splits "
        "plain text and cuts dialogues",
        choices=("auto", "split", "cut", "drop"),
    )
    packing: bool = flag(True, "put several texts into a row, each with a state of its own")
    tokenizer: str = flag(
        "", "world, bytes, bytes:ENCODING or chars:CHARACTERS; empty to go by the vocabulary's size"
    )
    template: str = flag(
        "auto", "how dialogues are written: world, g1 (with thoughts), plain, or a .json file"
    )
    turn_end: str = flag(
        "",
        "what ends an answer: suffix (the template's), eot (the end-of-text token) or both; "
        "empty for the template's own choice",
    )
    mask_prompt: bool = flag(True, "the loss counts answers only; 0 counts the prompts too")
    random_mode: int = flag(
        1, "1 shuffles the records anew each pass, 0 keeps their order", choices=(0, 1)
    )
    num_workers: int = flag(1, "processes that prepare batches", within="[0, inf)")
    cache_dir: str = flag("~/.cache/rwkv-lm-rlhf", "where tokenized files are kept")


@dataclass(frozen=True)
class PairFlags:
    """Preference data"""

    rlhf_train_file: str = flag(
        "",
        "preference data: .jsonl .json .csv (each also .gz), RWKV-LM-RLHF's .save or .h5, or a "
        "folder made by python -m data.make_pairs; --train_data_file does as well",
    )
    rlhf_max_corpus_len: int = flag(
        0,
        "leave out pairs whose prompt and longer answer have more tokens; 0: --ctx_len",
        within="[0, inf)",
    )


@dataclass(frozen=True)
class IterateFlags:
    """Iterative preference training"""

    iterate: int = flag(
        0,
        "rounds of sampling answers to the prompts of --rlhf_train_file, scoring them and training "
        "on the best and the worst of each prompt",
        within="[0, inf)",
    )
    reward: str = flag(
        "",
        "what scores an answer: FILE.py:FUNCTION of (prompt, answer), length:CHARACTERS for the "
        "nearest to that length, or format:REGEX for answers that match as a whole",
    )
    judge: str = flag(
        "", "in the place of --reward, a model: its average log-probability of an answer's tokens"
    )
    iterate_samples: int = flag(4, "answers a prompt in a round", within="[2, inf)")
    iterate_tokens: int = flag(256, "tokens of an answer at most", within="[1, inf)")
    iterate_temperature: float = flag(1.0, "of the draws", within="(0, inf)")
    iterate_top_p: float = flag(1.0, "of the draws", within="(0, 1]")
