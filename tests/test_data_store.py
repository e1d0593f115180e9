"""Token stores: what is written, the cache, commands, and that nothing is left half-written."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data import make_sft, show, store_cache, tokenizing
from data.flags import DataFlags
from data.progress import Progress, clock
from data.records import DataError
from data.store_cache import StoreSettings, open_store
from data.token_store import ArrayWriter, TokenStore, split, write_store
from data.tokenizing import Encoded
from rwkv import cli
from rwkv.errors import InputError
from rwkv.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
BYTES = load_tokenizer("bytes")
PAIR = {"prompt": "q", "completion": "a"}


def write_records(path: Path, records) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def settings(tmp_path):
    return StoreSettings(cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def builds(monkeypatch):
    """Counts how often a file is tokenized."""
    count = Counter()
    build = store_cache.build_store

    def counted(*arguments):
        count["builds"] += 1
        return build(*arguments)

    monkeypatch.setattr(store_cache, "build_store", counted)
    return count


def test_records_by_hand(tmp_path, settings):
    path = write_records(tmp_path / "a.jsonl", [{"text": "ab"}, PAIR])
    store = open_store(path, settings, BYTES)
    tokens, mask = store.record(0)
    assert tokens.tolist() == [97, 98, 0] and mask.tolist() == [False, True, True]
    tokens, mask = store.record(1)
    assert bytes(tokens.tolist()) == b"User: q\n\nAssistant: a\n\n\0"
    assert bytes(tokens[mask].tolist()) == b" a\n\n\0"
    assert len(store) == 2
    assert store.lengths.tolist() == [3, 24]
    assert store.scored.tolist() == [2, 5]
    assert store.dialogue.tolist() == [False, True]
    assert tokens.dtype == np.uint16


def test_data_flags_open_a_store(tmp_path):
    path = write_records(tmp_path / "a.jsonl", [PAIR])
    flags = DataFlags(train_data_file=str(path), cache_dir=str(tmp_path / "c"))
    assert len(open_store(flags.train_data_file, flags, BYTES)) == 1


def test_second_opening_reads_the_cache(tmp_path, settings, builds):
    path = write_records(tmp_path / "a.jsonl", [PAIR])
    for _ in range(3):
        open_store(path, settings, BYTES)
    assert builds["builds"] == 1
    assert not list((tmp_path / "cache").glob(".*"))


@pytest.mark.parametrize(
    "change",
    [
        {"template": "g1"},
        {"turn_end": "eot"},
        {"mask_prompt": False},
        {"tokenizer": load_tokenizer("bytes:utf-16-le")},
        {"content": [PAIR, PAIR]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_each_change_tokenizes_anew(tmp_path, settings, builds, change):
    path = write_records(tmp_path / "a.jsonl", [PAIR])
    open_store(path, settings, BYTES)
    if "content" in change:
        write_records(path, change["content"])
    flags = {k: v for k, v in change.items() if k not in ("tokenizer", "content")}
    changed = StoreSettings(cache_dir=settings.cache_dir, **flags)
    open_store(path, changed, change.get("tokenizer", BYTES))
    open_store(path, settings, BYTES)
    assert builds["builds"] == 2


def test_a_hash_is_remembered_while_the_file_looks_the_same(tmp_path, settings, monkeypatch):
    path = write_records(tmp_path / "a.jsonl", [PAIR])
    os.utime(path, (time.time() - 60,) * 2)
    open_store(path, settings, BYTES)
    monkeypatch.setattr(store_cache.hashlib, "file_digest", None)  # reading it again would fail
    open_store(path, settings, BYTES)


def test_a_same_sized_edit_is_seen(tmp_path, settings):
    path = write_records(tmp_path / "a.jsonl", [{"text": "ab"}])
    open_store(path, settings, BYTES)
    write_records(path, [{"text": "xy"}])
    assert open_store(path, settings, BYTES).record(0)[0].tolist() == [120, 121, 0]


def test_a_damaged_cache_is_made_again(tmp_path, settings):
    path = write_records(tmp_path / "a.jsonl", [PAIR])
    folder = open_store(path, settings, BYTES).folders[0]
    (folder / "tokens.npy").write_bytes(b"")
    assert len(open_store(path, settings, BYTES).record(0)[0]) == 24


def test_several_files_become_one_store(tmp_path, settings):
    a = write_records(tmp_path / "a.jsonl", [{"text": "ab"}])
    b = write_records(tmp_path / "b.jsonl", [{"text": "cde"}, {"text": "f"}])
    output = tmp_path / "c.tok"
    make_sft.main(["--input", str(a), "--output", str(output), "--tokenizer", "bytes"])
    store = open_store(f"{a}, {b},{output}", settings, BYTES)
    assert [bytes(store.record(i)[0].tolist()) for i in range(4)] == [
        b"ab\0",
        b"cde\0",
        b"f\0",
        b"ab\0",
    ]
    again = pickle.loads(pickle.dumps(store.select(np.array([3, 1]))))
    assert bytes(again.record(1)[0].tolist()) == b"cde\0"
    assert again.fingerprint != store.fingerprint


def test_a_comma_in_a_file_name(tmp_path, settings):
    path = write_records(tmp_path / "a,b.jsonl", [PAIR])
    assert len(open_store(str(path), settings, BYTES)) == 1


def test_processes_give_what_one_gives(tmp_path, settings, monkeypatch):
    records = [{"text": f"record {n} " + "x" * 50} for n in range(300)]
    path = write_records(tmp_path / "a.jsonl", records)
    alone = open_store(path, settings, BYTES)
    monkeypatch.setattr(tokenizing, "SMALL_FILE", 0)
    monkeypatch.setattr(tokenizing, "CHUNK_BYTES", 1000)
    recipe = store_cache.Recipe("bytes", store_cache.load_template("world", BYTES))
    store_cache.build_store(tmp_path / "many", [path], recipe, BYTES, workers=2)
    many = TokenStore([tmp_path / "many"])
    assert len(many) == 300
    for number in range(0, 300, 37):
        assert np.array_equal(many.record(number)[0], alone.record(number)[0])
    write_records(path, [*records, {"text": 5}])
    with pytest.raises(DataError, match=r"a\.jsonl:301: 'text' is a number"):
        store_cache.build_store(tmp_path / "bad", [path], recipe, BYTES, workers=2)
    assert not (tmp_path / "bad").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "records, message",
    [
        ([PAIR, {"text": 5}], r"a\.jsonl:2: 'text' is a number \(5\), not a string"),
        ([PAIR, {"text": "\ud83d"}], r"a\.jsonl:2: character 0 of the text, '\\ud83d'"),
        (["\n"], r"a\.jsonl:1: the text is empty"),
    ],
)
def test_a_wrong_record_leaves_nothing(tmp_path, settings, records, message):
    path = write_records(tmp_path / "a.jsonl", records)
    with pytest.raises(DataError, match=message):
        open_store(path, settings, BYTES)
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["lock"]


def test_blank_lines_alone_are_no_records(tmp_path, settings):
    path = tmp_path / "a.jsonl"
    path.write_text("\n\n")
    with pytest.raises(DataError, match=r"a\.jsonl: has no records"):
        open_store(path, settings, BYTES)


KILLED = """
import sys, time
from pathlib import Path
from data import store_cache
from data.make_sft import main
chunks = store_cache.encode_file
def slow(*arguments):
    yield from chunks(*arguments)
    print("wrote", flush=True)
    time.sleep(60)
