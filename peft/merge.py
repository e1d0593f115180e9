"""Write an adapter's changes into its base model's file.

    python -m peft.merge --base BASE.pth --adapter ADAPTER.pth --output MERGED.pth

Each layer is merged in float32 and written in the base's dtype under the base's keys, so the
result runs wherever the base does; with --quant_mode it is a newly quantized base, to train or chat
over. Before anything is written, base with adapter and the merged weights, and those quantized,
read the same tokens, and the command stops if their logits are too far apart.

A tuned state or prefix is no part of a model: the state that it makes texts start from is written
beside the model, as MERGED-state.pth, for --state.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft.flags import QUANT_ALIASES, QUANT_MODES
from rwkv.cli import Parser, run
from rwkv.errors import InputError
from rwkv.runner import named_device

TOLERANCE = 1e-2  # nats; rounding to bfloat16 costs the quickstart's model 1.1e-4
QUANT_TOLERANCE = 0.3  # nats; nf4 costs the quickstart's model 0.055

if TYPE_CHECKING:
    from rwkv.checkpoint import TensorFile


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m peft.merge", description="Write an adapter's changes into its base model."
    )
    parser.add_argument("--base", type=Path, required=True, help="the model it was trained on")
    parser.add_argument("--adapter", type=Path, required=True, help="the adapter file")
    parser.add_argument("--output", type=Path, required=True, help="the model to write")
    parser.add_argument(
        "--alpha", type=float, help="of LoRA and DoRA files that do not state it (RWKV-LM-RLHF's)"
    )
    parser.add_argument(
        "--other_base", action="store_true", help="allow a base it was not trained on"
    )
    parser.add_argument(
        "--as_trained",
        action="store_true",
        help="merge into the weights as training over quantized ones saw them, not the base's own",
    )
    parser.add_argument("--device", default="cpu", help="where to compare: cpu or cuda")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        help=f"largest KL, in nats a token, between adapted and merged model ({TOLERANCE:g})",
    )
    parser.add_argument(
        "--quant_mode",
        choices=(*QUANT_MODES, *QUANT_ALIASES),
        help="write the merged linear layers in fewer bits",
    )
    parser.add_argument("--quant_head", action="store_true", help="quantize head and embedding too")
    parser.add_argument(
        "--quant_tolerance",
        type=float,
        default=QUANT_TOLERANCE,
        help=f"the same as --tolerance, between adapted and quantized model ({QUANT_TOLERANCE:g})",
    )
    options = parser.parse_args(argv)
    options.device = named_device(options.device)

    from peft.adapter_file import has_start, project_version
    from peft.merging import compare, merge, open_pair
    from peft.quantized import layers_to_store, quantize_tensors, quantized_metadata
    from rwkv.checkpoint import (
        check_output,
        config_of,
        fingerprint,
        read_metadata,
        read_tensors,
        write_tensors,
    )

    if options.quant_mode is None:
        for name, usual in (("quant_head", False), ("quant_tolerance", QUANT_TOLERANCE)):
            if getattr(options, name) != usual:
                raise InputError(
                    f"--{name}: has no effect without --quant_mode; add it, or drop it"
                )
    if options.output.resolve() in (options.base.resolve(), options.adapter.resolve()):
        raise InputError(f"--output {options.output}: is an input too; choose another name")
    check_output(options.output, "quantized" if options.quant_mode else "model")
    base = read_tensors(options.base)
    if base.quantized:
        raise InputError(
            f"--base {options.base}: is quantized, and takes no changes; name the model it was "
            f"made from ({base.base}); such a file is for --load_model of train.py, rwkv.chat, "
            "rwkv.generate and rwkv.score"
        )
    pair = open_pair(
        base,
        options.adapter,
        alpha=options.alpha,
        other_base=options.other_base,
        as_trained=options.as_trained,
    )
    if has_start(pair.adapter):
        check_output(start_path(options.output), "state")
    merged = merge(pair)
    difference = compare(pair, merged, device=options.device)
    if not difference.kl <= options.tolerance:
        raise InputError(
            f"{options.output}: not written: {difference}; --tolerance is "
            f"{options.tolerance:g}: check that base and adapter belong together, or raise it"
        )
    origin: dict[str, Any] = {"merged": str(options.adapter), "difference": vars(difference)}
    storage = {} if options.as_trained else read_metadata(options.adapter).get("storage") or {}
    seen = None
    if storage:
        try:
            seen = open_pair(
                base,
                options.adapter,
                alpha=options.alpha,
                other_base=options.other_base,
                as_trained=True,
            )
        except InputError as error:  # whose last words are what to do for --as_trained
            reason = str(error).rpartition("; ")[0]
            print(f"not compared with the model as it was trained: {reason}")  # noqa: T201
    if seen is not None:
        beside = compare(seen, merged, device=options.device)
        origin["from_training"] = vars(beside)
        print(  # noqa: T201
            f"from the model as it was trained, over {', '.join(sorted(set(storage.values())))}"
            f": {beside}; --as_trained keeps that one's weights"
        )
    if options.quant_mode is None:
        metadata = {"kind": "model", "project": project_version(), "base": fingerprint(base)}
        write_tensors(options.output, merged, metadata | origin)
        print(f"{options.output}: {len(merged)} tensors; {difference}")  # noqa: T201
        write_start(options, pair.adapter)
        return 0
    kind = QUANT_ALIASES.get(options.quant_mode, options.quant_mode)
    layers = layers_to_store(config_of(base), ends=options.quant_head)
    loss = compare(pair, merged, device=options.device, storage=dict.fromkeys(layers, kind))
    if not loss.kl <= options.quant_tolerance:
        raise InputError(
            f"{options.output}: not written: as {kind}, {loss}; --quant_tolerance is "
            f"{options.quant_tolerance:g}: choose a storage of more bits, or raise it"
        )
    written, described = quantize_tensors(merged, layers, kind, options.device)
    metadata = quantized_metadata(fingerprint(merged), described)
    write_tensors(options.output, written, metadata | origin | {"quantization": vars(loss)})
    print(f"merged, before quantization: {difference}")  # noqa: T201
    print(f"{options.output}: {len(described)} layers as {kind}; {loss}")  # noqa: T201
    write_start(options, pair.adapter)
    return 0


def write_start(options: argparse.Namespace, adapter: "TensorFile") -> None:
    """Write the state that texts start from beside the model, where the adapter has one."""
    from peft.adapter_file import has_start
    from peft.apply import load_frozen
    from rwkv.checkpoint import write_tensors
    from rwkv.runner import load_start
    from rwkv.state import state_tensors

    if not has_start(adapter):
        return
    model = load_frozen(options.output, device=options.device)
    load_start(model, adapter)
    path = start_path(options.output)
    write_tensors(path, state_tensors(model.initial_state(1)), {"kind": "state"})
    print(f"{path}: the state that texts start from")  # noqa: T201


def start_path(output: Path) -> Path:
    """Where the state goes that texts start from."""
    return output.with_stem(f"{output.stem}-state")


if __name__ == "__main__":
    sys.exit(run(main))
