"""The spellings of training records, brought to two forms: a plain text, or a list of messages.

A record is a string or has `text`; or a prompt and its answer under any of the usual names; or
`messages` (OpenAI) or `conversations` (ShareGPT), in as many turns as there are. An answer may be
the whole dialogue, as `chosen` often is: it may repeat the prompt, or stand without one.
"""

import json
from collections.abc import Iterator
from typing import Any, NoReturn

from data.records import DataError
from rwkv.templates import Message

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
PROMPTS = ("instruction", "prompt", "question")
CONTEXTS = ("input", "context")
ANSWERS = ("completion", "response", "output", "answer", "chosen")
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
MEND = "mend the record, or remove it"
SHAPES = (
    "needs 'text'; a prompt ('prompt', 'instruction' or 'question') with its answer ('completion', "
    "'response', 'output', 'answer' or 'chosen'); an answer that is a whole dialogue; 'messages'; "
    "or 'conversations'"
)


def read_conversations(record: Any, where: str) -> Iterator[str | list[Message]]:
    """The texts and dialogues of one record: usually one, or one for each of its `instances`.

    Args:
        record: a parsed line of a file.
        where: `path:line`, for messages.

    Raises:
        DataError: the record has none of the known shapes, a value of a wrong type, an empty
            text, or no answer.
    """
    if isinstance(record, str):
        yield _filled(record, where, "the text")
        return
    if not isinstance(record, dict):
        _stop(where, f"is {_kind(record)}, not an object", SHAPES)
    record = {key: value for key, value in record.items() if value is not None}
    if isinstance(record.get("instances"), list):
        rest = {key: value for key, value in record.items() if key != "instances"}
        for number, instance in enumerate(record["instances"], start=1):
            if not isinstance(instance, dict):
                _stop(where, f"instance {number} is {_kind(instance)}, not an object")
            yield _dialogue({**rest, **instance}, where)
    elif "text" in record and _answer_key(record) is None and not _turns_key(record):
        yield _filled(record["text"], where, "'text'")
    else:
        yield _dialogue(record, where)


def parse_messages(turns: Any, where: str) -> list[Message]:
    """Messages in OpenAI's or ShareGPT's spelling.

    Raises:
        DataError: a turn has no known role, or content that is no text.
    """
    if isinstance(turns, dict):
        turns = [turns]
    if not isinstance(turns, list):
        _stop(where, f"the messages are {_kind(turns)}, not a list of objects")
    if not turns:
        _stop(where, "there is no message")
    return [_message(turn, f"{where}: message {n}") for n, turn in enumerate(turns, start=1)]


def join_turns(before: list[Message], turns: list[Message], where: str) -> list[Message]:
    """A prompt and what follows it, as one dialogue.

    What follows may be the whole dialogue, prompt included, with or without the system message;
    the prompt then comes once.

    Args:
        before: the prompt; [] for none.
        turns: the messages that follow it, at least one.
        where: names `turns`, for messages.

    Raises:
        DataError: both are dialogues of their own: `turns` asks another question.
    """
    system, asked = _split_system(before)
    own_system, rest = _split_system(turns)
    if same_turns(rest[: len(asked)], asked):
        return (system if same_turns(system, own_system) else system + own_system) + rest
    if before[-1].role == "user" and turns[0].role in ("system", "user"):
        _stop(where, "does not begin with the prompt", "leave the prompt out, or mend the record")
    return before + turns


def same_turns(some: list[Message], others: list[Message]) -> bool:
    """Whether two dialogues say the same, space at the ends of messages aside."""
    said, said_too = (
        [(m.role, m.text.strip(), m.thought.strip()) for m in messages]
        for messages in (some, others)
    )
    return said == said_too


def _split_system(messages: list[Message]) -> tuple[list[Message], list[Message]]:
    count = next((n for n, m in enumerate(messages) if m.role != "system"), len(messages))
    return messages[:count], messages[count:]


def _dialogue(record: dict[str, Any], where: str) -> list[Message]:
    turns_key, prompt_key = _turns_key(record), _first(record, PROMPTS)
    answer_key, context_key = _answer_key(record), _first(record, CONTEXTS)
    if prompt_key is None:
        prompt_key, context_key = context_key, None
    if turns_key:
        messages = parse_messages(record[turns_key], where)
        if messages[-1].role != "assistant" and "chosen" in record:
            chosen = _side(record, "chosen", "assistant", where)
            messages = join_turns(messages, chosen, f"{where}: 'chosen'")
    elif answer_key is None or not (prompt_key or isinstance(record[answer_key], list)):
        found = ", ".join(repr(key) for key in record) or "nothing"
        _stop(where, f"has {found}", SHAPES)
    else:
        messages = _history(record, where)
        if prompt_key:
            messages += _side(record, prompt_key, "user", where)
        context = record.get(context_key, "") if context_key else ""
        if not isinstance(context, str):
            _stop(where, f"{context_key!r} is {_kind(context)}, not a string")
        if context.strip():
            prompt = messages.pop()
            messages.append(Message(prompt.role, f"{prompt.text}\n{context}"))
        answer = _side(record, answer_key, "assistant", where)
        messages = join_turns(messages, answer, f"{where}: {answer_key!r}")
    messages = join_turns(_system(record, where), messages, where)
    while messages and messages[-1].role != "assistant":
        messages.pop()  # nothing follows that could be scored
    if not messages:
        _stop(where, "has no message of the assistant, so there is nothing to learn from it")
    return messages


