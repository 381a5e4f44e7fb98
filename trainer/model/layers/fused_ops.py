"""Norms, gates and rotations of a layer in one pass each, which save no more than backward needs.

transformers writes them as single operations, of which each makes a tensor and many save one. Here
a gated activation saves its two inputs, a norm its input and one number per token, a rotation
nothing; what lies in between is computed again from these, which costs no product. Where a compiler
is at hand, every pass is one loop over memory.

A module is recognised by what its code says, not by its name: families copy Llama's to the letter.

Shape letters: T tokens, A attention heads, D head size.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers.activations import ACT2FN
from transformers.integrations.moe import _default_apply_gate
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    apply_rotary_pos_emb,
    rotate_half,
)
from transformers.models.phi3.modeling_phi3 import Phi3MLP

ROTATION = "apply_rotary_pos_emb"
#: Activations with a derivative of their own, by the class that transformers makes them of.
ACTIVATIONS: dict[type[nn.Module], str] = {
    type(ACT2FN["silu"]): "silu",
    type(ACT2FN["gelu"]): "gelu",
    type(ACT2FN["gelu_pytorch_tanh"]): "gelu_tanh",
}


class _Passes:
    """The loops over memory, each compiled on first use if asked for."""

    def __init__(self, compiled: bool) -> None:
        def made(loop: Callable[..., Any]) -> Callable[..., Any]:
            return torch.compile(loop, dynamic=True) if compiled else loop

        self.gate, self.gate_backward = made(_gate), made(_gate_backward)
        self.norm, self.norm_backward = made(_norm), made(_norm_backward)
        self.rotate, self.rotate_back = made(_rotate), made(_rotate_back)


@cache
def _passes(compiled: bool) -> _Passes:
    return _Passes(compiled)


def _act(gate: Tensor, kind: str) -> Tensor:
    if kind == "silu":
        return functional.silu(gate)
    return functional.gelu(gate, approximate="tanh" if kind == "gelu_tanh" else "none")


def _act_backward(grad: Tensor, gate: Tensor, kind: str) -> Tensor:
    if kind == "silu":
        of_gate: Tensor = torch.ops.aten.silu_backward(grad, gate)
        return of_gate
    approximate = "tanh" if kind == "gelu_tanh" else "none"
    of_gate = torch.ops.aten.gelu_backward(grad, gate, approximate=approximate)
    return of_gate


def _gate(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    return _act(gate, kind) * up


def _gate_backward(grad: Tensor, gate: Tensor, up: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    return _act_backward(grad * up, gate, kind), grad * _act(gate, kind)


def _norm(x: Tensor, weight: Tensor, eps: float, offset: bool) -> tuple[Tensor, Tensor]:
    """The norm and each token's factor, fp32; rounded where Llama and Gemma round."""
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
    first, second = x_TAD.chunk(2, dim=-1)
    return x_TAD * cos_T1D + torch.cat([-second, first], dim=-1) * sin_T1D


def _rotate_back(grad_TAD: Tensor, cos_T1D: Tensor, sin_T1D: Tensor) -> Tensor:
    first, second = (grad_TAD * sin_T1D).chunk(2, dim=-1)
    return grad_TAD * cos_T1D + torch.cat([second, -first], dim=-1)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, kind: str, compiled: bool) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.kind, ctx.passes = kind, _passes(compiled)
        # Detached, or every pass would be compiled twice, with and without a gradient to come.
        y: Tensor = ctx.passes.gate(gate.detach(), up.detach(), kind)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        return *ctx.passes.gate_backward(grad, gate, up, ctx.kind), None, None


class _Normed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Callable[[], Tensor], eps: float, offset: bool, compiled: bool
    ) -> Tensor:
        ctx.weight, ctx.offset, ctx.passes = weight, offset, _passes(compiled)
        # The weight is asked for again in backward, not kept: sharding takes it away in between.
        y: Tensor
        y, factor = ctx.passes.norm(x.detach(), weight().detach(), eps, offset)
        ctx.save_for_backward(x, factor)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, factor = ctx.saved_tensors
        weight = ctx.weight().detach()
        return ctx.passes.norm_backward(grad, x, factor, weight, ctx.offset), None, None, None, None


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TAD: Tensor, cos_T1D: Tensor, sin_T1D: Tensor, compiled: bool
    ) -> Tensor:
        ctx.save_for_backward(cos_T1D, sin_T1D)  # one pair for all layers
        ctx.passes = _passes(compiled)
        y_TAD: Tensor = ctx.passes.rotate(x_TAD.detach(), cos_T1D, sin_T1D)
        return y_TAD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TAD: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.passes.rotate_back(grad_TAD, *ctx.saved_tensors), None, None, None


