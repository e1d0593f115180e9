"""Score the answers of preference files under the model that training starts from.

    python -m data.make_reference --data pairs.csv --load_model base.pth
    python -m data.make_reference --data pairs.tok --load_model base.pth --adapter sft/rwkv-0.pth

The scores lie beside the tokens, where train.py finds them by the hash of model, adapter and
tokens; it refuses others. A command that was killed goes on where it stopped. Where nothing but
adapters trains, and no adapter is loaded, train.py needs no scores.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.make_pairs import add_template_arguments
from rwkv.cli import Parser, run
from rwkv.errors import InputError

if TYPE_CHECKING:
    from data.pair_store import PairStore
    from data.reference_scores import Scorer


def main(argv: list[str] | None = None) -> int:
    from rwkv.runner import (
        add_model_arguments,
        add_storage_arguments,
        given_scales,
        open_model,
        storage_of,
    )

    parser = Parser(
        prog="python -m data.make_reference",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--data", required=True, help="files as for train.py --dpo, or folders of data.make_pairs"
    )
    parser.add_argument(
        "--batch_tokens", type=int, default=16384, help="tokens that the model reads at once"
    )
    add_model_arguments(parser)
    add_storage_arguments(parser)
    add_template_arguments(parser)
    parser.add_argument("--cache_dir", default="~/.cache/rwkv-lm-rlhf", help="see train.py")
    options = parser.parse_args(argv)
    if options.state:
        raise InputError(
            f"--state {options.state}: no run begins with a state that lies apart; name the "
            "adapter's file that holds it at --adapter"
        )

    from data.pair_records import PAIRS
    from data.pair_store import PairStore
    from data.reference_scores import Scorer, adapter_words, storage_words
    from data.store_cache import StoreSettings, open_store
    from rwkv.checkpoint import fingerprint, read_tensors

    model, tokenizer = open_model(options)
    settings = StoreSettings(options.template, options.turn_end or "", True, options.cache_dir)
    store = open_store(options.data, settings, tokenizer, PAIRS)
    assert isinstance(store, PairStore)
    scorer = Scorer(
        fingerprint(read_tensors(options.load_model)),
        adapter_words(options.adapter, given_scales(options)),
        storage_words(storage_of(model)),
    )
    for folder in store.folders:
        made = score_folder(model, folder, scorer, options.batch_tokens)
        print(  # noqa: T201
            f"{folder}: {len(PairStore([folder])):,} records scored, {made:,} of them now"
        )
    return 0


def score_folder(model: Any, folder: Path, scorer: "Scorer", batch_tokens: int) -> int:
    """Score the records of a folder that have no score yet; returns how many those were."""
    import numpy as np

    from data.pair_store import PairStore
    from data.progress import Progress
    from data.reference_scores import finish, open_unfinished

    store, scores = PairStore([folder]), open_unfinished(folder, scorer)
    todo = np.flatnonzero(np.isnan(scores).any(axis=1))
    progress, done = Progress(f"scoring {folder.name}"), 0
    for numbers in batches(store, todo, batch_tokens):
        scores[numbers] = score_records(model, store, numbers)
        done += len(numbers)
        progress(done, len(todo), done)
    progress.finish()
    finish(folder, scorer)
    return done


def batches(store: "PairStore", numbers: Any, batch_tokens: int) -> Any:
    """Yield groups of records of about `batch_tokens` tokens, records of one length together."""
    import numpy as np

    order = numbers[np.argsort(store.lengths[numbers], kind="stable")]
    ends = np.cumsum(store.lengths[order])
    start = 0
    while start < len(order):
        used = ends[start] - store.lengths[order[start]]
        stop = max(start + 1, int(np.searchsorted(ends, used + batch_tokens, side="right")))
        yield order[start:stop]
        start = stop


def score_records(model: Any, store: "PairStore", numbers: Any) -> Any:
    """Log-probabilities of chosen and rejected answers, float32 [n, 2]; 0 for a missing answer."""
    import numpy as np
    import torch

    from data.pair_pieces import make_batch
    from losses.preference import answer_log_probs
    from rwkv.errors import not_finite

    device = model.device
    batch = make_batch([store.pair(int(number)) for number in numbers])
    moved = batch._replace(**{n: t.to(device) for n, t in batch._asdict().items() if t is not None})
    with torch.no_grad():
        found = answer_log_probs(model, moved).float().cpu().numpy()
    if not np.isfinite(found).all():
        raise not_finite("scores")
    scores = np.zeros((len(numbers), 2), np.float32)
    prompt_of = batch.prompt_of.numpy()
    for side, index in enumerate((batch.chosen.numpy(), batch.rejected.numpy())):
        scores[prompt_of[index], side] = found[index]
    return scores


if __name__ == "__main__":
    sys.exit(run(main))
