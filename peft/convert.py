"""Convert adapters to and from HF peft's folders.

    python -m peft.convert --adapter ADAPTER.pth --output FOLDER
    python -m peft.convert --adapter FOLDER --output ADAPTER.pth

The folder is for the RWKV-7 models of flash-linear-attention and rwkv7-hf, whose layers have other
names. LoRA, DoRA and MiSS exist on both sides. Bone does not: HF peft's "bat" shares a block along
an output's slice, this one along an input's, so merge it instead.
"""

import sys
from pathlib import Path

from rwkv.cli import Parser, run
from rwkv.errors import InputError


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m peft.convert", description="Convert adapters to and from HF peft's folders."
    )
    parser.add_argument("--adapter", type=Path, required=True, help="a file, or HF peft's folder")
    parser.add_argument("--output", type=Path, required=True, help="a folder, or the file to write")
    parser.add_argument(
        "--alpha", type=float, help="of LoRA and DoRA files that do not state it (RWKV-LM-RLHF's)"
    )
    parser.add_argument(
        "--base_name", default=None, help="the base model's name on the hub, for the folder"
    )
    parser.add_argument(
        "--drop_whole",
        action="store_true",
        help="leave out tensors trained whole (norms, vectors), which the folder cannot hold",
    )
    options = parser.parse_args(argv)

    from peft.hf_folder import from_folder, to_folder
    from rwkv.checkpoint import write_tensors

    output, given = options.output.resolve(), options.adapter.resolve()
    if output == given or (output.exists() and given in output.parents):
        raise InputError(f"--output {options.output}: is of the adapter; choose another name")
    if options.adapter.is_dir():
        for name in ("alpha", "base_name", "drop_whole"):
            if getattr(options, name) not in (None, False):
                raise InputError(f"--{name}: has no effect on HF peft's folder; drop it")
        tensors, metadata = from_folder(options.adapter)
        write_tensors(options.output, tensors, metadata)
        count = len(metadata["layers"])
    else:
        if options.output.suffix in (".pth", ".pt", ".safetensors", ".bin", ".json"):
            raise InputError(f"--output {options.output}: HF peft wants a folder; drop the ending")
        count = to_folder(
            options.adapter,
            options.output,
            alpha=options.alpha,
            base_name=options.base_name,
            drop_whole=options.drop_whole,
        )
    print(f"{options.output}: {count} layers")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
