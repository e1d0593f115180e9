"""Preference files to batches: every spelling, every mistake, reference scores, whole runs."""

import json
import math
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from data import make_pairs, make_reference
from data.batch_plan import BatchPlan
from data.open_pairs import open_pairs
from data.pair_records import PAIRS, parse_pair, parse_prompt, parse_question
from data.pair_store import PairStore
from data.records import DataError
from data.reference_scores import Scorer, open_unfinished
from data.store_cache import StoreSettings, open_store
from data.upstream_pairs import NO_REFERENCE, TokenPair, read_save, write_save
from peft.stores import STORES
from rwkv.checkpoint import write_tensors
from rwkv.config import RWKVConfig, default_ranks
from rwkv.errors import InputError
from rwkv.init import initialize
from rwkv.model import RWKV
from rwkv.templates import Message
from rwkv.tokenizer import load_tokenizer
from rwkv.training.step_log import read_log

ROOT = Path(__file__).parent.parent
BYTES = load_tokenizer("bytes")
PAIR = {"prompt": "q", "chosen": "good", "rejected": "bad"}
PROMPT = b"User: q\n\nAssistant:"


@pytest.fixture
def settings(tmp_path) -> StoreSettings:
    return StoreSettings(cache_dir=str(tmp_path / "cache"))


def write(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def opened(path: Path, settings: StoreSettings) -> PairStore:
    return open_store(path, settings, BYTES, PAIRS)


def texts(store: PairStore, number: int = 0) -> list[bytes]:
    return [bytes(part.tolist()) for part in store.pair(number)[:3]]


def test_a_pair_by_hand(tmp_path, settings):
    store = opened(write(tmp_path / "a.jsonl", [PAIR]), settings)
    assert texts(store) == [PROMPT, b" good\n\n\0", b" bad\n\n\0"]


def turns(*contents: str) -> list[dict]:
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(contents)]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "q", "chosen": "good", "reject": "bad"},
        {"prompt": turns("q"), "chosen": turns("", "good")[1:], "rejected": turns("", "bad")[1:]},
        {"chosen": turns("q", "good"), "rejected": turns("q", "bad")},
        {"prompt": "q", "chosen": turns("q", "good"), "rejected": turns("q", "bad")},
        {"prompt": turns("q"), "chosen": turns("q", "good"), "rejected": turns("q\n", "bad")},
        {
            "messages": turns("q", "good"),
            "chosen": turns("q", "good"),
            "rejected": turns("q", "bad"),
        },
        {"messages": turns("q", "answered"), "chosen": "good", "rejected": "bad"},
        {"messages": turns("q"), "chosen": "good", "rejected": "bad"},
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
    ],
    ids=[
        "upstream",
        "messages",
        "dialogues",
        "dialogues with prompt",
        "dialogues with messages",
        "dialogues with dialogue",
        "answered dialogue",
        "prompt dialogue",
        "sharegpt",
    ],
)
def test_every_spelling_gives_the_same_pair(tmp_path, settings, record):
    store = opened(write(tmp_path / "a.jsonl", [record]), settings)
    assert texts(store) == [PROMPT, b" good\n\n\0", b" bad\n\n\0"]


def test_csv_with_a_system_text(tmp_path, settings):
    path = tmp_path / "a.csv"
    path.write_text("\ufeffsystem,prompt,chosen,reject\nBe nice.,q,good,bad\n", encoding="utf-8")
    assert texts(opened(path, settings))[0] == b"System: Be nice.\n\n" + PROMPT


def test_earlier_answers_belong_to_the_prompt(tmp_path, settings):
    record = {"prompt": turns("a", "b", "c"), "chosen": "good", "rejected": "bad"}
    prompt, chosen, _ = texts(opened(write(tmp_path / "a.jsonl", [record]), settings))
    assert prompt == b"User: a\n\nAssistant: b\n\nUser: c\n\nAssistant:"
    assert chosen == b" good\n\n\0"


