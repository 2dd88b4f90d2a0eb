"""Is the parity rule sharp enough for reasoning? Plant bugs in the reference and see.

Each bug is an edit of the reference's own source, run through the public op as if it were a fused
backend. The rule, with the factor that fused backends are held to, must reject every one, and must
accept correct implementations that only sum in another order.

Calibration, float32, 20 random calls of each case: the factor that the correct implementations
need is 1.0 in the median and 2.8 at most (against a single eager run instead of three it would be
6.5); the weakest bug needs 11, a LayerNorm eps of 1e-6; TF32 products need 280 and nearly all
others over 10,000. So the factor is 3. In float16, against the model that rounds every operation,
it finds all but the bugs of UNSEEN_IN_HALF.
"""

import contextlib
import functools
import importlib.util
import sys
import types
from unittest import mock

import pytest
import torch

from lcr_fast.testing import (
    ReasoningCase,
    assert_reasoning_parity,
    random_reasoning,
    reasoning_baseline,
    run_reasoning,
)

# They calibrate the rule, which changes less often than what it judges.
pytestmark = pytest.mark.full

CASES = {
    "plain": ReasoningCase(),
    "own weights": ReasoningCase(share_steps=False),
    "dropout": ReasoningCase(dropout=0.2),
    "rollout": ReasoningCase(n_trajectories=3),
    "large": ReasoningCase(scale=100.0),
    "far from 0": ReasoningCase(offset=100.0, out_scale=0.01),
}

# Places in the reference that several bugs edit.
_SDPA = "F.scaled_dot_product_attention(q, k, v, attn_mask=bias)"
_HEADS = f"heads = {_SDPA}  # [..., H, Lq, D/H]"
_UPDATE = "x = x + (update if mask is None else update * mask.to(update.dtype))"
_NORM = "return F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, EPS)"
_HIDDEN = "hidden = F.relu(F.linear(x, weights.ffn_in_weight, weights.ffn_in_bias))"
_FFN_OUT = "return F.linear(hidden, weights.ffn_out_weight, weights.ffn_out_bias)"
_POOLED = "pooled.append((alpha @ h).squeeze(-2))"
_NEXT = "h = (new[SEARCH], new[REC])\n        states.h.append(h)"

