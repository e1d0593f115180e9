"""The batches of a run, from the files that its objective reads."""

from typing import Any, NamedTuple

from data.batch_plan import BatchPlan
from data.flags import DataFlags, PairFlags
from data.open_pairs import open_pairs
from data.pair_store import PairStore
from data.reference_scores import Scorer, adapter_words, storage_words
from data.store_cache import open_store
from data.teacher_store import TeacherStore, Wanted, open_teacher
from data.token_store import split
from losses.distill import RENORMALIZED
from losses.flags import DistillationFlags
from losses.objectives import chosen_objective
from losses.preference_flags import PREFERENCES
from peft.adapter_file import planned_scales, unstated_scales
from peft.flags import PeftFlags, StateFlags
from peft.plan import Plan
from rwkv.checkpoint import fingerprint, read_tensors
from rwkv.errors import InputError
from rwkv.flags import Settings
from rwkv.tokenizer import Tokenizer
from rwkv.training.flags import ModelFlags, TrainerFlags


class Batches(NamedTuple):
    """The plans of the training data and, if there is any, of the held-out data."""

    training: BatchPlan
    held_out: BatchPlan | None


def open_data(settings: Settings, tokenizer: Tokenizer, layers: Plan) -> Batches:
    """The batches of the run's objective, from its files."""
    data, paths = settings[DataFlags], settings[DataFlags].train_data_file

    def open_files(paths: str) -> Any:
        if chosen_objective(settings) in PREFERENCES:
            return open_preferences(settings, paths, tokenizer, layers)
        if settings[DistillationFlags].reads_scores:
            return open_scores(settings, paths, tokenizer)
        return open_store(paths, data, tokenizer)

    if chosen_objective(settings) in PREFERENCES:
        paths = settings[PairFlags].rlhf_train_file or paths
    # the smaller one first: what is wrong with it is told before the larger is read
    held_out = open_files(data.val_data_file) if data.val_data_file else None
    store = open_files(paths)
    if data.val_fraction:
        store, held_out = split(store, data.val_fraction, settings[TrainerFlags].random_seed)
    return Batches(
        plan_batches(settings, store),
        None if held_out is None else plan_batches(settings, held_out, training=False),
    )


def open_preferences(
    settings: Settings, paths: str, tokenizer: Tokenizer, layers: Plan
) -> PairStore:
    """Preference records, with reference scores where the objective needs them.

    Raises:
        InputError: the files are wrong, or there is no reference to be had.
    """
    objective, live = chosen_objective(settings), is_own_reference(settings, layers)
    if objective == "kto" and not live:
        raise InputError(
            "--kto 1: compares with the model before training on answers that no file has scores "
            "of; use a profile like layerprofile/lora-adapters-only.json, without --load_adapter, "
            "--state and --prefix_tuning"
        )
    return open_pairs(
        paths,
        settings[DataFlags],
        tokenizer,
        longest=settings[PairFlags].rlhf_max_corpus_len,
        singles=objective == "kto",
        scorer=scorer_of(settings, layers) if objective == "dpo" else None,
        live=live,
    )


def scorer_of(settings: Settings, layers: Plan) -> Scorer:
    """The model that the run starts from, as a reference."""
    path, adapter = settings[ModelFlags].load_model, settings[PeftFlags].load_adapter
    base = fingerprint(read_tensors(path)) if path else "new"
    stored = {n: p.quant for n, p in layers.plans.items() if p.quant not in (None, "none")}
    scales = unstated_scales(adapter, planned_scales(layers)) if adapter else ()
    return Scorer(base, adapter_words(adapter, scales), storage_words(stored))


def is_own_reference(settings: Settings, layers: Plan) -> bool:
    """Whether the model with its adapters off is the model that the run starts from."""
    full = any(
        plan.mode == "full" and layers.layers[n].parameters for n, plan in layers.plans.items()
    )
    return not (full or settings[StateFlags].changes_start or settings[PeftFlags].load_adapter)


def open_scores(settings: Settings, paths: str, tokenizer: Tokenizer) -> TeacherStore:
    """Records with a teacher's scores.

    Raises:
        InputError: the files are wrong, or lack what the divergence needs.
    """
    flags = settings[DistillationFlags]
    wanted = Wanted(flags.top_k, flags.temperature, flags.kd_loss not in RENORMALIZED)
    return open_teacher(paths, settings[DataFlags].cache_dir, tokenizer, wanted)


def plan_batches(settings: Settings, store: Any, *, training: bool = True) -> BatchPlan:
    """The batches of a store; held-out ones keep their order and take one step each."""
    trainer, data = settings[TrainerFlags], settings[DataFlags]
    return BatchPlan(
        store,
        ctx_len=data.ctx_len,
        micro_bsz=trainer.micro_bsz,
        accumulate=trainer.accumulate_grad_batches if training else 1,
        world=trainer.devices * trainer.num_nodes,
        seed=trainer.random_seed,
        packing=data.packing,
        shuffle=training and bool(data.random_mode),
        overlong=data.overlong,
    )
