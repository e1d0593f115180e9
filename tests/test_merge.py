"""Adapter files, and python -m peft.merge: the merged file acts as base and adapter do."""

import json
from pathlib import Path

import pytest
import torch
from parity_rwkv import ask_peer, skip_without_peer

from peft import convert, quantize
from peft.adapter_file import (
    adapter_metadata,
    load_adapter,
    planned_scales,
    planned_shapes,
    read_adapter,
    trained_tensors,
)
from peft.apply import load_frozen, load_with_profile
from peft.flags import PeftFlags
from peft.layer_profile import ADAPTER_MODES
from peft.lora import LoraLinear
from peft.merge import main
from peft.merging import TEXT, attach, compare, fixed_text, merge, open_pair
from peft.stores import STORES
from rwkv.checkpoint import fingerprint, load_model, read_metadata, read_tensors, write_tensors
from rwkv.config import LowRanks, RWKVConfig
from rwkv.errors import InputError
from rwkv.generate import generate
from rwkv.init import initialize
from rwkv.model import RWKV
from rwkv.tokenizer import load_tokenizer

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


@pytest.fixture(scope="module", params=[6, 7])
def base(request, tmp_path_factory) -> Path:
    """A small model file with weights of every kind away from their first values."""
    config = RWKVConfig(
        version=request.param,
        n_layer=2,
        n_embd=32,
        dim_ffn=64,
        vocab_size=24,
        head_size=16,
        ranks=LowRanks(8, 8, 8, 8, 8),
    )
    model = RWKV(config, "reference")
    initialize(model)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.05)
    path = tmp_path_factory.mktemp(f"v{request.param}") / "base.pth"
    write_tensors(path, model.state_dict())
    return path


def profile(tmp_path: Path, **keys) -> str:
    keys = {"match": ["blocks.*", "head"], "rank": 8, **keys}
    path = tmp_path / f"{keys['mode']}.json"
    path.write_text(json.dumps({"rules": [keys]}))
    return str(path)


def trained(base: Path, flags: PeftFlags) -> tuple[RWKV, dict]:
    """The base with adapters that do something, as if trained; and the file's metadata."""
    model, plan = load_with_profile(base, flags, backend="reference")
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model, adapter_metadata(model, plan, base=fingerprint(read_tensors(base)))


def saved(base: Path, tmp_path: Path, flags: PeftFlags) -> tuple[RWKV, Path]:
    model, metadata = trained(base, flags)
    path = tmp_path / "adapter.pth"
    write_tensors(path, trained_tensors(model), metadata)
    return model, path


def logits(model: RWKV) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model(TOKENS)[0])


def test_a_file_of_every_parameter_is_a_model(base, tmp_path):
    """It loads without its base; a file of some is an adapter."""
    model, path = saved(base, tmp_path, PeftFlags())
    assert read_metadata(path)["kind"] == "model"
    assert torch.equal(logits(load_model(path, backend="reference")), logits(model))
    profile = tmp_path / "some.json"
    profile.write_text('{"rules": [{"match": "blocks.1.*", "mode": "full"}]}')
    (tmp_path / "other").mkdir()
    _, path = saved(base, tmp_path / "other", PeftFlags(layer_profile=str(profile)))
    assert read_metadata(path)["kind"] == "adapter"


modes = pytest.mark.parametrize("mode", ADAPTER_MODES)


@modes
def test_merged_file_acts_as_the_trained_model(mode, base, tmp_path):
    model, adapter = saved(base, tmp_path, PeftFlags(layer_profile=profile(tmp_path, mode=mode)))
    output = tmp_path / "merged.pth"
    command = ["--base", str(base), "--adapter", str(adapter), "--output", str(output)]
    assert main(command) == 0
    got = logits(load_model(output, backend="reference"))
    torch.testing.assert_close(got, logits(model), rtol=1e-3, atol=1e-4)
    assert list(read_tensors(output)) == list(read_tensors(base))
    assert read_metadata(output)["difference"]["kl"] < 1e-6


