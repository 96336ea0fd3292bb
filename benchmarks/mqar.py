"""Multi-query associative recall: trains two layers of each mixer from scratch, with states of several sizes.

    python -m benchmarks.mqar [--only gla,deltanet] [--json FILE]

A line is a mixer, the task with the state's elements per layer, the accuracy and the best learning rate, after a
training run of up to a minute for each rate. `subquad.analysis.mqar` describes the task.
"""

from collections.abc import Sequence

from benchmarks.common import Parser, output_file, run_as_script, write_json
from subquad.cli.parser import split_list


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("mqar", __doc__)
    parser.add_argument("--only", type=split_list, metavar="LIST", help="names of mixers; all if left out")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write all results there")
    args = parser.parse_args(argv)
    from subquad import mixers
    from subquad.analysis.mqar import mqar_results

    results = []
    for name in args.only or mixers.MIXERS:
        found = mqar_results([name])
        results += [result.as_dict() for result in found]
        for acc, lr in zip(found[::2], found[1::2], strict=True):
            print(f"{name:18} {acc.task:16} {acc.value:.1%} of {acc.n} at lr {lr.value:g}", flush=True)
    write_json(args.json, results)
    return 0


if __name__ == "__main__":
    run_as_script(main)
