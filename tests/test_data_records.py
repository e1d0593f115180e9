"""Readers and record shapes: what they understand, and the error for what they do not."""

import gzip
import json

import pytest

from data.conversations import read_conversations
from data.records import DataError, RecordFile, parse_json
from rwkv.templates import Message

DIALOGUE = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
USER, ANSWER = Message("user", "q"), Message("assistant", "a")


def read(path):
    return [(raw.line, parse_json(path, raw)) for raw in RecordFile(path)]


def conversations(record):
    return list(read_conversations(record, "f:1"))


def write(path, text):
    data = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix.lower() == ".gz" else data)
    return path


@pytest.mark.parametrize(
    "name, text",
    [
        ("a.jsonl", '{"text": "x"}\n\n{"text": "y"}'),
        ("a.jsonl", '\ufeff{"text": "x"}\r\n \r\n{"text": "y"}\r\n'),
        ("a.jsonl.gz", '{"text": "x"}\n\n{"text": "y"}\n'),
        ("a.JSONL.GZ", '{"text": "x"}\n\n{"text": "y"}\n'),
        ("a.json", '[{"text": "x"},\n\n{"text":\n "y"}\n]\n'),
        ("a.json", '{"text": "x"}\n\n{"text": "y"}\n'),
        ("a.json.gz", '\ufeff[{"text": "x"},\n\n {"text": "y"}]'),
    ],
)
def test_json_records_and_their_lines(tmp_path, name, text):
    path = write(tmp_path / name, text)
    assert read(path) == [(1, {"text": "x"}), (3, {"text": "y"})]


def test_csv_records_and_their_lines(tmp_path):
    path = write(tmp_path / "a.csv", '\ufeffprompt,chosen\r\n"a ""b""\r\nc",d\r\n\r\ne,f\r\n')
    assert read(path) == [
        (2, {"prompt": 'a "b"\r\nc', "chosen": "d"}),
        (5, {"prompt": "e", "chosen": "f"}),
    ]


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.jsonl", "", r"a\.jsonl: the file is empty"),
        ("a.txt", "x", r"a\.txt: unknown kind of file; give \.jsonl, \.json, \.csv"),
        ("a.jsonl", '{"text": "x"}\n{"text": \n', r"a\.jsonl:2: not JSON \(Expecting value"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}', r"a\.jsonl:2: not UTF-8 \(byte 0xff\)"),
        (
            "a.jsonl",
            '{"text": "x"}\n'.encode("utf-16"),
            r"a\.jsonl:1: not UTF-8 .*like UTF-16",
        ),
        ("a.jsonl", '{"text": "x"}\n'.encode("utf-16-le"), r"a\.jsonl:1: has NUL characters"),
        ("a.jsonl", bytes(range(256)), r"a\.jsonl:\d: "),
        ("a.jsonl", b"PK\x03\x04\xff", r"a\.jsonl:1: not UTF-8 .*0xff"),
        ("a.jsonl", "[" * 100_000, r"a\.jsonl:1: not JSON that can be read"),
        ("a.jsonl", "1" * 5000, r"a\.jsonl:1: not JSON that can be read"),
        ("a.json", '[{"text": "x"}\n{"text": "y"}]', r"a\.json:2: not JSON \(expected ','"),
        ("a.json", '[\n{"text": "x"},', r"a\.json: not JSON \(the list has no end\)"),
        ("a.json", '[{"text": "x"},\n\n{"text": }]', r"a\.json:3: not JSON"),
        ("a.json", '[{"text": "x"}]\n[{"text": "y"}]', r"a\.json:2: .* \(something follows the"),
        ("a.json", "[" * 100_000, r"a\.json:1: not JSON that can be read"),
        ("a.json", '["x",\n' + "1" * 5000 + "]", r"a\.json:2: not JSON that can be read"),
        ("a.json", b'["x",\n"\xff"]', r"a\.json:2: not UTF-8"),
        ("a.csv", "text,n\nx\n", r"a\.csv:2: has 1 fields, the first line names 2 columns"),
        ("a.csv", "text,text\nx,y\n", r"a\.csv:1: the first line must name every column, each"),
        ("a.csv", 'text\n"x\n', r"a\.csv:2: not CSV \(unexpected end of data\)"),
        ("a.csv", b"text\n\xff\n", r"a\.csv: after line \d: not UTF-8"),
    ],
)
def test_broken_files_are_named(tmp_path, name, text, message):
    path = write(tmp_path / name, text)
    with pytest.raises(DataError, match=message):
        read(path)


