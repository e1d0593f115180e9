"""Model files: what can be read, what is refused in which words, memory, and safe writing."""

import ctypes
import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from oracle import random_tensors
from torch import Tensor

from rwkv.checkpoint import (
    TensorFile,
    config_of,
    fill,
    fingerprint,
    load_model,
    read_metadata,
    read_tensors,
    write_tensors,
)
from rwkv.config import LowRanks, RWKVConfig
from rwkv.errors import InputError
from rwkv.model import RWKV

versions = pytest.mark.parametrize("version", [6, 7], ids=["v6", "v7"])


def tensors_of(version: int = 7, **sizes) -> dict[str, Tensor]:
    return {name: torch.from_numpy(t) for name, t in random_tensors(version, **sizes).items()}


def hidden_of(model: RWKV) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([[1, 2, 3]]))[0]


def write_shards(path: Path, tensors: dict[str, Tensor]) -> None:
    path.mkdir()
    names = sorted(tensors)
    for number, part in enumerate((names[::2], names[1::2])):
        write_tensors(path / f"model-{number}.safetensors", {name: tensors[name] for name in part})


def write_prefixed(path: Path, tensors: dict[str, Tensor]) -> None:
    write_tensors(path, {f"_forward_module.{name}": t for name, t in tensors.items()})


def write_flat(path: Path, tensors: dict[str, Tensor]) -> None:
    """Without the sides of 1 that some tools drop."""
    write_tensors(path, {name: t.squeeze() for name, t in tensors.items()})


def write_with_unused(path: Path, tensors: dict[str, Tensor]) -> None:
    first = {f"blocks.0.att.v{n}": tensors[f"blocks.1.att.v{n}"] for n in range(3)}
    write_tensors(path, tensors | first)


def write_old_format(path: Path, tensors: dict[str, Tensor]) -> None:
    torch.save(tensors, path, _use_new_zipfile_serialization=False)


WRITERS = {
    "pth": ("model.pth", write_tensors),
    "safetensors": ("model.safetensors", write_tensors),
    "folder of shards": ("model", write_shards),
    "DeepSpeed's prefix": ("model.pth", write_prefixed),
    "without sides of 1": ("model.pth", write_flat),
    "unused tensors of layer 0": ("model.pth", write_with_unused),
    "torch's old format": ("model.pth", write_old_format),
}


@pytest.mark.parametrize("name, write", WRITERS.values(), ids=WRITERS)
def test_every_form_of_a_file_gives_the_same_model(tmp_path, name, write):
    tensors = tensors_of()
    write_tensors(tmp_path / "reference.pth", tensors)
    write(tmp_path / name, tensors)
    want = load_model(tmp_path / "reference.pth")
    got = load_model(tmp_path / name)
    assert got.config == want.config
    for key, parameter in want.named_parameters():
        assert torch.equal(parameter, got.get_parameter(key)), key
    assert torch.equal(hidden_of(got), hidden_of(want))


@versions
def test_state_dict_has_the_files_keys(tmp_path, version):
    tensors = tensors_of(version)
    write_tensors(tmp_path / "model.pth", tensors)
    saved = load_model(tmp_path / "model.pth").state_dict()
    assert saved.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(saved[name], tensor), name


def test_every_size_comes_from_the_tensors(tmp_path):
    write_tensors(tmp_path / "7.pth", tensors_of(7, C=40, N=16, heads=3, V=50, layers=3))
    assert config_of(read_tensors(tmp_path / "7.pth")) == RWKVConfig(
        version=7,
        n_layer=3,
        n_embd=40,
        dim_att=48,
        dim_ffn=44,
        vocab_size=50,
        head_size=16,
        ranks=LowRanks(decay=5, iclr=3, value=7, gate=9),
    )
    write_tensors(tmp_path / "6.pth", tensors_of(6, layers=1))
    assert config_of(read_tensors(tmp_path / "6.pth")) == RWKVConfig(
        version=6,
        n_layer=1,
        n_embd=24,
        dim_att=24,
        dim_ffn=44,
        vocab_size=32,
        head_size=8,
        ranks=LowRanks(decay=7, mix=3),
    )


def test_real_sizes(assets):
    config = config_of(read_tensors(assets / "models" / "rwkv7-reverse-60digits.pth"))
    assert (config.name, config.n_head, config.head_size) == ("RWKV-7 L4-D32", 2, 16)
    config = config_of(read_tensors(assets / "models" / "tiny-rwkv-6v0-1m.pth"))
    assert (config.name, config.n_head, config.head_size) == ("RWKV-6 L12-D64", 8, 8)


