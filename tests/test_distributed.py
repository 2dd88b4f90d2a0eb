"""Several processes as one: training, its end, resume, evaluation and lists, over gloo."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lcr_fast.config import TrainConfig
from lcr_fast.storage import load_tensors
from lcr_fast.training import distributed
from lcr_fast.training.distributed import Share
from lcr_fast.training.objective import OBJECTIVES
from lcr_fast.training.trainer import CHECKPOINT, METRICS, MODEL

# Sizes that two processes cannot share evenly.
CONFIG = TrainConfig(
    epochs=2, batch_size=57, learning_rate=1e-2, align_pairs=31, align_items=0.3, rl_epochs=1,
    rl_epoch_size=21, rl_batch_size=7, rl_learning_rate=1e-3, rl_negatives=9, n_trajectories=3,
    noise_scale=0.5, action="sampled", inner_epochs=2, rl_trainable="all", select_readout=False,
)  # fmt: skip

# Forks the processes of a job; each runs the body with torchrun's variables.
_JOB = """
import os, signal, sys
from pathlib import Path
from torch.distributed import TCPStore
from lcr_fast import cli
from lcr_fast.config import TrainConfig
from lcr_fast.data.prepared import PreparedData
from lcr_fast.model import LCRSER
from lcr_fast.serving import offline
from lcr_fast.training import evaluation, trainer
from lcr_fast.training.distributed import joined
from lcr_fast.training.models import attach_text

trainer._CHECKPOINT_SECONDS = -1.0
# Or so few users would be one block, and one process would have it.
evaluation.rank_targets.__kwdefaults__["batch_size"] = 5
offline.recommend.__defaults__ = (None, 10, 5)

def train(start, folder, config, out, objectives, dies):
    data = PreparedData.open(folder)
    updates, original = [], trainer.Trainer._update

    def dying(self, loss):
        updates.append(loss)
        if len(updates) == dies:
            os.kill(os.getpid(), signal.SIGKILL)
        original(self, loss)

    if rank == count - 1:
        trainer.Trainer._update = dying
    for objective in objectives:
        model = attach_text(LCRSER.load(start), data)
        trainer.Trainer(
            model, data, TrainConfig.from_json(config), objective, Path(out) / objective,
            resume=True,
        ).run()

def train_together(*arguments):
    if count == 1:
        return train(*arguments)
    try:
        with joined("cpu"):
            train(*arguments)
    except ConnectionError as error:
        sys.exit(str(error))

