"""Fused norms, gated activations and rotary embeddings that save little for backward.

transformers computes each of these in several operations, most of which allocate and save a tensor.
Here a gated activation saves its two inputs, a norm its input and one number per token, and a
rotation nothing; backward recomputes the rest without a matrix product. When compiled, each
operation is one loop over memory.

A module is recognized by the bytecode of its methods, because most families of transformers copy
Llama's modules under other names. Unrecognized modules are left unchanged: they use more memory
but compute the same numbers.

Shape letters: T tokens, A attention heads, D head size.
"""

from __future__ import annotations

import dis
import inspect
import types
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.integrations.moe import _default_apply_gate
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    apply_rotary_pos_emb,
    rotate_half,
)
from transformers.models.phi3.modeling_phi3 import Phi3MLP

from trainer.model.layers.activations import ACTIVATIONS, gated, gated_backward
from trainer.model.layers.compilation import fused_loop
from trainer.model.layers.end_layers import OnlyRead
from trainer.model.layers.int8_blocks import SharedInput, int8_gated_mlp
from trainer.model.layers.int8_matmul import Product, Terms
from trainer.model.layers.linear import FrozenLinear

#: Layers of a gated MLP, and those of an attention whose input is the same.
MLP_LAYERS = ("gate_proj", "up_proj", "down_proj")
QKV_LAYERS = ("q_proj", "k_proj", "v_proj")
#: The global function that attention calls.
ROTATION = "apply_rotary_pos_emb"


def _loop(function: Callable[..., Any], compiled: bool, x: Tensor) -> Callable[..., Any]:
    return fused_loop(function, x) if compiled else function


def _norm(x: Tensor, weight: Tensor, eps: float, offset: bool) -> tuple[Tensor, Tensor]:
    """The norm and the fp32 factor of each token, with casts where Llama and Gemma cast."""
    x32 = x.float()
    factor = torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    if offset:
        return (x32 * factor * (1.0 + weight.float())).to(x.dtype), factor
    return weight * (x32 * factor).to(x.dtype), factor


def _norm_backward(grad: Tensor, x: Tensor, factor: Tensor, weight: Tensor, offset: bool) -> Tensor:
    grad = grad.float() * (1.0 + weight.float()) if offset else (grad * weight).float()
    normal = x.float() * factor
    return ((grad - normal * (grad * normal).mean(-1, keepdim=True)) * factor).to(x.dtype)


def _rotate(x_TAD: Tensor, cos_T1D: Tensor, sin_T1D: Tensor) -> Tensor:
    # ``cat`` is last, so that each half is one vectorized loop.
    (first, second), (cos, cos_2), (sin, sin_2) = (
        t.chunk(2, dim=-1) for t in (x_TAD, cos_T1D, sin_T1D)
    )
    return torch.cat([first * cos - second * sin, second * cos_2 + first * sin_2], dim=-1)


def _rotate_back(grad_TAD: Tensor, cos_T1D: Tensor, sin_T1D: Tensor) -> Tensor:
    (first, second), (cos, cos_2), (sin, sin_2) = (
        t.chunk(2, dim=-1) for t in (grad_TAD, cos_T1D, sin_T1D)
    )
    return torch.cat([first * cos + second * sin_2, second * cos_2 - first * sin], dim=-1)


def _rotate_both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate_both_back(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _rotate_back(q, cos, sin), _rotate_back(k, cos, sin)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, kind: str, compiled: bool) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.kind, ctx.compiled = kind, compiled
        # Detached: requires_grad is a compilation guard, which would cause a second compilation.
        y: Tensor = _loop(gated, compiled, gate)(gate.detach(), up.detach(), kind)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        backward = _loop(gated_backward, ctx.compiled, gate)
        return *backward(grad, gate, up, ctx.kind), None, None


class _Normed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Callable[[], Tensor], eps: float, offset: bool, compiled: bool
    ) -> Tensor:
        # Not saved: ZeRO-3 frees the weight after forward and gathers it again for backward.
        ctx.weight, ctx.offset, ctx.compiled = weight, offset, compiled
        y: Tensor
        y, factor = _loop(_norm, compiled, x)(x.detach(), weight().detach(), eps, offset)
        ctx.save_for_backward(x, factor)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, factor = ctx.saved_tensors
        backward = _loop(_norm_backward, ctx.compiled, x)
        dx = backward(grad, x, factor, ctx.weight().detach(), ctx.offset)
        return dx, None, None, None, None


