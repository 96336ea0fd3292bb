"""Python in a process of its own, and commands in this one."""

import os
import subprocess
import sys


def run_python(*argv: object, code: int = 0, environment: dict[str, str] | None = None, **settings) -> str:
    """The output of `python *argv`, which must exit with `code`; that on stderr where it is not 0."""
    command = [sys.executable, *map(str, argv)]
    settings["env"] = {**os.environ, **(environment or {})}
    done = subprocess.run(command, capture_output=True, text=True, check=False, **settings)
    assert done.returncode == code, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stderr if code else done.stdout


def run_cli(capsys, *argv: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command of `subquad`, in this process."""
    from subquad.cli import main

    code = main([str(a) for a in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err