SYSTEM = {"role": "system", "content": "s"}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"prompt": "a"},
        {"prompt": [SYSTEM, *turns("a")]},
        {"system": "s"},
        {"system": "s", "prompt": "a"},
        {"prompt": turns("a", "b", "c")},
    ],
    ids=["none", "text", "with system", "system alone", "system and text", "all turns"],
)
def test_whole_dialogues_differ_in_their_last_message(tmp_path, settings, more):
    record = {side: [SYSTEM, *turns("a", "b", "c", side)] for side in ("chosen", "rejected")}
    found = texts(opened(write(tmp_path / "a.jsonl", [more | record]), settings))
    prompt = b"System: s\n\nUser: a\n\nAssistant: b\n\nUser: c\n\nAssistant:"
    assert found == [prompt, b" chosen\n\n\0", b" rejected\n\n\0"]


@pytest.mark.parametrize("label", [True, False])
def test_a_labelled_dialogue_repeats_its_prompt(label):
    record = {"prompt": "q", "completion": turns("q", "a"), "label": label}
    pair = parse_pair(record, "x:1")
    assert [message.text for message in pair.prompt] == ["q"]
    assert [message.text for message in pair.chosen + pair.rejected] == ["a"]


@pytest.mark.parametrize(
    ("record", "question"),
    [
        ({"messages": turns("2+2?", "4")}, ["2+2?"]),
        ({"messages": turns("a", "b", "c", "d")}, ["a", "b", "c"]),
        ({"messages": turns("a", "b", "c")}, ["a", "b", "c"]),
        ({"prompt": "q", "chosen": ["not looked at"]}, ["q"]),
        ({"chosen": turns("q", "good"), "rejected": turns("q", "bad")}, ["q"]),
        ({"chosen": turns("a", "b", "c", "d")}, ["a", "b", "c"]),
        (
            {
                "prompt": "q",
                "chosen": [SYSTEM, *turns("q", "good")],
                "reject": [SYSTEM, *turns("q", "bad")],
            },
            ["s", "q"],
        ),
    ],
    ids=["answered", "turns", "open", "prompt", "dialogues", "one dialogue", "with prompt"],
)
def test_a_question_is_what_stands_before_the_last_answer(record, question):
    assert [message.text for message in parse_question(record, "x:1").prompt] == question


@pytest.mark.parametrize("record", [{"chosen": "a"}, {"messages": turns("", "a")[1:]}, ["q"]])
def test_a_question_needs_a_prompt(record):
    with pytest.raises(DataError, match="x:1: has no prompt"):
        parse_question(record, "x:1")


def test_a_good_answer_may_be_a_whole_dialogue():
    pair = parse_prompt({"prompt": "q", "chosen": turns("q", "good")}, "x:1")
    assert [m.text for m in pair.prompt] == ["q"] and pair.chosen == [Message("assistant", "good")]


def test_single_answers_have_a_label(tmp_path, settings):
    records = [
        {"prompt": "q", "completion": "good", "label": True},
        {"prompt": "q", "completion": "bad", "label": "false"},
    ]
    path = write(tmp_path / "a.jsonl", records)
    store = opened(path, settings)
    assert texts(store, 0) == [PROMPT, b" good\n\n\0", b""]
    assert texts(store, 1) == [PROMPT, b"", b" bad\n\n\0"]
    with pytest.raises(DataError, match="2 of 2 records have one answer only; use --kto"):
        open_pairs(str(path), settings, BYTES)


