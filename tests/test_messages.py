"""What a user does wrong: one line on stderr, exit status 2, nothing half-written.

Each case runs train.py in this process up to the error, which comes before Lightning is imported.
"""

import dataclasses
import errno
import json
import os
import pickle
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import train
from data import make_reference
from peft import convert, merge, quantize
from peft.adapter_file import adapter_metadata, trained_tensors
from peft.apply import load_with_profile
from peft.flags import PeftFlags
from rwkv import chat, cli, generate, score
from rwkv.checkpoint import fingerprint, read_tensors, write_tensors
from rwkv.config import RWKVConfig, default_ranks
from rwkv.errors import InputError, RunError
from rwkv.flags import is_within, parse
from rwkv.init import initialize
from rwkv.model import RWKV
from rwkv.run.settings import FLAGS, without_effect
from rwkv.training.flags import TrainerFlags
from rwkv.upstream_flags import ABSENT

CSV_HEADER = (
    "Layer,Mode,Rank,Alpha,Dropout,Weight_lr_init,Weight_lr_final,Weight_decay,"
    "State_lr_init,State_lr_final,RejectParts"
)


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A folder with a model of two blocks, data and a profile, none of them at fault."""
    folder = tmp_path_factory.mktemp("good")
    config = RWKVConfig(
        version=7,
        n_layer=2,
        n_embd=48,
        dim_ffn=96,
        vocab_size=256,
        head_size=16,
        ranks=default_ranks(7, 48),
    )
    model = RWKV(config)
    initialize(model, seed=0)
    write_tensors(folder / "base.pth", model.state_dict())
    rows = [{"prompt": f"Say {n}", "completion": f"{n}."} for n in range(20)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_profile(folder / "lora.json", mode="lora", rank=4)
    return folder


def write_profile(path: Path, **keys: object) -> Path:
    path.write_text(json.dumps({"rules": [{"match": "blocks.*", **keys}]}))
    return path


@pytest.fixture
def fails(good, tmp_path, capsys):
    """`fails(flag=value, ...)` runs train.py, asserts how it fails, and gives the message.

    A flag that is None is left out. `status` is the exit status to expect.
    """

    def run(*words: str, status: int = 2, **flags: object) -> str:
        given = {
            "load_model": good / "base.pth",
            "train_data_file": good / "train.jsonl",
            "proj_dir": tmp_path / "out",
            "cache_dir": tmp_path / "cache",
            "sft": 1,
            "ctx_len": 64,
            "accelerator": "cpu",
        } | flags
        named = [w for k, v in given.items() if v is not None for w in (f"--{k}", str(v))]
        found = cli.run(lambda: train.main([*named, *words]))
        text = capsys.readouterr().err
        assert found == status, text
        lines = text.splitlines()
        assert lines[-1].startswith("error: "), text
        assert sum(line.startswith("error: ") for line in lines) == 1
        assert "Traceback" not in text
        assert not list(tmp_path.rglob("*.part")), "something half-written is left"
        written = sorted(p.name for p in tmp_path.glob("out/*"))
        assert not written or "proj_dir" in flags, f"{written} was written"
        return lines[-1].removeprefix("error: ")

    return run


# Data files: (name, content, what the message says)
DATA = {
    "empty file": ("empty.jsonl", b"", ["empty.jsonl: the file is empty"]),
    "blank lines alone": ("blank.jsonl", b"\n\n", ["blank.jsonl"]),
    "not JSON": ("cut.jsonl", b'{"text": "a"}\n{"text": \n', ["cut.jsonl:2: not JSON"]),
    "no text": ("odd.jsonl", b'{"title": "a"}\n', ["odd.jsonl:1: has 'title'; needs 'text'"]),
    "empty text": ("void.jsonl", b'{"text": " "}\n', ["void.jsonl:1: 'text' is empty"]),
    "no answer": (
        "half.jsonl",
        b'{"prompt": "a"}\n',
        ["half.jsonl:1: has 'prompt'; needs 'text'; a prompt"],
    ),
    "unknown role": (
        "role.jsonl",
        b'{"messages": [{"role": "wizard", "content": "a"}]}\n',
        ["role.jsonl:1: message 1: its role is 'wizard'; known are system"],
    ),
    "a number for a text": ("number.jsonl", b'{"text": 5}\n', ["number.jsonl:1", "a number (5)"]),
    "not UTF-8": ("latin.jsonl", b'{"text": "caf\xe9"}\n', ["latin.jsonl:1: not UTF-8", "0xe9"]),
    "unknown ending": (
        "data.parquet",
        b"PAR1",
        ["data.parquet: unknown kind of file; give .jsonl"],
    ),
    "UTF-16": (
        "wide.jsonl",
        '{"text": "a"}\n'.encode("utf-16"),
        ["wide.jsonl:1: not UTF-8"],
    ),
    "binary": ("photo.jsonl", b"\x89PNG\r\n\x1a\n", ["photo.jsonl:1: not UTF-8 (byte 0x89)"]),
    "no content": (
        "silent.jsonl",
        b'{"messages": [{"role": "user"}, {"role": "assistant", "content": "a"}]}\n',
        ["silent.jsonl:1: message 1: has no content; mend the record"],
    ),
    "odd weight": (
        "heavy.jsonl",
        b'{"messages": [{"role": "assistant", "content": "a", "weight": "no"}]}\n',
        ["message 1: its weight is 'no', neither 1 nor 0; mend"],
    ),
    "CSV of other columns": (
        "c.csv",
        b"title,body\na,b\n",
        ["c.csv:2: has 'title', 'body'"],
    ),
    "CSV of uneven rows": ("odd.csv", b"text,more\na,b\nc\n", ["odd.csv:3: has 1 fields"]),
    "not HDF5": ("odd.h5", b"not hdf5", ["odd.h5: not a whole HDF5 file"]),
}


@pytest.mark.parametrize("case", DATA)
def test_a_bad_data_file_is_named_with_its_line(fails, tmp_path, case):
    name, content, wanted = DATA[case]
    (tmp_path / name).write_bytes(content)
    text = fails(train_data_file=tmp_path / name)
    for part in wanted:
        assert part in text
    assert not list((tmp_path / "cache").glob("*-*"))


def test_a_missing_data_file_is_named(fails, tmp_path):
    for flag in ("train_data_file", "val_data_file"):
        text = fails(**{flag: tmp_path / "gone.jsonl"})
        assert text == f"{tmp_path}/gone.jsonl: no such file; check the path"


def test_no_data_file_asks_for_one(fails):
    assert fails(train_data_file=None).startswith("--train_data_file: names no file")


def test_a_folder_that_is_no_store_says_how_to_make_one(fails, tmp_path):
    (tmp_path / "some").mkdir()
    assert "python -m data.make_sft" in fails(train_data_file=tmp_path / "some")


def test_ids_of_another_tokenizer_are_named(fails, tmp_path):
    write_h5(tmp_path / "other.h5", [[1, 2, 40_000]])
    text = fails(train_data_file=tmp_path / "other.h5")
    assert "tokens[0]: has the token 40000" in text and "another tokenizer" in text


# Model files
class Harmful:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def truncated(path: Path, base: Path) -> None:
    content = base.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def without_tensor(path: Path, base: Path) -> None:
    tensors = dict(read_tensors(base))
    del tensors["ln_out.weight"]
    torch.save(tensors, path)


def adapter(path: Path, base: Path) -> None:
    torch.save({"blocks.0.att.key.lora_A": torch.zeros(2, 2)}, path)


def transformer(path: Path, base: Path) -> None:
    torch.save({"model.layers.0.self_attn.q_proj.weight": torch.zeros(2, 2)}, path)


def whole_numbers(path: Path, base: Path) -> None:
    torch.save({name: tensor.int() for name, tensor in read_tensors(base).items()}, path)


def rwkv_5(path: Path, base: Path) -> None:
    torch.save({"blocks.0.att.key.weight": torch.zeros(2, 2)}, path)


def pickled_code(path: Path, base: Path) -> None:
    harmful = Harmful(path.with_name("harm"))
    path.write_bytes(pickle.dumps({"emb.weight": harmful}, protocol=2))


def pickled_code_in_an_archive(path: Path, base: Path) -> None:
    harmful = Harmful(path.with_name("harm"))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", pickle.dumps({"emb.weight": harmful}, protocol=2))
        archive.writestr("model/version", "3")
        archive.writestr("model/byteorder", "little")


MODELS = {
    "missing": (None, "no such file"),
    "empty": (lambda path, base: path.touch(), "is empty"),
    "truncated": (truncated, "is cut off or damaged; copy or download it again"),
    "text": (lambda path, base: path.write_text("weights"), "is no file of torch"),
    "pickled code": (pickled_code, "holds pickled code, which is never run here"),
    "pickled code, zipped": (pickled_code_in_an_archive, "holds pickled code"),
    "another model": (transformer, "is no RWKV model (its tensors are model.layers.0"),
    "whole numbers": (whole_numbers, "holds int32, weights are floating-point numbers"),
    "older RWKV": (rwkv_5, "is an older RWKV"),
    "an adapter": (adapter, "is an adapter, no model; name the base's file here, and"),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_bad_model_file_says_what_is_wrong_with_it(fails, good, tmp_path, case):
    make, wanted = MODELS[case]
    path = tmp_path / "model.pth"
    if make is not None:
        make(path, good / "base.pth")
    text = fails(load_model=path)
    assert f"{path}: " in text and wanted in text
    assert not (tmp_path / "harm").exists()


def test_a_model_file_that_lacks_a_tensor_names_it(fails, good, tmp_path):
    without_tensor(tmp_path / "model.pth", good / "base.pth")
    assert "model.pth: lacks ln_out.weight" in fails(load_model=tmp_path / "model.pth")


@pytest.mark.parametrize(
    ("flag", "value"),
    [("n_layer", 32), ("n_embd", 64), ("vocab_size", 65536), ("my_testing", "x060")],
)
def test_a_size_that_disagrees_with_the_file_shows_both(fails, flag, value):
    text = fails(**{flag: value})
    assert f"--{flag} says {value}; drop --{flag}" in text and f"has {flag} " in text


def test_a_new_model_without_sizes_asks_for_them(fails):
    assert fails(load_model=None).startswith("--load_model: name the model to train; or give --n_l")
    told = fails(load_model=None, n_layer=2, tokenizer="bytes")
    assert "--n_embd: a new model needs it" in told


def test_a_vocabulary_that_tells_no_tokenizer_asks_for_one(fails):
    text = fails(load_model=None, n_layer=1, n_embd=64, vocab_size=1000)
    assert "--tokenizer: cannot be told from a vocabulary of 1000; give world, bytes" in text


# Layer profiles
def test_an_unknown_key_in_a_profile_names_the_nearest(fails, tmp_path):
    path = write_profile(tmp_path / "p.json", mode="lora", rnak=4)
    wanted = f"{path}: rule 1: unknown key 'rnak'; did you mean 'rank'?"
    assert fails(layer_profile=path) == wanted


def test_an_unknown_key_outweighs_what_is_missing(fails, tmp_path):
    path = tmp_path / "p.json"
    path.write_text('{"rules": [{"mach": "*", "mode": "freeze"}]}')
    wanted = f"{path}: rule 1: unknown key 'mach'; did you mean 'match'?"
    assert fails(layer_profile=path) == wanted


def test_a_key_that_a_rule_has_twice_is_named(fails, tmp_path):
    path = tmp_path / "p.json"
    path.write_text('{"rules": [{"match": "*", "mode": "lora", "rank": 4, "rank": 8}]}')
    wanted = f"{path}: 'rank' is there twice in one object, as 4 and 8; keep one of them"
    assert fails(layer_profile=path) == wanted


PROFILES = {
    "unknown mode": ({"mode": "lorra", "rank": 4}, "did you mean 'lora'?"),
    "no rank": ({"mode": "lora"}, "needs a rank for blocks.0"),
    "rank of a wrong type": ({"mode": "lora", "rank": "4"}, "rank is '4'; write a whole number"),
    "rank that does not divide": ({"mode": "bone", "rank": 32}, "rank 32 does not divide"),
    "rank above the layer": ({"mode": "lora", "rank": 4096}, "4096"),
    "matches nothing": ({"match": "block.*", "mode": "freeze"}, "'block.*' matches no layer"),
    "adapter on emb": ({"match": "emb", "mode": "lora", "rank": 4}, "emb can be full or freeze"),
    "rate of zero": ({"mode": "full", "lr_init": 0}, "write more than 0"),
    "infinite rate": ({"mode": "full", "lr_init": float("inf")}, "write a finite number"),
    "unknown storage": ({"mode": "freeze", "quant": "nf5"}, "did you mean 'nf4'?"),
}


@pytest.mark.parametrize("case", PROFILES)
def test_a_bad_rule_is_named_by_file_and_number(fails, tmp_path, case):
    keys, wanted = PROFILES[case]
    text = fails(layer_profile=write_profile(tmp_path / "p.json", **keys))
    assert "p.json: rule 1: " in text and wanted in text


def test_a_profile_that_is_no_profile(fails, tmp_path):
    (tmp_path / "p.json").write_text("{")
    assert "p.json:1: not JSON" in fails(layer_profile=tmp_path / "p.json")
    assert "gone.json: no such file" in fails(layer_profile=tmp_path / "gone.json")
    (tmp_path / "p.csv").write_text(f"{CSV_HEADER}\nemb,freeze,0,0,0,0,0,0,0,0,\n")
    assert "has no row for head" in fails(layer_profile=tmp_path / "p.csv")


# Flags
@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--micro_bs", "2"], "--micro_bs: no such flag; did you mean --micro_bsz?"),
        (["--zzzzzz", "2"], "--zzzzzz: no such flag; --help lists the known ones"),
        (["--ctx_len", "0"], "--ctx_len 0: must be at least 1"),
        (["--ctx_len", "-5"], "--ctx_len -5: must be at least 1"),
        (["--ctx_len", "long"], "ctx_len"),
        (["--lr_init", "fast"], "lr_init"),
        (["--packing", "perhaps"], "packing"),
        (["--lr_schedule", "cosin"], "lr_schedule"),
        (["--precision", "fp64"], "precision"),
        (["--micro_bsz", "0"], "--micro_bsz 0: must be at least 1"),
        (["--epoch_count", "0"], "--epoch_count 0: must be at least 1"),
        (["--devices", "0"], "--devices 0: must be at least 1"),
        (["--smoothing", "1.5"], "--smoothing 1.5: must be from 0 to below 1; it is 0.0 if"),
        (
            ["--infctx", "1", "--chunk_ctx", "0"],
            "--chunk_ctx 0: must be at least 1; it is 512 if not",
        ),
        (["--epoch_steps", "-5"], "--epoch_steps -5: must be at least 0"),
        (["--beta1", "1"], "--beta1 1: must be from 0 to below 1; it is 0.9 if not given"),
        (["--adam_eps", "0"], "--adam_eps 0: must be above 0"),
        (["--log_every", "0"], "--log_every 0: must be at least 1"),
        (["--num_workers", "-1"], "--num_workers -1: must be at least 0"),
        (["--random_seed", "-1"], "--random_seed -1: must be at least 0"),
        (["--lora_plus_ratio", "0"], "--lora_plus_ratio 0: must be above 0"),
        (["--ctx_len", "1.5"], "--ctx_len 1.5: is no whole number; write one"),
        (["--lr_init", "nan"], "--lr_init nan: is no number; write one"),
        (["--packing", "perhaps"], "--packing perhaps: is not 1 or 0; write one"),
        (["--lr_schedule", "cosin"], "constant; did you mean cosine?"),
        (["--ctx_len"], "--ctx_len: has no value; write one behind it"),
        (["there"], "'there': belongs to no flag; --help lists them"),
        (["--proj_dir", ""], "--proj_dir: names no folder; give one, or"),
        (["--memory", "24GB"], "--memory 24GB: is for --dry_run 1; add it"),
        (["--memory", "-3GB", "--dry_run"], "--memory -3GB: is no size; write 24GB, say"),
        (["--proj_dir", "-x", "--val_prompts", "-y"], "--val_prompts -y: no such file"),
        (["--memory", "24", "--dry_run"], "--memory 24: is no size; write 24GB, say"),
        (
            ["--val_data_file", "v", "--val_fraction", "0.1"],
            "contradicts --val_data_file",
        ),
        (["--reward", "length:9"], "--reward: is for rounds of sampling; add --iterate N"),
        (
            ["--num_nodes", "2"],
            "--num_nodes 2: the other machines are not known; start",
        ),
        (
            ["--grad_cp", "0", "--grad_cp_offload", "1"],
            "moves what --grad_cp keeps, and --grad_cp is",
        ),
        (["--grad_cp_memory", "6"], "--grad_cp_memory 6: is for --grad_cp selective; add it, or"),
        (["--grad_cp", "some"], "--grad_cp some: is not 1 or 0 or selective; write one"),
        (["--cuda_graphs", "1"], "--cuda_graphs 1: records a GPU's work, and the model is on cpu"),
        (["--cuda_graphs", "1", "--dry_run", "1"], "--cuda_graphs 1: records a GPU's work"),
        (["--cuda_graphs", "yess"], "--cuda_graphs yess: is not 1 or 0 or auto; write one"),
        (["--infctx", "1", "--grad_cp_offload", "1"], "--infctx 1 recomputes blocks of one chunk"),
        (["--lr_final", "0"], "an exponential schedule cannot go from 0.0001 to 0"),
        (["--lr_init", "-1"], "--lr_init -1: must be at least 0"),
        (["--val_fraction", "1.5"], "--val_fraction 1.5"),
        (["--template", "chatml"], "--template chatml: no such template; choose auto, world"),
        (["--turn_end", "full-stop"], "--turn_end full-stop: is not one of suffix, eot, both"),
        (["--tokenizer", "gpt2"], "--tokenizer gpt2: no such tokenizer; choose world, bytes"),
        (["--tokenizer", "world"], "makes 65530 ids, the model's vocabulary has 256"),
        (["--load_adapter", "gone.pth"], "gone.pth: no such file"),
        (["--my_testing", "x070m"], "--my_testing x070m: is not supported"),
        (["--val_prompts", "gone.txt"], "--val_prompts gone.txt: no such file"),
        (["--config", "gone.yaml"], "gone.yaml"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_flag_is_named_with_its_mend(fails, words, wanted):
    assert wanted in fails(*words)


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"ctx_len: long\n", "run.yaml: --ctx_len long: is no whole number; write one"),
        (b"ctxlen: 3\n", "run.yaml: --ctxlen: no such flag; did you mean --ctx_len?"),
        (b"ctx_len: [3\n", "run.yaml: Problems parsing config"),
        (b"- 3\n", "run.yaml: Unexpected config"),
        (b"\xff\xfe3", "run.yaml:1: not UTF-8"),
    ],
    ids=["value", "name", "cut", "list", "binary"],
)
def test_a_bad_config_file_is_named(fails, tmp_path, content, wanted):
    (tmp_path / "run.yaml").write_bytes(content)
    assert wanted in fails("--config", str(tmp_path / "run.yaml"))


def test_every_number_among_the_flags_has_its_range():
    for group in train.FLAGS:
        for field in dataclasses.fields(group):
            if field.type in (int, float, "int", "float"):
                known = field.metadata["choices"] or field.metadata["within"]
                assert known, f"--{field.name}"
                if field.metadata["within"]:
                    assert is_within(field.default, field.metadata["within"]), f"--{field.name}"


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("--load_model a --tokens x", "--tokens x: is no whole number; write one"),
        ("--load_model a --alpha x", "--alpha x: is no number; write one"),
        (
            "--load_model a --dtype fp8",
            "--dtype fp8: is not one of auto, fp32, bf16,",
        ),
        ("--load_model a --token 3", "--token: no such flag; did you mean --tokens?"),
        ("--load_model", "--load_model: has no value; write one behind it"),
        ("--load_model -a --tokens -3", "--tokens -3: needs to be at least 1; raise it"),
        ("--load_model -a", "-a: no such file; check the path"),
        ("", "--load_model: is missing; --help says what it is"),
    ],
)
def test_other_commands_speak_alike(capsys, words, wanted):
    assert cli.run(lambda: chat.main(words.split())) == 2
    assert capsys.readouterr().err.startswith(f"error: {wanted}")


def test_no_objective_lists_the_objectives(fails):
    text = fails(sft=0)
    assert text.startswith("train.py: no objective is chosen; add one of --sft 1")


def test_contradicting_flags_are_both_named(fails):
    text = fails(fla=1, kernel="triton")
    assert text == "--fla 1: contradicts --kernel triton; keep one of them"


def test_two_objectives_are_both_named(fails):
    assert fails(dpo=1).startswith("train.py: --sft and --dpo exclude each other; keep one of")


@pytest.mark.parametrize(
    ("flags", "start"),
    [
        (
            {"strategy": "deepspeed_stage_2", "optim": "AdamW8bit"},
            "--optim AdamW8bit: its blocks do not fit the pieces of --strategy deepspeed_stage_2;",
        ),
        (
            {"strategy": "deepspeed_stage_2_offload", "optim": "lion"},
            "--optim lion: --strategy deepspeed_stage_2_offload steps AdamW in the host's memory;",
        ),
        ({"gpu_memory": -1}, "--gpu_memory -1: must be at least 0"),
    ],
)
def test_strategy_and_optimizer_that_do_not_go_together(fails, flags, start):
    assert fails(**flags).startswith(start)


def test_deepspeed_on_a_cpu_names_what_works_there(fails):
    """Before the data is read, which is not there."""
    text = fails(strategy="deepspeed_stage_2", train_data_file="nothing.jsonl")
    assert text.startswith("--strategy deepspeed_stage_2: DeepSpeed needs a GPU; use")


def test_a_missing_deepspeed_is_named(monkeypatch):
    """Where it is not there before anything is read, where it cannot be imported when it is."""
    from rwkv.training import strategy

    flags = TrainerFlags(strategy="deepspeed_stage_2")
    monkeypatch.setattr(strategy, "find_spec", lambda name: None)
    with pytest.raises(RunError, match="^--strategy deepspeed_stage_2: needs DeepSpeed; pip inst"):
        strategy.check_strategy(flags, on_gpu=True)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(RunError, match=r"^--strategy deepspeed_stage_2: cannot use DeepSpeed \("):
        strategy.make_strategy(flags, torch.bfloat16, 1)


def test_the_held_out_file_is_read_first(fails):
    text = fails(val_data_file="no-such.jsonl", train_data_file="nothing.jsonl")
    assert text.startswith("no-such.jsonl: no such file")


@pytest.mark.parametrize(
    "more, message",
    [
        (
            {"layer_profile": "nf4.json"},
            "nf4 and fp4: need bitsandbytes (it is not installed); pip",
        ),
        ({"optim": "lion"}, "--optim lion: needs bitsandbytes (it is not installed); pip install"),
    ],
    ids=["store", "optimizer"],
)
def test_missing_bitsandbytes_is_told_before_data_is_read(
    fails, good, tmp_path, capsys, monkeypatch, more, message
):
    """A dry run says it and goes on, for the run may be meant for another machine."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.chdir(tmp_path)
    write_profile(tmp_path / "nf4.json", mode="lora", rank=4, quant="nf4")
    (tmp_path / "empty.jsonl").write_text("")
    assert fails(train_data_file="empty.jsonl", status=1, **more).startswith(message)
    words = {"load_model": good / "base.pth", "train_data_file": good / "train.jsonl", **more}
    words |= {"sft": 1, "dry_run": 1, "accelerator": "cpu", "cache_dir": tmp_path / "cache"}
    assert train.main([w for k, v in words.items() for w in (f"--{k}", str(v))]) == 0
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("start", ["state", "prefix_tuning"])
def test_a_state_rate_that_ends_at_0_is_named(fails, tmp_path, start):
    profile = write_profile(tmp_path / "p.json", mode="freeze", state_lr_init=1.0, state_lr_final=0)
    text = fails(layer_profile=profile, **{start: 1})
    assert "p.json: rule 1: blocks.0.att.time_state: an exponential schedule cannot go" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_an_error(fails):
    text = fails(accelerator="gpu", status=1)
    assert text.startswith("--accelerator gpu: torch finds no GPU here; use --accelerator cpu")