def test_cut_off_gzip_is_named(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "x"}\n' * 1000)[:-20])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: not a whole gzip file"):
        read(path)


@pytest.mark.parametrize("name, message", [("no.jsonl", "no such file"), ("d.json", "a folder, ")])
def test_missing_files_are_named(tmp_path, name, message):
    (tmp_path / "d.json").mkdir()
    with pytest.raises(DataError, match=f"{name}: {message}"):
        RecordFile(tmp_path / name)


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "q", "completion": "a"},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"instruction": "q", "input": "", "output": "a"},
        {"instruction": "q", "response": "a", "text": "all of it"},
        {"question": "q", "answer": "a", "id": 3},
        {"input": "q", "output": "a"},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "a"},
        },
        {
            "prompt": [{"role": "user", "content": "q"}],
            "completion": [{"role": "assistant", "content": "a"}],
        },
        {"instruction": "q", "instances": [{"input": "", "output": "a"}]},
        {"prompt": "q", "chosen": DIALOGUE, "rejected": DIALOGUE},
        {"prompt": DIALOGUE[:1], "chosen": DIALOGUE},
        {"messages": DIALOGUE[:1], "chosen": DIALOGUE},
        {"chosen": DIALOGUE, "rejected": DIALOGUE},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "q"}]},
                {"role": "assistant", "content": "a"},
                {"role": "user", "content": "never answered"},
            ]
        },
    ],
    ids=lambda record: "-".join(record),
)
def test_one_question_in_every_spelling(record):
    assert conversations(record) == [[USER, ANSWER]]


@pytest.mark.parametrize("more", [{}, {"prompt": "q"}], ids=["alone", "prompt"])
def test_a_repeated_system_message_comes_once(more):
    system = {"role": "system", "content": "s"}
    record = {"system": "s", "chosen": [system, *DIALOGUE], **more}
    assert conversations(record) == [[Message("system", "s"), USER, ANSWER]]


@pytest.mark.parametrize("record", ["t", {"text": "t"}, {"text": "t", "prompt": "q"}])
def test_plain_text(record):
    assert conversations(record) == ["t"]


def test_input_follows_the_instruction():
    (messages,) = conversations({"instruction": "add", "input": "1 2", "output": "3"})
    assert messages == [Message("user", "add\n1 2"), Message("assistant", "3")]


def test_system_and_history_come_first():
    record = {"system": "s", "history": [["x", "y"]], "instruction": "q", "output": "a"}
    (messages,) = conversations(record)
    assert [(m.role, m.text) for m in messages] == [
        ("system", "s"),
        ("user", "x"),
        ("assistant", "y"),
        ("user", "q"),
        ("assistant", "a"),
    ]


def test_instances_are_records_of_their_own():
    record = {"instruction": "q", "instances": [{"output": "a"}, {"input": "i", "output": "b"}]}
    assert [m[0].text for m in conversations(record)] == ["q", "q\ni"]


@pytest.mark.parametrize(
    "turn",
    [
        {"content": "a", "reasoning_content": "t"},
        {"content": [{"type": "thinking", "thinking": "t"}, {"type": "text", "text": "a"}]},
        {"content": [{"type": "think", "text": "t"}, "a"]},
    ],
)
def test_thoughts_are_kept_apart(turn):
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", **turn}]
    assert conversations({"messages": messages}) == [[USER, Message("assistant", "a", "t")]]


