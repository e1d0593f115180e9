"""Sampling by hand, packed reading, wide batches, stops, streams, and the generate command."""

import argparse
import json
import math
import random
import subprocess
import sys

import pytest
import torch
from oracle import random_tensors

from peft import quantize
from peft.adapter_file import adapter_metadata, trained_tensors
from peft.apply import load_with_profile
from peft.flags import PeftFlags
from rwkv import runner
from rwkv.checkpoint import fingerprint, load_model, read_tensors, write_tensors
from rwkv.errors import InputError, RunError
from rwkv.generate import GREEDY, TextStream, Writing, generate, main, read_prompts
from rwkv.model import RWKV
from rwkv.names import ROOT
from rwkv.reading import read_texts, read_to_the_end
from rwkv.sampling import (
    count_tokens,
    draw,
    filtered_probabilities,
    penalize,
    pick_tokens,
    uniform_numbers,
)
from rwkv.sampling_flags import Sampling
from rwkv.tokenizer import load_tokenizer

DIGITS = load_tokenizer("chars:0123456789,#")
BYTES = load_tokenizer("bytes")
LOGITS = torch.tensor([[4.0, 3.0, 2.0, 1.0]]).log()  # probabilities 0.4, 0.3, 0.2, 0.1
versions = pytest.mark.parametrize("version", [6, 7], ids=["v6", "v7"])


@pytest.fixture
def model_file(tmp_path):
    """Write an oracle's random model; returns its path."""

    def make(version: int = 7, **sizes):
        tensors = random_tensors(version, **sizes)
        path = tmp_path / "model.pth"
        write_tensors(path, {name: torch.from_numpy(tensor) for name, tensor in tensors.items()})
        return path

    return make


@pytest.fixture(scope="module")
def reverser(assets) -> RWKV:
    return load_model(assets / "models" / "rwkv7-reverse-60digits.pth")


def numbers(count: int, seed: int = 0) -> list[str]:
    draw_ = random.Random(seed)
    return [
        str(draw_.randrange(10 ** (n - 1), 10**n)) for n in draw_.choices(range(1, 51), k=count)
    ]


def prompts(count: int, V: int = 32, seed: int = 0) -> list[list[int]]:
    draw_ = random.Random(seed)
    return [draw_.choices(range(V), k=draw_.randrange(1, 12)) for _ in range(count)]


def test_temperature_zero_takes_the_likeliest():
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    assert pick_tokens(logits, GREEDY, torch.tensor([0.9, 0.9])).tolist() == [1, 0]


@pytest.mark.parametrize("u, index", [(0.0, 0), (0.39, 0), (0.41, 1), (0.71, 2), (0.9999999, 3)])
def test_a_draw_by_hand(u, index):
    weights = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    assert draw(weights, torch.tensor([u], dtype=torch.float64)).item() == index


def test_a_draw_never_takes_a_token_of_no_weight():
    weights = torch.tensor([[0.0, 1.0, 0.0, 1.0, 0.0]]).expand(4, 5)
    uniforms = torch.tensor([0.0, 0.4999, 0.5, 1 - 2**-48], dtype=torch.float64)
    assert draw(weights, uniforms).tolist() == [1, 1, 3, 3]


