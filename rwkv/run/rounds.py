"""Rounds of sampling, scoring and training: --iterate."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from data.flags import DataFlags, IterateFlags, PairFlags
from data.make_reference import score_folder
from data.pair_records import PAIRS
from data.reference_scores import Scorer, adapter_words, storage_words
from data.rounds import make_judge, make_reward, write_round
from data.store_cache import open_store
from losses.objectives import chosen_objective
from losses.preference_flags import REFERENCED
from peft.adapter_file import planned_scales, unstated_scales
from peft.apply import load_frozen
from peft.flags import PeftFlags
from rwkv.cli import say
from rwkv.errors import InputError
from rwkv.flags import Settings
from rwkv.run.models import build, choose_device
from rwkv.runner import storage_of
from rwkv.templates import load_template
from rwkv.tokenizer import load_tokenizer
from rwkv.training.flags import ModelFlags, TrainerFlags
from rwkv.training.launch import is_child
from rwkv.training.model import read_config


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
    adapter = settings[PeftFlags].load_adapter
    for number in range(flags.iterate):
        folder = Path(trainer.proj_dir) / f"round-{number}"
        now = Settings(settings)
        now[PeftFlags] = replace(settings[PeftFlags], load_adapter=adapter)
        now[PairFlags] = replace(settings[PairFlags], rlhf_train_file=str(folder / "pairs.jsonl"))
        now[TrainerFlags] = replace(trainer, proj_dir=str(folder / "run"), resume=True)
        done = folder / "run" / f"rwkv-{trainer.epoch_begin + trainer.epoch_count - 1}.pth"
        if not done.exists():
            make_round(settings, now, number)
            status = train(now)
            if status or trainer.dry_run or is_child():
                return status
        adapter = str(done)
    return 0


def make_round(settings: Settings, now: Settings, number: int) -> None:
    """Write the pairs of a round, and for DPO their scores, by the model that it starts from."""
    flags, data = settings[IterateFlags], settings[DataFlags]
    if not settings[ModelFlags].load_model:
        raise InputError("--iterate: needs a model that can answer; give --load_model")
    device, adapter = choose_device(settings), now[PeftFlags].load_adapter
    config = read_config(settings[ModelFlags])
    tokenizer = load_tokenizer(data.tokenizer or None, config.vocab_size)
    template = load_template(data.template, tokenizer, data.turn_end or None)
    model, plan, base = build(now, config, device)  # as the round trains it, stores and adapters
    model.requires_grad_(False).eval()
    pairs = Path(now[PairFlags].rlhf_train_file)
    if not pairs.exists():
        if flags.judge:
            judge = load_frozen(flags.judge, device=device.kind, dtype=device.dtype)
            if judge.config.vocab_size < tokenizer.vocab_size:
                raise InputError(
                    f"--judge {flags.judge}: knows {judge.config.vocab_size} tokens, tokenizer "
                    f"{tokenizer.name} has {tokenizer.vocab_size}; take a judge of this vocabulary"
                )
            reward = make_judge(judge, tokenizer, template)
        else:
            reward = make_reward(flags.reward)
        prompts = Path(settings[PairFlags].rlhf_train_file or data.train_data_file)
        seed = settings[TrainerFlags].random_seed + number
        made = write_round(pairs, prompts, model, tokenizer, template, flags, reward, seed)
        say(
            f"round {number}: {made.pairs:,} pairs from {made.prompts:,} prompts, "
            f"mean score {made.mean_score:.4f}"
        )
    if chosen_objective(settings) in REFERENCED:
        scales = unstated_scales(adapter, planned_scales(plan)) if adapter else ()
        scorer = Scorer(base, adapter_words(adapter, scales), storage_words(storage_of(model)))
        for folder in open_store(str(pairs), data, tokenizer, PAIRS).folders:
            score_folder(model, folder, scorer, 16384)
