"""Distil a trained model into one of fewer steps, and say what that keeps."""

from collections.abc import Callable, Collection
from pathlib import Path

from lcr_fast.config import TrainConfig
from lcr_fast.data.prepared import PreparedData
from lcr_fast.experiments.tables import markdown, protocol_titles, with_interval
from lcr_fast.model import LCRSER
from lcr_fast.training.distillation import student_of
from lcr_fast.training.evaluation import rank_model
from lcr_fast.training.models import attach_text
from lcr_fast.training.ranks import differences
from lcr_fast.training.trainer import DISTILL, Trainer


def distill(
    teacher: LCRSER,
    data: PreparedData,
    config: TrainConfig,
    steps: int,
    out: Path,
    *,
    resume: bool = False,
    any_data: bool = False,
    report: Callable[[str], None] = lambda line: None,
    given: Collection[str] = (),
) -> LCRSER:
    """Train a student of fewer steps from a teacher's weights, in the folder ``out``.

    ``given`` are the options that were set, as :class:`Trainer` takes them.
    """
    student = attach_text(student_of(teacher, steps), data)
    trainer = Trainer(
        student, data, config, DISTILL, out,
        resume=resume, any_data=any_data, teacher=teacher, report=report, given=given,
    )  # fmt: skip
    return trainer.run()


def distillation_table(teacher: LCRSER, student: LCRSER, data: PreparedData) -> str:
    """Compare student and teacher on the test users, NDCG@5 by kind of target."""
    ranks = [rank_model(m, data, protocols=("sampled",)) for m in (teacher, student)]
    of_both, less = (
        [row for row in rows if row["metric"] == "ndcg@5" and row["n"]]
        for rows in (ranks[0].rows() + ranks[1].rows(), differences([(ranks[1], ranks[0])]))
    )
    groups = [row["targets"] for row in less]
    n = len(groups)
    lines = [
        [f"teacher, K = {teacher.config.steps}", *(f"{row['mean']:.4f}" for row in of_both[:n])],
        [f"student, K = {student.config.steps}", *(f"{row['mean']:.4f}" for row in of_both[n:])],
        [
            "student less teacher",
            *(with_interval(row, "+", 4) for row in less),
        ],
    ]
    title = f"test NDCG@5, {protocol_titles(ranks[0].n_negatives)['sampled']}"
    return markdown(lines, [title, *groups])
