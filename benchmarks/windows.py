"""Times one attention layer of SmolLM2's size with windows against the same layer without, by length of the text.

    python -m benchmarks.windows                              # lengths 2,048 to 32,768
    python -m benchmarks.windows --lengths 2048,8192 --json windows.json

The layers share their weights, which are random, since time does not depend on them. "forward" reads the whole text,
"decode" one token after it with a cache. Layers are timed in turns; medians are in milliseconds.
"""

import statistics
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import Parser, machine, markdown_table, output_file, run_as_script, time_interleaved, write_json
from benchmarks.decode import SIZES
from subquad.modeling.cache import CACHE_ARGUMENT
from subquad.modeling.linearize import linearize

LAYERS: dict[str, dict[str, Any]] = {
    "all tokens": {},
    "window 96": {"window": 96, "sinks": 4},
    "windows 64, 96, 128": {"window": [64, 96, 128], "sinks": 4},
    "windows 64, 64, all": {"window": [64, 64, "full"], "sinks": 4},
    "window 1,024": {"window": 1024, "sinks": 4},
}


def build() -> dict[str, Any]:
    """A student of one layer for each of `LAYERS`."""
    torch.manual_seed(0)
    sizes = {**SIZES["smollm2"], "num_hidden_layers": 1, "vocab_size": 64, "intermediate_size": 64}
    teacher = LlamaForCausalLM(LlamaConfig(max_position_embeddings=65536, pad_token_id=0, **sizes)).eval()
    scale_ids = torch.arange(3, 15)[None]
    return {
        name: linearize(teacher, layer_types={"default": {"mixer": "attention", **options}}, scale_ids=scale_ids)
        for name, options in LAYERS.items()
    }


@torch.no_grad()
def measure(students: dict[str, Any], length: int, seconds: float) -> list[dict[str, Any]]:
    ids, token = torch.randint(3, 64, (1, length)), torch.tensor([[5]])
    caches = {name: student(input_ids=ids, use_cache=True)[CACHE_ARGUMENT] for name, student in students.items()}

    def forward(name: str) -> Any:
        return lambda: students[name](input_ids=ids, use_cache=False, logits_to_keep=1)

    def decode(name: str) -> Any:
        return lambda: students[name](input_ids=token, use_cache=True, **{CACHE_ARGUMENT: caches[name]})

    results = []
    for what, make in (("forward", forward), ("decode", decode)):
        times = time_interleaved({name: make(name) for name in students}, seconds=seconds)
        results += [
            {"what": what, "length": length, "layer": name, "ms": statistics.median(found)}
            for name, found in times.items()
        ]
    return results


def main(argv: list[str] | None = None) -> int:
    parser = Parser("windows", __doc__)
    parser.add_argument("--lengths", default="2048,8192,32768")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each length and kind")
    parser.add_argument("--json", type=output_file, help="file of the results")
    args = parser.parse_args(argv)
    lengths = [int(length) for length in args.lengths.split(",")]
    students = build()
    results = [found for length in lengths for found in measure(students, length, args.seconds)]
    for what in ("forward", "decode"):
        cells = [
            [name, *(f"{r['ms']:.2f}" for r in results if (r["what"], r["layer"]) == (what, name))] for name in LAYERS
        ]
        print(f"\n{what}, ms\n")
        print(markdown_table(["attention", *(f"{length:,}" for length in lengths)], cells))
    write_json(args.json and Path(args.json), {"machine": machine(), "results": results})
    return 0


if __name__ == "__main__":
    run_as_script(main)