def test_equal_answers_are_left_out_and_counted(tmp_path, settings):
    store = opened(write(tmp_path / "a.jsonl", [PAIR, {**PAIR, "rejected": "good"}]), settings)
    assert len(store) == 1
    assert store.metas[0]["notes"] == {"left out, chosen and rejected are equal": 1}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "q", "chosen": "a"}, r"a\.jsonl:1: has 'prompt', 'chosen'; needs prompt, chos"),
        ({**PAIR, "chosen": " "}, r"a\.jsonl:1: 'chosen' is empty; python -m data\.doctor"),
        ({**PAIR, "rejected": 3}, r"a\.jsonl:1: 'rejected' is 3, not a string"),
        (
            {"prompt": "q", "completion": "a", "label": "maybe"},
            r"'label' is 'maybe', neither true nor false",
        ),
        ({"chosen": "a", "rejected": "b"}, r"a\.jsonl:1: has no prompt; python -m data\.doctor"),
        (
            {"chosen": turns("a", "b", "c", "d"), "rejected": turns("a", "x", "c", "e")},
            r"a\.jsonl:1: 'chosen' and 'rejected' differ before their last message; python -m",
        ),
        (
            {"chosen": turns("a", "b"), "reject": turns("a", "b", "c", "d")},
            "'chosen' and 'reject' differ before their last message",
        ),
        (
            {"chosen": turns("a", "b", "c"), "rejected": turns("a", "b", "c")},
            "'chosen' does not end with a message of the assistant",
        ),
        (
            {"prompt": "q", "chosen": turns("a", "b"), "rejected": turns("a", "c")},
            r"a\.jsonl:1: 'chosen': does not begin with the prompt; leave the prompt out, or mend",
        ),
        (["q"], r"a\.jsonl:1: is no object"),
    ],
)
def test_mistakes_are_named(tmp_path, settings, record, message):
    with pytest.raises(DataError, match=message):
        opened(write(tmp_path / "a.jsonl", [record]), settings)


def test_equal_answers_alone_are_no_data(tmp_path, settings):
    path = write(tmp_path / "a.jsonl", [{**PAIR, "rejected": "good"}])
    with pytest.raises(DataError, match="no records to train on; 1 left out, chosen and rejected"):
        opened(path, settings)


def test_thoughts_and_roles_are_parsed():
    pair = parse_pair({**PAIR, "system": "s"}, "x:1")
    assert pair.prompt[0] == Message("system", "s")
    assert pair.context()[0] == Message("system", "s", scored=False)


def test_save_files(tmp_path, settings):
    pairs = [TokenPair([1, 2], [3, 0], [4, 5, 0], -12.5, -30.0), TokenPair([9], [8], [7])]
    write_save(tmp_path / "a.save", pairs)
    store = opened(tmp_path / "a.save", settings)
    assert texts(store, 0) == [b"\1\2", b"\3\0", b"\4\5\0"]
    assert texts(store, 1) == [b"\t", b"\b", b"\7"]


def test_preference_h5_files(tmp_path, settings):
    import h5py

    with h5py.File(tmp_path / "a.h5", "w") as file:
        for name, rows in (
            ("prompttokens", [[1, 2], [3]]),
            ("chosentokens", [[4], [5, 6]]),
            ("rejecttokens", [[7, 8], [9]]),
        ):
            data = file.create_dataset(name, (2,), h5py.vlen_dtype(np.int64))
            for number, row in enumerate(rows):
                data[number] = row
    store = opened(tmp_path / "a.h5", settings)
    assert texts(store, 1) == [b"\3", b"\5\6", b"\t"]


def test_preference_h5_files_of_uneven_arrays_are_named(tmp_path, settings):
    import h5py

    with h5py.File(tmp_path / "a.h5", "w") as file:
        for name, count in (("prompttokens", 2), ("chosentokens", 2), ("rejecttokens", 3)):
            data = file.create_dataset(name, (count,), h5py.vlen_dtype(np.int64))
            for number in range(count):
                data[number] = [1, number]
    with pytest.raises(DataError, match="a.h5: its arrays have 2, 2, 3 records; make it again"):
        opened(tmp_path / "a.h5", settings)


@pytest.mark.parametrize("score", ["-3", None], ids=str)
def test_scores_of_a_save_file_that_are_no_numbers_are_none(tmp_path, score):
    torch.save([([1], [2], [3], score, score)], tmp_path / "a.save")
    (pair,) = read_save(tmp_path / "a.save", load_tokenizer("bytes"))
    assert (pair.ref_chosen, pair.ref_rejected) == (NO_REFERENCE, NO_REFERENCE)


class Exploit:
    def __reduce__(self):
        return print, ("run",)


def test_pickled_code_is_not_run(tmp_path, settings, capsys):
    torch.save([Exploit()], tmp_path / "a.save")
    with pytest.raises(DataError, match=r"a\.save: holds pickled code or is damaged"):
        opened(tmp_path / "a.save", settings)
    (tmp_path / "b.save").write_bytes(pickle.dumps(Exploit()))
    with pytest.raises(DataError, match=r"b\.save: holds pickled code or is damaged"):
        opened(tmp_path / "b.save", settings)
    assert "run" not in capsys.readouterr().out