@pytest.mark.parametrize(
    "sampling, want",
    [
        (Sampling(), [0.4, 0.3, 0.2, 0.1]),
        (Sampling(top_k=2), [4 / 7, 3 / 7, 0, 0]),
        (Sampling(top_k=9), [0.4, 0.3, 0.2, 0.1]),
        (Sampling(top_p=0.7), [4 / 7, 3 / 7, 0, 0]),
        (Sampling(top_p=0.71), [4 / 9, 3 / 9, 2 / 9, 0]),
        (Sampling(top_p=0.0), [1.0, 0, 0, 0]),
        (Sampling(temperature=0.5), [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
        (Sampling(temperature=0.5, top_k=3, top_p=0.6), [16 / 25, 9 / 25, 0, 0]),
    ],
    ids=str,
)
def test_filters_by_hand(sampling, want):
    found = filtered_probabilities(LOGITS, sampling)
    torch.testing.assert_close(found / found.sum(), torch.tensor([want]), atol=1e-6, rtol=1e-5)


def test_filters_work_row_by_row():
    rows = torch.cat([LOGITS, LOGITS.flip(1)])
    found = filtered_probabilities(rows, Sampling(top_k=3, top_p=0.6))
    torch.testing.assert_close(found[0], found[1].flip(0))
    assert (found[0] > 0).tolist() == [True, True, False, False]


def test_penalties_by_hand():
    """Token 1 twice, then token 0 once, at a decay of 0.5: counts 1 and (1 * 0.5 + 1) * 0.5."""
    sampling = Sampling(presence_penalty=0.5, frequency_penalty=2.0, penalty_decay=0.5)
    counts = torch.zeros(1, 3)
    for token in (1, 1, 0):
        counts = count_tokens(counts, torch.tensor([token]), sampling)
    assert counts.tolist() == [[1.0, 0.75, 0.0]]
    assert penalize(torch.zeros(1, 3), counts, sampling).tolist() == [[-2.5, -2.0, 0.0]]


def test_forbidden_tokens_are_never_picked():
    banned = torch.tensor([True, False, True, False])
    for sampling in (GREEDY, Sampling(), Sampling(top_k=1)):
        picked = pick_tokens(
            LOGITS.expand(50, 4),
            sampling,
            torch.arange(50, dtype=torch.float64) / 50,
            banned=banned,
        )
        assert set(picked.tolist()) <= {1, 3}


def test_draws_follow_the_probabilities():
    """Over 20,000 draws the shares are within four standard deviations."""
    n = 20_000
    uniforms = uniform_numbers(1, torch.zeros(n, dtype=torch.long), torch.arange(n))
    picked = pick_tokens(LOGITS.expand(n, 4), Sampling(), uniforms)
    for token, p in enumerate((0.4, 0.3, 0.2, 0.1)):
        share = (picked == token).float().mean().item()
        assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / n)


def test_uniform_numbers_depend_on_seed_row_and_step():
    rows, steps = torch.arange(50).repeat_interleave(50), torch.arange(50).repeat(50)
    found = torch.cat([uniform_numbers(seed, rows, steps) for seed in (0, 1, -1, 2**63)])
    assert found.min() >= 0 and found.max() < 1
    assert len(found.unique()) == len(found)
    assert found.mean().item() == pytest.approx(0.5, abs=0.01)
    alone = uniform_numbers(0, rows[7:8], steps[7:8])
    assert torch.equal(alone, uniform_numbers(0, rows, steps)[7:8])


@pytest.mark.parametrize(
    "values, message",
    [
        ({"temperature": -1}, "--temperature -1: needs to be at least 0"),
        ({"top_p": 1.5}, "--top_p 1.5: needs to be between 0 and 1"),
        ({"top_k": -2}, "--top_k -2: needs to be at least 0"),
        ({"penalty_decay": 2}, "--penalty_decay 2: needs to be between 0 and 1"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_named(values, message):
    with pytest.raises(InputError, match=message):
        Sampling(**values)


@versions
@pytest.mark.parametrize("piece", [1, 5, 100])
def test_reading_in_pieces_equals_reading_apart(model_file, version, piece):
    """Long texts cut, short ones packed, from new and from given states."""
    model = load_model(model_file(version), dtype=torch.float64)
    texts = prompts(6)
    hidden, state = read_to_the_end(model, texts, piece=piece)
    more, _ = read_to_the_end(model, texts[::-1], state, piece=piece)
    for n, text in enumerate(texts):
        alone, after = model(torch.tensor([text]))
        torch.testing.assert_close(hidden[n], alone[0, -1], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(state[1].wkv[n], after[1].wkv[0], rtol=1e-9, atol=1e-9)
        alone, _ = model(torch.tensor([text + texts[5 - n]]))
        torch.testing.assert_close(more[n], alone[0, -1], rtol=1e-9, atol=1e-9)


def test_pieces_have_one_size_and_name_their_tokens(model_file):
    model = load_model(model_file())
    texts = prompts(6)
    pieces = list(read_texts(model, texts, piece=5))
    sizes = [len(piece.hidden) for piece in pieces]
    assert set(sizes[:-1]) == {5} and sum(sizes) == sum(len(text) for text in texts)
    for spans, hidden, state in pieces:
        assert sum(stop - start for _, start, stop in spans) == len(hidden)
        assert len(state[0].wkv) == len(spans)


def test_the_real_model_reverses_numbers(reverser):
    given = numbers(60)
    found = generate(
        reverser,
        [DIGITS.encode(f"{number},") for number in given],
        max_tokens=60,
        tokenizer=DIGITS,
        stop=["#"],
        batch_size=25,
    )
    assert [answer.text for answer in found] == [number[::-1] for number in given]
    assert all(answer.ended and DIGITS.decode(answer.tokens)[-1] == "#" for answer in found)


@versions
@pytest.mark.parametrize(
    "sampling",
    [GREEDY, Sampling(0.8, top_p=0.9, presence_penalty=0.5, frequency_penalty=0.2)],
    ids=["greedy", "drawn"],
)
def test_the_batch_changes_no_text(model_file, version, sampling):
    """Rows end at different times and others take their place."""
    model = load_model(model_file(version))
    given = prompts(13)
    found = [
        generate(
            model, given, max_tokens=20, stop=[3, 4], sampling=sampling, seed=7, batch_size=size
        )
        for size in (1, 4, 64)
    ]
    assert found[0] == found[1] == found[2]
    assert len({len(answer.tokens) for answer in found[0]}) > 1


def test_seeds(model_file):
    model = load_model(model_file())
    given = [[1, 2, 3]] * 4

    def texts(seed):
        return [
            tuple(answer.tokens)
            for answer in generate(model, given, max_tokens=12, sampling=Sampling(), seed=seed)
        ]

    assert texts(1) == texts(1)
    assert texts(1) != texts(2)
    assert len(set(texts(1))) == 4  # equal prompts, each with draws of its own


def test_tokens_stop_and_limits(model_file):
    model = load_model(model_file())
    free = generate(model, [[1, 2]], max_tokens=8)[0]
    assert len(free.tokens) == 8 and not free.ended and free.text == ""
    stopped = generate(model, [[1, 2]], max_tokens=8, stop=[free.tokens[3]])[0]
    first = free.tokens.index(free.tokens[3])
    assert stopped.tokens == free.tokens[: first + 1] and stopped.ended
    assert generate(model, [[1, 2]], max_tokens=0)[0].tokens == []
    assert generate(model, [], max_tokens=8) == []


def test_forbidden_and_unknown_tokens_are_never_written(model_file):
    model = load_model(model_file())
    found = generate(
        model, prompts(8), max_tokens=20, tokenizer=DIGITS, sampling=Sampling(), forbidden=[0, 11]
    )
    assert {token for answer in found for token in answer.tokens} <= set(range(1, 11))


def test_a_large_penalty_forbids_repetition(model_file):
    model = load_model(model_file())
    sampling = Sampling(temperature=0, frequency_penalty=100.0)
    found = generate(model, prompts(3), max_tokens=32, sampling=sampling)
    assert all(sorted(answer.tokens) == list(range(32)) for answer in found)


def test_the_model_is_evaluated_and_then_as_before(model_file):
    model = load_model(model_file())
    modes = []
    model.train()
    model.blocks[0].register_forward_hook(lambda module, *_: modes.append(module.training))
    generate(model, [[1]], max_tokens=2)
    assert set(modes) == {False} and model.training and model.blocks[0].training


def test_an_empty_prompt_is_named(model_file):
    model = load_model(model_file())
    with pytest.raises(ValueError, match="prompt 2 is empty; give at least one token"):
        generate(model, [[1], []], max_tokens=2)
    with pytest.raises(ValueError, match="stop 'x': needs the tokenizer to be found"):
        generate(model, [[1]], max_tokens=2, stop=["x"])
    with pytest.raises(ValueError, match="the text is empty; read a token first"):
        list(TextStream(model, DIGITS).write(max_tokens=1))


def write(text: bytes, stop, limit=99) -> tuple[Writing, list[str]]:
    """Let a row write these bytes, a token each, until it is done."""
    writing, pieces = Writing(BYTES, stop, limit), []
    for byte in text:
        pieces.append(writing.add(byte))
        if writing.done:
            break
    assert writing.text == "".join(pieces)
    return writing, pieces


@pytest.mark.parametrize(
    "text, stop, want, ended_by",
    [
        (b"one\n\ntwo", ["\n\n"], "one", "\n\n"),
        (b"one\ntwo\n\n", ["\n\n"], "one\ntwo", "\n\n"),
        (b"aab", ["ab"], "a", "ab"),
        (b"xyz END", ["END", "yz"], "x", "yz"),
        (b"\n\nrest", ["\n\n"], "", "\n\n"),
        (b"one!two", [ord("!")], "one", ord("!")),
        (b"one\x00two", [], "one", 0),
        ("süß#".encode(), ["#"], "süß", "#"),
        ("sü".encode(), ["ß"], "sü", None),
        (b"open end\n", ["\n\n"], "open end", None),
        (b"anything", [""], "anything", None),
    ],
)
def test_stops(text, stop, want, ended_by):
    writing, _ = write(text, stop)
    assert (writing.text, writing.ended_by) == (want, ended_by)
    assert writing.done == (ended_by is not None)


def test_text_is_held_back_only_while_it_may_become_a_stop():
    _, pieces = write(b"a\nb\n\n", ["\n\n"])
    assert pieces == ["a", "", "\nb", "", ""]


def test_the_limit_lets_go_of_what_was_held():
    writing, pieces = write(b"a\n", ["\n\n"], limit=2)
    assert pieces == ["a", "\n"] and writing.done and writing.ended_by is None
    writing, pieces = write("aß".encode(), [], limit=2)
    assert pieces == ["a", "\ufffd"]


@versions
def test_a_stream_writes_what_generate_does(model_file, version):
    model = load_model(model_file(version, V=256))
    prompt, sampling = BYTES.encode("hello"), Sampling(0.7, frequency_penalty=0.3)
    stop = ["e", "\n"]
    options = {"max_tokens": 30, "stop": stop}
    want = generate(model, [prompt], tokenizer=BYTES, sampling=sampling, seed=3, **options)[0]
    stream = TextStream(model, BYTES, sampling=sampling, seed=3)
    stream.read(prompt)
    assert "".join(stream.write(**options)) == want.text
    _, state = read_to_the_end(model, [prompt + want.tokens])
    torch.testing.assert_close(stream.settle()[1].wkv, state[1].wkv, rtol=1e-4, atol=1e-5)


def test_a_stream_is_read_and_written_in_turns(model_file):
    """What it writes after two turns is what one prompt with all of it gives."""
    model = load_model(model_file(V=256))
    stream = TextStream(model, BYTES)
    stream.read([5, 6])
    list(stream.write(max_tokens=4))
    stream.read([7])
    stream.read([8, 9])
    list(stream.write(max_tokens=4))
    first = generate(model, [[5, 6]], max_tokens=4, tokenizer=BYTES)[0].tokens
    second = generate(model, [[5, 6, *first, 7, 8, 9]], max_tokens=4, tokenizer=BYTES)[0].tokens
    _, state = read_to_the_end(model, [[5, 6, *first, 7, 8, 9, *second]])
    torch.testing.assert_close(stream.settle()[0].wkv, state[0].wkv, rtol=1e-4, atol=1e-5)


def command(capsys, *words: object) -> str:
    assert main([str(word) for word in words]) == 0
    return capsys.readouterr().out


def test_the_command_continues_one_prompt(assets, capsys):
    model = assets / "models" / "rwkv7-reverse-60digits.pth"
    flags = ("--load_model", model, "--tokenizer", DIGITS.name, "--stop", "#", "--temperature", 0)
    assert command(capsys, *flags, "--prompt", "1234567,") == "7654321\n"


def test_the_command_continues_a_file_of_prompts(assets, tmp_path, capsys):
    model = assets / "models" / "rwkv7-reverse-60digits.pth"
    flags = ("--load_model", model, "--tokenizer", DIGITS.name, "--stop", "#", "--temperature", 0)
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "12,", "id": 1}\n\n{"prompt": "345,"}\n')
    out = command(capsys, *flags, "--prompt_file", path, "--batch_size", 1)
    assert [json.loads(line) for line in out.splitlines()] == [
        {"prompt": "12,", "id": 1, "completion": "21", "ended": True},
        {"prompt": "345,", "completion": "543", "ended": True},
    ]
    path = tmp_path / "prompt.txt"
    path.write_text("9081,")
    assert command(capsys, *flags, "--prompt_file", path) == "1809\n"


def test_mistakes_on_the_command_line_are_named(model_file, tmp_path):
    model = model_file()
    flags = ["--load_model", str(model), "--tokenizer", "chars:ab"]

    def error(*words: str) -> str:
        with pytest.raises(InputError) as caught:
            main([*flags, *words])
        return str(caught.value)

    assert "--prompt: is empty, and the tokenizer chars:ab has no end" in error("--prompt", "")
    assert "the character 'x' is not in --tokenizer chars:ab" in error("--prompt", "x")
    assert "no.jsonl: no such file; check" in error("--prompt_file", str(tmp_path / "no.jsonl"))
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    path = str(tmp_path / "p.jsonl")
    wanted = "p.jsonl:2: is no prompt; write an object with a string 'prompt'"
    assert wanted in error("--prompt_file", path)
    assert "--temperature -1.0: needs" in error("--prompt", "a", "--temperature", "-1")
    (tmp_path / "p.jsonl").write_text("\n")
    assert "p.jsonl: has no prompts; write" in error("--prompt_file", path)
    for name in ("batch_size", "tokens"):
        assert f"--{name} 0: needs to be at least 1" in error("--prompt", "a", f"--{name}", "0")
    assert "--presence_penalty nan: needs" in error("--prompt", "a", "--presence_penalty", "nan")
    assert "--device gpu: no such device" in error("--prompt", "a", "--device", "gpu")
    assert "--kernel x: no such backend; choose auto," in error("--prompt", "a", "--kernel", "x")


def test_a_file_may_have_unicode_line_ends_in_its_prompts(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a\u2028b"}\r\n{"prompt": "c"}\r\n')
    assert [record["prompt"] for record in read_prompts(tmp_path / "p.jsonl")] == ["a\u2028b", "c"]


def test_a_model_whose_scores_are_no_numbers_writes_nothing(model_file, tmp_path):
    path = model_file()
    tensors = {name: tensor.clone() for name, tensor in read_tensors(path).items()}
    tensors["head.weight"].fill_(3e38)
    write_tensors(tmp_path / "large.pth", tensors)
    flags = ["--load_model", str(tmp_path / "large.pth"), "--tokenizer", "chars:ab"]
    for more in ([], ["--temperature", "0"]):
        with pytest.raises(RunError, match="scores of the model are no finite numbers"):
            main([*flags, "--prompt", "a", *more])


def test_help_needs_no_heavy_package():
    code = (
        "import sys\n"
        "from rwkv import chat, generate, score\n"
        "for command in (chat, generate, score):\n"
        "    try: command.main(['--help'])\n"
        "    except SystemExit: pass\n"
        "sys.exit('imported torch' if 'torch' in sys.modules else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("--load_model") >= 3


def opened(path, merged: bool = True, **options) -> RWKV:
    """What open_model makes of the flags."""
    parser = argparse.ArgumentParser()
    runner.add_model_arguments(parser)
    words = ["--load_model", str(path), "--tokenizer", "bytes"]
    for name, value in options.items():
        words += [f"--{name}", str(value)]
    return runner.open_model(parser.parse_args(words), merged=merged)[0]


@versions
def test_a_tuned_state_is_loaded(model_file, tmp_path, version):
    path = model_file(version, V=256)
    state = {f"blocks.{n}.att.time_state": torch.randn(3, 8, 8).bfloat16() for n in range(2)}
    write_tensors(tmp_path / "state.pth", state)
    model = opened(path, state=tmp_path / "state.pth")
    initial = model.initial_state(2)
    for n, tensor in enumerate(state.values()):
        assert torch.equal(initial[n].wkv, tensor.float().expand(2, 3, 8, 8))
    write_tensors(tmp_path / "half.pth", dict(list(state.items())[:1]))
    with pytest.raises(InputError, match="has the states of 1 layers, the model has 2; name a"):
        opened(path, state=tmp_path / "half.pth")
    write_tensors(tmp_path / "odd.pth", {name: tensor[:2] for name, tensor in state.items()})
    with pytest.raises(InputError, match=r"time_state is \[2, 8, 8\], the model asks for"):
        opened(path, state=tmp_path / "odd.pth")
    with pytest.raises(InputError, match="holds no time_state; name a file of a tuned state"):
        opened(path, state=path)


def test_an_adapter_is_merged(model_file, tmp_path):
    """W + alpha / rank B A, a whole tensor, and a tuned state from one adapter file."""
    path = model_file(V=256)
    A, B = torch.randn(2, 24), torch.randn(24, 2)
    tensors = {"blocks.0.att.key.lora_A": A, "blocks.0.att.key.lora_B": B}
    tensors["ln_out.bias"] = torch.randn(24)
    tensors |= {f"blocks.{n}.att.time_state": torch.randn(3, 8, 8) for n in range(2)}
    write_tensors(tmp_path / "adapter.pth", tensors)
    base, adapted = opened(path), opened(path, adapter=tmp_path / "adapter.pth", alpha=6)
    want = base.blocks[0].att.key.weight + 3 * B @ A
    torch.testing.assert_close(adapted.blocks[0].att.key.weight, want)
    assert torch.equal(adapted.ln_out.bias, tensors["ln_out.bias"])
    assert torch.equal(adapted.blocks[1].att.time_state, tensors["blocks.1.att.time_state"])
    assert torch.equal(adapted.blocks[1].att.key.weight, base.blocks[1].att.key.weight)


def test_an_alpha_without_an_adapter_is_named(model_file):
    with pytest.raises(InputError, match="^--alpha 6: has no effect without --adapter; drop it"):
        opened(model_file(V=256), alpha=6)


def test_an_adapter_beside_the_weights_acts_as_in_training(model_file, tmp_path):
    """Bit for bit, over bfloat16 weights; merged ones are rounded, in their own dtype only."""
    path, tokens = model_file(V=256), torch.arange(20).unsqueeze(0)
    profile = tmp_path / "p.json"
    profile.write_text('{"rules": [{"match": "blocks.*", "mode": "lora", "rank": 2}]}')
    model, plan = load_with_profile(
        path, PeftFlags(layer_profile=str(profile)), dtype=torch.bfloat16
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        want = model(tokens)[0]
        base = fingerprint(read_tensors(path))
        metadata = adapter_metadata(model, plan, base=base)
        write_tensors(tmp_path / "adapter.pth", trained_tensors(model), metadata)
        beside = opened(path, merged=False, adapter=tmp_path / "adapter.pth", dtype="bf16")
        assert torch.equal(beside(tokens)[0], want)
        assert not any(p.requires_grad for p in beside.parameters())
        exact, merged = (
            opened(path, merged=merged, adapter=tmp_path / "adapter.pth")(tokens)[0]
            for merged in (False, True)
        )
    torch.testing.assert_close(merged, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tensor: tensor.int(), "holds int32, weights are floating-point numbers"),
        (lambda tensor: tensor * torch.nan, "holds values that are no finite numbers"),
    ],
    ids=["whole numbers", "nan"],
)
def test_only_good_weights_are_quantized(model_file, tmp_path, change, message):
    tensors = {name: tensor.clone() for name, tensor in read_tensors(model_file(V=256)).items()}
    tensors["blocks.0.att.key.weight"] = change(tensors["blocks.0.att.key.weight"])
    write_tensors(tmp_path / "odd.pth", tensors)
    words = ["--load_model", str(tmp_path / "odd.pth"), "--output", str(tmp_path / "q.pth")]
    with pytest.raises(InputError, match=f"odd.pth: blocks.0.att.key.weight {message}"):
        quantize.main(words)
    assert not (tmp_path / "q.pth").exists()


@pytest.mark.parametrize("kind", ["nf4", "int8", "fp6"])
def test_a_quantized_file_is_opened(model_file, tmp_path, kind):
    """With its codes, and with an adapter over them."""
    small = tmp_path / "small.pth"
    quantize.main(["--load_model", str(model_file(V=256)), "--quant_mode", kind,
                   "--output", str(small)])  # fmt: skip
    tensors = {"blocks.0.att.key.lora_A": torch.randn(2, 24)}
    tensors["blocks.0.att.key.lora_B"] = torch.randn(24, 2)
    write_tensors(tmp_path / "adapter.pth", tensors)
    model = opened(small)
    profile = tmp_path / "p.json"
    profile.write_text('{"rules": [{"match": "*", "mode": "freeze"}]}')
    want, _ = load_with_profile(small, PeftFlags(layer_profile=str(profile)))
    tokens = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(model(tokens)[0], want(tokens)[0])
    key = opened(small, adapter=tmp_path / "adapter.pth", alpha=6).blocks[0].att.key
    update = 3 * tensors["blocks.0.att.key.lora_B"] @ tensors["blocks.0.att.key.lora_A"]
    torch.testing.assert_close(key.merged_weight(), key.dense_weight() + update)
    assert generate(model, [[1, 2]], max_tokens=3)[0].tokens


def test_a_layer_that_trained_as_a_whole_is_not_that_of_a_quantized_file(model_file, tmp_path):
    small, tensors = tmp_path / "small.pth", read_tensors(model_file(V=256))
    quantize.main(["--load_model", str(model_file(V=256)), "--quant_mode", "int8", "--quant_head",
                   "--output", str(small)])  # fmt: skip
    trained = {name: tensors[name] + 1 for name in ("emb.weight", "blocks.0.att.key.weight")}
    write_tensors(tmp_path / "adapter.pth", trained)
    model = opened(small, adapter=tmp_path / "adapter.pth", dtype="bf16")
    for name, value in trained.items():
        assert torch.equal(model.get_parameter(name), value.bfloat16())
    assert model.head.store is not None
    assert generate(model, [[1, 2]], max_tokens=3)[0].tokens


def test_the_dtype_is_the_one_asked_for(model_file):
    model = opened(model_file(V=256), dtype="bf16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert generate(model, [[1, 2]], max_tokens=3)[0].tokens


def test_a_template_answers_as_the_chat_does(model_file, tmp_path, capsys):
    """The same tokens before and after, one prompt or many."""
    from rwkv.chat import Chat
    from rwkv.templates import load_template

    path = model_file(V=256)
    template = load_template("world", BYTES)
    chat = Chat(load_model(path), BYTES, template, max_tokens=12)
    wanted = "".join(chat.say("Say it.")).strip()
    (tmp_path / "p.jsonl").write_text('{"prompt": "Say it."}\n')
    flags = ("--load_model", path, "--tokenizer", "bytes", "--temperature", 0, "--tokens", 12)
    flags = (*flags, "--template", "world", "--device", "cpu")
    (line,) = command(capsys, *flags, "--prompt_file", tmp_path / "p.jsonl").splitlines()
    assert json.loads(line)["completion"] == wanted
    assert command(capsys, *flags, "--prompt", "Say it.").strip() == wanted
    assert command(capsys, *flags[:-4], "--device", "cpu", "--prompt", "Say it.").strip() != wanted
    with pytest.raises(InputError, match="--turn_end: has no effect without --template; add it"):
        main(["--load_model", str(path), "--prompt", "a", "--turn_end", "eot"])


def test_the_end_of_an_answer_is_the_templates(monkeypatch, model_file, capsys):
    """What is behind the suffix is not shown, nor the blank before the answer."""
    write = "  Yes.\n\nUser: "

    def scripted(self, *, max_tokens, stop):
        writing = Writing(BYTES, stop, max_tokens)
        for token in write.encode():
            if not writing.done and (piece := writing.add(token)):
                yield piece

    monkeypatch.setattr(TextStream, "write", scripted)
    words = ("--load_model", model_file(V=256), "--tokenizer", "bytes", "--prompt", "a")
    assert command(capsys, *words, "--template", "world") == "Yes.\n"
    assert command(capsys, *words) == f"{write}\n"
