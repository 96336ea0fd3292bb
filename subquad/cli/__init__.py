"""The command line. `subquad --help` lists the commands.

Commands import torch after their arguments are checked, so that help, lists and mistakes are shown at once.
"""

import argparse
import logging
import sys
from collections.abc import Sequence

from subquad.cli import measurements, students, training
from subquad.cli.parser import Parser
from subquad.utils import UserError

DESCRIPTION = """\
Distill a pretrained Transformer into a subquadratic language model, and measure the result.

  train      distill    train one student from a recipe
             study      train all students of a recipe with lists, and compare them in a table
             recipe     print a recipe with all defaults, or the JSON schema of recipes
  create     linearize  create an untrained student
  inspect    mixers     list the token mixers and their options
             inspect    print a student's layers, options, parameters and cache size
  use        generate   continue a text
             export     convert a student for transformers, vLLM, SGLang, llama.cpp or MLX
  measure    eval       compare students with their teacher: quality, long context, efficiency
             report     write the HTML page of a study: tables, curves, the best student's evaluation
             bench      benchmark operators, decoding and training on this machine

TEACHER and MODEL may be: nano, smollm2-135m, a directory, a .gguf file, or a model id on the Hugging Face hub.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code.

    Mistakes of the user are printed on stderr, a line each, with exit code 2. An interruption is exit code 130.
    """
    logger = logging.getLogger("subquad")
    logger.handlers = [logging.StreamHandler(sys.stdout)]
    logger.setLevel(logging.INFO)
    try:
        args = build_parser().parse_args(argv)
        return args.run(args) or 0
    except UserError as error:
        print("subquad:", "\n  ".join(error.problems), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("subquad: interrupted; the same command continues it", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 1


def build_parser() -> Parser:
    parser = Parser(prog="subquad", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(run=lambda _: parser.print_help())
    parser.commands = parser.add_subparsers(
        metavar="COMMAND", title="options of a command", description="subquad COMMAND --help"
    )
    for group in (training, students, measurements):
        group.add_commands(parser)
    return parser