store_cache.encode_file = slow
main(sys.argv[1:])
"""


def test_a_killed_build_leaves_nothing_that_counts(tmp_path):
    """A kill within the writing leaves no store, and the next build removes what it left."""
    path = write_records(tmp_path / "a.jsonl", [PAIR])
    arguments = ["--input", str(path), "--output", str(tmp_path / "o"), "--tokenizer", "bytes"]
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, *arguments], cwd=ROOT, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"wrote\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "o").exists()
    assert len(list(tmp_path.glob(".o.*.part"))) == 1
    assert make_sft.main(arguments) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "o"]


def test_what_a_build_did_not_leave_stays(tmp_path):
    path, other = write_records(tmp_path / "a.jsonl", [PAIR]), tmp_path / ".o.notes.part"
    other.write_text("mine")
    arguments = ["--input", str(path), "--output", str(tmp_path / "o"), "--tokenizer", "bytes"]
    assert make_sft.main(arguments) == 0
    assert other.read_text() == "mine"


def test_a_store_of_another_tokenizer_is_refused(tmp_path, settings):
    path = write_records(tmp_path / "a.jsonl", [PAIR])
    output = tmp_path / "o"
    make_sft.main(["--input", str(path), "--output", str(output), "--tokenizer", "bytes"])
    with pytest.raises(DataError, match=r"o: was made with tokenizer bytes \(bytes\), the model's"):
        open_store(output, settings, load_tokenizer("world"))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda o: (o / "mask.npy").unlink(), r"mask\.npy: cannot be read"),
        (
            lambda o: np.save(o / "mask.npy", np.zeros(3)),
            r"has shape \[3\], meta\.json says \[24\]",
        ),
        (lambda o: (o / "meta.json").write_text("{"), r"meta\.json: is damaged"),
        (lambda o: (o / "meta.json").unlink(), r"o: a folder, but not one made by"),
        (
            lambda o: (o / "meta.json").write_text(
                (o / "meta.json").read_text().replace('"sft"', '"pairs"')
            ),
            r"o: holds 'pairs' records, 'sft' are needed",
        ),
        (
            lambda o: (o / "meta.json").write_text(
                (o / "meta.json").read_text().replace('"format": 1', '"format": 99')
            ),
            r"o: has format 99, this program reads 1",
        ),
    ],
    ids=["missing", "short", "meta", "no meta", "kind", "version"],
)
def test_damage_is_named(tmp_path, settings, damage, message):
    path = write_records(tmp_path / "a.jsonl", [PAIR])
    output = tmp_path / "o"
    make_sft.main(["--input", str(path), "--output", str(output), "--tokenizer", "bytes"])
    damage(output)
    with pytest.raises(DataError, match=message):
        open_store(output, settings, BYTES)


@pytest.mark.parametrize("paths, message", [("", "names no file"), ("no.jsonl", "no such file")])
def test_missing_files_are_named(settings, paths, message):
    with pytest.raises(InputError, match=message):
        open_store(paths, settings, BYTES)


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    path = write_records(tmp_path / "a.jsonl", [PAIR])
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--cache_dir .*file: cannot be written"):
        open_store(path, StoreSettings(cache_dir=str(tmp_path / "file")), BYTES)


def test_split_is_a_partition_drawn_from_the_seed(tmp_path, settings):
    path = write_records(tmp_path / "a.jsonl", [{"text": chr(65 + n)} for n in range(20)])
    store = open_store(path, settings, BYTES)
    train, held_out = split(store, 0.2, seed=3)
    letters = [{int(s.record(i)[0][0]) for i in range(len(s))} for s in (train, held_out)]
    assert letters[0] | letters[1] == set(range(65, 85)) and not letters[0] & letters[1]
    assert len(held_out) == 4
    assert split(store, 0.2, seed=3)[1].fingerprint == held_out.fingerprint
    assert split(store, 0.2, seed=4)[1].fingerprint != held_out.fingerprint
    assert len(split(store, 0.001, seed=0)[1]) == 1
    with pytest.raises(InputError, match=r"--val_fraction 1\.5: must be above 0 and below 1"):
        split(store, 1.5, seed=0)


def h5_file(path, rows, name="tokens", vlen=True):
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        if not vlen:
            file.create_dataset(name, data=np.array(rows))
            return path
        dtype = h5py.vlen_dtype(np.int64)
        data = file.create_dataset(name, (len(rows),), dtype=dtype, compression="gzip")
        for number, row in enumerate(rows):
            data[number] = np.array(row, dtype=np.int64)
    return path


def test_upstream_h5(tmp_path, settings):
    path = h5_file(tmp_path / "a.h5", [[97, 98], [99, 0], [100, 101, 102]])
    store = open_store(path, settings, BYTES)
    assert [store.record(i)[0].tolist() for i in range(3)] == [
        [97, 98, 0],
        [99, 0],
        [100, 101, 102, 0],
    ]
    assert store.scored.tolist() == [2, 1, 3] and not store.dialogue.any()
    assert store.metas[0]["notes"] == {"ends of text added": 2}


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: h5_file(p, [[1], [256]]), r"a\.h5: tokens\[1\]: has the token 256, tokenizer"),
        (lambda p: h5_file(p, [[1, -2]]), r"a\.h5: tokens\[0\]: has the token -2"),
        (lambda p: h5_file(p, [[1], []]), r"a\.h5: tokens\[1\]: the record is empty"),
        (lambda p: h5_file(p, [[1]], "tok"), r"a\.h5: has no array 'tokens', only tok"),
        (lambda p: h5_file(p, [[1.5]], vlen=False), r"a\.h5: 'tokens' has shape \[1, 1\]"),
        (lambda p: p.write_bytes(b"x"), r"a\.h5: not a whole HDF5 file"),
    ],
    ids=["large", "negative", "empty", "name", "shape", "no h5"],
)
def test_wrong_h5_files_are_named(tmp_path, settings, make, message):
    pytest.importorskip("h5py")
    make(tmp_path / "a.h5")
    with pytest.raises(DataError, match=message):
        open_store(tmp_path / "a.h5", settings, BYTES)


def test_left_out_thoughts_are_counted(tmp_path, capsys):
    path = write_records(tmp_path / "a.jsonl", [{**PAIR, "reasoning": "t"}])
    arguments = ["--input", str(path), "--tokenizer", "bytes"]
    make_sft.main([*arguments, "--output", str(tmp_path / "o")])
    assert "1 thoughts left out" in capsys.readouterr().out
    make_sft.main([*arguments, "--template", "g1", "--output", str(tmp_path / "p")])
    assert "left out" not in capsys.readouterr().out


def test_make_sft_reports_and_refuses_to_overwrite(tmp_path, capsys):
    path = write_records(tmp_path / "a.jsonl", [PAIR])
    arguments = ["--input", str(path), "--output", str(tmp_path / "o"), "--tokenizer", "bytes"]
    assert cli.run(lambda: make_sft.main(arguments)) == 0
    assert capsys.readouterr().out.endswith("o: 1 records, 24 tokens, 5 scored\n")
    assert cli.run(lambda: make_sft.main(arguments)) == 2
    assert "o: exists; remove it or choose another --output" in capsys.readouterr().err


def test_show_marks_what_is_scored(tmp_path, capsys):
    path = write_records(tmp_path / "a.jsonl", [PAIR, {"text": "é"}])
    cache = ["--cache_dir", str(tmp_path / "cache"), "--tokenizer", "bytes", "--ctx_len", "30"]
    assert show.main([str(path), *cache]) == 0
    out = capsys.readouterr().out
    assert "record 0: 24 tokens, 5 scored\nUser: q\n\nAssistant:[[ a\n\n<end of text>]]" in out
    assert "record 1: 3 tokens, 2 scored\n[[é<end of text>]]" in out
    assert "2 records, 1 of them dialogues\n27 tokens, 7 scored (25.9%)" in out
    assert "--ctx_len 30, packed: 1 rows, 83.3% full" in out
    with pytest.raises(InputError, match="--first -1: records are counted from 0"):
        show.main([str(path), *cache, "--first", "-1"])


def test_show_colours_a_terminal(tmp_path, capsys, monkeypatch):
    path = write_records(tmp_path / "a.jsonl", [PAIR])
    output = str(tmp_path / "o")
    make_sft.main(["--input", str(path), "--output", output, "--tokenizer", "bytes"])
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    show.main([output, "--rows", "1"])
    assert "Assistant:\033[32m a\n\n<end of text>\033[0m" in capsys.readouterr().out


def test_progress_tells_rate_and_time_left(capsys, monkeypatch):
    now = iter([0.0, 1.0, 10.0, 11.0])
    monkeypatch.setattr("data.progress.time.monotonic", lambda: next(now))
    progress = Progress("tokenizing a.jsonl")
    progress(1, 100, 5)
    progress(25, 100, 500)
    progress(26, 100, 520)
    progress.finish()
    expected = "tokenizing a.jsonl: 25%, 500 records, 50 a second, 0:30 left\n"
    assert capsys.readouterr().err == expected
    assert clock(3725) == "1:02:05"


def test_arrays_grow_past_their_first_header(tmp_path):
    with ArrayWriter(tmp_path / "a.npy", np.int64) as file:
        for start in range(0, 12000, 1000):
            file.append(np.arange(start, start + 1000))
    assert np.array_equal(np.load(tmp_path / "a.npy"), np.arange(12000))


def test_a_million_records_open_at_once(tmp_path):
    count = 1_000_000
    tokens = np.zeros(2 * count, np.uint16)
    mask = np.tile([False, True], count)
    lengths = np.full(count, 2)
    write_store(
        tmp_path / "o", [Encoded(tokens, mask, lengths, np.zeros(count, bool), Counter())], {}
    )
    assert len(TokenStore([tmp_path / "o"])) == count


@pytest.mark.parametrize("name", ["text/wikipedia_english_20240801to20240815.json.gz"])
def test_real_texts_come_back(assets, settings, name):
    import gzip

    world = load_tokenizer("world")
    store = open_store(assets / "data" / name, settings, world)
    with gzip.open(assets / "data" / name) as file:
        texts = json.load(file)
    for number in range(0, len(texts), 97):
        tokens, mask = store.record(number)
        assert world.decode(tokens.tolist()) == texts[number]
        assert tokens[-1] == 0 and mask[1:].all()
