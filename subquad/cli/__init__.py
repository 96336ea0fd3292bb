"""The command line. `subquad --help` lists the commands.

Commands import torch after their arguments are checked, so that help, lists and mistakes are shown at once.
"""

import logging
import sys
from collections.abc import Sequence

from subquad.cli import doctor, measurements, students, training
from subquad.cli.parser import Parser
from subquad.utils import UserError

DESCRIPTION = "Distill a pretrained Transformer into a subquadratic language model, and measure the result."
REFERENCES = "TEACHER and MODEL: nano, smollm2-135m, a directory, a .gguf file, or a model id on the Hugging Face hub."


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code.

    Mistakes of the user are printed on stderr, a line each, with exit code 2. An interruption is exit code 130, or 143
    where training was ended by SIGTERM.
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
    except KeyboardInterrupt as error:
        print("subquad: interrupted; the same command continues it", file=sys.stderr)
        return getattr(error, "exit_code", 130)
    except BrokenPipeError:
        sys.stderr.close()
        return 1


def build_parser() -> Parser:
    parser = Parser(prog="subquad", description=DESCRIPTION, epilog=REFERENCES)
    parser.set_defaults(run=lambda _: parser.print_help())
    parser.commands = parser.add_subparsers(
        metavar="COMMAND", title="commands", description="`subquad COMMAND --help` lists the options of a command."
    )
    for group in (training, students, measurements, doctor):
        group.add_commands(parser)
    return parser