# name: (case, what stands in the reference, what stands there instead)
WRONG_RESULTS = {
    "mask one key short": (
        "plain",
        "(~length_mask(lengths, size)",
        "(~length_mask(lengths - 1, size)",
    ),
    "mask one key long": (
        "plain",
        "(~length_mask(lengths, size)",
        "(~length_mask(lengths + 1, size)",
    ),
    "no gate for an empty stream": ("plain", "gates[1 - x] * attended", "attended"),
    "gate of the wrong stream": ("plain", "gates[1 - x] * attended", "gates[x] * attended"),
    "memory of the same stream": ("plain", "memory[1 - x], w[x]", "memory[x], w[x]"),
    "memory from before self-attention": ("plain", '"post_msa": a', '"post_msa": h'),
    "second stream reads the first one's new state": (
        "plain",
        'if steps.update != "jacobi" and steps.cross',
        "if steps.cross",
    ),
    "no residual around self-attention": (
        "plain",
        "a = add_norm(h, attended",
        "a = add_norm(0 * h, attended",
    ),
    "no residual around cross-attention": ("plain", "add_norm(a, gates", "add_norm(0 * a, gates"),
    "no residual around the FFN": ("plain", "add_norm(c, ffn", "add_norm(0 * c, ffn"),
    "LayerNorm without eps": ("plain", "EPS = 1e-5", "EPS = 0.0"),
    "LayerNorm eps 1e-6": ("plain", "EPS = 1e-5", "EPS = 1e-6"),
    "LayerNorm eps 1e-3": ("plain", "EPS = 1e-5", "EPS = 1e-3"),
    "LayerNorm with the unbiased variance": (
        "plain",
        _NORM,
        "n = x.shape[-1]\n"
        "    weight = norm_weight * ((n - 1) / n) ** 0.5\n"
        "    return F.layer_norm(x, (n,), weight, norm_bias, EPS)",
    ),
    "norm of the wrong sublayer": (
        "plain",
        "masks[1], w.norm_weight[1]",
        "masks[1], w.norm_weight[0]",
    ),
    "one head skipped": (
        "plain",
        _HEADS,
        f"{_HEADS}\n    heads = torch.cat((heads[..., :1, :, :], 0 * heads[..., 1:, :, :]), -3)",
    ),
    "heads in the wrong order": ("plain", _HEADS, f"heads = {_SDPA}.flip(-3)"),
    "scores divided by sqrt(D)": ("plain", _SDPA, _SDPA[:-1] + ", scale=query.shape[-1] ** -0.5)"),
    "no query bias": ("plain", "qkv_bias[:dim])\n", "0 * qkv_bias[:dim])\n"),
    "no value bias": (
        "plain",
        _HEADS,
        f"v = v - qkv_bias.chunk(3)[2].unflatten(-1, (n_heads, 1, -1))\n    {_HEADS}",
    ),
    "no output bias": (
        "plain",
        "flatten(-2), out_weight, out_bias)",
        "flatten(-2), out_weight, 0 * out_bias)",
    ),
    "FFN without ReLU": ("plain", _HIDDEN, _HIDDEN.replace("F.relu", "")),
    "FFN with GELU": ("plain", _HIDDEN, _HIDDEN.replace("F.relu", "F.gelu")),
    "last hidden unit of the FFN skipped": (
        "plain",
        _FFN_OUT,
        f"hidden = F.pad(hidden[..., :-1], (0, 1))\n    {_FFN_OUT}",
    ),
    "weights of the first step in every step": (
        "own weights",
        "sets[min(k, len(sets) - 1)]",
        "sets[0]",
    ),
    "dropout without its scale": (
        "dropout",
        _UPDATE,
        _UPDATE.replace("mask.to(", "(mask > 0).to("),
    ),
    "dropout with the mask of another sublayer": (
        "dropout",
        "masks[1], w.norm",
        "masks[2], w.norm",
    ),
    "dropout with the masks of the first step": (
        "dropout",
        "masks[x][3 * k : 3 * k + 3]",
        "masks[x][:3]",
    ),
    "pooling of h instead of a": ("plain", "(pool(a), pool(h))", "(pool(h), pool(h))"),
    "pooling with the other stream's key": (
        "plain",
        "keys[..., x, None, :]",
        "keys[..., 1 - x, None, :]",
    ),
    "pooling over padding": (
        "plain",
        "alpha = (logits + key_bias(lengths, h.shape[-2], h.dtype))",
        "alpha = logits",
    ),
    "states in half precision between steps": (
        "plain",
        _NEXT,
        f"new = [x.half().to(acc) for x in new]\n        {_NEXT}",
    ),
    "probabilities in half precision": (
        "plain",
        _SDPA,
        "((q @ k.mT * q.shape[-1] ** -0.5 + bias).softmax(-1).half().to(v) @ v)",
    ),
    "products of numbers rounded to TF32": (
        "plain",
        _FFN_OUT,
        f"hidden = hidden * 4097 - hidden * 4096\n    {_FFN_OUT}",
    ),
    "variance as the difference of two sums": (
        "far from 0",
        _NORM,
        "mean = x.mean(-1, keepdim=True)\n"
        "    rstd = (x.square().mean(-1, keepdim=True) - mean.square() + EPS).rsqrt()\n"
        "    return (x - mean) * rstd * norm_weight + norm_bias",
    ),
}

