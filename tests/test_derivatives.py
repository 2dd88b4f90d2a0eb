"""Derivatives that a fused backend does not have are refused, not 0."""

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from lcr_fast import LCRSER, Batch, LCRConfig, ops
from lcr_fast.ops._extension import extension_error
from lcr_fast.testing import random_batch, random_model

pytestmark = pytest.mark.skipif(
    extension_error() is not None, reason=f"lcr_fast._C is not built: {extension_error()}"
)
STAGES = ["encode", "latent_reasoning", "score"]


def make_case(backend="cpp") -> tuple[LCRSER, Batch]:
    generator = torch.Generator().manual_seed(0)
    config = LCRConfig(
        n_items=12, n_terms=6, dim=8, steps=2, max_search_len=3, max_rec_len=4, max_clicks=2,
        mlp_hidden=(9,), seen_bonus=True, backend=backend,
    )  # fmt: skip
    model = random_model(config, generator).float()
    return model, random_batch(config, 5, 4, generator)


def stage(name: str, model: LCRSER, batch: Batch):
    """Give a function of one op, linear where it can be, and where to take its derivative."""
    h0 = tuple(h.detach() for h in model.encode(batch))
    if name == "encode":
        position = model.rec_position.detach()

        def encoded(x: Tensor) -> Tensor:
            with torch.no_grad():
                search, rec = model.embed(batch)
            return ops.encode(
                search, rec + x[: rec.shape[1]], batch.search_lengths, batch.rec_lengths,
                model.encoder.weights(), n_heads=model.config.n_heads, backend="cpp",
            )[1]  # fmt: skip

        return encoded, position
    if name == "latent_reasoning":
        return lambda x: model.reason((h0[0], x), batch).rec, h0[1]
    padding = batch.candidates == 0
    return lambda x: model.score((h0[0], x), batch).masked_fill(padding, 0.0), h0[1]


@pytest.mark.parametrize("name", STAGES)
def test_second_derivatives_are_refused(name):
    model, batch = make_case()
    function, x = stage(name, model, batch)
    x.requires_grad_()
    # The gradient of a sum: what comes from above needs no gradient itself.
    (gradient,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
    (plain,) = torch.autograd.grad(function(x).sum(), x)
    assert torch.equal(gradient, plain)
    with pytest.raises(RuntimeError, match=f"^{name} on cpp has no second derivatives: ask for"):
        gradient.square().sum().backward()
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.functional.hvp(
            lambda x: function(x).square().sum(), x.detach(), torch.ones_like(x)
        )


def test_a_penalty_on_what_no_fused_op_touches_is_the_references():
    found = {}
    for backend in ("reference", "cpp"):
        model, batch = make_case(backend)
        seen = torch.cat((batch.rec_items[:, :1], batch.candidates), 1)
        loss = model(batch.replace(candidates=seen)).clamp(min=-99.0).logsumexp(-1).sum()
        (gradient,) = torch.autograd.grad(loss, model.head.seen_bonus, create_graph=True)
        gradient.square().sum().backward()
        found[backend] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found["cpp"]["encoder.qkv_weight"].abs().max() > 0
    torch.testing.assert_close(found["cpp"], found["reference"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["encode", "reasoning"])
def test_the_reference_has_them_as_the_message_says(name):
    model, batch = make_case("reference")
    x = model.rec_position if name == "encode" else model.reasoning.self_out_bias
    with sdpa_kernel(SDPBackend.MATH):
        scores = model(batch).masked_fill(batch.candidates == 0, 0.0)
        (gradient,) = torch.autograd.grad(scores.square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), x)
    assert second.abs().max() > 0


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("frozen", [False, True])
def test_forward_mode_is_refused(name, frozen):
    model, batch = make_case()
    model.requires_grad_(not frozen)
    function, x = stage(name, model, batch)
    refused = pytest.raises(RuntimeError, match=f"^{name} on cpp has no derivatives in forward")
    with refused:
        torch.func.jvp(function, (x,), (torch.ones_like(x),))
    with refused:
        torch.func.jacfwd(function)(x)
    with forward_ad.dual_level():
        # Without a tangent a level changes nothing.
        plain = function(x)
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with refused, torch.no_grad():
            function(dual)
    assert torch.equal(plain, function(x))


def test_gradients_of_torch_func_are_the_references():
    model, batch = make_case("cpp")
    weights = dict(model.named_parameters())
    valid = batch.candidates > 0

    def loss(weights: dict[str, Tensor], of: LCRSER) -> Tensor:
        scores = torch.func.functional_call(of, weights, (batch,))
        return scores.masked_fill(~valid, 0.0).square().sum()

    with pytest.raises(RuntimeError, match=r"encode on cpp has no gradients within torch\.func"):
        torch.func.grad(loss)(weights, model)
    reference, _ = make_case("reference")
    found = torch.func.grad(loss)(weights, reference)
    loss(dict(reference.named_parameters()), reference).backward()
    for name, p in reference.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(found[name], p.grad)
