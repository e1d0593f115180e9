"""Write a model with its linear layers in fewer bits, to load and train over without the original.

    python -m peft.quantize --load_model MODEL.pth --quant_mode nf4 --output SMALL.pth

train.py --load_model takes the file and uses its codes as they are. Merge adapters into the
original model, which the file names by its fingerprint.

They are the codes that train.py makes itself of the original, if it trains in the file's dtype or a
wider one; else it rounds the weights to its own first. A GPU makes those that a CPU makes, except
where two are equally near: two scales of a block in 4 to 6 bits, two codes of fp4, two of
bitsandbytes' for a scale of nf4_double or fp4_double.
"""

import sys
from pathlib import Path

from peft.flags import QUANT_ALIASES, QUANT_MODES
from rwkv.cli import Parser, run
from rwkv.errors import InputError
from rwkv.runner import named_device


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m peft.quantize",
        description="Write a model with its linear layers in fewer bits.",
    )
    parser.add_argument("--load_model", type=Path, required=True, help="the model")
    parser.add_argument(
        "--quant_mode", default="nf4", choices=(*QUANT_MODES, *QUANT_ALIASES), help="the storage"
    )
    parser.add_argument("--quant_head", action="store_true", help="quantize head and embedding too")
    parser.add_argument("--output", type=Path, required=True, help="the file to write")
    parser.add_argument(
        "--device", default="cpu", help="where to quantize: auto, cpu, cuda or cuda:N (cpu)"
    )
    options = parser.parse_args(argv)
    device = str(named_device(options.device))

    import torch

    from peft.quantized import layers_to_store, quantize_tensors, quantized_metadata
    from rwkv.checkpoint import (
        check_complete,
        check_finite,
        check_output,
        check_weight,
        config_of,
        fingerprint,
        read_tensors,
        write_tensors,
    )
    from rwkv.model import RWKV

    if options.output.resolve() == options.load_model.resolve():
        raise InputError(f"--output {options.output}: is the model itself; choose another name")
    check_output(options.output, "quantized")
    tensors = read_tensors(options.load_model)
    if tensors.quantized:
        raise InputError(
            f"{options.load_model}: is quantized already; name the model it was made from"
        )
    config = config_of(tensors)
    with torch.device("meta"):
        check_complete(tensors, dict(RWKV(config).named_parameters()))
    linear = layers_to_store(config, ends=options.quant_head)
    for name in tensors:
        check_weight(options.load_model, name, tensors[name])
        check_finite(options.load_model, name, tensors[name])
    kind = QUANT_ALIASES.get(options.quant_mode, options.quant_mode)
    written, described = quantize_tensors(tensors, linear, kind, device)
    write_tensors(options.output, written, quantized_metadata(fingerprint(tensors), described))
    size, before = (
        sum(t.numel() * t.element_size() for t in some.values()) for some in (written, tensors)
    )
    print(  # noqa: T201
        f"{options.output}: {len(described)} layers as {kind}, "
        f"{size / 1e6:,.1f} MB instead of {before / 1e6:,.1f} MB"
    )
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
