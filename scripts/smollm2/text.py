"""Text and items of the measurements of SmolLM2-135M (results/smollm2-135m): what is trained on, on what choices are
made and on what students are reported.

    python scripts/smollm2/text.py DATA DIR

DATA has `corpus/books.{train,valid}.txt.xz` and `eval/*.jsonl.gz`. Writes to DIR:

- `books.txt`: the training books;
- `teacher.jsonl`: text that the teacher wrote, half of it continuations of 16 tokens of the books, half of it answers;
- `dev/`, `test/`: halves of the validation books (`books.txt`: the first and the second half of each book), and fixed
  items of each benchmark (of the shuffled items the odd ones and the even ones);
- `overlap.json`: of each benchmark, the items that share 13 words in a row with a training text (none may).
"""

import argparse
import gzip
import json
import lzma
import random
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from subquad.modeling.teachers import load_teacher
from subquad.utils import write_json_atomic, write_text_atomic

ITEMS = 500
"""Items of a benchmark in each half."""
TASKS = ("lambada_openai", "arc_easy", "piqa", "winogrande", "blimp")
ROWS, NEW_TOKENS, PROMPT = 256, 256, 16
BATCH = 32
NGRAM = 13
REQUESTS = (
    "Write a short story about {}.",
    "Explain {} to a child.",
    "Write a letter to a friend about {}.",
    "What should a traveller know about {}?",
    "Describe {} in two paragraphs.",
    "Write a dialogue between two people about {}.",
    "Give five facts about {}.",
    "Why is {} important?",
)


def read_books(path: Path) -> list[str]:
    return [book.strip() for book in lzma.decompress(path.read_bytes()).decode().split("<|endoftext|>")]


def write_halves(books: list[str], directory: Path) -> None:
    halves: dict[str, list[str]] = {"dev": [], "test": []}
    for book in books:
        middle = book.index("\n\n", len(book) // 2)
        halves["dev"].append(book[:middle])
        halves["test"].append(book[middle:].strip())
    for half, parts in halves.items():
        (directory / half).mkdir(parents=True, exist_ok=True)
        write_text_atomic(directory / half / "books.txt", "\n<|endoftext|>\n".join(parts) + "\n")


def write_items(data: Path, directory: Path) -> None:
    for task in TASKS:
        lines = gzip.decompress((data / f"eval/{task}.jsonl.gz").read_bytes()).decode().splitlines()
        random.Random(task).shuffle(lines)
        for half, items in (("dev", lines[1::2]), ("test", lines[::2])):
            write_text_atomic(directory / half / f"{task}.jsonl", "\n".join(items[:ITEMS]) + "\n")


@torch.no_grad()
def write_teacher_text(books: list[str], path: Path) -> None:
    """Text of the teacher at temperature 1, as JSON lines."""
    teacher, tokenizer = load_teacher("smollm2-135m")
    torch.manual_seed(0)
    rng = random.Random(0)
    paragraphs = [p for book in books for p in book.split("\n\n") if len(p) > 200]
    nouns = sorted({w for p in rng.sample(paragraphs, 4000) for w in re.findall(r"\bthe ([a-z]{4,12})\b", p)})
    tokenizer.padding_side = "left"
    with path.open("w", encoding="utf-8") as file:
        for batch in range(ROWS // BATCH):
            if batch % 2:
                requests = [rng.choice(REQUESTS).format("the " + rng.choice(nouns)) for _ in range(BATCH)]
                chats = [[{"role": "user", "content": request}] for request in requests]
                prompts = [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats]
                inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
            else:
                rows = [tokenizer(p)["input_ids"][:PROMPT] for p in rng.sample(paragraphs, BATCH)]
                ids = torch.tensor(rows)
                inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
            out = teacher.generate(**inputs, max_new_tokens=NEW_TOKENS, **sampling)
            start = inputs["input_ids"].shape[1] if batch % 2 else 0
            for row in out[:, start:]:
                file.write(json.dumps({"text": tokenizer.decode(row, skip_special_tokens=True).strip()}) + "\n")
            file.flush()
            print(f"{(batch + 1) * BATCH} of {ROWS} texts", flush=True)


def ngrams(text: str) -> Iterator[int]:
    words = re.findall(r"[a-z0-9]+", text.lower())
    return (hash(tuple(words[i : i + NGRAM])) for i in range(len(words) - NGRAM + 1))


def count_overlap(directory: Path) -> dict[str, dict[str, int]]:
    """Of each benchmark and of the validation books: the items (paragraphs) that share `NGRAM` words in a row with the
    training text."""
    texts = {task: [] for task in (*TASKS, "books")}
    for half in ("dev", "test"):
        for task in TASKS:
            texts[task] += (directory / half / f"{task}.jsonl").read_text().splitlines()
        texts["books"] += (directory / half / "books.txt").read_text().split("\n\n")
    wanted = {h for items in texts.values() for item in items for h in ngrams(item)}
    written = [json.loads(line)["text"] for line in (directory / "teacher.jsonl").read_text().splitlines()]
    training = [(directory / "books.txt").read_text(), *written]
    found = wanted & {h for text in training for h in ngrams(text)}
    counts = {}
    for task, items in texts.items():
        counts[task] = {"items": len(items), "overlap": sum(any(h in found for h in ngrams(item)) for item in items)}
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("directory", type=Path)
    args = parser.parse_args()
    args.directory.mkdir(parents=True, exist_ok=True)
    books = read_books(args.data / "corpus/books.train.txt.xz")
    write_text_atomic(args.directory / "books.txt", "\n<|endoftext|>\n".join(books) + "\n")
    write_halves(read_books(args.data / "corpus/books.valid.txt.xz"), args.directory)
    write_items(args.data, args.directory)
    if not (args.directory / "teacher.jsonl").exists():
        write_teacher_text(books, args.directory / "teacher.jsonl")
    overlap = count_overlap(args.directory)
    write_json_atomic(args.directory / "overlap.json", overlap)
    print(json.dumps(overlap, indent=1))


if __name__ == "__main__":
    main()