def _system(record: dict[str, Any], where: str) -> list[Message]:
    parts = []
    if record.get("system"):
        parts.append(_filled(record["system"], where, "'system'"))
    if record.get("tools"):
        tools = record["tools"]
        parts.append("Tools: " + (tools if isinstance(tools, str) else _compact(tools)))
    return [Message("system", "\n".join(parts))] if parts else []


def _history(record: dict[str, Any], where: str) -> list[Message]:
    """Earlier turns, [[question, answer], ...]."""
    messages = []
    for pair in record.get("history") or []:
        if not isinstance(pair, list) or len(pair) != 2:
            _stop(where, "'history' is no list of [question, answer] pairs")
        messages.append(Message("user", _filled(pair[0], where, "a question in 'history'")))
        messages.append(Message("assistant", _filled(pair[1], where, "an answer in 'history'")))
    return messages


def _side(record: dict[str, Any], key: str, role: str, where: str) -> list[Message]:
    """A prompt or an answer, which is a string or a list of messages."""
    value = record[key]
    if isinstance(value, (list, dict)):
        return parse_messages(value, where)
    thought = record.get(_first(record, THOUGHTS) or "", "") if role == "assistant" else ""
    if not isinstance(thought, str):
        _stop(where, f"the reasoning is {_kind(thought)}, not a string")
    return [Message(role, _filled(value, where, repr(key)), thought)]


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        _stop(where, f"is {_kind(turn)}, not an object")
    name = turn.get("role", turn.get("from"))
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        _stop(where, f"its role is {name!r}", f"known are {', '.join(ROLES)}")
    content = turn.get("content", turn.get("value"))
    if role != "assistant" and "content" not in turn and "value" not in turn:
        _stop(where, "has no content")
    text, thought = _content(content, where)
    thought += next((turn[key] for key in THOUGHTS if isinstance(turn.get(key), str)), "")
    calls = turn.get("tool_calls") or []
    if not isinstance(calls, list):
        _stop(where, f"'tool_calls' is {_kind(calls)}, not a list")
    text = "\n".join([*([text] if text.strip() else []), *(_call(c, where) for c in calls)])
    if role == "assistant" and not (text or thought):
        _stop(where, "the assistant says nothing", "remove the message or the record")
    weight = turn.get("weight", 1)
    if weight not in (0, 1):
        _stop(where, f"its weight is {weight!r}, neither 1 nor 0")
    return Message(role, text, thought, scored=weight != 0)


def _content(content: Any, where: str) -> tuple[str, str]:
    """Text and thought of a message's content: a string, None, or a list of parts."""
    if content is None:
        return "", ""
    if isinstance(content, str):
        return content, ""
    if not isinstance(content, list):
        _stop(where, f"its content is {_kind(content)}, not a string")
    text: list[str] = []
    thought: list[str] = []
    for part in content:
        if isinstance(part, str):
            text.append(part)
            continue
        kind = part.get("type") if isinstance(part, dict) else _kind(part)
        value = (
            next(
                (part[key] for key in (kind, "text", "content") if isinstance(part.get(key), str)),
                None,
            )
            if isinstance(part, dict)
            else None
        )
        if value is None or kind not in ("text", "think", *THOUGHTS):
            _stop(where, f"a part of its content is {kind!r}", "only text and thinking can be read")
        (text if kind == "text" else thought).append(value)
    return "".join(text), "".join(thought)


def _call(call: Any, where: str) -> str:
    """A tool call as the assistant writes it: its name and arguments in JSON, marked."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        _stop(where, "a tool call has no name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError:
            _stop(where, f"the arguments of {function['name']!r} are not JSON")
    body = _compact({"name": function["name"], "arguments": arguments})
    return f"<tool_call>{body}</tool_call>"


def _filled(value: Any, where: str, name: str) -> str:
    if not isinstance(value, str):
        _stop(where, f"{name} is {_kind(value)}, not a string")
    if not value.strip():
        _stop(where, f"{name} is empty", "remove the record")
    return value


def _first(record: dict[str, Any], keys: tuple[str, ...]) -> str | None:
    return next((key for key in keys if key in record), None)


def _answer_key(record: dict[str, Any]) -> str | None:
    return _first(record, ANSWERS)


def _turns_key(record: dict[str, Any]) -> str | None:
    return _first(record, ("messages", "conversations"))


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(", ", ": "))


def _kind(value: Any) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", str: "a string"}
    names |= {list: "a list", dict: "an object", type(None): "null"}
    shown = f" ({value!r})" if isinstance(value, (bool, int, float)) else ""
    return names.get(type(value), type(value).__name__) + shown


def _stop(where: str, what: str, mend: str = MEND) -> NoReturn:
    raise DataError(f"{where}: {what}; {mend}")