def test_dtype_is_the_files_or_the_one_asked_for(tmp_path):
    write_tensors(tmp_path / "model.pth", {n: t.bfloat16() for n, t in tensors_of().items()})
    for dtype in (None, torch.float32):
        found = {p.dtype for p in load_model(tmp_path / "model.pth", dtype=dtype).parameters()}
        assert found == {dtype or torch.bfloat16}


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def last_byte_lost(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def garbled(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:5000] + b"\xff" * 200 + data[5200:])


CUT_OFF = "is cut off or damaged; copy or download it again"
BROKEN = {
    "half a pth": ("m.pth", half, CUT_OFF),
    "a pth less a byte": ("m.pth", last_byte_lost, CUT_OFF),
    "garbled pth": ("m.pth", garbled, CUT_OFF),
    "half a safetensors": ("m.safetensors", half, "cannot be read as safetensors"),
    "empty": ("m.pth", lambda path: path.write_bytes(b""), "is empty; copy or download it again"),
    "a text": ("m.pth", lambda path: path.write_text("hello"), "is no file of torch; name a .pth"),
    "a list": ("m.pth", lambda path: torch.save([1], path), "is no table of tensors; name a"),
    "a checkpoint": (
        "m.pth",
        lambda path: torch.save({"model": tensors_of(), "step": 3}, path),
        "is no table of tensors; name a model, adapter or state file",
    ),
    "numbers as names": (
        "m.pth",
        lambda path: torch.save({1: torch.ones(1)}, path),
        "is no table of tensors",
    ),
    "no tensors": ("m.pth", lambda path: torch.save({}, path), "holds no tensors"),
    "a module": (
        "m.pth",
        lambda path: torch.save(torch.nn.Linear(2, 2), path),
        "holds pickled code, which is never run here; ask its author for a file of tensors alone",
    ),
}


@pytest.mark.parametrize("name, damage, message", BROKEN.values(), ids=BROKEN)
def test_files_that_cannot_be_read(tmp_path, name, damage, message):
    path = tmp_path / name
    write_tensors(path, tensors_of())
    damage(path)
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}: {re.escape(message)}"):
        read_tensors(path)


def test_paths_that_are_no_file(tmp_path):
    with pytest.raises(InputError, match="no such file; check the path"):
        read_tensors(tmp_path / "missing.pth")
    with pytest.raises(InputError, match="the folder holds no .safetensors file; name a .pth"):
        read_tensors(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InputError, match="is no .pth or .safetensors file; name a checkpoint"):
        read_tensors(tmp_path / "notes.txt")


class Code:
    """Unpickling this makes a folder."""

    def __init__(self, folder: Path):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


SAVERS = {
    "torch": torch.save,
    "pickle": lambda x, path: path.write_bytes(pickle.dumps(x, protocol=2)),
}


@pytest.mark.parametrize("save", SAVERS.values(), ids=SAVERS)
def test_pickled_code_is_not_run(tmp_path, save):
    save({"emb.weight": Code(tmp_path / "run")}, tmp_path / "model.pth")
    with pytest.raises(InputError, match="holds pickled code, which is never run"):
        read_tensors(tmp_path / "model.pth")
    assert not (tmp_path / "run").exists()


def without(*names: str):
    return lambda tensors: {name: t for name, t in tensors.items() if name not in names}


WRONG = {
    "a missing tensor": (
        without("blocks.1.ln1.weight"),
        "lacks blocks.1.ln1.weight; is it a whole model file?",
    ),
    "many missing": (
        without(
            *(f"blocks.1.ffn.{n}" for n in ("x_k", "key.weight", "value.weight")), "ln_out.bias"
        ),
        "lacks blocks.1.ffn.key.weight, blocks.1.ffn.value.weight, blocks.1.ffn.x_k and more;",
    ),
    "a size missing": (
        without("blocks.0.att.w1"),
        "an RWKV-7 file with missing or odd tensors ('blocks.0.att.w1'); copy or download",
    ),
    "an unknown tensor": (
        lambda tensors: tensors | {"blocks.1.att.extra": torch.ones(1)},
        "has unexpected blocks.1.att.extra; is it a whole model file?",
    ),
    "another shape": (
        lambda tensors: tensors | {"blocks.1.att.key.weight": torch.ones(24, 23)},
        "blocks.1.att.key.weight is [24, 23], the other tensors ask for [24, 24];",
    ),
    "heads that do not fit": (
        lambda tensors: tensors | {"blocks.0.att.r_k": torch.ones(3, 7)},
        "24 channels are no whole number of heads of 7",
    ),
    "an adapter": (
        lambda _: {"blocks.0.att.key.lora_A": torch.ones(2, 24)},
        "is an adapter, no model; name the base's file here, and",
    ),
    "a state": (
        lambda _: {"blocks.0.att.time_state": torch.ones(3, 8, 8)},
        "is a state, no model; name the base's file here, and",
    ),
    "RWKV-5": (
        lambda _: {"emb.weight": torch.ones(2, 2), "blocks.0.att.key.weight": torch.ones(2, 2)},
        "is an older RWKV (its tensors are emb.weight, blocks.0.att.key.weight, ...);",
    ),
    "another model": (
        lambda _: {"transformer.wte.weight": torch.ones(2, 2)},
        "is no RWKV model (its tensors are transformer.wte.weight, ...); name an RWKV-6 or RWKV-7",
    ),
}