def test_the_package_rwkv_writes_what_the_adapter_does(base, tmp_path):
    """Greedy text of the merged file in another runner is the base's with its adapter."""
    skip_without_peer()
    model, path = saved(base, tmp_path, PeftFlags(layer_profile=profile(tmp_path, mode="lora")))
    command = ["--base", str(base), "--adapter", str(path), "--output", str(tmp_path / "m.pth")]
    assert main(command) == 0
    tokens = TOKENS[0].tolist()
    peer = ask_peer(tmp_path / "m.pth", tokens, count=12)
    (answer,) = generate(model, [tokens], max_tokens=12)
    assert peer.written == answer.tokens


def test_pissa_of_more_than_half_the_smaller_side_is_merged(base, tmp_path):
    """The file's LoRA has twice the rank: 40 over weights of 32 channels."""
    keys = {"mode": "pissa", "rank": 20, "train_small": False}
    model, path = saved(base, tmp_path, PeftFlags(layer_profile=profile(tmp_path, **keys)))
    output = tmp_path / "merged.pth"
    command = ["--base", str(base), "--adapter", str(path), "--output", str(output)]
    assert main(command) == 0
    got = logits(load_model(output, backend="reference"))
    torch.testing.assert_close(got, logits(model), rtol=1e-3, atol=1e-4)
    beside = load_frozen(base, backend="reference")
    attach(open_pair(read_tensors(base), path), beside)
    torch.testing.assert_close(logits(beside), logits(model), rtol=1e-3, atol=1e-4)
    if beside.config.version == 7:  # HF peft's names are of its models
        folder, again = tmp_path / "folder", tmp_path / "again.pth"
        for given, made in ((path, folder), (folder, again)):
            assert convert.main(["--adapter", str(given), "--output", str(made)]) == 0
        merged = merge(open_pair(read_tensors(base), again))
        assert all(torch.equal(merged[name], t) for name, t in read_tensors(output).items())


@modes
@pytest.mark.parametrize("storage", ["none", *STORES])
def test_training_goes_on_from_a_file(mode, storage, base, tmp_path):
    """The reader has the logits of the writer, before a step and after it."""
    keys = {"mode": mode, "quant": storage}
    flags = PeftFlags(layer_profile=profile(tmp_path, **keys), quant_head=True)
    model, adapter = saved(base, tmp_path, flags)
    again, _ = load_with_profile(base, flags, backend="reference")
    load_adapter(again, adapter, base=fingerprint(read_tensors(base)))
    assert trained_tensors(again).keys() == trained_tensors(model).keys()
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-5)
    for one in (model, again):
        steps = torch.optim.SGD((p for p in one.parameters() if p.requires_grad), lr=0.1)
        one.logits(one(TOKENS)[0])[..., 0].mean().backward()
        steps.step()
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-5)


def test_layers_that_train_in_full_are_merged_whole(base, tmp_path):
    flags = PeftFlags(layer_profile=profile(tmp_path, mode="full"))
    model, adapter = saved(base, tmp_path, flags)
    merged = merge(open_pair(read_tensors(base), adapter))
    want = model.state_dict()
    assert merged.keys() == want.keys()
    assert all(torch.equal(merged[name], want[name]) for name in want)


def test_scale_of_rslora_survives_the_file(base, tmp_path):
    flags = PeftFlags(layer_profile=profile(tmp_path, mode="lora", alpha=6), rslora=True)
    _, adapter = saved(base, tmp_path, flags)
    _, kinds, _ = read_adapter(adapter)
    assert kinds["head"].scale == pytest.approx(6 / 8**0.5)


