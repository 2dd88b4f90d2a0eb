"""How jobs of training begin: their options, configs, data and folder."""

import argparse
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcr_fast.cli.arguments import (
    FROM_DATA,
    add_any_data,
    add_config_options,
    add_run_options,
    apply_run_options,
    check_unoccupied,
    given_fields,
    ranking_options,
    say,
)
from lcr_fast.config import LCRConfig, TrainConfig, unique

if TYPE_CHECKING:
    from lcr_fast.experiments.comparison import Job

# The default job's data is small, and so is its model.
SYNTHETIC_DEFAULTS: dict[str, dict[str, Any]] = {
    "model": {
        "dim": 32, "steps": 2, "max_search_len": 8, "max_rec_len": 12, "max_clicks": 2,
    },
    "train": {
        "epochs": 10, "align_pairs": 256, "rl_epochs": 2, "rl_epoch_size": 1024, "noise_scale": 0.5,
    },
}  # fmt: skip
_SECTIONS: dict[str, type] = {"model": LCRConfig, "train": TrainConfig}


def add_job_options(parser: argparse.ArgumentParser, defaults: dict[str, dict]) -> None:
    """Add what all jobs share: their data, folder and configs."""
    parser.add_argument("--data", type=Path, help="prepared data; default: synthetic")
    parser.add_argument("--out", type=Path, help="folder to write; default: the next runs/NAME-N")
    parser.add_argument("--resume", action="store_true", help="continue the job in --out")
    add_any_data(parser, "resume although the models in --out are of other data")
    parser.add_argument(
        "--config", type=Path, help='JSON file {"model": {...}, "train": {...}}; flags override it'
    )
    add_run_options(parser)
    for section, kind in _SECTIONS.items():
        own = ", ".join(f"{k} {v}" for k, v in defaults[section].items())
        group = parser.add_argument_group(
            f"{section} config", f"Without --data the defaults differ: {own}."
        )
        add_config_options(group, kind)


def merged_configs(arguments: argparse.Namespace, defaults: dict[str, dict]) -> dict[str, Any]:
    """Merge defaults, --config and flags into the two configs; ``given``: what was set."""
    named: dict[str, None] = {}
    values = {section: dict(defaults.get(section, {})) for section in _SECTIONS}
    if arguments.config:
        try:
            text = arguments.config.read_text(encoding="utf-8")
            given = json.loads(text, object_pairs_hook=unique)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{arguments.config}: not valid JSON: {error}") from None
        if not isinstance(given, dict) or given.keys() - _SECTIONS.keys():
            raise ValueError(
                f'{arguments.config} must be a JSON object of "model" and "train", '
                f"got {', '.join(given) if isinstance(given, dict) else type(given).__name__}"
            )
        for section, options in given.items():
            if not isinstance(options, dict):
                raise ValueError(f"{arguments.config}: {section} must be a JSON object")
        for name in FROM_DATA:
            if name in given.get("model", {}):
                raise ValueError(f"{arguments.config}: the data decides {name}, leave it out")
        for section, options in given.items():
            values[section] |= options
            named |= dict.fromkeys(options)
    for section, kind in _SECTIONS.items():
        given = given_fields(arguments, kind)
        # Absent flags are not there at all, apart from --backend.
        given = {name: value for name, value in given.items() if value is not None}
        values[section] |= given
        named |= dict.fromkeys(given)
    return {
        "model": LCRConfig.from_dict(values["model"]),
        "train": TrainConfig.from_dict(values["train"]),
        "given": list(named),
    }


@contextlib.contextmanager
def open_job(
    arguments: argparse.Namespace, defaults: dict[str, dict], prefix: str = "", **world: Any
) -> "Iterator[Job]":
    """Read the configs, open or make the data, claim the folder; yield a Job.

    ``prefix`` begins the name of a folder that --out does not name, ``world`` are fields of the
    synthetic World where there is no --data.
    """
    from lcr_fast.data.prepared import PreparedData
    from lcr_fast.experiments.comparison import Job
    from lcr_fast.model import LCRSER
    from lcr_fast.storage import claimed
    from lcr_fast.training import distributed
    from lcr_fast.training.models import fit_config

    apply_run_options(arguments)
    ranking = ranking_options(arguments)
    configs = merged_configs(arguments, defaults)
    # Fails where the backend cannot serve it, before a file is written.
    LCRSER(configs["model"]).backend_report(arguments.device)
    data = PreparedData.open(arguments.data) if arguments.data else None
    name = arguments.data.resolve().name if arguments.data else "synthetic"
    with contextlib.ExitStack() as held:

        def claim() -> Path:
            out = held.enter_context(out_folder(arguments, prefix + name))
            held.enter_context(claimed(out))
            if data is None and not (arguments.resume and (out / "data").is_dir()):
                _make_synthetic(out / "data", configs["train"].seed, **world)
            return out

        out = distributed.current().by_first(claim)
        if data is None:
            data = PreparedData.open(out / "data")
        print(data.summary())
        print(f"writing to {out}")
        mention_capture(arguments.device, configs["train"])
        yield Job(
            data,
            fit_config(data, configs["model"]),
            configs["train"],
            out,
            device=arguments.device,
            resume=arguments.resume,
            any_data=arguments.any_data,
            given=configs["given"],
            report=say,
            **ranking,
        )


def mention_capture(device: str, config: TrainConfig) -> None:
    """Tell who trains on a GPU by launches that there is a faster way."""
    if device.startswith("cuda") and not config.capture:
        print(
            "each operation of a step is launched; --capture replays steps as CUDA graphs, several "
            "times faster where batches are small (docs/speed.md)"
        )


def print_results(job: "Job", tables: str) -> None:
    """Print what a job has found, and where it lies."""
    print(f"\n{tables}\n\ntables, plots and models: {job.out}")


def _make_synthetic(folder: Path, seed: int, **world: Any) -> None:
    from lcr_fast.data import synthetic
    from lcr_fast.data.build import prepare

    prepare(synthetic.generate(synthetic.World(seed=seed, **world)), folder, seed=seed)


@contextlib.contextmanager
def out_folder(arguments: argparse.Namespace, name: str) -> Iterator[Path]:
    """Choose and make the folder of a job; one that is still empty at an error goes again."""
    from lcr_fast.storage import next_folder

    out = arguments.out
    if out is None:
        if arguments.resume:
            raise ValueError("--resume needs --out, the folder of the job to continue")
        out = next_folder(Path("runs"), name)
    else:
        check_unoccupied(out, resume=arguments.resume)
    existed = arguments.out is not None and out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        yield out
    finally:
        if not existed:
            with contextlib.suppress(OSError):  # it holds something
                out.rmdir()