WRONG_GRADIENTS = {
    "none through the memory": (
        "plain",
        "a, memory, lengths[1 - x]",
        "a, memory.detach(), lengths[1 - x]",
    ),
    "none through the queries": ("plain", _HEADS, f"q = q.detach()\n    {_HEADS}"),
    "none through the residual of self-attention": (
        "plain",
        "a = add_norm(h, attended",
        "a = add_norm(h.detach(), attended",
    ),
    "none through the residual of cross-attention": (
        "plain",
        "add_norm(a, gates",
        "add_norm(a.detach(), gates",
    ),
    "softmax without its row sum": (
        "plain",
        _HEADS,
        "scores = q @ k.mT * q.shape[-1] ** -0.5 + bias\n"
        "    heads = (scores - scores.logsumexp(-1, keepdim=True).detach()).exp() @ v",
    ),
    "LayerNorm without the term of its mean": (
        "plain",
        _NORM,
        "mean = x.mean(-1, keepdim=True).detach()\n"
        "    rstd = ((x - mean).square().mean(-1, keepdim=True) + EPS).rsqrt()\n"
        "    return (x - mean) * rstd * norm_weight + norm_bias",
    ),
    "LayerNorm without the term of its variance": (
        "plain",
        _NORM,
        "mean = x.mean(-1, keepdim=True)\n"
        "    rstd = ((x - mean).square().mean(-1, keepdim=True) + EPS).rsqrt().detach()\n"
        "    return (x - mean) * rstd * norm_weight + norm_bias",
    ),
    "ReLU that lets everything through": (
        "plain",
        _HIDDEN,
        "linear = F.linear(x, weights.ffn_in_weight, weights.ffn_in_bias)\n"
        "    hidden = linear + (F.relu(linear) - linear).detach()",
    ),
    "weight gradient without the last user": (
        "plain",
        _FFN_OUT,
        "w, rows = weights.ffn_out_weight, torch.cat((hidden[:-1], 0 * hidden[-1:])).detach()\n"
        "    missing = F.linear(rows, w) - F.linear(rows, w).detach()\n"
        "    return F.linear(hidden, w.detach(), weights.ffn_out_bias) + missing",
    ),
    "weight gradient without the last event": (
        "plain",
        _FFN_OUT,
        "w, rows = weights.ffn_out_weight, F.pad(hidden[:, :-1], (0, 0, 0, 1)).detach()\n"
        "    missing = F.linear(rows, w) - F.linear(rows, w).detach()\n"
        "    return F.linear(hidden, w.detach(), weights.ffn_out_bias) + missing",
    ),
    "weight gradient without the last step": (
        "plain",
        "w = sets[min(k, len(sets) - 1)]",
        "w = sets[0] if k < steps.n_steps - 1 "
        "else [type(s)(*(t.detach() for t in s)) for s in sets[0]]",
    ),
    "none through the steps before the last": (
        "plain",
        _NEXT,
        f"{_NEXT}\n        h = (h[0].detach(), h[1].detach()) if k == 0 else h",
    ),
    "gate missing": (
        "plain",
        "gates[1 - x] * attended",
        "attended + (gates[1 - x] * attended - attended).detach()",
    ),
    "dropout missing": (
        "dropout",
        _UPDATE,
        "x = x + update + (update * mask.to(update.dtype) - update).detach()",
    ),
    "upstream gradient at padding taken in": (
        "plain",
        "return zero_padding(c, lengths[x])",
        "return c + (zero_padding(c, lengths[x]) - c).detach()",
    ),
    "pooling without the gradient of its weights": (
        "plain",
        _POOLED,
        _POOLED.replace("alpha", "alpha.detach()"),
    ),
    "pooling without the gradient of its states": (
        "plain",
        _POOLED,
        _POOLED.replace("@ h)", "@ h.detach())"),
    ),
    "only the first trajectory's": (
        "rollout",
        "h = initial\n",
        "h = tuple(torch.cat((x[:, :1], x[:, 1:].detach()), 1) for x in initial)\n",
    ),
}

