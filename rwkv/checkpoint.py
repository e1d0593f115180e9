"""Read and write model, adapter and state files.

A file is a flat table of tensors under BlinkDL's names: `.pth` (torch.save), `.safetensors`, or a
folder of safetensors shards. Ours have a `.json` beside them that says what they are.
"""

import hashlib
import json
import pickle
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rwkv.config import LowRanks, RWKVConfig
from rwkv.errors import InputError
from rwkv.files import replacing, sync
from rwkv.model import RWKV

PREFIX = "_forward_module."  # DeepSpeed's, in front of every key of some files
SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")
UNREADABLE = (  # what torch.load raises over broken files
    pickle.UnpicklingError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
DTYPES = ("float32", "bfloat16", "float16")  # of the weights that codes stand for
PARTS = ".store."  # between a quantized layer's name and the names of its codes and scales
UNUSED = ("blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2")  # written by some trainers


class TensorFile(Mapping[str, Tensor]):
    """The tensors of a file or a folder of shards, read one by one as they are asked for.

    Keys come without DeepSpeed's prefix.

    Attributes:
        shapes: of every tensor, known without reading one.
        quantized: what the `.json` of a quantized file (`python -m peft.quantize`) says of each
            layer whose weight is stored in fewer bits. Its `LAYER.weight` has a shape here and
            cannot be read; `parts` gives what stands for it.
        base: the fingerprint of the model that a quantized file was made from, else None.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._where: dict[str, tuple[Any, str]] = {}
        for shard in _shards(self.path):
            opened = (
                _open_safetensors(shard) if shard.suffix == ".safetensors" else _open_pth(shard)
            )
            for key in opened.keys():  # noqa: SIM118 (a safetensors file is no mapping)
                name = key.removeprefix(PREFIX)
                self._where[name] = (opened, key)
                if isinstance(opened, dict):
                    self.shapes[name] = tuple(opened[key].shape)
                else:
                    self.shapes[name] = tuple(opened.get_slice(key).get_shape())
        if not self.shapes:
            raise InputError(f"{self.path}: holds no tensors; is it the right file?")
        self.quantized, self.base = self._stored_layers()

    def _stored_layers(self) -> tuple[dict[str, dict[str, Any]], str | None]:
        """What the `.json` says of layers in few bits, and of the model they were made from.

        Their codes and scales give way to the shapes of the weights they stand for.

        Raises:
            InputError: it lacks something, or is another file's.
        """
        beside, metadata = self.path.with_suffix(".json"), read_metadata(self.path)
        stored = metadata.get("quantized") or {}
        mend = "put the file's own beside it, or quantize the model again"
        held = {name.partition(PARTS)[0] for name in self.shapes if PARTS in name}
        if held and not stored:
            raise InputError(
                f"{self.path}: is a quantized model without its {beside.name}; put that file "
                "beside it"
            )
        if not stored:
            return {}, None
        if not isinstance(stored, dict) or metadata.get("kind") != "quantized":
            raise InputError(f"{beside}: is no description of a quantized model; {mend}")
        if not isinstance(metadata.get("base"), str):
            raise InputError(f"{beside}: does not name the model it was made from; {mend}")
        if missing := held - stored.keys():
            raise InputError(
                f"{beside}: does not describe {min(missing)}, which {self.path.name} holds in few "
                f"bits; {mend}"
            )
        if others := stored.keys() - held:
            raise InputError(
                f"{beside}: describes {min(others)} in few bits, and {self.path.name} holds no "
                f"such codes; {mend}"
            )
        for layer, entry in stored.items():
            _check_entry(f"{beside}: {layer}", entry, mend)
        self.shapes = {name: shape for name, shape in self.shapes.items() if PARTS not in name}
        self.shapes |= {f"{layer}.weight": tuple(one["shape"]) for layer, one in stored.items()}
        return stored, metadata["base"]

    def parts(self, layer: str) -> dict[str, Tensor]:
        """The codes and scales of a quantized layer, by name."""
        start = layer + PARTS
        return {
            name.removeprefix(start): self[name] for name in self._where if name.startswith(start)
        }

    def __getitem__(self, name: str) -> Tensor:
        if name in self.shapes and name not in self._where:
            raise InputError(
                f"{self.path}: {name} is quantized; such a file is for --load_model of train.py, "
                "chat, generate and score; name the model it was made from"
            )
        opened, key = self._where[name]
        return opened[key] if isinstance(opened, dict) else opened.get_tensor(key)

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def _check_entry(where: str, entry: Any, mend: str) -> None:
    """Stop at a layer's description that cannot be."""
    if not isinstance(entry, dict):
        raise InputError(f"{where} is {entry!r}, no object; {mend}")
    shape, dtype, storage = (entry.get(key) for key in ("shape", "dtype", "storage"))
    sides = shape if isinstance(shape, list) else []
    if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        raise InputError(f"{where}: shape is {shape!r}, not two sizes; {mend}")
    if dtype not in DTYPES:
        raise InputError(f"{where}: dtype is {dtype!r}, not one of {', '.join(DTYPES)}; {mend}")
    if not isinstance(storage, str):
        raise InputError(f"{where}: storage is {storage!r}, no word; {mend}")


def read_tensors(path: Path | str) -> TensorFile:
    """Open a `.pth` or `.safetensors` file, or a folder of safetensors shards.

    Raises:
        InputError: it is missing, cut off, holds pickled code, or is no table of tensors.
    """
    return TensorFile(path)


def _shards(path: Path) -> list[Path]:
    if path.is_dir():
        shards = sorted(path.glob("*.safetensors"))
        if not shards:
            raise InputError(f"{path}: the folder holds no .safetensors file; name a .pth file")
        return shards
    if not path.exists():
        raise InputError(f"{path}: no such file; check the path")
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path}: is no .pth or .safetensors file; name a checkpoint")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: is empty; copy or download it again")
    return [path]