def test_tool_calls_and_results():
    call = {"function": {"name": "f", "arguments": '{"x":  1}'}}
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "0"},
        {"role": "assistant", "content": "a"},
    ]
    (messages,) = conversations({"messages": turns, "tools": [{"name": "f"}]})
    assert [(m.role, m.text) for m in messages] == [
        ("system", 'Tools: [{"name": "f"}]'),
        ("user", "q"),
        ("assistant", '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>'),
        ("tool", "2"),
        ("assistant", "a"),
    ]


def test_weight_0_is_not_scored():
    turns = [
        {"role": "assistant", "content": "x", "weight": 0},
        {"role": "assistant", "content": "y"},
    ]
    assert [m.scored for m in conversations({"messages": turns})[0]] == [False, True]


@pytest.mark.parametrize(
    "record, message",
    [
        (7, r"f:1: is a number \(7\), not an object; needs 'text'"),
        ({}, r"f:1: has nothing; needs 'text'; a prompt"),
        ({"text": None}, r"f:1: has nothing; needs"),
        ({"body": "x"}, r"f:1: has 'body'; needs"),
        ({"text": 5}, r"f:1: 'text' is a number \(5\), not a string"),
        ({"text": " \n"}, r"f:1: 'text' is empty; remove the record"),
        ({"prompt": "q"}, r"f:1: has 'prompt'; needs"),
        ({"chosen": "a"}, r"f:1: has 'chosen'; needs"),
        (
            {"prompt": "p", "chosen": DIALOGUE},
            r"f:1: 'chosen': does not begin with the prompt; leave the prompt out, or mend the",
        ),
        ({"prompt": "q", "completion": ""}, r"f:1: 'completion' is empty"),
        ({"prompt": "q", "input": 3, "output": "a"}, r"f:1: 'input' is a number \(3\), not a"),
        (
            {"messages": []},
            r"f:1: there is no message",
        ),
        ({"messages": [{"role": "user", "content": "q"}]}, r"f:1: has no message of the assist"),
        ({"messages": [{"role": "bard", "content": "q"}]}, r"message 1: its role is 'bard'; known"),
        ({"messages": ["q"]}, r"f:1: message 1: is a string, not an object"),
        (
            {"messages": [{"role": "assistant", "content": ""}]},
            r"message 1: the assistant says nothing; remove",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            r"message 1: a part of its content is 'image_url'; only text",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]},
            r"message 1: a tool call has no name",
        ),
    ],
)
def test_wrong_records_are_named(record, message):
    with pytest.raises(DataError, match=message):
        conversations(record)


@pytest.mark.parametrize(
    "name, count",
    [
        ("instruct/seed_tasks.jsonl", 175),
        ("instruct/roleplay-simple-deduped-roleplay-instruct.json.gz", 1923),
        ("instruct/sgd_chat_600.jsonl.gz", 600),
        ("instruct/e2e_eval_raw.jsonl.gz", 4672),
        ("text/wikipedia_english_20240801to20240815.json.gz", 1000),
        ("preference/rlhf_example_dataset_withreject.csv", 31),
        ("preference/llamafactory_dpo_en_demo.json.gz", 300),
        ("verifiable/gsm8k_test.jsonl.gz", 1319),
        ("verifiable/banking77_test.csv", 3080),
    ],
)
def test_real_files(assets, name, count):
    path = assets / "data" / name
    found = [c for line, record in read(path) for c in read_conversations(record, f"{line}")]
    assert len(found) == count


def test_real_lines_are_the_files_own(assets):
    path = assets / "data/verifiable/banking77_test.csv"
    lines = path.read_text().splitlines()
    assert all(record["category"] in lines[line - 1] for line, record in read(path)[:300])
    path = assets / "data/instruct/seed_tasks.jsonl"
    lines = path.read_text().splitlines()
    assert all(json.loads(lines[line - 1]) == record for line, record in read(path))