class _Rotated(torch.autograd.Function):
    """Rotates queries and keys in one call."""

    @staticmethod
    def forward(
        ctx: Any, q_TAD: Tensor, k_TAD: Tensor, cos_T1D: Tensor, sin_T1D: Tensor, compiled: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos_T1D, sin_T1D)  # shared by all layers
        ctx.compiled = compiled
        rotate = _loop(_rotate_both, compiled, q_TAD)
        rotated: tuple[Tensor, Tensor] = rotate(q_TAD.detach(), k_TAD.detach(), cos_T1D, sin_T1D)
        return rotated

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
        rotate = _loop(_rotate_both_back, ctx.compiled, grad_q)
        return *rotate(grad_q, grad_k, *ctx.saved_tensors), None, None, None


def _apply_rotation(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1, *, compiled: bool
) -> tuple[Tensor, Tensor]:
    """Replacement of ``apply_rotary_pos_emb``."""
    # With heads before tokens, q and k are transposed views; rotate them in memory order.
    heads = 2 if unsqueeze_dim == 1 else unsqueeze_dim
    q, k = (x.transpose(1, 2) if unsqueeze_dim == 1 else x for x in (q, k))
    cos, sin = cos.unsqueeze(heads), sin.unsqueeze(heads)
    q, k = _Rotated.apply(q, k, cos, sin, compiled)
    return (q.transpose(1, 2), k.transpose(1, 2)) if unsqueeze_dim == 1 else (q, k)


class FusedModule(nn.Module):
    """Base of the fused classes, which are mixed into the original class of a module.

    Attributes:
        compiled: whether operations are compiled into loops or run as separate torch operations.
        operation: name in ``fused_counts``.
        original: class of the module before fusion.
    """

    compiled = False
    operation: str
    original: Any


class RecomputedGatedMLP(FusedModule):
    """``down(act(gate(x)) * up(x))``.

    Attributes:
        int8_terms: set if the three layers multiply in int8; what is between the products is fused
            then, too.
    """

    operation = "gated MLP"
    int8_terms: Terms | None = None
    act_fn: nn.Module
    gate_proj: Any
    up_proj: Any
    down_proj: Any

    def forward(self, x: Tensor) -> Tensor:
        kind = ACTIVATIONS[type(self.act_fn)]
        layers = self.gate_proj, self.up_proj, self.down_proj
        # Hooks of layers, such as those of a LoRA adapter, are called by the layers only.
        if self.int8_terms and not any(p._forward_hooks or p._forward_pre_hooks for p in layers):
            gate, up, down = (layer.matrix for layer in layers)
            return int8_gated_mlp(x, gate, up, down, kind, self.int8_terms)
        inner = _Gated.apply(self.gate_proj(x), self.up_proj(x), kind, self.compiled)
        y: Tensor = self.down_proj(inner)
        return y


class RecomputedPackedMLP(FusedModule):
    """A gated MLP with gate and up in one matrix (Phi-3, GLM)."""

    operation = "gated MLP"
    activation_fn: nn.Module
    gate_up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, hidden_states: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
        kind = ACTIVATIONS[type(self.activation_fn)]
        y: Tensor = self.down_proj(_Gated.apply(gate, up, kind, self.compiled))
        return y


class RecomputedRMSNorm(FusedModule):
    """Root-mean-square norm (arXiv 1910.07467)."""

    operation = "RMSNorm"
    weight: Tensor
    variance_epsilon: float

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Normed.apply(x, self._weight, self.variance_epsilon, False, self.compiled)
        return y

    def _weight(self) -> Tensor:
        return self.weight


class RecomputedOffsetRMSNorm(RecomputedRMSNorm):
    """Root-mean-square norm that multiplies by ``1 + weight`` (Gemma)."""

    eps: float

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Normed.apply(x, self._weight, self.eps, True, self.compiled)
        return y


class RecomputedRotaryAttention(FusedModule):
    """Attention that rotates queries and keys as Llama does (arXiv 2104.09864)."""

    operation = "rotary attention"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _with_fused_rotation(self.original, self.compiled)(self, *args, **kwargs)


#: (class of transformers, methods to compare, fused class).
KNOWN: tuple[tuple[type[nn.Module], tuple[str, ...], type[FusedModule]], ...] = (
    (LlamaRMSNorm, ("forward",), RecomputedRMSNorm),
    (GemmaRMSNorm, ("forward", "_norm"), RecomputedOffsetRMSNorm),
    (LlamaMLP, ("forward",), RecomputedGatedMLP),
    (Phi3MLP, ("forward",), RecomputedPackedMLP),
)


