"""Parameters of a model: their shapes and first values, packed as the ops take them."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lcr_fast.config import LCRConfig
from lcr_fast.weights import ScoringWeights

_OUT_SCALE = 0.1  # of Glorot's bound, for the projections that end a sublayer


class Packed(nn.Module):
    """The parameters of one weights tuple, under its field names."""

    def __init__(self, weights_type, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.weights_type = weights_type
        for name in weights_type._fields:
            self.register_parameter(name, nn.Parameter(torch.empty(shapes[name])))
        for name, parameter in self.named_parameters():
            if "norm_weight" in name:
                nn.init.ones_(parameter)
            elif "bias" in name:
                nn.init.zeros_(parameter)
            elif parameter.numel():
                _init_sublayer(name, parameter)

    def weights(self):
        """Return the parameters as the ops take them."""
        return self.weights_type(*_tensors(self, self.weights_type._fields))


def require_gathered(parameter: Tensor) -> None:
    """Raise ValueError for a parameter that torch's FSDP has not gathered."""
    if hasattr(parameter, "device_mesh"):
        raise ValueError(
            "weights are sharded where they are read: fully_shard the whole model and call it as "
            "model(batch), or register_fsdp_forward_method what else you call; its parts, such as "
            "model.encoder, have no forward that would gather them"
        )


def _tensors(module: nn.Module, names: Iterable[str]) -> list[Tensor]:
    """List a module's parameters, as their parametrizations and pruning masks make them."""
    own: dict[str, Any] = module._parameters  # it has them all as a rule, and getattr is slow
    tensors = [own[name] if name in own else getattr(module, name) for name in names]
    if tensors:
        require_gathered(tensors[0])
    return tensors


def _init_linear(weight: Tensor) -> None:
    """Glorot-uniform over the last two axes."""
    bound = math.sqrt(6.0 / sum(weight.shape[-2:]))
    nn.init.uniform_(weight, -bound, bound)


def _init_sublayer(name: str, weight: Tensor) -> None:
    """Start every sublayer near the identity and every attention as similarity (our reading).

    With ordinary post-norm initialisation each of the 2 + 3K sublayers averages over positions,
    and K steps leave nothing to tell events apart: training stays on a plateau. So the output
    projections start small, and keys start equal to queries.
    """
    with torch.no_grad():
        for block in weight.split(weight.shape[-1], -2) if "qkv" in name else (weight,):
            _init_linear(block)
        if "qkv" in name:
            query, key, _ = weight.split(weight.shape[-1], -2)
            key.copy_(query)
        if "out_weight" in name:
            weight.mul_(_OUT_SCALE)


def encoder_shapes(config: LCRConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of :class:`EncoderWeights` by field."""
    n, d, f = config.n_layers, config.dim, config.ffn_width
    return {
        "qkv_weight": (n, 2, 3 * d, d), "qkv_bias": (n, 2, 3 * d),
        "out_weight": (n, 2, d, d), "out_bias": (n, 2, d),
        "ffn_in_weight": (n, 2, f, d), "ffn_in_bias": (n, 2, f),
        "ffn_out_weight": (n, 2, d, f), "ffn_out_bias": (n, 2, d),
        "norm_weight": (n, 2, 2, d), "norm_bias": (n, 2, 2, d),
    }  # fmt: skip


def reasoning_shapes(config: LCRConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of :class:`ReasoningWeights` by field."""
    p = 1 if config.share_steps and config.steps else config.steps
    d, f = config.dim, config.ffn_width if config.step_ffn else 0
    shapes = {
        "ffn_in_weight": (p, 2, f, d),
        "ffn_in_bias": (p, 2, f),
        "ffn_out_weight": (p, 2, d, f),
        "ffn_out_bias": (p, 2, d),
        "norm_weight": (p, 2, 3, d),
        "norm_bias": (p, 2, 3, d),
    }
    for kind in ("self", "cross"):
        shapes |= {
            f"{kind}_qkv_weight": (p, 2, 3 * d, d),
            f"{kind}_qkv_bias": (p, 2, 3 * d),
            f"{kind}_out_weight": (p, 2, d, d),
            f"{kind}_out_bias": (p, 2, d),
        }
    return shapes


class Head(nn.Module):
    """Parameters of the target-aware aggregation, the MLP and the bonus of seen items."""

    def __init__(self, config: LCRConfig) -> None:
        super().__init__()
        d = config.dim
        # Starting from the identity, an event attends to candidates that resemble it.
        self.target_weight = nn.Parameter(torch.eye(d).repeat(2, 1, 1))
        widths = (d * (4 if config.user_embedding else 3), *config.mlp_hidden, 1)
        n_linear = 0 if config.score == "dot" else len(widths) - 1
        self.dot = config.score != "mlp"
        self.seen_bonus = nn.Parameter(torch.zeros(2)) if config.seen_bonus else None
        self.mlp_weights = nn.ParameterList(
            nn.Parameter(torch.empty(widths[i + 1], widths[i])) for i in range(n_linear)
        )
        self.mlp_biases = nn.ParameterList(
            nn.Parameter(torch.zeros(widths[i + 1])) for i in range(n_linear)
        )
        for weight in self.mlp_weights:
            _init_linear(weight)
        if config.score == "mlp_dot":
            # The MLP starts silent: what it adds to the match of vectors, it has to learn.
            nn.init.zeros_(self.mlp_weights[-1])

    def weights(self) -> ScoringWeights:
        """Return the parameters as the ops take them."""
        # By their numbers: parameters() would list once what two layers share.
        layers = [str(i) for i in range(len(self.mlp_weights))]
        require_gathered(self.target_weight)
        weights, biases = _tensors(self.mlp_weights, layers), _tensors(self.mlp_biases, layers)
        return ScoringWeights(self.target_weight, tuple(weights), tuple(biases), self.dot)
