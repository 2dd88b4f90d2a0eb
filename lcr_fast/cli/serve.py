"""``lcr-fast serve``: a model behind HTTP."""

import argparse
import sys

from lcr_fast.cli.arguments import (
    Commands,
    add_capture,
    add_command,
    add_dtype,
    add_model_arguments,
    apply_run_options,
    captured,
    open_model,
    say,
)


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "serve",
        run,
        "answer requests over HTTP",
        "Answer POST /score and /recommend (JSON, ids of the raw data), GET /health and /metrics "
        "until SIGTERM or Ctrl-C. Anyone who reaches the port may ask.",
    )
    add_model_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8000, help="0 for any that is free")
    parser.add_argument(
        "--max-batch", type=int, default=64, help="requests that are computed together"
    )
    parser.add_argument(
        "--wait-ms", type=float, default=0.0, help="time that a first request waits for others"
    )
    add_dtype(parser)
    add_capture(parser)


def run(arguments: argparse.Namespace) -> None:
    import torch

    from lcr_fast.serving.app import create_app, make_server
    from lcr_fast.serving.engine import Engine
    from lcr_fast.training.identity import describe_unknown

    apply_run_options(arguments)
    model, data = open_model(arguments, arguments.model)
    if unknown := describe_unknown(model.config, data):
        print(unknown, file=sys.stderr)
    model = model.projected()
    recommender = captured(arguments, model, arguments.max_batch)
    engine = Engine(model, data, recommender, getattr(torch, arguments.dtype))
    print(f"scores: {engine.describe_scores()}", file=sys.stderr)
    app = create_app(engine, max_batch=arguments.max_batch, max_wait=arguments.wait_ms / 1e3)
    make_server(app, host=arguments.host, port=arguments.port, say=say).run()
