"""The command line: `fishjax COMMAND ...`. Results go to stdout, progress and one line of error to stderr.

Each command is a module `_<command>.py` with `HELP`, `add_arguments(parser)` and `run(args) -> exit code`
(None is 0); it imports what is heavy inside `run`, so that `--help` and the file commands start fast.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import fishjax
from fishjax.errors import FishjaxError, UsageError

COMMANDS = (
    "inspect",
    "diff",
    "apply",
    "vet",
    "merge",
    "fisher",
    "mask",
    "train",
    "generate",
    "convert",
    "plot",
    "fsck",
)

_EPILOG = (
    "exit codes: 0 done or accepted, 1 policy failed, 2 usage or missing file, 3 malformed or corrupt file, "
    "4 wrong base or structure, 5 conflict, 6 provenance, 7 inconclusive, "
    "70 internal error, 74 input or output failed"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; errors become one line on stderr, never a traceback.

    Args:
      argv: the arguments after the program's name; by default those of the process.

    >>> main(["--version"])
    fishjax 0.1.0
    0
    """
    try:
        args = _parser().parse_args(argv)
        code = args.run(args) or 0
        sys.stdout.flush()
        return code
    except SystemExit as done:  # argparse after --help and --version
        return int(done.code or 0)
    except FishjaxError as error:
        return _fail(str(error), error.exit_code)
    except (
        FileNotFoundError,
        NotADirectoryError,
        IsADirectoryError,
        PermissionError,
        FileExistsError,
    ) as error:
        return _fail(_of_system(error), 2)
    except BrokenPipeError:  # the reader of stdout has gone, as after `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 74
    except OSError as error:
        return _fail(f"input or output failed: {_of_system(error)}", 74)
    except KeyboardInterrupt:
        return _fail("interrupted; nothing was left half written", 130)
    except Exception as error:
        if os.environ.get("FISHJAX_TRACEBACK"):
            raise
        what = f"{type(error).__name__}: {error}"
        return _fail(f"internal error: {what}; FISHJAX_TRACEBACK=1 shows where", 70)


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are ours: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see `{self.prog} --help`")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="fishjax", description=_summary(), epilog=_EPILOG, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"fishjax {fishjax.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = importlib.import_module(f"fishjax.cli._{name}")
        sub = commands.add_parser(name, help=module.HELP, description=module.HELP, allow_abbrev=False)
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    return parser


def _summary() -> str:
    return (fishjax.__doc__ or "").splitlines()[0]


def _of_system(error: OSError) -> str:
    """Name the file and say what is wrong with it."""
    if error.filename is None:
        return str(error)
    return f"`{os.fsdecode(error.filename)}`: {error.strerror}"


def _fail(message: str, code: int) -> int:
    # A file's name may hold anything: what is not printable must not reach the terminal.
    line = "".join(c if c.isprintable() else " " if c.isspace() else ascii(c)[1:-1] for c in message)
    print(f"fishjax: {line}", file=sys.stderr)
    return code