def test_ids_of_another_tokenizer_are_refused(tmp_path, settings):
    write_save(tmp_path / "a.save", [TokenPair([1], [3000], [4])])
    with pytest.raises(DataError, match=r"record 0: has the token 3000, tokenizer bytes has 0 to"):
        opened(tmp_path / "a.save", settings)


def test_what_does_not_fit_is_left_out_and_counted(tmp_path, settings):
    records = [PAIR, {**PAIR, "prompt": "q" * 90}, {**PAIR, "chosen": "g" * 90}]
    store = opened(write(tmp_path / "a.jsonl", records), settings)
    pieces = store.pieces(60)
    assert pieces.record.tolist() == [0]
    assert pieces.report["left out, prompt longer than the room"] == 1
    assert pieces.report["left out, prompt and answer longer than the room"] == 1
    with pytest.raises(InputError, match=r"--ctx_len 20: no prompt with its longer answer fits"):
        store.pieces(20)
    with pytest.raises(InputError, match="--overlong cut: answers are compared whole"):
        store.pieces(60, "cut")
    store.longest = 28
    assert store.pieces(60).report["pairs"] == 1


def test_a_plan_visits_each_pair_once(tmp_path, settings):
    records = [{"prompt": f"{n}", "chosen": "y" * (n % 5 + 1), "rejected": "no"} for n in range(20)]
    plan = BatchPlan(
        opened(write(tmp_path / "a.jsonl", records), settings), ctx_len=64, micro_bsz=2, seed=1
    )
    seen, counts = [], []
    for step in range(plan.steps_per_pass):
        batch = plan.micro_batch(step, 0)
        assert batch.tokens() <= 2 * 2 * 64
        seen += batch.first[batch.chosen].tolist()
        counts.append(batch.count.tolist())
        assert batch.count.tolist() == [
            len(batch.chosen),
            len(batch.rejected),
            int(batch.lengths[batch.chosen].sum()),
        ]
    assert len(seen) == 20
    assert np.array(counts).sum(axis=0)[0] == 20


def save_model(
    path: Path, seed: int = 3, version: int = 7, n_embd: int = 32, head_size: int = 16
) -> Path:
    config = RWKVConfig(
        version=version,
        n_layer=2,
        n_embd=n_embd,
        dim_ffn=2 * n_embd,
        vocab_size=256,
        head_size=head_size,
        ranks=default_ranks(version, n_embd),
    )
    model = RWKV(config)
    initialize(model, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("output.weight", "ffn.value.weight")):
                parameter.normal_(std=0.05, generator=draw)
    write_tensors(path, model.state_dict())
    return path