def _open_safetensors(path: Path) -> Any:
    import safetensors

    try:
        return safetensors.safe_open(str(path), framework="pt")
    except safetensors.SafetensorError as error:
        raise InputError(
            f"{path}: cannot be read as safetensors ({error}); copy or download it again"
        ) from None


def _open_pth(path: Path) -> dict[str, Tensor]:
    try:
        try:
            table = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            table = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check its rights") from None
    except UNREADABLE as error:
        raise InputError(f"{path}: {_why_unreadable(path, str(error))}") from None
    fine = isinstance(table, dict) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in table.items()
    )
    if not fine:
        raise InputError(f"{path}: is no table of tensors; name a model, adapter or state file")
    return table


def _why_unreadable(path: Path, error: str) -> str:
    if "GLOBAL" in error:
        return (
            "holds pickled code, which is never run here; ask its author for a file of tensors "
            "alone"
        )
    with path.open("rb") as handle:
        if handle.read(2) not in (b"PK", b"\x80\x02"):  # of torch's two formats
            return "is no file of torch; name a .pth or .safetensors file"
    return "is cut off or damaged; copy or download it again"


def config_of(tensors: TensorFile) -> RWKVConfig:
    """Read every size of a model from the shapes of its tensors.

    Raises:
        InputError: the file is not an RWKV-6 or RWKV-7 model.
    """
    path, shapes = tensors.path, tensors.shapes
    kind, parts = read_metadata(path).get("kind"), {name.rpartition(".")[2] for name in shapes}
    if any(name.startswith("base_model.model.") for name in shapes):
        raise InputError(
            f"{path}: is HF peft's adapter, no model; name the base's file here, and at --adapter "
            "what python -m peft.convert makes of the folder"
        )
    if kind == "adapter" or parts & {"lora_A", "lora_B", "bone", "miss", "prefix"}:
        raise InputError(
            f"{path}: is an adapter, no model; name the base's file here, and this one at "
            "--adapter (of train.py: --load_adapter)"
        )
    if kind == "state" or ("emb.weight" not in shapes and "time_state" in parts):
        raise InputError(
            f"{path}: is a state, no model; name the base's file here, and this one at --state"
        )
    if "blocks.0.att.r_k" in shapes:
        version = 7
    elif "blocks.0.att.time_maa_w1" in shapes:
        version = 6
    else:
        other = "an older RWKV" if "blocks.0.att.key.weight" in shapes else "no RWKV model"
        first = ", ".join(list(shapes)[:3])
        raise InputError(
            f"{path}: is {other} (its tensors are {first}, ...); name an RWKV-6 or RWKV-7 file"
        )
    try:
        vocab_size, n_embd = shapes["emb.weight"]
        head = shapes["blocks.0.att.r_k" if version == 7 else "blocks.0.att.time_faaaa"]
        if version == 7:
            second = "blocks.1.att.v1"
            ranks = LowRanks(
                decay=shapes["blocks.0.att.w1"][1],
                iclr=shapes["blocks.0.att.a1"][1],
                value=shapes[second][1] if second in shapes else 0,
                gate=shapes["blocks.0.att.g1"][1],
            )
        else:
            ranks = LowRanks(
                decay=shapes["blocks.0.att.time_decay_w1"][1],
                mix=shapes["blocks.0.att.time_maa_w2"][1],
            )
        return RWKVConfig(
            version=version,
            n_layer=1 + max(int(n.split(".")[1]) for n in shapes if n.startswith("blocks.")),
            n_embd=n_embd,
            dim_att=shapes["blocks.0.att.key.weight"][0],
            dim_ffn=shapes["blocks.0.ffn.key.weight"][0],
            vocab_size=vocab_size,
            head_size=head[1],
            ranks=ranks,
        )
    except (KeyError, ValueError, IndexError) as error:
        raise InputError(
            f"{path}: an RWKV-{version} file with missing or odd tensors ({error}); "
            "copy or download it again"
        ) from None


