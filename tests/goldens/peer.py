"""The reference: transformers' own Glm4Moe, and the same model with FP8 weights run as W8A8.

Knows nothing of glm_jax. Needs torch and transformers, which the product does not install.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Glm4MoeConfig, Glm4MoeForCausalLM
from transformers.models.glm4_moe import modeling_glm4_moe as glm

Rounding = Callable[[Tensor], tuple[Tensor, Tensor]]

_FP8_MAX = 448.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """What the routers chose, per expert layer and token.

    Attributes:
      picks: int64[moe_layers, rows, length, top_k], chosen experts in ascending order.
      weights: f32 of the same shape, what each chosen expert is multiplied by.
      gap: f32[moe_layers, rows, length], the last chosen expert's lead over the first rejected.
    """

    picks: Tensor
    weights: Tensor
    gap: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What one full forward of [rows, length] tokens went through.

    Attributes:
      hidden: f32[layers, rows, length, hidden_size], the residual stream after each layer.
      logits: f32[rows, length, vocab_size].
    """

    hidden: Tensor
    logits: Tensor
    routing: Routing


def divide(x: Tensor) -> tuple[Tensor, Tensor]:
    """Per-token FP8: the e4m3 values as f32, and the scale of each row."""
    x = x.float()
    scale = (x.abs().amax(-1, keepdim=True) / _FP8_MAX).clamp_min(1e-12)
    rounded = (x / scale).clamp(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn)
    return rounded.float(), scale


def disturbed(seed: int) -> Rounding:
    """`divide` after noise as large as f32 arithmetic makes, as on another machine."""
    generator = torch.Generator().manual_seed(seed)

    def rounding(x: Tensor) -> tuple[Tensor, Tensor]:
        noise = torch.randn(x.shape, generator=generator) * 2e-7
        return divide(x.float() * (1 + noise))

    return rounding


class W8A8(nn.Module):
    """A linear layer with FP8 weights [out, in] that also quantizes what it is fed, per token.

    With groups > 1 each of that many equal parts of a token's row gets a scale of its own, as on
    devices that share a row-parallel layer and see only their part.
    """

    def __init__(
        self, values: Tensor, scale: Tensor, bias: Tensor | None, groups: int, rounding: Rounding
    ):
        super().__init__()
        self.values = values.float()
        self.scale = scale.float().reshape(-1)
        self.bias = None if bias is None else bias.float()
        self.groups = groups
        self.rounding = rounding

    def forward(self, x: Tensor) -> Tensor:
        rounded, token_scale = self.rounding(x.unflatten(-1, (self.groups, -1)))
        y = F.linear((rounded * token_scale).flatten(-2), self.values) * self.scale
        return (y if self.bias is None else y + self.bias).to(x.dtype)


class W8A8Experts(nn.Module):
    """The routed experts, each gate, up and down as W8A8; the weighted sum is in f32."""

    def __init__(self, experts: list[list[W8A8]]):
        super().__init__()
        self.experts = experts

    def forward(self, x: Tensor, picks: Tensor, weights: Tensor) -> Tensor:
        total = torch.zeros_like(x, dtype=torch.float32)
        for number, (gate, up, down) in enumerate(self.experts):
            token, place = torch.where(picks == number)
            y = down(F.silu(gate(x[token])) * up(x[token]))
            total.index_add_(0, token, y.float() * weights[token, place, None].float())
        return total.to(x.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Arithmetic:
    """How an FP8 checkpoint is computed.

    Attributes:
      quantizes_activations: W8A8; otherwise the weights are dequantized and nothing else is done.
      row_groups: parts that o_proj's and the dense and shared down_proj's inputs are quantized in.
      rounding: how a row becomes FP8.
    """

    quantizes_activations: bool
    row_groups: int = 1
    rounding: Rounding = divide


WEIGHT_ONLY = Arithmetic(quantizes_activations=False)
PER_TOKEN = Arithmetic(quantizes_activations=True)


def load(directory: Path, dtype: torch.dtype, arithmetic: Arithmetic = WEIGHT_ONLY) -> nn.Module:
    """The peer, ready to run: a bf16 checkpoint through AutoModel, an FP8 one through our hands.

    compressed-tensors on CPU never quantizes what routed experts are fed, hence our own W8A8.
    """
    settings = json.loads((directory / "config.json").read_text())
    if "quantization_config" not in settings:
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, experts_implementation="eager"
        )
        return model.eval()
    del settings["quantization_config"]
    config = Glm4MoeConfig(**{**settings, "experts_implementation": "eager"})
    model = Glm4MoeForCausalLM(config).to(dtype).eval()
    model.model.rotary_emb = glm.Glm4MoeRotaryEmbedding(config)  # .to() rounded its frequencies
    stored = _read(directory)
    with torch.no_grad():
        for name, module in list(model.named_modules()):
            _fill(model, name, module, stored, arithmetic)
    return model