RECORDS = [
    {
        "prompt": f"Is {n} {'very ' * (n % 4)}even?",
        "chosen": "yes" if n % 2 == 0 else "no",
        "rejected": "no, never" if n % 2 == 0 else "yes",
    }
    for n in range(24)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    save_model(folder / "base.pth")
    save_model(folder / "six.pth", version=6)
    write(folder / "train.jsonl", RECORDS[:18])
    write(folder / "val.jsonl", RECORDS[18:])
    write(
        folder / "single.jsonl",
        [
            {
                "prompt": r["prompt"],
                "completion": r["chosen" if n % 2 else "rejected"],
                "label": n % 2,
            }
            for n, r in enumerate(RECORDS)
        ],
    )
    rules = [{"match": "blocks.*", "mode": "lora", "rank": 4, "alpha": 8, "train_small": False}]
    (folder / "adapters.json").write_text(json.dumps({"rules": rules}))
    return folder


def flags(folder: Path, output: Path, objective: str, **more: object) -> list[str]:
    values = {
        "load_model": folder / "base.pth",
        "rlhf_train_file": folder / "train.jsonl",
        "layer_profile": folder / "adapters.json",
        "proj_dir": output,
        "cache_dir": folder / "cache",
        "accelerator": "cpu",
        objective: 1,
        "ctx_len": 64,
        "lr_init": 1e-2,
        "lr_final": 1e-2,
        "epoch_count": 2,
        "num_workers": 0,
    }
    return [word for key, value in (values | more).items() for word in (f"--{key}", str(value))]


def run(words: list[str], output: Path) -> list[dict]:
    assert train.main(words) == 0
    return read_log(output / "train_log.jsonl")


DPO_METRICS = {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"}
DPO_METRICS |= {"logps/chosen", "logps/rejected", "nll"}


@pytest.mark.parametrize(
    ("objective", "metrics"),
    [
        ("dpo", DPO_METRICS),
        ("orpo", {*DPO_METRICS, "log_odds"}),
        ("simpo", DPO_METRICS),
        ("kto", {"rewards/chosen", "rewards/rejected", "rewards/margins", "kl", "nll"}),
    ],
)
def test_objectives_train_and_evaluate(folder, tmp_path, objective, metrics):
    words = flags(folder, tmp_path, objective, val_data_file=folder / "val.jsonl")
    lines = run(words, tmp_path)
    steps = [line for line in lines if "loss" in line]
    assert metrics <= steps[0].keys()
    held_out = [line for line in lines if "val_loss" in line]
    assert {f"val_{name}" for name in metrics} <= held_out[0].keys()
    assert held_out[-1]["val_loss"] < held_out[0]["val_loss"]


@pytest.mark.parametrize("base", ["base.pth", "six.pth"])
@pytest.mark.parametrize("more", [{}, {"infctx": 1, "chunk_ctx": 16}, {"packing": 0}], ids=str)
def test_dpo_starts_at_log_two(folder, tmp_path, base, more):
    words = flags(folder, tmp_path, "dpo", load_model=folder / base, epoch_count=1, **more)
    first = run(words, tmp_path)[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("quant", STORES)
def test_dpo_starts_at_log_two_over_stored_weights(folder, tmp_path, quant):
    words = flags(folder, tmp_path, "dpo", epoch_count=1, quant=1, quant_mode=quant)
    assert run(words, tmp_path)[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)


@pytest.mark.parametrize("quant", ["nf4", "fp5"])
@pytest.mark.parametrize("match", ["blocks.*", "*"])
def test_scores_belong_to_a_storage(folder, tmp_path, quant, match):
    """Norms train beside the adapters: the scores must be of the weights as the run stores them."""
    profile = {"rules": [{"match": match, "mode": "lora", "rank": 4, "quant": quant}]}
    (tmp_path / "profile.json").write_text(json.dumps(profile))
    data = write(tmp_path / "own.jsonl", RECORDS)
    more: dict[str, object] = {"cache_dir": tmp_path / "cache"}
    make_reference.main(reference_words(folder, data, **more))
    words = flags(
        folder,
        tmp_path / "run",
        "dpo",
        rlhf_train_file=data,
        cache_dir=tmp_path / "cache",
        layer_profile=tmp_path / "profile.json",
        epoch_count=1,
    )
    with pytest.raises(DataError, match=f"are of model .* this run starts from .* in {quant}-"):
        train.main(words)
    more["layer_profile"] = tmp_path / "profile.json"
    make_reference.main(reference_words(folder, data, **more))
    first = run(words, tmp_path / "run")[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["auto", "cuda", "triton", "fla", "torch"])
def test_dpo_starts_at_log_two_on_every_kernel(tmp_path, kernel, one_configuration):
    """In bfloat16, with scores from a file, heads of 64."""
    save_model(tmp_path / "base.pth", n_embd=128, head_size=64)
    data = write(tmp_path / "own.jsonl", RECORDS)
    more = {"load_model": tmp_path / "base.pth", "cache_dir": tmp_path / "cache", "kernel": kernel}
    make_reference.main(reference_words(tmp_path, data, **more))
    words = flags(tmp_path, tmp_path / "run", "dpo", rlhf_train_file=data, epoch_count=1)
    del words[words.index("--layer_profile") : words.index("--layer_profile") + 2]
    words[words.index("cpu")] = "gpu"
    words += ["--kernel", kernel, "--precision", "bf16"]
    assert run(words, tmp_path / "run")[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)


def test_dpo_kinds_from_the_flag(folder, tmp_path):
    words = flags(folder, tmp_path, "dpo", epoch_count=1, dpo_loss="ipo", dpo_beta=0.5)
    assert run(words, tmp_path)[0]["loss"] == pytest.approx(1.0, abs=1e-3)


def test_kto_takes_single_answers(folder, tmp_path):
    words = flags(folder, tmp_path, "kto", rlhf_train_file=folder / "single.jsonl")
    lines = run(words, tmp_path)
    assert lines[0]["loss"] == pytest.approx(0.5, abs=1e-3)
    good = [line["rewards/chosen"] for line in lines if line["rewards/chosen"]]
    bad = [line["rewards/rejected"] for line in lines if line["rewards/rejected"]]
    assert good[-1] > 0 > bad[-1]  # a step here holds answers of one kind only


def reference_words(folder: Path, data: Path, **more: object) -> list[str]:
    values = {"data": data, "load_model": folder / "base.pth", "cache_dir": folder / "cache"}
    return [word for key, value in (values | more).items() for word in (f"--{key}", str(value))]


def test_scores_of_a_file_equal_adapters_off(folder, tmp_path, capsys):
    """The same run with scores from make_reference and with the model as its own reference."""
    data = write(tmp_path / "own.jsonl", RECORDS)
    live = run(flags(folder, tmp_path / "live", "dpo", rlhf_train_file=data), tmp_path / "live")
    assert make_reference.main(reference_words(folder, data, batch_tokens=200)) == 0
    assert "24 records scored, 24 of them now" in capsys.readouterr().out
    stored = run(flags(folder, tmp_path / "file", "dpo", rlhf_train_file=data), tmp_path / "file")
    for a, b in zip(live, stored, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)


def test_full_training_uses_scores_and_starts_at_log_two(folder, tmp_path):
    data = write(tmp_path / "full.jsonl", RECORDS)
    words = flags(folder, tmp_path / "run", "dpo", rlhf_train_file=data, lr_init=1e-4)
    del words[words.index("--layer_profile") : words.index("--layer_profile") + 2]
    with pytest.raises(DataError, match="has no reference scores.*run python -m data.make_refer"):
        train.main(words)
    make_reference.main(reference_words(folder, data))
    assert run(words, tmp_path / "run")[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)


def test_a_further_run_over_bfloat16_weights_starts_at_log_two(folder, tmp_path):
    """The reference has its adapter beside the weights, as the run that starts from it does."""
    data = write(tmp_path / "further.jsonl", RECORDS)
    words = flags(folder, tmp_path / "sft", "dpo", rlhf_train_file=data, precision="bf16")
    run([*words, "--lr_init", "3e-2", "--lr_final", "3e-2"], tmp_path / "sft")
    adapter = tmp_path / "sft" / "rwkv-0.pth"
    make_reference.main(reference_words(folder, data, adapter=adapter, dtype="bf16"))
    words = flags(
        folder, tmp_path / "run", "dpo", rlhf_train_file=data, precision="bf16",
        load_adapter=adapter, epoch_count=1,
    )  # fmt: skip
    first = run(words, tmp_path / "run")[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/margins"] == 0


def test_scores_are_of_one_alpha(folder, tmp_path):
    """Where the adapter's file does not state it, as RWKV-LM-RLHF's."""
    data = write(tmp_path / "alpha.jsonl", RECORDS)
    run(flags(folder, tmp_path / "sft", "dpo", rlhf_train_file=data), tmp_path / "sft")
    adapter = tmp_path / "plain.pth"
    shutil.copy(tmp_path / "sft" / "rwkv-0.pth", adapter)
    (rule,) = json.loads((folder / "adapters.json").read_text())["rules"]
    words = flags(
        folder, tmp_path / "run", "dpo", rlhf_train_file=data, load_adapter=adapter, dry_run=1
    )
    for alpha, message in ((2 * rule["alpha"], "are of model .* x "), (rule["alpha"], "")):
        make_reference.main(reference_words(folder, data, adapter=adapter, alpha=alpha))
        if message:
            with pytest.raises(DataError, match=message):
                train.main(words)
        else:
            assert train.main(words) == 0


def test_scores_from_a_state_apart_are_refused(folder):
    words = reference_words(folder, folder / "train.jsonl", state="s.pth")
    with pytest.raises(InputError, match=r"--state s\.pth: no run begins with a state that lies"):
        make_reference.main(words)


def test_a_mask_for_prompts_leaves_pairs_as_they_are(folder, tmp_path):
    """`--mask_prompt 0` is about SFT: the scores of the same records are found."""
    data = write(tmp_path / "masked.jsonl", RECORDS)
    make_reference.main(reference_words(folder, data))
    words = flags(folder, tmp_path / "run", "dpo", rlhf_train_file=data, mask_prompt=0, dry_run=1)
    del words[words.index("--layer_profile") : words.index("--layer_profile") + 2]
    assert train.main(words) == 0


def test_stale_scores_are_refused(folder, tmp_path):
    """Scores of another model, of another adapter, and of changed text."""
    data = write(tmp_path / "stale.jsonl", RECORDS)
    save_model(tmp_path / "other.pth", seed=5)
    make_reference.main(reference_words(folder, data, load_model=tmp_path / "other.pth"))
    words = flags(folder, tmp_path / "run", "dpo", rlhf_train_file=data)
    del words[words.index("--layer_profile") : words.index("--layer_profile") + 2]
    with pytest.raises(DataError, match="reference scores are of model .* starts from model"):
        train.main(words)
    make_reference.main(reference_words(folder, data))
    assert train.main([*words, "--dry_run", "1"]) == 0
    write(data, [{**RECORDS[0], "chosen": "changed"}, *RECORDS[1:]])
    with pytest.raises(DataError, match="has no reference scores"):
        train.main(words)


@pytest.mark.parametrize("ending", [".npy", ".json"])
def test_damaged_scores_are_named(folder, tmp_path, ending):
    data = write(tmp_path / "damaged.jsonl", RECORDS)
    store = tmp_path / "damaged.tok"
    make_pairs.main(["--input", str(data), "--tokenizer", "bytes", "--output", str(store)])
    make_reference.main(reference_words(folder, store))
    (scores,) = store.glob("reference-*.npy")
    scores.with_suffix(ending).write_bytes(b"{")
    if ending == ".json":
        scores.unlink()
    words = flags(folder, tmp_path / "run", "dpo", rlhf_train_file=store)
    del words[words.index("--layer_profile") : words.index("--layer_profile") + 2]
    with pytest.raises(DataError, match=f"{ending}: is damaged; remove it and run python -m data"):
        train.main(words)


def test_scores_go_on_after_a_kill(folder, tmp_path):
    """kill -9 while scoring: the next command does what is left, and the scores are the same."""
    output = tmp_path / "pairs.tok"
    data = write(tmp_path / "a.jsonl", RECORDS)
    words = ["--input", str(data), "--output", str(output), "--tokenizer", "bytes"]
    assert make_pairs.main(words) == 0
    code = (
        "import sys, time\n"
        "from data import make_reference as command\n"
        "score = command.score_records\n"
        "def slow(*a):\n"
        "    found = score(*a)\n"
        "    print('scored', flush=True)\n"
        "    time.sleep(0.2)\n"
        "    return found\n"
        "command.score_records = slow\n"
        "command.main(sys.argv[1:])\n"
    )
    arguments = reference_words(folder, output, batch_tokens=100)
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, stdout=subprocess.PIPE
    )
    for _ in range(3):
        assert process.stdout.readline() == b"scored\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    part = next(output.glob("reference-*.part.npy"))
    left = int(np.isnan(np.load(part)).any(axis=1).sum())
    assert 0 < left < len(RECORDS)
    whole = tmp_path / "whole.tok"
    make_pairs.main([*words[:3], str(whole), *words[4:]])
    make_reference.main(reference_words(folder, whole))
    make_reference.main(arguments)
    found, expected = (np.load(next(p.glob("reference-*.npy"))) for p in (output, whole))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


def test_unfinished_scores_are_refused(folder, tmp_path):
    output = tmp_path / "pairs.tok"
    data = write(tmp_path / "a.jsonl", RECORDS)
    make_pairs.main(["--input", str(data), "--output", str(output), "--tokenizer", "bytes"])
    from rwkv.checkpoint import fingerprint, read_tensors

    open_unfinished(output, Scorer(fingerprint(read_tensors(folder / "base.pth"))))
    words = flags(folder, tmp_path / "run", "dpo", rlhf_train_file=output)
    del words[words.index("--layer_profile") : words.index("--layer_profile") + 2]
    with pytest.raises(DataError, match="reference scores are unfinished; run the same python"):
        train.main(words)


def test_dpo_turns_a_preference_around(folder, tmp_path):
    lines = run(
        flags(
            folder, tmp_path, "dpo", epoch_count=6, lr_init=2e-2, val_data_file=folder / "val.jsonl"
        ),
        tmp_path,
    )
    assert lines[-1]["val_rewards/accuracies"] > 0.8
    assert lines[-1]["val_rewards/margins"] > 0.1


def test_kto_needs_its_own_reference(folder, tmp_path):
    words = flags(folder, tmp_path, "kto")
    del words[words.index("--layer_profile") : words.index("--layer_profile") + 2]
    with pytest.raises(InputError, match="--kto 1: compares with the model before training"):
        train.main(words)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("dpo_beta", 0, "--dpo_beta 0: must be above 0"),
        ("dpo_label_smoothing", 0.5, "--dpo_label_smoothing 0.5: must be from 0 to below 0.5"),
        ("orpo_alpha", -1, "--orpo_alpha -1: must be at least 0"),
    ],
)
def test_values_out_of_range_are_named(folder, tmp_path, name, value, message):
    with pytest.raises(InputError, match=message):
        train.main(flags(folder, tmp_path, "dpo", **{name: value}))


UPSTREAM = (
    "--gpu_arch cuda --my_testing x070 --vocab_size 256 --n_layer 2 --n_embd 32 "
    "--grad_cp 1 --random_mode 1 --lr_init 2e-5 --lr_final 1e-6 --warmup_steps 10 --beta1 0.9 "
    "--beta2 0.999 --adam_eps 1e-8 --weight_decay 0.01 --accelerator gpu --devices 1 "
    "--precision bf16 --strategy deepspeed_stage_2 --epoch_steps 20 --epoch_count 2 --epoch_save 1 "
    "--ctx_len 512 --micro_bsz 1 --accumulate_grad_batches 4 --rlhf_max_corpus_len 512 "
    "--quant 1 --quant_mode nf4 --dry_run 1"
)
MODES = {
    "dpo": "--dpo 1 --dpo_alpha 0.05 --dpo_beta 0.02",
    "orpo": "--orpo 1 --orpo_mode 1 --orpo_alpha 0.0004",
    "simpo": "--simpo 1 --simpo_alpha 0.3 --simpo_beta 0.01 --simpo_gamma 0",
}


@pytest.mark.parametrize("mode", MODES)
def test_commands_of_rwkv_lm_rlhf_start(folder, tmp_path, capsys, mode):
    """Its flags and a .save file, with paths changed and nothing else."""
    write_save(tmp_path / "trainset.save", [TokenPair([1, 2], [3, 0], [4, 5, 0], -9.0, -30.0)] * 9)
    words = f"{UPSTREAM} {MODES[mode]}".split()
    words += ["--load_model", str(folder / "base.pth"), "--proj_dir", str(tmp_path / "out")]
    words += ["--rlhf_train_file", str(tmp_path / "trainset.save")]
    words += ["--layer_profile", str(folder / "adapters.json")]
    assert train.main([*words, "--cache_dir", str(tmp_path / "cache")]) == 0
    assert "pairs 9" in capsys.readouterr().err


def test_upstreams_example_files(assets, tmp_path, settings):
    world = load_tokenizer("world")
    store = open_store(assets / "upstream" / "dpo_example.save", settings, world, PAIRS)
    assert len(store) == 60
    assert [len(part) for part in store.pair(0)[:3]] == [14, 151, 73]
    csv = assets / "data" / "preference" / "rlhf_example_dataset_withreject.csv"
    assert len(open_store(csv, settings, world, PAIRS)) == 31
    demo = assets / "data" / "preference" / "llamafactory_dpo_en_demo.json.gz"
    assert len(open_store(demo, settings, world, PAIRS)) == 300