def load_model(
    path: Path | str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> RWKV:
    """Build the model of a file and fill it, tensor by tensor.

    Args:
        path: a BlinkDL-layout RWKV-6 or RWKV-7 file; see `read_tensors`.
        device: where the parameters go; nothing larger than one tensor waits elsewhere.
        dtype: of the parameters; None keeps the file's.
        backend: of the wkv operator; see rwkv.ops.

    Raises:
        InputError: the file cannot be read, is no RWKV model, or lacks tensors.
    """
    tensors = read_tensors(path)
    with torch.device("meta"):
        model = RWKV(config_of(tensors), backend)
    fill(model, tensors, device=device, dtype=dtype)
    return model


def fill(
    model: nn.Module,
    tensors: TensorFile,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    unused: Iterable[str] = UNUSED,
    placed: Callable[[str], None] | None = None,
) -> None:
    """Give every parameter of a model on the meta device its tensor from the file.

    Args:
        model, tensors: the model, and the file.
        device, dtype: as for `load_model`.
        unused: keys of the file that the model may lack.
        placed: called with each parameter's name as soon as it holds its tensor; it may replace
            that parameter's module. The weights of a quantized file are left to it.

    Raises:
        InputError: a tensor is missing, unexpected, of another shape or not finite.
    """
    names = dict(model.named_parameters())
    check_complete(tensors, names, unused)
    for name, parameter in names.items():
        if placed is not None and name.removesuffix(".weight") in tensors.quantized:
            if tensors.shapes[name] != tuple(parameter.shape):
                raise InputError(
                    f"{tensors.path.with_suffix('.json')}: {name} is "
                    f"{list(tensors.shapes[name])}, the other tensors ask for "
                    f"{list(parameter.shape)}; put the file's own beside it"
                )
            placed(name)
            continue
        tensor = tensors[name]
        if tensor.squeeze().shape != parameter.squeeze().shape:
            raise InputError(
                f"{tensors.path}: {name} is {list(tensor.shape)}, the other tensors ask for "
                f"{list(parameter.shape)}; is it a whole model file?"
            )
        check_weight(tensors.path, name, tensor)
        value = tensor.reshape(parameter.shape).to(device, dtype, copy=True)
        check_finite(tensors.path, name, value)
        set_parameter(model, name, value)
        del tensor, value  # `placed` may store the layer, whose weight is then free
        if placed is not None:
            placed(name)


def check_complete(
    tensors: TensorFile, names: Collection[str], unused: Iterable[str] = UNUSED
) -> None:
    """Stop at a file that lacks one of a model's parameters, or has others.

    Args:
        tensors: the file.
        names: of the parameters.
        unused: keys of the file that the model may lack.

    Raises:
        InputError: the message names the first three.
    """
    missing = sorted(set(names) - tensors.keys())
    unexpected = sorted(tensors.keys() - set(names) - set(unused))
    if missing or unexpected:
        problems = [
            f"{word} {', '.join(some[:3])}{' and more' if len(some) > 3 else ''}"
            for word, some in (("lacks", missing), ("has unexpected", unexpected))
            if some
        ]
        raise InputError(f"{tensors.path}: {' and '.join(problems)}; is it a whole model file?")


def check_finite(path: Path, name: str, tensor: Tensor) -> None:
    """Stop at a weight with values that are no finite numbers, before they spread.

    Raises:
        InputError: it has some.
    """
    if not torch.stack(tensor.aminmax()).isfinite().all():  # makes no tensor of this size
        raise InputError(
            f"{path}: {name} holds values that are no finite numbers; copy or download it again"
        )


def check_weight(path: Path, name: str, tensor: Tensor) -> None:
    """Stop where a tensor of a model's file holds whole numbers, as those of other tools may."""
    if not tensor.is_floating_point():
        raise InputError(
            f"{path}: {name} holds {str(tensor.dtype).removeprefix('torch.')}, weights are "
            "floating-point numbers; is it a whole model file?"
        )


def set_parameter(model: nn.Module, name: str, value: Tensor) -> None:
    """Replace the parameter `name` of the model by a new one that holds `value`."""
    module_name, _, attribute = name.rpartition(".")
    module = model.get_submodule(module_name)
    trains = getattr(module, attribute).requires_grad
    setattr(module, attribute, nn.Parameter(value, requires_grad=trains))


def write_tensors(
    path: Path | str, tensors: Mapping[str, Tensor], metadata: dict[str, Any] | None = None
) -> None:
    """Write tensors to a `.pth` or `.safetensors` file, whole or not at all.

    At any moment, and after a kill, tensors have no other's `.json` beside them: when all is on
    the disk the old tensors go, then come the `.json` and the new tensors.

    Args:
        path: its ending chooses the format.
        tensors: on any device; written from the CPU, without history, each with its own storage.
        metadata: what the file is; goes into a `.json` beside it, readable by `read_metadata`.

    Raises:
        InputError: the ending is unknown, the disk is full or the folder cannot be written.
    """
    path = Path(path)
    check_output(path, None if metadata is None else metadata.get("kind"))
    plain = {name: _plain(tensor) for name, tensor in tensors.items()}
    with replacing(path) as part:
        if path.suffix == ".safetensors":
            from safetensors.torch import save_file

            save_file(plain, part)
        else:
            with part.open("wb") as handle:
                torch.save(plain, handle)
        if metadata is not None:
            sync(part)
            with replacing(path.with_suffix(".json")) as beside:
                beside.write_text(json.dumps(metadata, indent=1) + "\n", encoding="utf-8")
                sync(beside)
                path.unlink(missing_ok=True)


def check_output(path: Path, kind: str | None) -> None:
    """Stop where `write_tensors` could not write, or would write over something else.

    Args:
        path: of the tensors.
        kind: what the `.json` beside them will say that they are; None where there will be none.

    Raises:
        InputError: the ending is unknown; the file is there and is of another kind; or its `.json`
            is another file's, or describes no tensors.
    """
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path}: is no .pth or .safetensors file; give it one of these endings")
    if kind is None:
        return
    beside = path.with_suffix(".json")
    held = read_metadata(path).get("kind")
    for twin in (path.with_suffix(suffix) for suffix in SUFFIXES if suffix != path.suffix):
        if twin.exists():
            raise InputError(
                f"{path}: its {beside.name} would describe {twin.name} too; choose another name"
            )
    if beside.exists() and held is None:
        raise InputError(
            f"{path}: would write over {beside.name}, which describes no tensors; choose another "
            "name"
        )
    if path.exists() and held != kind:
        raise InputError(
            f"{path}: is there, and no .json says that it is of kind {kind!r}; it is not written "
            "over, choose another name"
        )


def _plain(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu().contiguous()
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone()


def read_metadata(path: Path | str) -> dict[str, Any]:
    """What the `.json` beside a tensor file says of it; empty if there is none."""
    beside = Path(path).with_suffix(".json")
    if not beside.exists():
        return {}
    try:
        metadata = json.loads(beside.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(
            f"{beside}: not JSON ({error}); restore it, or remove it if it is not needed"
        ) from None
    if not isinstance(metadata, dict):
        raise InputError(
            f"{beside}: is no JSON object; restore it, or remove it if it is not needed"
        )
    return metadata


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """A short hash that tells one model from another.

    It covers names, shapes, dtypes and 64 values of each tensor, so that it takes milliseconds
    and is the same for a .pth and its .safetensors twin. A quantized file has that of the model
    it was made from.
    """
    if isinstance(tensors, TensorFile) and tensors.base is not None:
        return tensors.base
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        sample = tensor.flatten()[:: max(1, tensor.numel() // 64)][:64].contiguous()
        digest.update(f"{name} {tuple(tensor.squeeze().shape)} {tensor.dtype}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