def _read(directory: Path) -> dict[str, Tensor]:
    stored: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            stored |= {name: file.get_tensor(name) for name in file.keys()}
    return stored


def _fill(
    model: nn.Module, name: str, module: nn.Module, stored: dict[str, Tensor], how: Arithmetic
) -> None:
    """Gives one module its tensors, or puts a W8A8 one in its place."""

    def w8a8(owner: str, groups: int = 1) -> W8A8:
        values, scale = stored[f"{owner}.weight"], stored[f"{owner}.weight_scale"]
        return W8A8(values, scale, stored.get(f"{owner}.bias"), groups, how.rounding)

    def dequantized(owner: str) -> Tensor:
        layer = w8a8(owner)
        return layer.values * layer.scale[:, None]

    if isinstance(module, glm.Glm4MoeExperts):
        parts = ("gate_proj", "up_proj", "down_proj")
        owners = [f"{name}.{number}" for number in range(module.num_experts)]
        if how.quantizes_activations:
            experts = [[w8a8(f"{owner}.{part}") for part in parts] for owner in owners]
            model.set_submodule(name, W8A8Experts(experts))
            return
        for number, owner in enumerate(owners):
            gate, up, down = (dequantized(f"{owner}.{part}") for part in parts)
            module.gate_up_proj[number].copy_(torch.cat([gate, up]))
            module.down_proj[number].copy_(down)
    elif f"{name}.weight_scale" in stored:
        if how.quantizes_activations:
            is_row_parallel = name.endswith(("o_proj", "down_proj"))
            model.set_submodule(name, w8a8(name, how.row_groups if is_row_parallel else 1))
            return
        module.weight.copy_(dequantized(name))
        if module.bias is not None:
            module.bias.copy_(stored[f"{name}.bias"])
    elif isinstance(module, glm.Glm4MoeTopkRouter):
        module.weight.copy_(stored[f"{name}.weight"])
        module.e_score_correction_bias = stored[f"{name}.e_score_correction_bias"].float()
    elif isinstance(module, nn.Linear | nn.Embedding | glm.Glm4MoeRMSNorm):
        module.weight.copy_(stored[f"{name}.weight"])


@contextmanager
def _recorded(modules: Iterable[nn.Module]) -> Iterator[list[Any]]:
    """Collects what the modules return while the context is open."""
    outputs: list[Any] = []
    handles = [
        module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
        for module in modules
    ]
    yield outputs
    for handle in handles:
        handle.remove()


def _routers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, glm.Glm4MoeTopkRouter)]


def _routing(model: nn.Module, outputs: list[Any], shape: tuple[int, ...]) -> Routing:
    picks, weights, gaps = [], [], []
    for router, (logits, pick_weights, chosen) in zip(_routers(model), outputs, strict=True):
        order = chosen.argsort(-1)
        picks.append(chosen.gather(-1, order).view(*shape, -1))
        weights.append(pick_weights.float().gather(-1, order).view(*shape, -1))
        ranked = (
            (logits.sigmoid() + router.e_score_correction_bias).sort(-1, descending=True).values
        )
        gaps.append((ranked[:, router.top_k - 1] - ranked[:, router.top_k]).view(shape))
    return Routing(picks=torch.stack(picks), weights=torch.stack(weights), gap=torch.stack(gaps))


@torch.no_grad()
def run(model: Any, ids: Tensor) -> Run:
    """One full forward, with everything the goldens hold recorded on the way."""
    with _recorded(model.model.layers) as hidden, _recorded(_routers(model)) as routed:
        logits = model(ids, use_cache=False).logits.float()
    return Run(
        hidden=torch.stack(hidden).float(),
        logits=logits,
        routing=_routing(model, routed, tuple(ids.shape)),
    )


@torch.no_grad()
def run_layers(model: Any, inputs: Tensor) -> tuple[Tensor, Routing]:
    """Each layer on an input of its own: [layers, rows, length, hidden_size] in and (f32) out."""
    dtype = model.model.embed_tokens.weight.dtype
    positions = torch.arange(inputs.shape[2])[None]
    outputs = []
    with _recorded(_routers(model)) as routed:
        for layer, x in zip(model.model.layers, inputs.to(dtype), strict=True):
            rotary = model.model.rotary_emb(x, positions)
            outputs.append(layer(x, position_embeddings=rotary, attention_mask=None).float())
    return torch.stack(outputs), _routing(model, routed, tuple(inputs.shape[1:3]))


@torch.no_grad()
def continue_greedily(model: Any, prompt: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Plain greedy decoding of int[length], everything recomputed at each step: no cache involved.

    Returns the tokens and how far each was ahead of the runner-up, in logits: both [steps].
    """
    ids, gaps = prompt[None], []
    for _ in range(steps):
        best = model(ids, use_cache=False).logits[0, -1].float().topk(2)
        gaps.append(best.values[0] - best.values[1])
        ids = torch.cat([ids, best.indices[None, :1]], dim=1)
    return ids[0, len(prompt) :], torch.stack(gaps)