@pytest.fixture
def adapter(good, tmp_path) -> Path:
    """A file of the good profile's adapters."""
    path = tmp_path / "adapter.pth"
    flags = PeftFlags(layer_profile=str(good / "lora.json"))
    model, plan = load_with_profile(good / "base.pth", flags)
    base = fingerprint(read_tensors(good / "base.pth"))
    write_tensors(path, trained_tensors(model), adapter_metadata(model, plan, base=base))
    return path


@pytest.mark.parametrize("dry_run", [0, 1], ids=["run", "dry run"])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("cut", "adapter.pth: "),
        ("base", "adapter.pth: belongs to the base 0123, --load_model is"),
        ("rank", "adapter.pth: blocks.0.att.receptance.lora_A is [4, 48], the profile makes it [2"),
        ("alpha", "adapter.pth: blocks.0.att.receptance: was trained with alpha / rank 2, the pro"),
        ("names", "adapter.pth: has unexpected blocks.0.att"),
    ],
)
def test_an_adapter_to_go_on_from_is_looked_at_before_the_base_is_loaded(
    fails, good, adapter, tmp_path, monkeypatch, dry_run, fault, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rwkv.run.models.load_with_profile", None)
    keys = {"mode": "lora", "rank": 4}
    if fault == "cut":
        adapter.write_bytes(adapter.read_bytes()[:-500])
    elif fault == "base":
        described = json.loads(adapter.with_suffix(".json").read_text()) | {"base": "0123"}
        adapter.with_suffix(".json").write_text(json.dumps(described))
    keys |= {"rank": {"rank": 2}, "alpha": {"alpha": 1}}.get(fault, {})
    profile = write_profile(tmp_path / "profile.json", **keys)
    limited = int(fault == "names")
    more = {"layer_profile": profile, "limited_lora": limited, "dry_run": dry_run}
    text = fails(load_adapter=adapter.name, **more)
    assert text.startswith(message), text


def test_an_adapter_that_suits_is_planned_with(good, adapter, tmp_path):
    words = {"load_model": good / "base.pth", "train_data_file": good / "train.jsonl", "sft": 1}
    words |= {"layer_profile": good / "lora.json", "load_adapter": adapter, "dry_run": 1}
    words |= {"accelerator": "cpu", "cache_dir": tmp_path}
    assert train.main([w for k, v in words.items() for w in (f"--{k}", str(v))]) == 0


@pytest.mark.parametrize("flag", ABSENT)
def test_an_absent_feature_is_never_ignored(fails, flag):
    text = fails(f"--{flag}", "2")
    assert text.startswith(f"--{flag} 2: ") and "is absent here" in text


# Files of a run
@pytest.mark.parametrize("content", [b"", b"PK", b"\x80\x02garbage", b"hello"], ids=repr)
def test_a_damaged_resume_point_is_named(fails, tmp_path, content):
    point = tmp_path / "out" / "resume" / "step-3"
    point.mkdir(parents=True)
    (point / "state.pt").write_bytes(content)
    text = fails(proj_dir=tmp_path / "out", resume=1)
    assert text.startswith(f"{point}: cannot be read (") and "; remove it" in text


def test_a_folder_that_holds_a_run_is_not_written_over(fails, tmp_path):
    point = tmp_path / "out" / "resume" / "step-3"
    point.mkdir(parents=True)
    text = fails(proj_dir=tmp_path / "out")
    assert "already holds a run (step 3); add --resume 1" in text
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["resume"]
    assert not (tmp_path / "cache").exists(), "the data was read before"


def test_models_without_a_resume_point_are_not_written_over(fails, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "rwkv-0.pth").write_bytes(b"precious")
    for resume in (0, 1):
        text = fails(proj_dir=tmp_path / "out", resume=resume)
        assert text.startswith(f"--proj_dir {tmp_path / 'out'}: already holds rwkv-0.pth")
    assert (tmp_path / "out" / "rwkv-0.pth").read_bytes() == b"precious"


def test_torchrun_and_the_flags_name_the_same_processes(fails, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "3")
    text = fails(devices=2)
    assert text.startswith("--devices 2 --num_nodes 1: torchrun has started 3 processes; let")


def test_no_flags_at_all():
    with pytest.raises(InputError, match="no objective is chosen"):
        train.main([])


def test_weights_that_are_no_numbers_are_named(fails, good, tmp_path):
    tensors = {name: tensor.clone() for name, tensor in read_tensors(good / "base.pth").items()}
    tensors["blocks.0.att.key.weight"][3, 4] = float("nan")
    write_tensors(tmp_path / "nan.pth", tensors)
    text = fails(load_model=tmp_path / "nan.pth")
    assert "nan.pth: blocks.0.att.key.weight holds values that are no finite numbers" in text


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:659] . unexpected pos 64 vs 0"),
    ],
    ids=["from the system", "as torch reports it"],
)
def test_a_full_disk_leaves_the_old_file_and_no_half_one(tmp_path, monkeypatch, capsys, error):
    """The second saving finds no room: the first file stays whole, and nothing lies beside it."""
    path = tmp_path / "rwkv-0.pth"
    write_tensors(path, {"ln_out.weight": torch.ones(4)}, {"kind": "adapter"})

    def fill_the_disk(tensors, handle):
        handle.write(b"half of a f")
        raise error

    monkeypatch.setattr(torch, "save", fill_the_disk)
    status = cli.run(lambda: write_tensors(path, {"ln_out.weight": torch.zeros(4)}) or 0)
    assert status == 2
    wanted = f"error: {path}: no space left on the device; free some or choose another folder\n"
    assert capsys.readouterr().err == wanted
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rwkv-0.json", "rwkv-0.pth"]
    assert torch.equal(read_tensors(path)["ln_out.weight"], torch.ones(4))