# Correct, in another order.
CORRECT = {
    "softmax and products written out": (
        _HEADS,
        "scores = sum(x @ y.mT for x, y in zip(q.split(8, -1), k.split(8, -1), strict=True))\n"
        "    scores = scores * (q.shape[-1] ** -0.5 * 1.4426950408889634) + bias\n"
        "    p = (scores - scores.amax(-1, keepdim=True)).exp2()\n"
        "    heads = p @ v / p.sum(-1, keepdim=True)",
    ),
    "LayerNorm written out": (
        _NORM,
        "mean = x.mean(-1, keepdim=True)\n"
        "    centred = x - mean\n"
        "    rstd = 1 / (centred.square().mean(-1, keepdim=True) + EPS).sqrt()\n"
        "    return centred * rstd * norm_weight + norm_bias",
    ),
    "FFN in blocks of hidden units": (
        _FFN_OUT,
        "out = weights.ffn_out_bias\n"
        "    blocks = weights.ffn_out_weight.split(8, -1)\n"
        "    for h, w in zip(hidden.split(8, -1), blocks, strict=True):\n"
        "        out = out + F.linear(h, w)\n"
        "    return out",
    ),
}


def edited_reference(*edits: tuple[str, str]) -> types.ModuleType:
    """Import the reference's steps, and what they are made of, with some of the source replaced."""
    names = [f"lcr_fast.reference.{part}" for part in ("transformer", "reasoning")]
    sources = [importlib.util.find_spec(name).loader.get_source(name) for name in names]
    for old, new in edits:
        found = sum(source.count(old) for source in sources)
        assert found == 1, f"the reference has {found} times {old!r}"
        sources = [source.replace(old, new) for source in sources]
    edited = {name: types.ModuleType(name) for name in names}
    with mock.patch.dict(sys.modules, edited):  # the steps import the edited parts
        for (name, module), source in zip(edited.items(), sources, strict=True):
            exec(compile(source, name, "exec"), module.__dict__)
    return edited[names[-1]]


# Smaller than what a half-precision model loses anyway.
UNSEEN_IN_HALF = {
    "LayerNorm eps 1e-6",
    "LayerNorm eps 1e-3",
    "states in half precision between steps",
    "probabilities in half precision",
}


@functools.cache
def draw(case: str, seed: int, dtype: torch.dtype):
    call = random_reasoning(CASES[case], seed).to(dtype)
    return call, reasoning_baseline(call)


def check(case: str, seed: int, dtype: torch.dtype, *edits: tuple[str, str]) -> None:
    """Hold an edited reference to the rule."""
    call, baseline = draw(case, seed, dtype)
    module = edited_reference(*edits)
    with contextlib.ExitStack() as stack:
        if dtype == torch.float16:
            stack.enter_context(mock.patch.object(module, "accumulator", lambda x: x.dtype))
        stack.enter_context(mock.patch("lcr_fast.ops.reasoning.reference", module))
        results = run_reasoning(call, "reference")
    assert_reasoning_parity(results, baseline)


@pytest.mark.parametrize("bug", WRONG_RESULTS)
def test_the_rule_finds(bug):
    case, old, new = WRONG_RESULTS[bug]
    with pytest.raises(AssertionError, match=r"error|non-finite"):
        check(case, 0, torch.float32, (old, new))


@pytest.mark.parametrize(
    "bug", [b for b in WRONG_RESULTS | WRONG_GRADIENTS if b not in UNSEEN_IN_HALF]
)
def test_the_rule_finds_in_half_precision(bug):
    case, old, new = (WRONG_RESULTS | WRONG_GRADIENTS)[bug]
    with pytest.raises(AssertionError, match=r"error|non-finite"):
        check("plain" if case == "far from 0" else case, 0, torch.float16, (old, new))


@pytest.mark.parametrize("bug", WRONG_GRADIENTS)
def test_the_rule_finds_in_gradients_alone(bug):
    """Where results were wrong too, it would say nothing about gradients."""
    case, old, new = WRONG_GRADIENTS[bug]
    with pytest.raises(AssertionError, match=r"^d.*(error|non-finite)"):
        check(case, 0, torch.float32, (old, new))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("implementation", [*CORRECT, "all of these"])
def test_the_rule_accepts(implementation, case, seed):
    edits = CORRECT.values() if implementation not in CORRECT else [CORRECT[implementation]]
    check(case, seed, torch.float32, *edits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_the_rule_accepts_the_reference(case, dtype):
    """In half precision, the one that computes in float32."""
    call, baseline = draw(case, 0, dtype)
    assert_reasoning_parity(run_reasoning(call, "reference"), baseline)