def test_a_dtype_of_fewer_bits_is_kept(base, tmp_path):
    narrow = tmp_path / "bf16.pth"
    tensors = {name: tensor.bfloat16() for name, tensor in read_tensors(base).items()}
    write_tensors(narrow, tensors)
    _, adapter = saved(narrow, tmp_path, PeftFlags(layer_profile=profile(tmp_path, mode="lora")))
    merged = merge(open_pair(read_tensors(narrow), adapter))
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    difference = compare(open_pair(read_tensors(narrow), adapter), merged)
    assert 0 < difference.kl < 1e-3 and difference.agreement > 0.9


def test_unused_keys_of_the_base_are_kept(base, tmp_path):
    """Some files hold value residual parameters for layer 0, which has none."""
    wide = tmp_path / "wide.pth"
    tensors = dict(read_tensors(base)) | {"blocks.0.att.v0": torch.ones(1, 1, 32)}
    write_tensors(wide, tensors)
    _, adapter = saved(wide, tmp_path, PeftFlags(layer_profile=profile(tmp_path, mode="bone")))
    merged = merge(open_pair(read_tensors(wide), adapter))
    assert list(merged) == list(tensors) and torch.equal(
        merged["blocks.0.att.v0"], tensors["blocks.0.att.v0"]
    )
    assert compare(open_pair(read_tensors(wide), adapter), merged).kl < 1e-6


def test_a_tuned_state_is_not_part_of_the_model(base, tmp_path):
    model, metadata = trained(base, PeftFlags(layer_profile=profile(tmp_path, mode="bone")))
    tensors = trained_tensors(model) | {"blocks.0.att.time_state": torch.zeros(2, 16, 16)}
    write_tensors(tmp_path / "a.pth", tensors, metadata)
    assert "blocks.0.att.time_state" not in merge(open_pair(read_tensors(base), tmp_path / "a.pth"))


def test_files_without_metadata_need_alpha_alone(base, tmp_path):
    """RWKV-LM-RLHF's files: rank and kind are in the shapes, alpha is not."""
    flags = PeftFlags(layer_profile=profile(tmp_path, mode="dora_column", alpha=4))
    model, _ = trained(base, flags)
    adapter = tmp_path / "rwkv-0.pth"
    write_tensors(adapter, trained_tensors(model))
    with pytest.raises(InputError, match=r"rwkv-0.pth: .*: the file does not say its alpha; give"):
        read_adapter(adapter)
    _, kinds, _ = read_adapter(adapter, alpha=4)
    assert kinds["head"].mode == "dora_column" and kinds["head"].scale == 0.5
    output = str(tmp_path / "merged.pth")
    command = ["--base", str(base), "--adapter", str(adapter), "--output", output, "--alpha", "4"]
    assert main(command) == 0
    got = logits(load_model(output, backend="reference"))
    torch.testing.assert_close(got, logits(model), rtol=1e-3, atol=1e-4)