# Commands of RWKV-LM-RLHF, whose flags and files are taken as they are
def write_h5(path: Path, rows: list[list[int]]) -> Path:
    """An SFT file as RWKV-LM-RLHF writes it: `tokens`, an array of int64 a record, gzip 9."""
    import h5py
    import numpy as np

    with h5py.File(path, "w") as file:
        tokens = file.create_dataset(
            "tokens",
            (len(rows),),
            dtype=h5py.special_dtype(vlen=np.dtype("int64")),
            compression="gzip",
            compression_opts=9,
        )
        for number, row in enumerate(rows):
            tokens[number] = np.array(row, dtype=np.int64)
    return path


def cut_profile(source: Path, path: Path, n_layer: int) -> Path:
    """The CSV profile with the rows of its first blocks, its embedding and its head."""
    lines = source.read_text(encoding="utf-8-sig").splitlines()
    kept = [line for line in lines if not line[:1].isdigit() or int(line.split(",")[0]) < n_layer]
    path.write_text("\n".join(kept) + "\n")
    return path


def sft_command(folder: Path, profile: Path, n_layer: int, n_embd: int) -> list[str]:
    """The words of example/SFT's script there, with this model's sizes and these files."""
    text = f"""--load_model {folder}/model.pth --wandb SFT --proj_dir {folder}/out
        --infctx 1 --chunk_ctx 512 --vocab_size 65536 --ctx_len 4096 --epoch_steps 200
        --epoch_count 200 --epoch_begin 0 --epoch_save 1 --micro_bsz 1 --n_layer {n_layer}
        --n_embd {n_embd} --lr_init 2e-5 --lr_final 1e-6 --warmup_steps 100 --beta1 0.9
        --beta2 0.999 --adam_eps 1e-8 --accelerator gpu --devices 1 --precision bf16 --grad_cp 1
        --my_testing x070 --strategy deepspeed_stage_2_offload --layer_profile {profile} --quant 1
        --quant_mode nf4 --gpu_arch cuda --limited_lora 0 --sft 1 --smoothing 0.005
        --random_mode 1 --optim "" --train_data_file {folder}/f.h5
        --infctx_dataset_multiplier 8 --accumulate_grad_batches 1"""
    return ["" if word == '""' else word for word in text.split()]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_dry_run_plans_for_a_kernel_of_another_machine(good, tmp_path, capsys):
    words = ["--load_model", str(good / "base.pth"), "--train_data_file", str(good / "train.jsonl")]
    words += ["--cache_dir", str(tmp_path), "--ctx_len", "64", "--sft", "1", "--fla", "1"]
    assert cli.run(lambda: train.main([*words, "--dry_run", "1"])) == 0
    assert "wkv7: --kernel fla cannot run here (fla: needs a GPU" in capsys.readouterr().err
    assert cli.run(lambda: train.main(words)) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("error: wkv7: --kernel fla cannot run here (fla: needs a GPU")
    assert lines[-1].endswith("; use --kernel auto")


