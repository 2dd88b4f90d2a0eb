"""Load a service over loopback with Poisson arrivals: latency against load, open loop.

    python benchmarks/serve_load.py [--rates 50 100 200 400] [--seconds 5] [--max-batch 64] ...

A request's time starts when it should have been sent, so a service that falls behind cannot hide
it. The service runs in a process of its own, with a random model on synthetic data, or with
--model and --data. Prints a Markdown table; ends by itself.
"""

import argparse
import asyncio
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import numpy as np
import torch
from tabulate import tabulate

from lcr_fast.config import LCRConfig
from lcr_fast.data import synthetic
from lcr_fast.data.build import prepare
from lcr_fast.data.prepared import PreparedData
from lcr_fast.model import LCRSER
from lcr_fast.training.models import fit_config

_CONNECTIONS = 256
_DEADLINE = 10.0  # seconds for one answer


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rates", type=float, nargs="+", default=[25, 50, 100, 200, 400])
    parser.add_argument("--seconds", type=float, default=5.0, help="of each rate")
    parser.add_argument("--candidates", type=int, default=100)
    parser.add_argument("--max-batch", type=int, default=64)
    parser.add_argument("--wait-ms", type=float, default=0.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5, help="K of the random model")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path)
    arguments = parser.parse_args()
    if (arguments.model is None) != (arguments.data is None):
        parser.error("--model and --data go together")
    with tempfile.TemporaryDirectory() as folder:
        model, data = arguments.model, arguments.data
        if model is None:
            model, data = _make(Path(folder), arguments.steps)
        command = [
            sys.executable, "-m", "lcr_fast", "serve", model, "--data", data, "--port", "0",
            "--max-batch", str(arguments.max_batch), "--wait-ms", str(arguments.wait_ms),
            "--threads", str(arguments.threads),
        ]  # fmt: skip
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            url = process.stdout.readline().split()[-1]
            bodies = _bodies(PreparedData.open(data, verify=False), arguments.candidates)
            rows = [
                asyncio.run(_load(url, bodies, rate, arguments.seconds)) for rate in arguments.rates
            ]
        finally:
            process.terminate()
            process.wait(20)
    headers = ("asked / s", "answered / s", "p50", "p99", "busy (503)", "requests a batch")
    print(tabulate(rows, headers, tablefmt="github"))


def _make(folder: Path, steps: int) -> tuple[Path, Path]:
    data = prepare(synthetic.generate(synthetic.World()), folder / "data")
    torch.manual_seed(0)
    model = LCRSER(fit_config(data, LCRConfig(steps=steps)))
    model.data_fingerprint = data.fingerprint
    model.save(folder / "model.safetensors")
    return folder / "model.safetensors", folder / "data"


def _bodies(data: PreparedData, n_candidates: int, n: int = 64) -> list[dict]:
    generator = np.random.default_rng(0)
    n_candidates = min(n_candidates, data.n_items)
    items = [generator.choice(data.n_items, n_candidates, replace=False) + 1 for _ in range(n)]
    users = generator.integers(1, data.n_users + 1, n)
    return [
        {"user": data.users[int(user)], "items": [data.items[int(item)] for item in row]}
        for user, row in zip(users, items, strict=True)
    ]


async def _load(url: str, bodies: list[dict], rate: float, seconds: float) -> tuple:
    """Send requests at a rate; return a row of the table."""
    generator = np.random.default_rng(1)
    arrivals = np.cumsum(generator.exponential(1 / rate, int(rate * seconds) + 1))
    times: list[float] = []
    refused = 0

    async def ask(client: httpx.AsyncClient, due: float, body: dict) -> None:
        nonlocal refused
        answer = await client.post("/score", json=body)
        if answer.status_code == 503:
            refused += 1
            return
        answer.raise_for_status()
        times.append(time.perf_counter() - due)

    limits = httpx.Limits(max_connections=_CONNECTIONS, max_keepalive_connections=_CONNECTIONS)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=_DEADLINE) as client:
        before = await _batches(client)
        await asyncio.gather(*(client.post("/score", json=body) for body in bodies[:8]))
        start = time.perf_counter()
        asked = []
        for i, arrival in enumerate(arrivals):
            await asyncio.sleep(max(0.0, start + arrival - time.perf_counter()))
            body = bodies[i % len(bodies)]
            asked.append(asyncio.create_task(ask(client, start + arrival, body)))
        await asyncio.gather(*asked)
        took = time.perf_counter() - start
        after = await _batches(client)
    p50, p99 = (f"{1e3 * t:.1f} ms" for t in np.percentile(times, (50, 99)))
    size = (after[0] - before[0]) / max(1, after[1] - before[1])
    return f"{rate:g}", f"{len(times) / took:.0f}", p50, p99, refused, f"{size:.1f}"


async def _batches(client: httpx.AsyncClient) -> tuple[float, float]:
    """Read how many requests in how many batches the service has computed."""
    lines = (await client.get("/metrics")).text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    names = (f'lcr_fast_batch_size_{what}{{path="/score"}}' for what in ("sum", "count"))
    total, count = (float(values.get(name, 0)) for name in names)
    return total, count


if __name__ == "__main__":
    main()