def _lean_rotation(compiled: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    """What stands in for ``apply_rotary_pos_emb``."""

    def rotate(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        # Heads stand behind tokens in memory, though not in the shape.
        heads = 2 if unsqueeze_dim == 1 else unsqueeze_dim
        q, k = (x.transpose(1, 2) if unsqueeze_dim == 1 else x for x in (q, k))
        cos, sin = cos.unsqueeze(heads), sin.unsqueeze(heads)
        q, k = (_Rotated.apply(x, cos, sin, compiled) for x in (q, k))
        return (q.transpose(1, 2), k.transpose(1, 2)) if unsqueeze_dim == 1 else (q, k)

    return rotate


_ROTATIONS = {compiled: _lean_rotation(compiled) for compiled in (False, True)}


class FusedModule(nn.Module):
    """What lean modules share; each is mixed into the class of the module that it stands for.

    Attributes:
        compiled: passes are compiled; otherwise they are torch's single operations.
    """

    compiled = False


class RecomputedGatedMLP(FusedModule):
    """``down(act(gate(x)) * up(x))``."""

    act_fn: nn.Module
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        kind = ACTIVATIONS[type(self.act_fn)]
        y: Tensor = self.down_proj(
            _Gated.apply(self.gate_proj(x), self.up_proj(x), kind, self.compiled)
        )
        return y


class RecomputedPackedMLP(FusedModule):
    """The same with gate and up in one matrix (Phi-3, GLM)."""

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

    weight: Tensor
    variance_epsilon: float

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Normed.apply(x, self._weight, self.variance_epsilon, False, self.compiled)
        return y

    def _weight(self) -> Tensor:
        return self.weight


class RecomputedOffsetRMSNorm(RecomputedRMSNorm):
    """The same whose weight counts from 1 (Gemma)."""

    eps: float

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Normed.apply(x, self._weight, self.eps, True, self.compiled)
        return y


class RecomputedRotaryAttention(FusedModule):
    """Attention of any family that rotates queries and keys as Llama does (arXiv 2104.09864)."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _rotating(_class(self), self.compiled)(self, *args, **kwargs)


#: (Modules whose code is like this, the methods that count, what takes their place).
KNOWN: tuple[tuple[Any, tuple[str, ...], type[FusedModule]], ...] = (
    (LlamaRMSNorm, ("forward",), RecomputedRMSNorm),
    (GemmaRMSNorm, ("forward", "_norm"), RecomputedOffsetRMSNorm),
    (LlamaMLP, ("forward",), RecomputedGatedMLP),
    (Phi3MLP, ("forward",), RecomputedPackedMLP),
)


def lean_class(module: nn.Module) -> type[FusedModule] | None:
    """What does the same as this module and saves less; None if nothing is known to."""
    for known, methods, lean in KNOWN:
        if all(_code(_class(module), name) == _code(known, name) for name in methods):
            act = getattr(module, "act_fn", getattr(module, "activation_fn", None))
            return lean if act is None or type(act) in ACTIVATIONS else None
    return RecomputedRotaryAttention if _rotates(module) else None


def lean_gate(experts: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """The activation of stacked experts between their matrices; None if it is one of their own.

    Takes gate and up side by side, [T, 2 I], and gives [T, I].
    """
    act: Any = getattr(experts, "act_fn", None)
    kind = ACTIVATIONS.get(type(act))
    if kind is None or _code(_class(experts), "_apply_gate") != _code_of(_default_apply_gate):
        return None

    def gate(gate_up: Tensor) -> Tensor:
        y: Tensor = _Gated.apply(*gate_up.chunk(2, dim=-1), kind, False)
        return y

    return gate


def make_lean(model: nn.Module) -> None:
    """Let every module that is known save less; others are left as they are."""
    for module in model.modules():
        lean = lean_class(module)
        if lean is not None:
            mixed: Any = lean
            module.__class__ = _mixed(mixed, _class(module))


def compile_lean(model: nn.Module) -> None:
    """From now on, every pass is one loop over memory."""
    for module in model.modules():
        if isinstance(module, FusedModule):
            module.compiled = True


@cache
def _mixed(lean: Any, original: Any) -> Any:
    return type(f"Lean{original.__name__}", (lean, original), {"original": original})


@cache
def _rotating(mixed: Any, compiled: bool) -> Callable[..., Any]:
    """The forward of an attention class, in which one name means another function."""
    forward = mixed.original.forward
    names = {**forward.__globals__, ROTATION: _ROTATIONS[compiled]}
    parts = forward.__name__, forward.__defaults__, forward.__closure__
    made = types.FunctionType(forward.__code__, names, *parts)
    made.__kwdefaults__ = forward.__kwdefaults__
    return made


def _rotates(module: nn.Module) -> bool:
    forward: Any = getattr(type(module), "forward", None)
    names = getattr(forward, "__globals__", {})
    return ROTATION in getattr(getattr(forward, "__code__", None), "co_names", ()) and all(
        _code_of(names.get(known.__name__)) == _code_of(known)
        for known in (apply_rotary_pos_emb, rotate_half)
    )


def _class(module: nn.Module) -> Any:
    return type(module)


def _code(owner: Any, method: str) -> str:
    return _code_of(getattr(owner, method, None))


@cache
def _code_of(function: Any) -> str:
    """What a function does, whatever its annotations and comments."""
    try:
        source = textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):
        return f"{function!r} has no source"
    tree = ast.parse(source).body[0]
    if not isinstance(tree, ast.FunctionDef):
        return source
    for argument in tree.args.args:
        argument.annotation = None
    tree.returns, tree.decorator_list = None, []
    if ast.get_docstring(tree) is not None:
        tree.body = tree.body[1:]
    return ast.dump(tree)
