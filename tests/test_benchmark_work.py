"""The counted work of benchmarks against counts by hand, and against torch's own counter."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import work
from lcr_fast import ops, reference
from lcr_fast.reference import Steps
from lcr_fast.testing import ReasoningCase, random_reasoning, run_reasoning
from lcr_fast.weights import ReasoningWeights

MEGA = 1e6


@pytest.mark.parametrize(
    ("d", "L", "encoders", "step", "factored", "repeated", "head"),
    [(64, 50, 6.2, 10.75, 3.4, 84.5, 13.5), (128, 200, 120, 213, 27, 1331, 23.7)],
)
def test_known_counts(d, L, encoders, step, factored, repeated, head):
    C = 100
    found = {
        encoders: work.encoder_flops(L, L, d),
        step: work.reasoning_flops(L, L, d, 1),
        factored: work.aggregation_flops(L, L, C, d),
        repeated: work.aggregation_flops(L, L, C, d, repeated=True),
        head: work.head_flops(C, (4 * d, 200, 80, 1)),
    }
    for expected, flops in found.items():
        assert flops / MEGA == pytest.approx(expected, rel=0.01)


def test_bytes_of_a_fused_and_an_eager_step():
    assert work.reasoning_bytes(50, 50, 64, 2, 0) == pytest.approx(25.6e3)
    assert work.eager_reasoning_bytes(50, 50, 64, 2, 1) == pytest.approx(0.61e6, rel=0.01)
    assert work.reasoning_bytes(10, 10, 64, 4, 7, n_states=8) == 9 * 20 * 64 * 4 + 7


def test_users_add_up_and_an_empty_stream_is_not_attended():
    lengths = (torch.tensor([3, 5, 0]), torch.tensor([7, 0, 0]))
    each = [work.reasoning_flops(int(s), int(r), 16, 2) for s, r in zip(*lengths, strict=True)]
    assert work.reasoning_flops(*lengths, 16, 2) == sum(each)
    # One stream alone: self-attention and FFN, 12 n d^2 + 4 n^2 d, as in an encoder.
    assert each[1] == 2 * work.encoder_flops(5, 0, 16)
    assert each[2] == 0


def counted(function) -> int:
    # The counter does not know torch's fused attention on CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def test_reasoning_agrees_with_the_counter_of_torch():
    call = random_reasoning(
        ReasoningCase(n_users=1, search_len=6, rec_len=9, steps=3, pooled=False, padding=0.0)
    ).to(torch.float32)
    weights = ReasoningWeights(*(call.inputs[name] for name in ReasoningWeights._fields))
    flops = work.reasoning_flops(6, 9, 32, 3)

    def forward():
        return ops.latent_reasoning(
            call.inputs["search"],
            call.inputs["rec"],
            *call.lengths,
            weights,
            Steps(3, 2),
            backend="reference",
        )

    assert counted(forward) == flops
    assert counted(lambda: run_reasoning(call, "reference")) == work.training_flops(flops)


def test_scoring_agrees_with_the_counter_of_torch():
    generator = torch.Generator().manual_seed(0)
    states, candidates = (torch.randn(1, n, 16, generator=generator) for n in (9, 5))
    lengths, weight = torch.tensor([9]), torch.randn(16, 16, generator=generator)
    found = counted(lambda: reference.aggregate(states, lengths, candidates, weight))
    assert found == work.aggregation_flops(9, 0, 5, 16)
