"""What commands share: their parser, their options, the checks of those."""

import argparse
import functools
import sys
import typing
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcr_fast.config import LCRConfig

if TYPE_CHECKING:
    from lcr_fast.capture import CapturedRecommender
    from lcr_fast.data.prepared import PreparedData
    from lcr_fast.model import LCRSER

Commands = argparse._SubParsersAction  # what add_subparsers returns
# Fields of LCRConfig that the data decides.
FROM_DATA = ("n_items", "n_users", "n_queries", "n_terms", "item_text_dim", "query_text_dim")

_RANKING = ("protocols", "catalogue_users")
_MOST_THREADS = 4096  # OpenMP crashes where it cannot start as many as were asked for


class Parser(argparse.ArgumentParser):
    """Complain in one line: the usage of ``train`` alone would fill a screen."""

    def error(self, message: str) -> typing.NoReturn:
        """End the process with exit code 2."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Show a default only where there is one to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def add_command(
    commands: Commands,
    name: str,
    run: Callable[[argparse.Namespace], None],
    help: str,
    description: str,
) -> argparse.ArgumentParser:
    """Add a command that ``run`` does."""
    parser = commands.add_parser(
        name,
        help=help,
        description=description,
        formatter_class=_Help,
    )
    parser.set_defaults(run=run)
    return parser


# -- options -------------------------------------------------------------------------------------


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a trained model, its data and where it runs: what :func:`open_model` reads."""
    parser.add_argument("model", metavar="MODEL", type=Path, help="a model.safetensors")
    parser.add_argument("--data", type=Path, required=True, help="prepared data")
    add_any_data(parser, "use the model although it was trained on other data")
    add_run_options(parser)


def add_any_data(parser: argparse.ArgumentParser, help: str) -> None:
    """Add the flag by which a user vouches for data that a model does not know."""
    parser.add_argument("--any-data", action="store_true", help=help)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add what computes: :func:`apply_run_options` checks and sets it, but for the backend."""
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument(
        "--backend",
        choices=typing.get_args(typing.get_type_hints(LCRConfig)["backend"]),
        help="which implementation the ops use; default: the config's, auto",
    )
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's choice")


def add_capture(parser: argparse.ArgumentParser) -> None:
    """Add the way back from CUDA graphs: see :func:`captured`."""
    parser.add_argument(
        "--no-capture",
        dest="capture",
        action="store_false",
        help="on a GPU, launch every kernel by itself; the default replays CUDA graphs",
    )


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """Add what the products of scores are computed in: the name of a torch.dtype."""
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the products that scores are made of, on a CPU; bfloat16 is faster where the CPU "
        "has AVX512-BF16 (docs/serving.md says what it does to rankings)",
    )


def add_protocols(parser: argparse.ArgumentParser) -> None:
    """Add the choice of what targets are ranked among."""
    from lcr_fast.training.evaluation import PROTOCOLS

    parser.add_argument(
        "--protocols",
        nargs="+",
        choices=PROTOCOLS,
        default=list(PROTOCOLS),
        help="what targets are ranked among, where the data has it",
    )


def add_catalogue_users(parser: argparse.ArgumentParser) -> None:
    """Add how many users are ranked in the whole catalogue."""
    from lcr_fast.training.evaluation import CATALOGUE_SECONDS

    parser.add_argument(
        "--catalogue-users",
        type=int,
        metavar="N",
        help="test users ranked in the whole catalogue, the same for every model; 0 for all; "
        f"default: as many as take some {CATALOGUE_SECONDS} s a model on two cores",
    )


def add_csv(parser: argparse.ArgumentParser) -> None:
    """Add a file for all numbers."""
    parser.add_argument("--csv", type=Path, help="also write every number to this file")


def add_config_options(group: argparse._ArgumentGroup, kind: type) -> None:
    """Add an option for each field of a config class, but sizes of the data and the backend.

    What is not given is not in the namespace at all.
    """
    for flag, options in _config_options(kind).items():
        group.add_argument(flag, **options)


@functools.cache  # a dozen commands have them
def _config_options(kind: type) -> dict[str, dict[str, Any]]:
    hints = typing.get_type_hints(kind)
    flags = {}
    for f in fields(kind):
        if f.name in FROM_DATA or f.name == "backend":
            continue
        hint = hints[f.name]
        default = "" if f.default is MISSING else f" (default: {f.default})"
        options: dict[str, Any] = {
            "default": argparse.SUPPRESS,
            "dest": f.name,
            "help": f.metadata["help"].replace("%", "%%") + default,
        }
        if typing.get_origin(hint) is typing.Literal:
            options["choices"] = typing.get_args(hint)
        elif typing.get_origin(hint) is tuple:
            options |= {"type": int, "nargs": "+", "metavar": "N"}
        elif hint is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= {"type": hint, "metavar": hint.__name__.upper()}
        flags["--" + f.name.replace("_", "-")] = options
    return flags


def given_fields(arguments: argparse.Namespace, kind: type) -> dict[str, Any]:
    """Return the fields of a config class that the command line gives."""
    flags = vars(arguments)
    return {f.name: flags[f.name] for f in fields(kind) if f.name in flags}


def ranking_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what --protocols and --catalogue-users ask of a ranking, where a command has them.

    Raises ValueError where the latter speaks of a catalogue that the former leave out.
    """
    options = {name: vars(arguments)[name] for name in _RANKING if name in arguments}
    n = options.get("catalogue_users")
    if n is not None and "catalogue" not in options.get("protocols", ("catalogue",)):
        raise ValueError(f"--catalogue-users {n}: --protocols leaves the catalogue out")
    return options


