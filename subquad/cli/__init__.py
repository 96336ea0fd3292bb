"""The command line. `subquad --help` lists the commands.

Commands import torch after their arguments are checked, so that help, lists and mistakes are shown at once.
"""

import logging
import sys
from collections.abc import Sequence
from contextlib import nullcontext

from subquad import progress
from subquad.cli import completion, doctor, measurements, students, training
from subquad.cli.parser import Parser
from subquad.utils import UserError, is_first_process

DESCRIPTION = "Distill a pretrained Transformer into a subquadratic language model, and measure the result."
REFERENCES = "TEACHER and MODEL: nano, smollm2-135m, a directory, a .gguf file, or a model id on the Hugging Face hub."

CONTINUES = "; the same command continues it"
WOULD_CONTINUE = "; with --output, the same command would continue it"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code.

    Mistakes of the user are printed on stderr, a line each, with exit code 2. An interruption is exit code 130, or 143
    where training was ended by SIGTERM.
    """
    logger = logging.getLogger("subquad")
    logger.handlers = [LineHandler(sys.stdout)]
    interrupted = ""
    try:
        args = build_parser().parse_args(argv)
        run, resumes, quiet = (vars(args).pop(name, False) for name in ("run", "resumes", "quiet"))
        if resumes:
            interrupted = CONTINUES if getattr(args, "output", True) else WOULD_CONTINUE
        quiet = quiet or not is_first_process()
        logger.setLevel(logging.WARNING if quiet else logging.INFO)
        with progress.hidden("bars", "lines") if quiet else nullcontext():
            return run(args) or 0
    except UserError as error:
        print("subquad:", "\n  ".join(error.problems), file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"subquad: interrupted{getattr(error, 'hint', None) or interrupted}", file=sys.stderr)
        return getattr(error, "exit_code", 130)
    except BrokenPipeError:
        sys.stderr.close()
        return 1


class LineHandler(logging.StreamHandler):
    """Writes lines above progress bars, without breaking them."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
        with tqdm.external_write_mode() if tqdm is not None else nullcontext():
            super().emit(record)


def build_parser() -> Parser:
    parser = Parser(prog="subquad", description=DESCRIPTION, epilog=REFERENCES)
    parser.set_defaults(run=lambda _: parser.print_help(), resumes=False)
    parser.commands = parser.add_subparsers(
        metavar="COMMAND", title="commands", description="`subquad COMMAND --help` lists the options of a command."
    )
    for group in (training, students, measurements, doctor, completion):
        group.add_commands(parser)
    return parser
