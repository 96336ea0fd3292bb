"""Speed of speculative decoding: students that draft for their teacher, against the teacher alone.

    subquad bench draft smollm2-135m --text books.valid.txt --student "window 32=DIR" --student "budget 96=DIR"
    subquad bench draft nano --text README.md --student DIR --contexts 256 --drafted 2,4 --json draft.json

Prompts are rows of the text. Each way writes the same number of tokens after a prompt, greedily, through `generate`.
The ways take turns. Seconds are counted after the first token, so without reading the prompt. "accepted" is the number
of drafted tokens a call of the teacher that are kept; "speed" is the ratio to the teacher's median tokens a second.
Texts that differ from the teacher's own are counted: in float32 none should, in bfloat16 ties can break otherwise.
"""

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import Parser, machine, markdown_table, output_file, run_as_script, write_json
from subquad.modeling.teachers import load_teacher
from subquad.utils import UserError

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


class Clock:
    """A streamer that notes when tokens arrive, and how many at a time."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.counts: list[int] = []

    def put(self, tokens: Tensor) -> None:
        self.times.append(time.perf_counter())
        self.counts.append(tokens.numel())

    def end(self) -> None:
        pass

    @property
    def tokens_per_second(self) -> float:
        """Of all tokens after those of the first call, which reads the prompt."""
        return sum(self.counts[2:]) / (self.times[-1] - self.times[1])

    @property
    def accepted(self) -> float:
        """Drafted tokens that are kept, a call: one token of each call is the teacher's own."""
        return statistics.fmean(self.counts[2:]) - 1


def write(teacher: Any, draft: Any, drafted: int, ids: Tensor, tokens: int) -> tuple[Tensor, Clock]:
    clock, given = Clock(), {}
    if draft is not None:
        draft.generation_config.num_assistant_tokens = drafted
        draft.generation_config.num_assistant_tokens_schedule = "constant"
        draft.generation_config.assistant_confidence_threshold = 0.0
        given = {"assistant_model": draft}
    out = teacher.generate(ids, max_new_tokens=tokens, streamer=clock, **given, **GREEDY)
    return out[0, ids.shape[1] :], clock


def measure(teacher: Any, students: dict[str, Any], prompts: Tensor, drafted: list[int], tokens: int) -> list[dict]:
    """Of prompts `[N, context]`: one result for each student and number of drafted tokens, and the teacher's."""
    ways = {("teacher", 0): None, **{(name, n): student for name, student in students.items() for n in drafted}}
    clocks: dict[Any, list[Clock]] = {way: [] for way in ways}
    differ = dict.fromkeys(ways, 0)
    for ids in prompts.unsqueeze(1):
        reference = None
        for way, draft in ways.items():
            written, clock = write(teacher, draft, way[1], ids, tokens)
            reference = written if reference is None else reference
            clocks[way].append(clock)
            differ[way] += int(not torch.equal(written, reference))
    own = statistics.median(clock.tokens_per_second for clock in clocks["teacher", 0])
    results = []
    for (name, count), found in clocks.items():
        speed = statistics.median(clock.tokens_per_second for clock in found)
        accepted = statistics.fmean(clock.accepted for clock in found)
        results.append({"context": prompts.shape[1], "model": name, "drafted": count, "accepted": accepted})
        results[-1] |= {"tokens_per_second": speed, "speed": speed / own, "differ": differ[name, count]}
    return results


def main(argv: list[str] | None = None) -> int:
    parser = Parser("draft", __doc__)
    parser.add_argument("teacher")
    parser.add_argument("--student", action="append", required=True, metavar="[NAME=]DIR")
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--contexts", default="1024,4096,16384")
    parser.add_argument("--drafted", default="2,4,8", help="tokens that are drafted at a time")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64, help="to write after each prompt")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--json", type=output_file, help="file of the results")
    args = parser.parse_args(argv)
    dtype = getattr(torch, args.dtype)
    teacher, tokenizer = load_teacher(args.teacher)
    named = {given.rpartition("=")[0] or Path(given).name: given.rpartition("=")[2] for given in args.student}
    students = {name: load_teacher(directory)[0].to(dtype).eval() for name, directory in named.items()}
    teacher, results = teacher.to(dtype).eval(), []  # type: ignore[call-arg]
    ids = torch.tensor(tokenizer(args.text.read_text(encoding="utf-8")).input_ids)
    for context in map(int, args.contexts.split(",")):
        if len(ids) < args.prompts * context:
            raise UserError(f"--text: got {len(ids)} tokens, expected at least {args.prompts * context}")
        prompts = ids[: len(ids) // args.prompts * args.prompts].view(args.prompts, -1)[:, :context]
        results += measure(teacher, students, prompts, list(map(int, args.drafted.split(","))), args.tokens)
        rows = [r for r in results if r["context"] == context]
        cells = [
            [r["model"], str(r["drafted"]), *(f"{r[k]:.2f}" for k in ("accepted", "tokens_per_second", "speed"))]
            for r in rows
        ]
        print(f"\ncontext {context:,}, {args.dtype}; texts that differ: {sum(r['differ'] for r in rows)}\n")
        print(markdown_table(["model", "drafted", "accepted", "tokens/s", "speed"], cells), flush=True)
        write_json(args.json, {"machine": machine(), "dtype": args.dtype, "tokens": args.tokens, "results": results})
    return 0


if __name__ == "__main__":
    run_as_script(main)