@pytest.mark.parametrize("change, message", WRONG.values(), ids=WRONG)
def test_files_that_are_no_whole_model(tmp_path, change, message):
    path = tmp_path / "model.pth"
    write_tensors(path, change(tensors_of()))
    with pytest.raises(InputError, match=re.escape(message)):
        load_model(path)


def anonymous_bytes() -> int:
    """Memory of this process that no file stands behind."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("counts memory in /proc")
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", status.read_text())[1])


def test_a_model_is_in_memory_once(tmp_path):
    """Opening reads nothing, and filling holds the model and one tensor, never the file too."""
    path = tmp_path / "model.pth"
    write_tensors(path, tensors_of(C=64, V=65536, layers=1))
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # else what was freed before hides what is taken
    size, before, peak = path.stat().st_size, anonymous_bytes(), 0

    def look(_: str) -> None:
        nonlocal peak
        peak = max(peak, anonymous_bytes() - before)

    tensors = read_tensors(path)
    assert anonymous_bytes() - before < 0.1 * size
    with torch.device("meta"):
        model = RWKV(config_of(tensors))
    fill(model, tensors, placed=look)
    assert 0.9 * size < peak < 1.2 * size


def test_writing_and_reading_back(tmp_path):
    """Views, transposes, gradients and integers, in both formats, with what is said of them."""
    table = torch.arange(12.0).view(3, 4)
    tensors = {"row": table[1], "turned": table.t(), "trained": torch.nn.Parameter(table)}
    tensors |= {"codes": torch.arange(3, dtype=torch.uint8), "half": table.bfloat16()}
    for name in ("a.pth", "deep/er/a.safetensors"):
        write_tensors(tmp_path / name, tensors, {"type": "lora", "rank": 8})
        found = read_tensors(tmp_path / name)
        assert found.keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert torch.equal(found[key], tensor) and not found[key].requires_grad
        assert found.shapes["turned"] == (4, 3)
        assert read_metadata(tmp_path / name) == {"type": "lora", "rank": 8}
    assert (tmp_path / "a.pth").stat().st_size < 4000


def test_a_view_is_written_without_the_rest(tmp_path):
    write_tensors(tmp_path / "a.pth", {"corner": torch.zeros(1000, 1000)[:2, :2]})
    assert (tmp_path / "a.pth").stat().st_size < 4000


def test_metadata_that_is_missing_or_wrong(tmp_path):
    assert read_metadata(tmp_path / "a.pth") == {}
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(InputError, match="a.json: not JSON .*; restore it, or remove"):
        read_metadata(tmp_path / "a.pth")
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(InputError, match="a.json: is no JSON object; restore it, or"):
        read_metadata(tmp_path / "a.pth")


def test_a_file_needs_a_known_ending(tmp_path):
    (tmp_path / "out").mkdir()
    for name in ("model", "model.ckpt", "out"):
        with pytest.raises(InputError, match="is no .pth or .safetensors file; give it one of"):
            write_tensors(tmp_path / name, {"a": torch.ones(1)})


def test_a_fingerprint_tells_models_apart(tmp_path):
    def print_of(name: str, tensors: dict[str, Tensor]) -> str:
        write_tensors(tmp_path / name, tensors)
        return fingerprint(TensorFile(tmp_path / name))

    tensors = tensors_of()
    one = print_of("a.pth", tensors)
    assert one == print_of("b.safetensors", tensors)
    assert one != print_of("c.pth", tensors_of(seed=1))
    assert one != print_of("d.pth", {name: t.bfloat16() for name, t in tensors.items()})
    moved = tensors | {"ln_out.bias": tensors["ln_out.bias"] + 1e-3}
    assert one != print_of("e.pth", moved)
