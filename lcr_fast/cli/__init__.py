"""Command line ``lcr-fast``: prepare data, train, evaluate, compare, recommend, study, and more.

Every command is a module of this package, named as the command is: ``add`` gives it its options,
``run`` does it. What commands share is in ``arguments``, how jobs of training begin in ``jobs``.
"""

import argparse
import contextlib
import io
import logging
import os
import sys
from collections.abc import Iterator
from types import ModuleType

from lcr_fast.cli import (
    adapt,
    baselines,
    compare,
    distill,
    evaluate,
    export,
    extend,
    inspect,
    prepare,
    recommend,
    report,
    serve,
    study,
    train,
)
from lcr_fast.cli.arguments import Parser

# As --help lists them.
COMMANDS: tuple[ModuleType, ...] = (
    prepare, inspect, train, evaluate, baselines, compare, report, recommend, extend, export,
    serve, adapt, distill, study,
)  # fmt: skip
_SHARED = ("train", "evaluate", "recommend")  # commands that several processes can share


def main(argv: list[str] | None = None) -> None:
    """Run the command line; bad input ends it with one sentence and exit code 2."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    logging.getLogger("lcr_fast").setLevel(logging.INFO)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # The ids of the data are any text, whatever the terminal's locale can spell.
        sys.stdout.reconfigure(encoding="utf-8")
    arguments = make_parser().parse_args(argv)
    try:
        with _processes(arguments):
            arguments.run(arguments)
            sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter would complain once more when it flushes stdout.
        sys.stderr.close()
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"lcr-fast {arguments.command}: {where}{error.strerror or error}", file=sys.stderr)
        raise SystemExit(2) from None
    except ValueError as error:
        print(f"lcr-fast {arguments.command}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except FloatingPointError as error:
        print(f"lcr-fast {arguments.command}: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except (MemoryError, RuntimeError) as error:
        # torch says so in a RuntimeError of its own on a GPU, and in an ordinary one on a CPU.
        told = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
        if not told and "can't allocate memory" not in str(error):
            raise
        first = next(iter(str(error).splitlines()), "")
        print(f"lcr-fast {arguments.command}: out of memory: {first}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        # Some parsers have no such option.
        more = "; --resume continues from the last checkpoint" if "resume" in arguments else ""
        print(f"\nstopped{more}", file=sys.stderr)
        raise SystemExit(130) from None


def make_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands; what it parses has the command's ``run``."""
    from lcr_fast import __version__

    parser = Parser(
        prog="lcr-fast", description="Latent cross reasoning for search-aware recommendation."
    )
    parser.add_argument("--version", action="version", version=f"lcr-fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser


@contextlib.contextmanager
def _processes(arguments: argparse.Namespace) -> Iterator[None]:
    """Join the other processes where torchrun has started several."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield
        return
    if arguments.command not in _SHARED:
        raise ValueError(f"runs in one process; torchrun is for {', '.join(_SHARED)}")
    from lcr_fast.training.distributed import joined

    with joined(arguments.device) as arguments.device:
        yield