@pytest.mark.parametrize("name", ["24_TEST_lora.csv", "24_TEST_bone.csv"])
def test_the_sft_command_of_rwkv_lm_rlhf_starts(assets, tmp_path, capsys, name):
    """Word for word but for sizes and paths, on two blocks of the published models' shape."""
    config = RWKVConfig(
        version=7,
        n_layer=2,
        n_embd=512,
        dim_ffn=2048,
        vocab_size=65536,
        head_size=64,
        ranks=default_ranks(7, 512),
    )
    with torch.device("meta"):
        shapes = RWKV(config).state_dict()
    write_tensors(
        tmp_path / "model.pth",
        {k: torch.zeros(v.shape, dtype=torch.bfloat16) for k, v in shapes.items()},
    )
    write_h5(tmp_path / "f.h5", [[11, 12, 13] * 30, [21, 22] * 50])
    profile = cut_profile(assets / "upstream" / "layerprofile" / name, tmp_path / name, 2)
    words = [*sft_command(tmp_path, profile, 2, 512), "--cache_dir", str(tmp_path / "cache")]
    assert cli.run(lambda: train.main([*words, "--dry_run"])) == 0
    shown = capsys.readouterr().err
    assert "--gpu_arch: no effect (kernels are chosen by --kernel)" in shown
    assert "--infctx_dataset_multiplier: no effect" in shown
    assert "RWKV-7 L2-D512" in shown and "nf4" in shown
    assert name.split("_")[2].removesuffix(".csv") in shown
    assert "40,000 steps" in shown and "strategy deepspeed_stage_2_offload" in shown
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_dry_run_says_what_a_cpu_cannot(fails, good, tmp_path, capsys):
    """DeepSpeed needs a GPU; a plan for another machine's goes on without the package."""
    for accelerator in ("cpu", "auto"):
        text = fails(strategy="deepspeed_stage_2", accelerator=accelerator, dry_run=1)
        assert text.startswith("--strategy deepspeed_stage_2: DeepSpeed needs a GPU; use --strat")
        assert text.endswith("auto or ddp, or plan for one by --accelerator gpu")
    words = {"load_model": good / "base.pth", "train_data_file": good / "train.jsonl", "sft": 1}
    words |= {"strategy": "deepspeed_stage_2", "accelerator": "gpu", "gpu_memory": 8}
    words |= {"dry_run": 1, "cache_dir": tmp_path}
    assert train.main([w for k, v in words.items() for w in (f"--{k}", str(v))]) == 0
    told = capsys.readouterr().err
    assert "buckets of DeepSpeed" in told and "no effect" not in told


