"""python -m peft.convert against folders that HF peft 0.21.2 wrote (tests/parity_hf_peft.py)."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from peft.convert import main
from peft.hf_folder import from_folder, hf_name, our_name, to_folder
from peft.merging import merge, open_pair
from rwkv.checkpoint import read_tensors, write_tensors
from rwkv.errors import InputError

GOLDEN = Path(__file__).parent / "golden" / "hf_peft"
KINDS = ("lora", "rslora", "dora", "miss")
NAMES = {"blocks.0.att.key": "model.layers.0.attn.k_proj", "head": "lm_head"}
kinds = pytest.mark.parametrize("kind", KINDS)


def weights(kind: str, which: str) -> dict[str, torch.Tensor]:
    tensors = read_tensors(GOLDEN / kind / "weights.safetensors")
    return {f"{ours}.weight": tensors[f"{which}.{theirs}.weight"] for ours, theirs in NAMES.items()}


def converted(kind: str, tmp_path: Path) -> Path:
    path = tmp_path / "adapter.pth"
    assert main(["--adapter", str(GOLDEN / kind), "--output", str(path)]) == 0
    return path


def base_file(kind: str, tmp_path: Path) -> Path:
    path = tmp_path / "base.pth"
    write_tensors(path, weights(kind, "base"))
    return path


@kinds
def test_hf_folders_merge_to_hf_weights(kind, tmp_path):
    base = read_tensors(base_file(kind, tmp_path))
    merged = merge(open_pair(base, converted(kind, tmp_path)))
    for name, want in weights(kind, "merged").items():
        torch.testing.assert_close(merged[name], want, rtol=1e-5, atol=1e-6)


@kinds
def test_there_and_back_is_the_same(kind, tmp_path):
    path, folder, again = converted(kind, tmp_path), tmp_path / "folder", tmp_path / "again.pth"
    assert main(["--adapter", str(path), "--output", str(folder)]) == 0
    theirs = read_tensors(GOLDEN / kind / "adapter_model.safetensors")
    assert {
        n: t.tolist() for n, t in read_tensors(folder / "adapter_model.safetensors").items()
    } == {n: t.tolist() for n, t in theirs.items()}
    main(["--adapter", str(folder), "--output", str(again)])
    base = read_tensors(base_file(kind, tmp_path))
    first, second = (merge(open_pair(base, p)) for p in (path, again))
    assert all(torch.allclose(first[name], second[name], atol=1e-7) for name in first)


@kinds
def test_our_configuration_says_what_hf_says(kind, tmp_path):
    """Where HF peft names a module by its ending, ours names it in full."""
    folder = tmp_path / "folder"
    main(["--adapter", str(converted(kind, tmp_path)), "--output", str(folder)])
    ours, theirs = (
        json.loads((f / "adapter_config.json").read_text()) for f in (folder, GOLDEN / kind)
    )
    same = {"peft_type", "use_dora", "bias", "modules_to_save", "init_weights"} & ours.keys()
    assert {key: ours[key] for key in same} == {key: theirs[key] for key in same}
    assert all(any(m.endswith(t) for t in theirs["target_modules"]) for m in ours["target_modules"])
    if kind == "lora":  # ranks 2 and 4 with alphas 6 and 2, one the rule and one the exception
        assert sorted([ours["r"], *ours["rank_pattern"].values()]) == [2, 4]
        assert sorted([ours["lora_alpha"], *ours["alpha_pattern"].values()]) == [2, 6]
    if kind == "rslora":  # its scale, 6 / sqrt(4), written as alpha / rank
        assert ours["lora_alpha"] == 12 and not ours["use_rslora"]


@pytest.mark.parametrize(
    "layer", ["head", *(f"blocks.11.{n}" for n in ("att.receptance", "att.output", "ffn.value"))]
)
def test_names_go_both_ways(layer):
    assert our_name(hf_name(layer)) == layer


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({"head.bone": (2, 4, 4)}, "head is Bone, whose blocks HF peft lays out otherwise; merge"),
        (
            {"head.miss": (2, 4), "ln_out.bias": (4,)},
            "1 tensors trained whole, such as ln_out.bias",
        ),
        ({"blocks.0.att.gate.miss": (2, 4)}, "att.gate has no name in HF's RWKV-7 models"),
        (
            {
                "head.miss": (2, 4),
                "blocks.0.att.key.lora_A": (2, 4),
                "blocks.0.att.key.lora_B": (4, 2),
            },
            "holds lora and miss; HF peft's folder holds one kind",
        ),
    ],
    ids=["bone", "whole", "gate", "mixed"],
)
def test_what_hf_peft_lacks_is_named(tmp_path, tensors, message):
    path = tmp_path / "a.pth"
    write_tensors(path, {name: torch.zeros(shape) for name, shape in tensors.items()})
    with pytest.raises(InputError, match=message):
        to_folder(path, tmp_path / "folder", alpha=4 if "lora and" in message else None)
    assert not (tmp_path / "folder").exists()


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    path, folder = tmp_path / "a.pth", tmp_path / "rwkv7-0.1b-folder"
    write_tensors(path, {"head.miss": torch.zeros(2, 4)})
    with pytest.raises(InputError, match=r"b\.pth: HF peft wants a folder; drop the ending"):
        main(["--adapter", str(path), "--output", str(tmp_path / "b.pth")])
    words = ["--adapter", str(path), "--output", str(folder)]
    main(words)
    main(words)
    (folder / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match=r"folder: holds thesis.txt, which is not of HF peft's"):
        main(words)
    assert (folder / "thesis.txt").read_text() == "precious"


def test_a_model_card_stays(tmp_path):
    path, folder = tmp_path / "a.pth", tmp_path / "folder"
    for value in (0.0, 1.0):
        write_tensors(path, {"head.miss": torch.full((2, 4), value)})
        main(["--adapter", str(path), "--output", str(folder)])
        (folder / "README.md").write_text("what I found")
    main(["--adapter", str(path), "--output", str(folder)])
    assert (folder / "README.md").read_text() == "what I found"
    (tensor,) = read_tensors(folder / "adapter_model.safetensors").values()
    assert (tensor == 1).all()


def test_whole_tensors_can_be_left_out(tmp_path):
    path, folder = tmp_path / "a.pth", tmp_path / "folder"
    write_tensors(path, {"head.miss": torch.zeros(2, 4), "ln_out.bias": torch.zeros(4)})
    main(["--adapter", str(path), "--output", str(folder), "--drop_whole"])
    assert list(read_tensors(folder / "adapter_model.safetensors")) == [
        "base_model.model.lm_head.miss_block"
    ]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"peft_type": "LOHA"}, "holds LOHA, .*; plain LORA"),
        ({"init_weights": "bat", "peft_type": "MISS"}, r"holds MISS \('bat'\)"),
        ({"modules_to_save": ["lm_head"]}, "possibly with modules_to_save"),
        ({"init_lora_weights": "pissa_niter_4"}, "lies over a base that HF peft changed"),
        ({"lora_alpha": None}, "has lora_alpha None and alpha_pattern .*, not numbers; copy"),
        ({"alpha_pattern": [1]}, r"and alpha_pattern \[1\], not numbers"),
        ({"alpha_pattern": {"(": 1}}, "not numbers"),
    ],
    ids=["kind", "variant", "modules", "another base", "alpha", "alphas", "pattern"],
)
def test_folders_that_cannot_be_converted_are_named(tmp_path, change, message):
    folder = tmp_path / "hf"
    shutil.copytree(GOLDEN / "lora", folder)
    config = json.loads((folder / "adapter_config.json").read_text()) | change
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        from_folder(folder)


@pytest.mark.parametrize(
    "words", [["--alpha", "4"], ["--base_name", "x"], ["--drop_whole"]], ids=lambda words: words[0]
)
def test_flags_that_a_folder_does_not_need_are_named(tmp_path, words):
    command = ["--adapter", str(GOLDEN / "lora"), "--output", str(tmp_path / "a.pth"), *words]
    with pytest.raises(InputError, match=f"^{words[0]}: has no effect on HF peft's folder; drop"):
        main(command)


def test_a_folder_without_configuration_is_named(tmp_path):
    with pytest.raises(InputError, match="lacks adapter_config.json; name HF peft's folder"):
        main(["--adapter", str(tmp_path), "--output", str(tmp_path / "a.pth")])


def test_a_folder_is_not_overwritten_by_itself(tmp_path):
    folder = tmp_path / "hf"
    shutil.copytree(GOLDEN / "lora", folder)
    before = (folder / "adapter_model.safetensors").read_bytes()
    for output in (folder, folder / "adapter_model.safetensors"):
        with pytest.raises(InputError, match="is of the adapter; choose another name"):
            main(["--adapter", str(folder), "--output", str(output)])
    assert (folder / "adapter_model.safetensors").read_bytes() == before
