"""Rounds of sampling, scoring and training: --iterate."""

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from data.flags import DataFlags, IterateFlags, PairFlags
from data.make_reference import score_folder
from data.pair_records import PAIRS, parse_question, read_text_pairs
from data.pair_store import PairStore
from data.reference_scores import has_scores
from data.rounds import Reward, make_judge, make_reward, write_round
from data.store_cache import one_at_a_time, open_store
from losses.objectives import chosen_objective
from losses.preference_flags import REFERENCED
from peft.apply import load_frozen
from peft.flags import PeftFlags
from rwkv.cli import say
from rwkv.errors import InputError
from rwkv.flags import Settings
from rwkv.run.batches import scorer_of
from rwkv.run.models import Device, build, choose_device, plan_layers
from rwkv.templates import Template, load_template
from rwkv.tokenizer import Tokenizer, load_tokenizer
from rwkv.training.flags import ModelFlags, TrainerFlags
from rwkv.training.launch import is_child
from rwkv.training.model import read_config
from rwkv.training.strategy import take_device


def iterate(settings: Settings, train: Callable[[Settings], int]) -> int:
    """Rounds of sampling, scoring and training; returns the exit status.

    Round N keeps its pairs and its run in --proj_dir/round-N. The same command goes on where an
    earlier one stopped, within a round and between rounds.

    Args:
        settings: of the whole.
        train: trains one round and returns its exit status.
    """
    flags, trainer = settings[IterateFlags], settings[TrainerFlags]
    if chosen_objective(settings) not in ("dpo", "orpo", "simpo"):
        raise InputError("--iterate: makes pairs; add --dpo 1, --orpo 1 or --simpo 1")
    if bool(flags.reward) == bool(flags.judge):
        raise InputError(
            "--iterate: needs something that scores answers; give --reward or --judge, and not both"
        )
    if not settings[ModelFlags].load_model:
        raise InputError("--iterate: needs a model that can answer; give --load_model")
    adapter = settings[PeftFlags].load_adapter
    for number in range(flags.iterate):
        folder = Path(trainer.proj_dir) / f"round-{number}"
        now = Settings(settings)
        now[PeftFlags] = replace(settings[PeftFlags], load_adapter=adapter)
        now[PairFlags] = replace(settings[PairFlags], rlhf_train_file=str(folder / "pairs.jsonl"))
        now[TrainerFlags] = replace(trainer, proj_dir=str(folder / "run"), resume=True)
        done = folder / "run" / f"rwkv-{trainer.epoch_begin + trainer.epoch_count - 1}.pth"
        if not done.exists():
            if trainer.dry_run and not (folder / "pairs.jsonl").exists():
                prompts = sum(
                    1 for _ in read_text_pairs(prompts_of(settings), parse=parse_question)
                )
                say(
                    f"round {number}: {flags.iterate_samples} answers to each of {prompts:,} "
                    "prompts; a dry run writes none, and without their pairs there is no plan"
                )
                return 0
            gc.collect()  # the last round's trainer and model hold each other
            make_round(settings, now, number)
            status = train(now)
            if status or trainer.dry_run or is_child():
                return status
        adapter = str(done)
    return 0


def make_round(settings: Settings, now: Settings, number: int) -> None:
    """Write the pairs of a round, and for DPO their scores, by the model that it starts from.

    Of several processes on a machine the first does it, and the others find it done.
    """
    flags, data, trainer = settings[IterateFlags], settings[DataFlags], settings[TrainerFlags]
    device, config = choose_device(settings), read_config(settings[ModelFlags])
    tokenizer = load_tokenizer(data.tokenizer or None, config.vocab_size)
    template = load_template(data.template, tokenizer, data.turn_end or None)
    pairs = Path(now[PairFlags].rlhf_train_file)
    scorer = None
    if chosen_objective(settings) in REFERENCED:
        scorer = scorer_of(now, plan_layers(now, config))

    def stored() -> PairStore:
        store = open_store(str(pairs), data, tokenizer, PAIRS)
        assert isinstance(store, PairStore)
        return store

    with one_at_a_time(pairs.parent, "--proj_dir"):
        if pairs.exists() and (scorer is None or has_scores(stored(), scorer)):
            return
        take_device(trainer, device.kind)
        model, _, _ = build(now, config, device)  # as the round trains it, stores and adapters
        model.requires_grad_(False).eval()
        if not pairs.exists():
            if flags.reward:
                reward = make_reward(flags.reward)
            else:
                reward = load_judge(flags, device, tokenizer, template)
            asked, seed = prompts_of(settings), trainer.random_seed + number
            made = write_round(pairs, asked, model, tokenizer, template, flags, reward, seed)
            say(
                f"round {number}: {made.pairs:,} pairs from {made.prompts:,} prompts, "
                f"mean score {made.mean_score:.4f}"
            )
        if scorer is not None:
            for folder in stored().folders:
                score_folder(model, folder, scorer, 16384)


def prompts_of(settings: Settings) -> Path:
    """The file whose prompts are answered."""
    return Path(settings[PairFlags].rlhf_train_file or settings[DataFlags].train_data_file)


def load_judge(
    flags: IterateFlags, device: Device, tokenizer: Tokenizer, template: Template
) -> Reward:
    """The model that scores answers, as a reward.

    Raises:
        InputError: it does not know the tokenizer's vocabulary.
    """
    judge = load_frozen(flags.judge, device=device.kind, dtype=device.dtype)
    if judge.config.vocab_size < tokenizer.vocab_size:
        raise InputError(
            f"--judge {flags.judge}: knows {judge.config.vocab_size} tokens, tokenizer "
            f"{tokenizer.name} has {tokenizer.vocab_size}; take a judge of this vocabulary"
        )
    return make_judge(judge, tokenizer, template)
