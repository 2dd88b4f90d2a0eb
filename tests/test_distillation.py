"""Distillation: what a student starts from, what its loss is, and what the command writes."""

import math

import numpy as np
import pytest
import torch

from command_line import run
from lcr_fast.config import TrainConfig
from lcr_fast.model import LCRSER
from lcr_fast.testing import random_batch
from lcr_fast.training.distillation import Distilled, student_of
from lcr_fast.training.evaluation import make_batcher
from lcr_fast.training.identity import assign
from lcr_fast.training.models import attach_text
from lcr_fast.training.objective import Supervised
from lcr_fast.training.trainer import DISTILL, Trainer

CONFIG = TrainConfig(
    align_queries=0.0, tcl_weight=0.0, distill_kl=0.7, distill_states=0.3, distill_temperature=2.0
)


@pytest.fixture
def teacher(prepared, make_model) -> LCRSER:
    return make_model(prepared, dropout=0.0, seed=3, readout=0.5).eval()


@pytest.mark.parametrize("changes", [{}, {"share_steps": False, "step_embedding": True}], ids=str)
@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_student_is_its_teacher_after_fewer_steps(prepared, make_model, steps, changes):
    teacher = make_model(prepared, readout=0.5, **changes).eval()  # a student reads h^(K) alone
    with torch.no_grad():
        for parameter in teacher.reasoning.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    student = attach_text(student_of(teacher, steps), prepared).eval()
    batch = random_batch(teacher.config, 6, 4, torch.Generator().manual_seed(0))
    expected = teacher.score(teacher.states(batch).h[steps], batch)
    torch.testing.assert_close(student(batch), expected, rtol=1e-4, atol=1e-5)
    assert student.data_fingerprint == teacher.data_fingerprint


def test_a_student_takes_no_more_steps_than_its_teacher(teacher):
    for steps in (-1, 3):
        with pytest.raises(
            ValueError, match=f"steps must be within 0..2, the teacher's, got {steps}"
        ):
            student_of(teacher, steps)


def test_the_loss_is_that_of_phase_1_and_the_distance_to_the_teacher(prepared, make_model, teacher):
    student = make_model(prepared, dropout=0.0, seed=4, steps=1)
    batcher = make_batcher(prepared, "train", student)
    batch = random_batch(student.config, 5, 6, torch.Generator().manual_seed(0))
    batch.candidates[1, 4:] = 0
    batch = batch.replace(target=batch.target * 0)
    (alone,) = Supervised(student, batcher, CONFIG).updates(batch, 1, {})
    (update,) = Distilled(student, batcher, CONFIG, teacher).updates(batch, 1, {})
    with torch.no_grad():
        seen = {m: m.final_states(batch) for m in (student, teacher)}
        scores = {m: m.score(seen[m], batch).double() / 2.0 for m in seen}
    divergence, far, d = 0.0, 0.0, student.config.dim
    for b in range(5):
        shown = [i for i, item in enumerate(batch.candidates[b].tolist()) if item]
        p, q = (scores[m][b, shown].softmax(0).tolist() for m in (teacher, student))
        divergence += sum(x * math.log(x / y) for x, y in zip(p, q, strict=True)) / 5
        for x, lengths in enumerate((batch.search_lengths, batch.rec_lengths)):
            pooled = []
            for m in (student, teacher):
                e = m.item_vectors(batch.candidates[b, :1])[0]
                h = seen[m][x][b, : lengths[b]]
                alpha = (h @ m.head.target_weight[x] @ e).softmax(0)
                pooled.append((alpha.unsqueeze(1) * h).sum(0))
            far += (pooled[0] - pooled[1]).detach().square().sum().item() / (5 * 2 * d)
    assert update.logs["distill_kl"].item() == pytest.approx(divergence, rel=1e-4)
    assert update.logs["distill_states"].item() == pytest.approx(far, rel=1e-4)
    expected = alone.loss.item() + 0.7 * 4.0 * divergence + 0.3 * far
    assert update.loss.item() == pytest.approx(expected, rel=1e-5)
    update.loss.backward()
    assert student.head.target_weight.grad.abs().sum() > 0
    # The caller's teacher is left as it was, and learns nothing.
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters())


def test_switched_off_nothing_of_the_teacher_counts(prepared, make_model, teacher):
    student = make_model(prepared, seed=4)
    batcher = make_batcher(prepared, "train", student)
    config = CONFIG.replace(distill_kl=0.0, distill_states=0.0)
    batch = Supervised(student, batcher, config).batch(np.arange(4), np.random.default_rng(0))
    (alone,) = Supervised(student, batcher, config).updates(batch, 1, {})
    (update,) = Distilled(student, batcher, config, teacher).updates(batch, 1, {})
    assert update.loss.item() == alone.loss.item()


def test_shared_weights_stay_the_teachers(prepared, teacher, tmp_path):
    teacher.requires_grad_(False)
    student = attach_text(student_of(teacher, 1), prepared)
    config = CONFIG.replace(distill_trainable="histories", epochs=2, batch_size=16)
    Trainer(student, prepared, config, DISTILL, tmp_path / "run", teacher=teacher).train()
    moved = {
        name.partition(".")[0]
        for name, tensor in student.state_dict().items()
        if not torch.equal(tensor, teacher.state_dict()[name][: len(tensor)])
    }
    assert moved == {"encoder", "reasoning", "search_position", "rec_position"}


def test_distill_writes_a_model_and_resumes(prepared, prepared_folder, teacher, tmp_path):
    assign(teacher, prepared)
    teacher.save(tmp_path / "t.safetensors")
    options = ["--data", prepared_folder, "--out", tmp_path / "run", "--epochs", 1]
    text = run("distill", tmp_path / "t.safetensors", *options)
    assert "student, K = 0" in text
    assert "student less teacher" in text
    student = LCRSER.load(tmp_path / "run" / "model.safetensors")
    assert student.config.steps == 0
    again = run("distill", tmp_path / "t.safetensors", *options, "--resume")
    assert again.splitlines()[-5:] == text.splitlines()[-5:]
    with pytest.raises(SystemExit):
        run("distill", tmp_path / "t.safetensors", *options)
