"""Make the base model's texts from files of articles and dialogues, in ASCII.

    python example/Quickstart/make_texts.py --input wiki-1.json.gz wiki-2.json.gz chats.jsonl.gz \\
        --output texts.jsonl --held_out held_out.jsonl

Files are .json lists or .jsonl, perhaps .gz; a record is a string or has `text`, `messages`, or
`instruction` and `response`. A model of bytes this small has no room for other scripts: accents and
typographic signs become their ASCII look-alikes, and a line that still has more than a few other
signs is left out. The last 120 strings are held out.
"""

import argparse
import gzip
import json
import random
import re
import unicodedata
from pathlib import Path

LOOK_ALIKES = str.maketrans(
    {"–": "-", "—": "-", "−": "-", "‘": "'", "’": "'", "“": '"', "”": '"', "…": "...", "×": "x"}
)
NAMES = {"user": "User", "assistant": "Assistant", "system": "System"}
MOST = 12_000_000  # characters


def records(path: Path) -> list:
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
    if text.lstrip().startswith("["):
        return json.loads(text)
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def text_of(record: str | dict) -> str:
    if isinstance(record, str):
        return record
    if "text" in record:
        return record["text"]
    if "messages" in record:
        turns = [f"{NAMES[m['role']]}: {m['content'].strip()}" for m in record["messages"]]
        return "\n\n".join(turns)
    asked = " ".join(part for part in (record["instruction"], record.get("input", "")) if part)
    return f"User: {asked}\n\nAssistant: {record['response'].strip()}"


def to_ascii(text: str) -> str:
    """The text without other signs than ASCII's; lines that lose more than one in 50 go."""
    kept = []
    for line in unicodedata.normalize("NFKD", text.translate(LOOK_ALIKES)).splitlines():
        line = "".join(c for c in line if not unicodedata.combining(c))
        plain = line.encode("ascii", "ignore").decode()
        if len(plain) >= 0.98 * len(line):
            kept.append(re.sub(r"[^\S\n]+", " ", plain).strip())
    return "\n".join(kept).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", type=Path, nargs="+", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--held_out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    articles, dialogues = [], []
    for path in options.input:
        for record in records(path):
            text = to_ascii(text_of(record))
            if len(text) >= 100:
                (articles if isinstance(record, str) else dialogues).append(text)
    held_out, articles = articles[-120:], articles[:-120]
    texts, size = [], 0
    for text in [*dialogues, *articles]:
        if size + len(text) <= MOST:
            texts.append(text)
            size += len(text)
    random.Random(options.seed).shuffle(texts)
    for path, some in ((options.output, texts), (options.held_out, held_out)):
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in some))
    print(f"{len(texts):,} texts, {size:,} characters; {len(held_out)} held out")


if __name__ == "__main__":
    main()