def test_flags_of_a_gpu_are_named_on_a_cpu(good, tmp_path, capsys):
    words = {"load_model": good / "base.pth", "train_data_file": good / "train.jsonl", "sft": 1}
    words |= {"accelerator": "cpu", "gpu_memory": 8, "grad_cp_offload": 1}
    words |= {"dry_run": 1, "cache_dir": tmp_path}
    assert train.main([w for k, v in words.items() for w in (f"--{k}", str(v))]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert "--gpu_memory 8.0: has no effect on a CPU" in lines
    assert "--grad_cp_offload 1: has no effect on a CPU" in lines


@pytest.mark.parametrize(("warmup", "told"), [(3, False), (4, True)])
def test_a_warm_up_that_outlasts_the_run_is_told(good, tmp_path, capsys, warmup, told):
    words = {"load_model": good / "base.pth", "train_data_file": good / "train.jsonl", "sft": 1}
    words |= {"epoch_steps": 4, "warmup_steps": warmup, "dry_run": 1, "cache_dir": tmp_path}
    assert train.main([w for k, v in words.items() for w in (f"--{k}", str(v))]) == 0
    assert (f"--warmup_steps {warmup}: the run ends within" in capsys.readouterr().err) == told


@pytest.mark.parametrize(("epoch_steps", "told"), [(1, True), (3, True), (4, False)])
def test_epochs_that_end_within_a_step_are_told(good, tmp_path, capsys, epoch_steps, told):
    """Four micro-batches a step: epochs of 1 end at steps 1, 1, 1, 1, 2; of 3 at 1, 2, 3, 3, 4."""
    words = {"load_model": good / "base.pth", "train_data_file": good / "train.jsonl", "sft": 1}
    words |= {"epoch_steps": epoch_steps, "epoch_count": 5, "accumulate_grad_batches": 4}
    words |= {"dry_run": 1, "cache_dir": tmp_path, "accelerator": "cpu"}
    assert train.main([w for k, v in words.items() for w in (f"--{k}", str(v))]) == 0
    line = f"--epoch_steps {epoch_steps}: epochs end within steps of --accumulate_grad_batches 4; "
    line += f"of 5 models {2 if epoch_steps == 1 else 4} will be written, the last of each step"
    assert (line in capsys.readouterr().err.splitlines()) == told


def test_flags_without_effect_are_named():
    """Those of a switch that is off, and those of profiles where there is none."""
    words = "--sft 1 --quant_head 1 --quant_mode fp8 --rslora 1 --orpo_alpha 2"
    settings = parse(words.split(), FLAGS, program="train.py", description="")
    assert without_effect(settings) == [
        "--quant_mode fp8: has no effect without --quant 1",
        "--quant_head 1: has no effect without --quant 1",
        "--orpo_alpha 2.0: has no effect without --orpo 1",
        "--rslora 1: has no effect without --layer_profile",
    ]
    words = "--sft 1 --val_every 5 --val_prompts p.txt"
    settings = parse(words.split(), FLAGS, program="train.py", description="")
    assert without_effect(settings) == [
        "--val_every 5: has no effect without --val_data_file or --val_fraction",
        "--val_prompts p.txt: has no effect without --val_data_file or --val_fraction",
    ]
    held_out = parse([*words.split(), "--val_fraction", "0.1"], FLAGS, program="", description="")
    assert not without_effect(held_out)


def test_flags_without_effect_are_named_at_their_usual_values():
    """If they are written, and say more than that something is off."""
    line = "--sft 1 --quant 0 --quant_head 0 --quant_mode=nf4 --infctx 1 --chunk_ctx 512"
    line += " --val_every 0"
    words = line.split()
    settings = parse(words, FLAGS, program="train.py", description="")
    wanted = "--quant_mode nf4: has no effect without --quant 1"
    assert without_effect(settings, words) == [wanted]


# Files at the wrong flag
@pytest.fixture
def says(capsys):
    """`says(main, word, ...)` runs a command that fails with status 2, and gives its message."""

    def run(main, *words: object) -> str:
        assert cli.run(lambda: main([str(word) for word in words])) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line.removeprefix("error: ")

    return run


@pytest.fixture
def trial(good, tmp_path) -> Path:
    """A folder with an adapter of LoRA and a quantized file, both made of the good model."""
    flags = PeftFlags(layer_profile=str(good / "lora.json"))
    model, plan = load_with_profile(good / "base.pth", flags)
    metadata = adapter_metadata(model, plan, base=fingerprint(read_tensors(good / "base.pth")))
    write_tensors(tmp_path / "adapter.pth", trained_tensors(model), metadata)
    words = ["--load_model", good / "base.pth", "--output", tmp_path / "int8.pth"]
    assert quantize.main([*map(str, words), "--quant_mode", "int8"]) == 0
    return tmp_path


@pytest.mark.parametrize("described", [True, False], ids=["its .json says so", "without .json"])
def test_a_whole_model_is_no_adapter(fails, says, good, tmp_path, described):
    base, model = good / "base.pth", tmp_path / "merged.pth"
    write_tensors(model, dict(read_tensors(base)), {"kind": "model"} if described else None)
    wanted = f"{model}: is a whole model, no adapter; it is a base, as at --load_model"
    both = ["--load_model", base, "--adapter", model]
    assert says(chat.main, *both) == wanted
    assert says(generate.main, *both, "--prompt", "a") == wanted
    assert says(score.main, *both, "--data", good / "train.jsonl") == wanted
    output = tmp_path / "again.pth"
    assert says(merge.main, "--base", base, "--adapter", model, "--output", output) == wanted
    assert fails(load_adapter=model, layer_profile=good / "lora.json") == wanted


def test_a_quantized_file_is_no_adapter(says, good, trial):
    text = says(chat.main, "--load_model", good / "base.pth", "--adapter", trial / "int8.pth")
    assert (
        text
        == f"{trial / 'int8.pth'}: is a whole model, no adapter; it is a base, as at --load_model"
    )


def test_only_merge_offers_its_flag_for_another_base(says, good, trial):
    tensors = dict(read_tensors(good / "base.pth"))
    write_tensors(trial / "other.pth", tensors | {"emb.weight": tensors["emb.weight"] + 1})
    both = ["--adapter", trial / "adapter.pth"]
    text = says(chat.main, "--load_model", trial / "other.pth", *both)
    assert text.endswith("; name the base it was trained on")
    text = says(merge.main, "--base", trial / "other.pth", *both, "--output", trial / "m.pth")
    assert text.endswith("; name the base it was trained on, or add --other_base")


def test_an_adapter_is_no_model(fails, says, trial):
    """Also one that holds a block's small tensors, without its .json."""
    path, small = trial / "adapter.pth", trial / "small.pth"
    wanted = f"{path}: is an adapter, no model; name the base's file here, and this one at "
    wanted += "--adapter (of train.py: --load_adapter)"
    assert says(generate.main, "--load_model", path, "--prompt", "a") == wanted
    assert says(quantize.main, "--load_model", path, "--output", trial / "q.pth") == wanted
    assert fails(load_model=path) == wanted
    path.with_suffix(".json").rename(small.with_suffix(".json"))
    assert fails(load_model=path) == wanted
    tensors = {name: t for name, t in read_tensors(path).items() if "lora" not in name}
    write_tensors(small, tensors)
    assert fails(load_model=small) == wanted.replace(str(path), str(small))


def test_a_state_is_no_model(fails, tmp_path):
    path = tmp_path / "state.pth"
    write_tensors(path, {"blocks.0.att.time_state": torch.zeros(3, 16, 16)})
    assert fails(load_model=path).startswith(f"{path}: is a state, no model; name the base's file")


def test_an_adapter_of_hf_peft_names_the_conversion(fails, says, good, trial):
    folder = trial / "hf"
    (trial / "keys.json").write_text('{"rules": [{"match": "*.key", "mode": "lora", "rank": 4}]}')
    flags = PeftFlags(layer_profile=str(trial / "keys.json"))
    model, plan = load_with_profile(good / "base.pth", flags)
    write_tensors(
        trial / "only.pth", trained_tensors(model), adapter_metadata(model, plan, base="")
    )
    assert convert.main(["--adapter", str(trial / "only.pth"), "--output", str(folder)]) == 0
    base = ["--load_model", good / "base.pth"]
    wanted = "is HF peft's adapter; name what python -m peft.convert --adapter "
    wanted += f"{folder} --output ADAPTER.pth makes of it"
    for path in (folder, folder / "adapter_model.safetensors"):
        assert says(chat.main, *base, "--adapter", path) == f"{path}: {wanted}"
        assert fails(load_adapter=path, layer_profile=good / "lora.json") == f"{path}: {wanted}"
    assert fails(load_model=folder).startswith(f"{folder}: is HF peft's adapter, no model; name")


def test_a_quantized_base_of_merge_names_what_it_is_for(says, good, trial):
    words = ["--base", trial / "int8.pth", "--adapter", trial / "adapter.pth"]
    made_from = fingerprint(read_tensors(good / "base.pth"))
    assert says(merge.main, *words, "--output", trial / "m.pth") == (
        f"--base {trial / 'int8.pth'}: is quantized, and takes no changes; name the model it was "
        f"made from ({made_from}); such a file is for --load_model of train.py, rwkv.chat, "
        "rwkv.generate and rwkv.score"
    )


# Switches of all commands
@pytest.mark.parametrize(("given", "count"), [("", 14), (" 1", 14), (" 0", 12)])
def test_switches_take_0_or_1_or_nothing(good, tmp_path, capsys, given, count):
    words = f"--load_model {good / 'base.pth'} --quant_mode int8 --quant_head{given} --output "
    assert quantize.main([*words.split(), str(tmp_path / "q.pth")]) == 0
    assert f": {count} layers as int8" in capsys.readouterr().out


def test_a_switch_that_is_neither_is_named(says):
    words = "--load_model a --output b --quant_head perhaps"
    assert says(quantize.main, *words.split()) == "--quant_head perhaps: is not 1 or 0; write one"


# What would be without effect
@pytest.mark.parametrize("words", ["--quant_head 1", "--quant_tolerance 0.1"])
def test_merge_names_flags_of_a_storage_that_is_not_chosen(says, words):
    name = words.split()[0]
    text = says(merge.main, *f"--base a --adapter b --output c {words}".split())
    assert text == f"{name}: has no effect without --quant_mode; add it, or drop it"


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("--quant_head", "--quant_head: has no effect without --quant 1; add it, or drop it"),
        ("--quant_mode nf4", "--quant_mode: has no effect without --quant 1; add it, or drop it"),
        ("--quant 1", "--quant: has no effect without --layer_profile; add it, or drop it"),
    ],
)
def test_scores_name_flags_of_a_storage_that_is_not_chosen(says, good, words, wanted):
    both = ["--load_model", good / "base.pth", "--data", good / "train.jsonl"]
    assert says(make_reference.main, *both, *words.split()) == wanted