@pytest.fixture
def foreign(base, tmp_path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A file as RWKV-LM-RLHF's trainer leaves it, and the weights that it stands for.

    A flat table of what trained, by torch.save, in bfloat16, and no word of alpha, which is 8: LoRA
    of rank 4 in the head, Bone of rank 16 and DoRA of rank 4 with a norm a column in block 1, whose
    norms train whole. Its formulas: W + alpha / rank B A; W + W4 G + G in blocks (a r) (b s) of W
    as [a, b, r, s], G by b; M (W + alpha / rank B A) / (its columns' lengths + 1e-6).
    """
    draw = torch.Generator().manual_seed(3)

    def drawn(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=draw) * 0.1).bfloat16()

    old = read_tensors(base)
    tensors = {
        "blocks.1.att.key.lora_A": drawn(4, 32),
        "blocks.1.att.key.lora_B": drawn(32, 4),
        "blocks.1.att.key.lora_M": 1 + drawn(1, 32),
        "blocks.1.ffn.key.bone": drawn(2, 16, 16),
        "blocks.1.ln1.weight": 1 + drawn(32),
        "blocks.1.ln1.bias": drawn(32),
        "head.lora_A": drawn(4, 32),
        "head.lora_B": drawn(24, 4),
    }
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    W = {n: old[f"{n}.weight"].double() for n in ("blocks.1.att.key", "blocks.1.ffn.key", "head")}
    V = (
        W["blocks.1.att.key"]
        + 2 * wide["blocks.1.att.key.lora_B"] @ wide["blocks.1.att.key.lora_A"]
    )
    G, W4 = wide["blocks.1.ffn.key.bone"], W["blocks.1.ffn.key"].clone()
    for a in range(4):
        for b in range(2):
            block = W4[16 * a : 16 * a + 16, 16 * b : 16 * b + 16]
            block += block @ G[b] + G[b]
    changed = {
        "blocks.1.att.key.weight": wide["blocks.1.att.key.lora_M"]
        * V
        / (V.square().sum(dim=0).sqrt() + 1e-6),
        "blocks.1.ffn.key.weight": W4,
        **{name: wide[name] for name in ("blocks.1.ln1.weight", "blocks.1.ln1.bias")},
        "head.weight": W["head"] + 2 * wide["head.lora_B"] @ wide["head.lora_A"],
    }
    path = tmp_path / "rwkv-3.pth"
    torch.save(tensors, path)
    return path, {name: value.float() for name, value in changed.items()}


def test_a_file_of_rwkv_lm_rlhf_is_merged(base, foreign):
    path, changed = foreign
    merged = merge(open_pair(read_tensors(base), path, alpha=8))
    for name, before in read_tensors(base).items():
        want = changed.get(name, before)
        torch.testing.assert_close(merged[name], want, rtol=1e-5, atol=1e-6, msg=name)


def test_a_file_of_rwkv_lm_rlhf_is_trained_on(base, foreign, tmp_path):
    """Under the profile that it was trained with; alpha is the profile's."""
    path, changed = foreign
    rules = [
        {"match": "*", "mode": "freeze"},
        {"match": "head", "mode": "lora", "rank": 4, "alpha": 8},
        {"match": "blocks.1.att.key", "mode": "dora_column", "rank": 4, "alpha": 8},
        {"match": "blocks.1.ffn.key", "mode": "bone", "rank": 16},
        {"match": "blocks.1.ln1", "mode": "full"},
    ]
    (tmp_path / "profile.json").write_text(json.dumps({"rules": rules}))
    flags = PeftFlags(layer_profile=str(tmp_path / "profile.json"), limited_lora=True)
    model, _ = load_with_profile(base, flags, backend="reference")
    load_adapter(model, path)
    for name in ("blocks.1.att.key", "blocks.1.ffn.key", "head"):
        got = model.get_submodule(name).merged_weight()
        torch.testing.assert_close(got, changed[f"{name}.weight"], rtol=1e-5, atol=1e-6, msg=name)
    assert torch.equal(model.blocks[1].ln1.weight, changed["blocks.1.ln1.weight"])


@pytest.mark.parametrize("limited", [False, True], ids=["small", "limited"])
@pytest.mark.parametrize("mode", sorted({*ADAPTER_MODES, "full"}))
def test_a_plan_knows_what_an_adapter_file_holds(base, tmp_path, mode, limited):
    """Names, shapes and scales, before there is a model."""
    path = profile(tmp_path, mode=mode, **({} if mode == "full" else {"alpha": 4}))
    model, plan = load_with_profile(base, PeftFlags(layer_profile=path, limited_lora=limited))
    made = {name: tuple(tensor.shape) for name, tensor in trained_tensors(model).items()}
    scales = {n: m.scale for n, m in model.named_modules() if isinstance(m, LoraLinear)}
    assert planned_shapes(plan) == made
    assert planned_scales(plan) == scales


@pytest.mark.parametrize(
    "mode, reason",
    [("lora", "the .json beside it states it"), ("bone", "it holds no LoRA or DoRA")],
)
@pytest.mark.parametrize("command", ["merge", "convert"])
def test_an_alpha_without_effect_is_named(command, mode, reason, base, tmp_path):
    _, adapter = saved(base, tmp_path, PeftFlags(layer_profile=profile(tmp_path, mode=mode)))
    words = ["--adapter", str(adapter), "--alpha", "4", "--output"]
    with pytest.raises(
        InputError, match=f"^--alpha 4: has no effect on .*adapter.pth, for {reason}; drop it"
    ):
        if command == "merge":
            main(["--base", str(base), *words, str(tmp_path / "merged.pth")])
        else:
            convert.main([*words, str(tmp_path / "folder")])


def test_the_command_refuses_what_differs_and_deletes_nothing(base, tmp_path):
    flags = PeftFlags(layer_profile=profile(tmp_path, mode="lora"))
    _, adapter = saved(base, tmp_path, flags)
    output = tmp_path / "merged.pth"
    command = ["--base", str(base), "--adapter", str(adapter), "--output", str(output)]
    assert main(command) == 0
    before = output.read_bytes()
    with pytest.raises(InputError, match=r"merged.pth: not written: logits differ by .* KL"):
        main([*command, "--tolerance", "-1"])
    assert output.read_bytes() == before
    assert sorted(p.name for p in tmp_path.glob("*merged*")) == ["merged.json", "merged.pth"]


@pytest.mark.parametrize("more", [[], ["--quant_mode", "int8"]], ids=["model", "quantized"])
def test_no_output_takes_the_place_of_something_else(base, tmp_path, more):
    """Of a file of another kind, or of the .json of one with another ending."""
    _, adapter = saved(base, tmp_path, PeftFlags(layer_profile=profile(tmp_path, mode="lora")))
    before = adapter.with_suffix(".json").read_bytes()
    command = ["--base", str(base), "--adapter", str(adapter), *more, "--output"]
    beside = adapter.with_suffix(".safetensors")
    with pytest.raises(
        InputError, match=r"its adapter.json would describe adapter.pth too; choose"
    ):
        main([*command, str(beside)])
    plain = tmp_path / "plain.pth"
    plain.write_bytes(base.read_bytes())
    with pytest.raises(
        InputError, match="plain.pth: is there, and no .json says that it is of kin"
    ):
        main([*command, str(plain)])
    assert adapter.with_suffix(".json").read_bytes() == before
    assert plain.read_bytes() == base.read_bytes() and not beside.exists()


def test_another_base_is_refused(base, tmp_path):
    _, adapter = saved(base, tmp_path, PeftFlags(layer_profile=profile(tmp_path, mode="lora")))
    other = tmp_path / "other.pth"
    write_tensors(other, {name: t + 0.01 for name, t in read_tensors(base).items()})
    with pytest.raises(
        InputError, match=r"adapter.pth: was trained on the base \w+, .*other.pth is"
    ):
        merge(open_pair(read_tensors(other), adapter))
    assert merge(open_pair(read_tensors(other), adapter, other_base=True))


@pytest.mark.parametrize("mode", ["lora", "dora", "bone"])
def test_merging_as_trained_keeps_the_quantized_weights(mode, base, tmp_path, capsys):
    """Else the merged model is another than the one that was trained over 4 bits, which is told."""
    keys = {"match": "*", "mode": mode, "quant": "nf4", "train_small": False}
    model, adapter = saved(base, tmp_path, PeftFlags(layer_profile=profile(tmp_path, **keys)))
    assert model.emb.weight is None
    outputs = [tmp_path / "trained.pth", tmp_path / "plain.pth"]
    for output, more in zip(outputs, (["--as_trained"], []), strict=True):
        command = ["--base", str(base), "--adapter", str(adapter), "--output", str(output)]
        assert main([*command, *more]) == 0
        told = "from the model as it was trained, over nf4: " in capsys.readouterr().out
        assert told == (not more)
    trained, plain = (logits(load_model(path, backend="reference")) for path in outputs)
    torch.testing.assert_close(trained, logits(model), rtol=1e-3, atol=1e-4)
    assert (plain - trained).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8", "fp6"])
@pytest.mark.parametrize("ends", [[], ["--quant_head"]], ids=["blocks", "all"])
def test_merging_into_a_new_quantized_base(base, tmp_path, capsys, kind, ends):
    """Its codes are those of the merged file, and both losses are told."""
    _, adapter = saved(base, tmp_path, PeftFlags(layer_profile=profile(tmp_path, mode="lora")))
    plain, small, again = (tmp_path / f"{name}.pth" for name in ("plain", "small", "again"))
    command = ["--base", str(base), "--adapter", str(adapter), "--output"]
    assert main([*command, str(plain)]) == 0
    capsys.readouterr()
    storage = ["--quant_mode", kind, *ends]
    assert main([*command, str(small), *storage, "--quant_tolerance", "9"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("merged, before quantization: logits differ by ")
    assert f"layers as {kind}; logits differ by " in told[1] and "top-1 agreement" in told[1]
    quantize.main(["--load_model", str(plain), *storage, "--output", str(again)])
    made, wanted = (load_frozen(path, backend="reference") for path in (small, again))
    assert torch.equal(logits(made), logits(wanted))
    assert fingerprint(read_tensors(small)) == fingerprint(read_tensors(plain))
    metadata = read_metadata(small)
    assert metadata["difference"]["kl"] < metadata["quantization"]["kl"]


@pytest.mark.parametrize("vocab_size", [256, 65536, 40])
def test_models_are_compared_on_a_text_of_theirs(vocab_size):
    tokens = fixed_text(vocab_size)
    assert tokens.shape[0] == 1 and tokens.min() >= 0 and tokens.max() < vocab_size
    if vocab_size != 40:
        assert load_tokenizer(None, vocab_size).decode(tokens[0].tolist()) == TEXT


def test_an_incomplete_model_is_not_quantized(base, tmp_path):
    tensors = {name: tensor.clone() for name, tensor in read_tensors(base).items()}
    del tensors["blocks.1.att.value.weight"]
    write_tensors(tmp_path / "part.pth", tensors)
    output = tmp_path / "small.pth"
    with pytest.raises(InputError, match=r"part.pth: lacks blocks\.1\.att\.value\.weight; is it"):
        quantize.main(["--load_model", str(tmp_path / "part.pth"), "--output", str(output)])
    assert not output.exists()


def test_a_loss_above_the_tolerance_is_refused_and_nothing_written(base, tmp_path):
    _, adapter = saved(base, tmp_path, PeftFlags(layer_profile=profile(tmp_path, mode="lora")))
    output = tmp_path / "small.pth"
    command = ["--base", str(base), "--adapter", str(adapter), "--output", str(output)]
    message = "not written: as fp4, logits differ by .* KL .* nats a token, top-1 agreement .*; "
    with pytest.raises(InputError, match=message + "--quant_tolerance is 1e-06: choose a storage"):
        main([*command, "--quant_mode", "fp4", "--quant_tolerance", "1e-6"])
    assert not output.exists() and not output.with_suffix(".json").exists()


def test_merging_as_trained_needs_the_file_to_say_how(base, tmp_path, capsys):
    path = tmp_path / "rwkv-0.pth"
    write_tensors(path, {"head.bone": torch.zeros(4, 8, 8)})
    with pytest.raises(InputError, match="does not say how the base was stored; drop --as_tr"):
        open_pair(read_tensors(base), path, as_trained=True)
    keys = {"mode": "pissa", "quant": "int8"}
    _, adapter = saved(base, tmp_path, PeftFlags(layer_profile=profile(tmp_path, **keys)))
    with pytest.raises(InputError, match="PiSSA stored another weight than the base's; drop"):
        open_pair(read_tensors(base), adapter, as_trained=True)
    output = tmp_path / "merged.pth"
    assert main(["--base", str(base), "--adapter", str(adapter), "--output", str(output)]) == 0
    said = "not compared with the model as it was trained: "
    assert said in (told := capsys.readouterr().out) and "another weight than the base's\n" in told


@pytest.mark.parametrize(
    "storage, message",
    [
        ({"head": "nf3"}, r"adapter.json: head was stored as 'nf3', known are nf4, .*; restore it"),
        ({"head": ["nf4"]}, r"adapter.json: head was stored as \['nf4'\], known are nf4"),
        ({"haed": "nf4"}, r"says that haed was stored as nf4, and .*base.pth has no such layer; "),
        ({"ln_out": "nf4"}, "says that ln_out was stored as nf4, and .* has no such layer"),
        (["head"], "adapter.json: says nothing usable of the storage; restore it"),
    ],
    ids=["store", "stores", "layer", "vector", "list"],
)
def test_a_storage_that_cannot_be_is_named(base, tmp_path, storage, message):
    keys = {"mode": "lora", "quant": "nf4"}
    _, adapter = saved(base, tmp_path, PeftFlags(layer_profile=profile(tmp_path, **keys)))
    metadata = read_metadata(adapter) | {"storage": storage}
    adapter.with_suffix(".json").write_text(json.dumps(metadata))
    with pytest.raises(InputError, match=message):
        open_pair(read_tensors(base), adapter, as_trained=True)


def test_an_output_that_is_an_input_is_refused(base, tmp_path):
    _, adapter = saved(base, tmp_path, PeftFlags(layer_profile=profile(tmp_path, mode="lora")))
    with pytest.raises(InputError, match="is an input too; choose another name"):
        main(["--base", str(base), "--adapter", str(adapter), "--output", str(base)])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mode": "bone"}, r"lacks blocks.0.*bone.* has unexpected .*lora_A.*; use the profile"),
        (
            {"rank": 4},
            r"lora_A is \[8, 32\], the profile makes it \[4, 32\]; set the rank",
        ),
        ({"alpha": 8}, "was trained with alpha / rank 2, the profile says 1; set the same alpha"),
        ({"train_small": False}, r"has unexpected .* and more; use the profile and --limited_lora"),
    ],
    ids=["mode", "rank", "alpha", "small"],
)
def test_a_profile_that_does_not_fit_the_file_is_refused(base, tmp_path, change, message):
    keys = {"mode": "lora", "rank": 8, "alpha": 16}
    _, adapter = saved(base, tmp_path, PeftFlags(layer_profile=profile(tmp_path, **keys)))
    flags = PeftFlags(layer_profile=profile(tmp_path, **keys | change))
    model, _ = load_with_profile(base, flags, backend="reference")
    before = {name: tensor.clone() for name, tensor in trained_tensors(model).items()}
    with pytest.raises(InputError, match=message):
        load_adapter(model, adapter)
    assert all(torch.equal(t, before[name]) for name, t in trained_tensors(model).items())


def test_first_directions_of_another_base_change_nothing(base, tmp_path):
    """Codes are what is left beside PiSSA's own; the last layer of the file has others."""
    keys = {"mode": "pissa", "quant": "int8", "train_small": False}
    flags = PeftFlags(layer_profile=profile(tmp_path, **keys))
    model, adapter = saved(base, tmp_path, flags)
    tensors = {name: tensor.clone() for name, tensor in read_tensors(adapter).items()}
    tensors["head.lora_A"][8:] *= 2
    write_tensors(adapter, tensors, read_metadata(adapter))
    again, _ = load_with_profile(base, flags, backend="reference")
    before = {name: tensor.clone() for name, tensor in trained_tensors(again).items()}
    told = (
        r"adapter.pth: head: PiSSA's first directions are not this model's: the base or --svd_niter"
        r" is another, or an earlier version drew them on a GPU; load .* or merge"
    )
    with pytest.raises(InputError, match=told):
        load_adapter(again, adapter)
    assert all(torch.equal(t, before[name]) for name, t in trained_tensors(again).items())


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({"blocks.0.ffn.expert_0.key.lora_A_expert_0": (8, 32)}, "mixture-of-experts adapters are"),
        ({"blocks.0.att.key.lora_A": (8, 32)}, "att.key: holds lora_A alone"),
        (
            {"head.lora_A": (4, 32), "head.lora_B": (24, 8)},
            r"head: lora_A is \[4, 32\] and lora_B \[24, 8\], which are of different ranks",
        ),
        ({"head.lora_A": (0, 32), "head.lora_B": (24, 0)}, r"head: lora_A is \[0, 32\]; copy"),
        ({"blocks.9.att.key.bone": (4, 8, 8)}, "changes blocks.9.att.key.weight, which .* lacks"),
        ({"head.bone": (2, 8, 8)}, r"head.bone is \[2, 8, 8\], over a \[24, 32\] weight it would"),
        ({"head.bone": (2, 16, 16)}, "head: bone: rank 16 does not divide both sides"),
        ({"emb.weight": (24, 16)}, r"emb.weight is \[24, 16\], in .* it is \[24, 32\]"),
        ({"extra": (3,)}, "changes extra, which .* lacks"),
        ({"head.bone": (4, 8, 8), "head.weight": (24, 32)}, "an adapter for head and its whole"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_files_that_do_not_fit_are_named(base, tmp_path, tensors, message):
    path = tmp_path / "odd.pth"
    write_tensors(path, {name: torch.zeros(shape) for name, shape in tensors.items()})
    with pytest.raises(InputError, match=message):
        merge(open_pair(read_tensors(base), path))


def test_real_models_merge_within_the_tolerance(assets, tmp_path):
    for name in ("tiny-rwkv-6v0-1m", "rwkv7-reverse-60digits"):
        base = assets / "models" / f"{name}.pth"
        flags = PeftFlags(layer_profile=profile(tmp_path, mode="dora"))
        _, adapter = saved(base, tmp_path, flags)
        output = tmp_path / f"{name}.safetensors"
        command = ["--base", str(base), "--adapter", str(adapter), "--output", str(output)]
        assert main(command) == 0
        assert read_metadata(output)["difference"]["kl"] < 1e-5


def test_an_adapter_that_lost_a_layer_is_named(base, tmp_path):
    """Else the model would be merged without it."""
    _, adapter = saved(base, tmp_path, PeftFlags(layer_profile=profile(tmp_path, mode="lora")))
    tensors = {n: t for n, t in read_tensors(adapter).items() if "blocks.0.att.key.lora" not in n}
    metadata = read_metadata(adapter)
    write_tensors(adapter, tensors, metadata)
    with pytest.raises(
        InputError, match=r"lacks the adapter of blocks.0.att.key, which its .json names; copy both"
    ):
        open_pair(read_tensors(base), adapter)


def test_an_adapter_with_bad_numbers_is_named(base, tmp_path):
    flags = PeftFlags(layer_profile=profile(tmp_path, mode="lora"))
    model, adapter = saved(base, tmp_path, flags)
    tensors = {n: t.clone() for n, t in read_tensors(adapter).items()}
    tensors["blocks.0.att.key.lora_B"][0, 0] = float("nan")
    write_tensors(adapter, tensors, read_metadata(adapter))
    message = r"att\.key\.lora_B holds values that are no finite numbers; copy or download it again"
    with pytest.raises(InputError, match=message):
        open_pair(read_tensors(base), adapter)
    with pytest.raises(InputError, match=message):
        load_adapter(model, adapter)