# -- checks --------------------------------------------------------------------------------------


def check_file(flag: str, path: Path | None, model: Path | None = None) -> None:
    """Raise ValueError where a file cannot be written, before what it would hold is computed.

    Nor may it take the place of the ``model`` that the command reads.
    """
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"{flag} {path}: a folder; name a file in it")
    if model is not None and path.exists() and model.exists() and path.samefile(model):
        raise ValueError(f"{flag} {path}: the model that is read; name another file")


def check_new(path: Path) -> None:
    """Raise ValueError where a model would take another file's place."""
    if path.exists():
        raise ValueError(f"{path} exists already: name another file")


def check_unoccupied(folder: Path, *, resume: bool) -> None:
    """Raise ValueError where a job would write among files that are not its own."""
    if not folder.is_dir():
        return
    found = {path.name for path in folder.iterdir()}
    if found and not resume:
        raise ValueError(f"{folder} is not empty: continue with --resume, or name another")
    from lcr_fast.experiments.comparison import JOB
    from lcr_fast.training.trainer import CHECKPOINT

    # A job that was killed at once leaves its data alone, or what was half-written.
    is_new = {name for name in found if not name.startswith(".")} <= {"data"}
    places = (folder.glob(depth + CHECKPOINT) for depth in ("", "*/", "*/*/"))
    if not (is_new or JOB in found or any(any(place) for place in places)):
        raise ValueError(f"{folder} is not empty, and holds no job to continue: name another")


def apply_run_options(arguments: argparse.Namespace) -> None:
    """Set --threads and make --device current; ValueError where one of them cannot be had."""
    import torch

    if arguments.threads is not None:
        if not 1 <= arguments.threads <= _MOST_THREADS:
            raise ValueError(f"--threads must be in 1..{_MOST_THREADS}, got {arguments.threads}")
        torch.set_num_threads(arguments.threads)
    try:
        device = torch.device(arguments.device)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {arguments.device!r}")
    if device.type == "cuda":
        n = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not n:
            raise ValueError(f"--device {arguments.device}: this torch sees no GPU")
        if (device.index or 0) >= n:
            raise ValueError(
                f"--device {arguments.device}: this torch sees {n} GPUs, from cuda:0 on"
            )
        if device.index is not None:
            # What can serve is asked of the current GPU.
            torch.cuda.set_device(device)


def open_model(arguments: argparse.Namespace, path: Path) -> "tuple[LCRSER, PreparedData]":
    """Open a saved model and --data, which must be the model's, or --any-data given."""
    from lcr_fast.data.prepared import PreparedData
    from lcr_fast.training.models import load_model

    data = PreparedData.open(arguments.data)
    model = load_model(path, data, arguments.device, arguments.backend, any_data=arguments.any_data)
    return model, data


def captured(
    arguments: argparse.Namespace, model: "LCRSER", largest: int
) -> "CapturedRecommender | None":
    """Capture a model for batches up to ``largest``, and say what that takes.

    None on a CPU, for a model whose users leave early, and where --no-capture asks for none.
    """
    on_gpu = model.head.target_weight.device.type == "cuda"
    if not on_gpu or not arguments.capture or model.exits is not None:
        return None
    from lcr_fast.capture import capture_recommender

    sizes = [*(n for n in (1, 8, 64) if n < largest), largest]
    try:
        recommender = capture_recommender(model, sizes)
    except RuntimeError as error:
        raise ValueError(f"{error}; --no-capture does without graphs") from error
    print(
        f"captured batches of {', '.join(map(str, sizes))}: "
        f"{recommender.memory_bytes / 1e6:.0f} MB of GPU memory",
        file=sys.stderr,
    )
    return recommender


def say(line: str) -> None:
    """Print a line at once, also into a pipe."""
    print(line, flush=True)