count, name, arguments = {arguments}
# As torchrun's agent, which outlives its processes.
store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
processes = []
for rank in range(count):
    process = os.fork()
    if process == 0:
        if count > 1:
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count),
                MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port),
                TORCHELASTIC_USE_AGENT_STORE="True",
            )
        status = 0
        try:
            cli.main(*arguments) if name == "cli" else train_together(*arguments)
        except SystemExit as error:
            if isinstance(error.code, str):
                print(error.code, file=sys.stderr)
            status = 1 if isinstance(error.code, str) else error.code or 0
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    processes.append(process)
ends = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
print("ends", ends)
"""


@pytest.fixture(scope="module")
def job(run_code):
    """Return a function that runs a job in a number of processes: output, errors, their ends."""
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")

    def run(count: int, name: str, *arguments: object) -> tuple[str, str, list[int]]:
        plain = [each if isinstance(each, int | list) else str(each) for each in arguments]
        done = run_code(_JOB.format(arguments=[count, name, plain]))
        output, _, ends = done.stdout.rpartition("ends ")
        assert ends, done.stderr
        return output, done.stderr, json.loads(ends)

    return run


@pytest.fixture(scope="module")
def train(job, prepared, prepared_folder, make_model, tmp_path_factory):
    """Return a function that trains, or resumes, in a number of processes."""
    start = tmp_path_factory.mktemp("start") / "start.safetensors"
    make_model(prepared, score="mlp").save(start)

    def run(count: int, out, objectives, dies: int = 0, **changes):
        config = CONFIG.replace(**changes).to_json()
        return job(count, "train", start, prepared_folder, config, out, list(objectives), dies)

    return run


@pytest.fixture(scope="module")
def alone(train, tmp_path_factory):
    """Train by every objective in one process; return the folder."""
    out = tmp_path_factory.mktemp("alone")
    _, errors, ends = train(1, out, OBJECTIVES)
    assert ends == [0], errors
    return out


def curve(folder) -> list[dict[str, float]]:
    lines = (folder / METRICS).read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def assert_same_run(first, second) -> None:
    """Compare the curves and last weights of two runs, to rounding."""
    mine, theirs = curve(first), curve(second)
    assert len(mine) == len(theirs) > 1
    for a, b in zip(mine, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)
    weights, others = (load_tensors(out / CHECKPOINT, "checkpoint")[0] for out in (first, second))
    assert weights.keys() == others.keys()
    # Where a gradient is but rounding, as of biases before a softmax, Adam makes steps of it.
    for key in ("item_embedding.weight", "head.target_weight", "reasoning.ffn_in_weight"):
        mine, theirs = weights[f"model.{key}"], others[f"model.{key}"]
        assert (mine - theirs).norm() <= 1e-2 * theirs.norm(), key


def test_two_processes_train_as_one(train, alone, tmp_path):
    _, errors, ends = train(2, tmp_path, OBJECTIVES)
    assert ends == [0, 0], errors
    warnings = errors.splitlines()
    assert len(warnings) == len(set(warnings))  # of one process
    for objective in OBJECTIVES:
        assert_same_run(tmp_path / objective, alone / objective)


@pytest.mark.full
def test_tables_by_rows_too(train, tmp_path):
    for count in (1, 2):
        _, errors, ends = train(count, tmp_path / str(count), ["supervised", "grpo"], tables="rows")
        assert ends == [0] * count, errors
    for objective in ("supervised", "grpo"):
        assert_same_run(tmp_path / "1" / objective, tmp_path / "2" / objective)


def test_one_dead_process_ends_the_job_and_any_number_resumes(train, alone, tmp_path):
    _, errors, ends = train(2, tmp_path, ["supervised"], dies=3)
    assert ends == [1, -signal.SIGKILL], errors
    assert errors.strip().splitlines() == [
        "the job was stopped, or another of its processes ended; --resume continues from the last "
        "checkpoint"
    ]
    _, errors, ends = train(2, tmp_path, ["supervised"], dies=3)  # two updates more
    assert ends == [1, -signal.SIGKILL], errors
    _, errors, ends = train(1, tmp_path, ["supervised"])
    assert ends == [0], errors
    assert_same_run(tmp_path / "supervised", alone / "supervised")


@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for a rank in /proc")
def test_torchrun_ends_with_a_rank_and_one_process_resumes(prepared_folder, tmp_path):
    command = ["-m", "lcr_fast", "train", "--data", prepared_folder, "--out", tmp_path]
    command += ["--variants", "lcr", "--dim", "8", "--epochs", "3", "--batch-size", "4"]
    lines = tmp_path / "lcr" / METRICS
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    with subprocess.Popen([*torchrun, *command], stderr=subprocess.PIPE, text=True) as agent:
        while not (lines.is_file() and lines.read_text()):
            assert agent.poll() is None
            time.sleep(0.05)
        os.kill(_process_of(agent.pid, rank=1), signal.SIGKILL)
        _, errors = agent.communicate()
    assert agent.returncode == 1
    said = [line for line in errors.splitlines() if line.startswith("lcr-fast train:")]
    assert said == [
        "lcr-fast train: the job was stopped, or another of its processes ended; --resume "
        "continues from the last checkpoint"
    ]
    assert len(curve(lines.parent)) < 4
    subprocess.run([sys.executable, *command, "--resume"], check=True)
    assert [line["epoch"] for line in curve(lines.parent)] == [0, 1, 2, 3]
    assert (tmp_path / "results.md").is_file()


def _process_of(agent: int, rank: int) -> int:
    """Find a process that torchrun has started."""
    started = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    variable = f"RANK={rank}".encode()
    (found,) = (
        int(process)
        for process in started
        if variable in Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    )
    return found


def test_commands_for_one_process_say_so(job, tmp_path):
    _, errors, ends = job(2, "cli", ["inspect", str(tmp_path)])
    assert ends == [2, 2]
    assert "inspect: runs in one process; torchrun is for train, evaluate, recommend" in errors


def test_bad_input_is_said_once(job, prepared_folder, tmp_path):
    _, errors, ends = job(2, "cli", ["evaluate", str(tmp_path), "--data", str(prepared_folder)])
    assert sorted(ends) == [1, 2]
    assert len(errors.strip().splitlines()) == 1
    assert "a folder; expected a model file" in errors


def test_evaluation_and_lists_are_those_of_one_process(job, alone, prepared_folder, tmp_path):
    shared = [str(alone / "supervised" / MODEL), "--data", str(prepared_folder), "--threads", "1"]
    found = {}
    for count in (1, 2):
        table = tmp_path / f"{count}.csv"
        output, errors, ends = job(count, "cli", ["evaluate", *shared, "--csv", str(table)])
        assert ends == [0] * count, errors
        lists, errors, ends = job(count, "cli", ["recommend", *shared, "-k", "3"])
        assert ends == [0] * count, errors
        found[count] = (output, table.read_bytes(), lists)
    assert found[1] == found[2]
    assert len(found[1][2].splitlines()) > 60


@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_shares_cover_a_batch_in_order(n):
    """Each process's rows, cut where they repeat, are the batch; so are the blocks."""
    whole = torch.arange(n)
    parts = [Share(rank, 3).deal(whole) for rank in range(3)]
    assert len({len(part) for part in parts}) == 1
    assert torch.equal(torch.cat(parts)[:n], whole)
    starts = [start for rank in range(3) for start in Share(rank, 3).blocks(n, 2)]
    assert sorted(starts) == [2 * block for block in range(math.ceil(n / 2))]


def test_a_process_alone_has_everything():
    share, whole = distributed.current(), torch.arange(3.0)
    assert share.deal(whole) is share.collect(whole, 3) is share.total(whole) is whole
    assert list(share.rounds([1, 2])) == [1, 2]
    assert share.by_first(lambda: 5) == 5
