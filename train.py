"""Fine-tune RWKV-6 and RWKV-7 models: flags -> model -> profile -> data -> objective -> trainer.

    python train.py --load_model base.pth --train_data_file chats.jsonl --sft 1 \\
        --layer_profile layerprofile/lora.json --proj_dir out/run
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from data.flags import DataFlags, IterateFlags
from rwkv import cli, upstream_flags
from rwkv.cli import say
from rwkv.errors import RunError
from rwkv.flags import Settings, parse
from rwkv.run.settings import FLAGS, check, without_effect, without_effect_on_cpu
from rwkv.training.flags import ModelFlags, TrainerFlags
from rwkv.training.run_folder import check_folder


def main(argv: list[str] | None = None) -> int:
    """Train as the flags say; returns the exit status."""
    words, notes = upstream_flags.split(list(sys.argv[1:] if argv is None else argv))
    settings = parse(words, FLAGS, program="train.py", description=__doc__.splitlines()[0])
    check(settings)
    for note in [*notes, *without_effect(settings, words)]:
        say(note)
    if not settings[IterateFlags].iterate:
        return train(settings)
    from rwkv.run.rounds import iterate

    return iterate(settings, train)


def train(settings: Settings) -> int:
    """Prepare a run, print its plan and, unless it is a dry run, train."""
    from rwkv.run.batches import open_data
    from rwkv.run.models import (
        check_packages,
        check_start,
        choose_device,
        is_for_gpu,
        plan_layers,
    )
    from rwkv.run.overview import Run, count_steps, describe
    from rwkv.tokenizer import load_tokenizer
    from rwkv.training.model import read_config
    from rwkv.training.strategy import check_strategy

    model_flags, trainer = settings[ModelFlags], settings[TrainerFlags]
    device = choose_device(settings)
    on_gpu = is_for_gpu(settings, device)
    for note in [] if on_gpu else without_effect_on_cpu(settings):
        say(note)
    if not trainer.dry_run:
        check_folder(Path(trainer.proj_dir), trainer.resume)
    with forgiven(trainer):
        check_strategy(trainer, on_gpu=on_gpu)
    vocab_size = model_flags.vocab_size
    if model_flags.load_model:
        vocab_size = read_config(model_flags).vocab_size
    tokenizer = load_tokenizer(settings[DataFlags].tokenizer or None, vocab_size)
    config = read_config(model_flags, tokenizer.vocab_size)
    layers = plan_layers(settings, config)
    check_start(settings, config, layers)
    with forgiven(trainer):
        check_packages(settings, layers)
    batches = open_data(settings, tokenizer, layers)
    steps = count_steps(trainer, batches.training)
    run = Run(settings, config, layers, batches, steps, device, tokenizer)
    for line in describe(run):
        say(line)
    if trainer.dry_run:
        from rwkv.run.memory import preview

        return preview(run)
    from rwkv.run.fitting import fit

    return fit(run)


@contextlib.contextmanager
def forgiven(trainer: TrainerFlags) -> Iterator[None]:
    """What the machine lacks is told and no error in a dry run, which may plan for another."""
    try:
        yield
    except RunError as error:
        if trainer.dry_run is not True:
            raise
        say(str(error))


if __name__ == "__main__":
    sys.exit(cli.run(main))