def fused_class(module: nn.Module) -> type[FusedModule] | None:
    """The fused class that is equivalent to a module's class; None if there is none."""
    for known, methods, fused in KNOWN:
        if all(_same_code(type(module), known, name) for name in methods):
            act = getattr(module, "act_fn", getattr(module, "activation_fn", None))
            return fused if act is None or type(act) in ACTIVATIONS else None
    return RecomputedRotaryAttention if _rotates_like_llama(type(module)) else None


def fused_gate(experts: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """Fused activation of stacked experts, [T, 2 I] (gate, then up) to [T, I]; None if unknown."""
    act: Any = getattr(experts, "act_fn", None)
    kind: str | None = ACTIVATIONS.get(type(act))
    own_gate = getattr(type(experts), "_apply_gate", None)
    if kind is None or _code(own_gate) != _code(_default_apply_gate):
        return None

    def gate(gate_up: Tensor) -> Tensor:
        y: Tensor = _Gated.apply(*gate_up.chunk(2, dim=-1), kind, False)
        return y

    return gate


def fuse_operations(model: nn.Module) -> None:
    """Change the class of every recognized module to its fused class."""
    for module in model.modules():
        original: Any = type(module)
        fused: Any = fused_class(module)
        if fused is not None:
            module.__class__ = _mixed(fused, original)


def compile_fused_operations(model: nn.Module) -> None:
    """Compile the loops of all fused modules on their next use."""
    for module in model.modules():
        if isinstance(module, FusedModule):
            module.compiled = True


def fuse_int8_layers(model: nn.Module, product: Product, terms: Terms) -> None:
    """Fuse what is between the int8 products of fused modules.

    Args:
        product: that of all layers concerned: ``int8_matmul`` without a threshold.
        terms: those of ``product``.
    """

    def joinable(module: nn.Module, names: Sequence[str], *, bias: bool) -> list[FrozenLinear]:
        layers = [getattr(module, name, None) for name in names]
        linear = [x for x in layers if isinstance(x, FrozenLinear) and x.product is product]
        allowed = [x for x in linear if bias or x.bias is None]
        return allowed if len(allowed) == len(names) else []

    for module in model.modules():
        if isinstance(module, RecomputedGatedMLP):
            module.int8_terms = terms if joinable(module, MLP_LAYERS, bias=False) else None
        elif isinstance(module, RecomputedRotaryAttention):
            limited = isinstance(getattr(module, "q_proj", None), OnlyRead)
            layers = joinable(module, QKV_LAYERS[limited:], bias=True)
            shared = SharedInput([layer.matrix for layer in layers], terms)
            for index, layer in enumerate(layers):
                layer.product = partial(shared.product, index)


def fused_counts(model: nn.Module) -> Counter[str]:
    """Number of fused modules by operation."""
    return Counter(m.operation for m in model.modules() if isinstance(m, FusedModule))


@cache
def _mixed(fused: Any, original: Any) -> Any:
    return type(f"Fused{original.__name__}", (fused, original), {"original": original})


@cache
def _with_fused_rotation(original: Any, compiled: bool) -> Callable[..., Any]:
    """The forward of an attention class with the global ``apply_rotary_pos_emb`` replaced."""
    # Unwrapped: a decorator of transformers 5.24 accepts former names of arguments.
    forward: Any = inspect.unwrap(original.forward)
    rotation = partial(_apply_rotation, compiled=compiled)
    fused = types.FunctionType(
        forward.__code__,
        {**forward.__globals__, ROTATION: rotation},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    fused.__kwdefaults__ = forward.__kwdefaults__
    return fused


def _rotates_like_llama(attention: type[nn.Module]) -> bool:
    forward = inspect.unwrap(attention.forward)
    names = getattr(forward, "__globals__", {})
    used = getattr(getattr(forward, "__code__", None), "co_names", ())
    known = {ROTATION: apply_rotary_pos_emb, "rotate_half": rotate_half}
    return ROTATION in used and all(
        _code(names.get(name)) == _code(function) for name, function in known.items()
    )


def _same_code(one: type[nn.Module], other: type[nn.Module], method: str) -> bool:
    return _code(getattr(one, method, None)) == _code(getattr(other, method, None))


@cache
def _code(function: Any) -> object:
    """Instructions and default arguments of a function; equal for copies, apart from docstrings.

    With the package ``kernels``, transformers turns some functions into modules.
    """
    if isinstance(function, nn.Module):
        function = type(function).forward
    function = inspect.unwrap(function) if callable(function) else function
    code = getattr(function, "__code__", None)
    if code is None:
        return function
    instructions = tuple((step.opname, step.argval) for step in dis.get_instructions(code))
    return instructions, function.__defaults__, function.__kwdefaults__
