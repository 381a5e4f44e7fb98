"""A simulated device other than the CPU, whose operations the CPU computes.

Like a GPU it refuses to mix tensors of host and device, and kernels that only CPUs have; like NCCL
it refuses to send tensors of the host. It counts where host and GPU would wait for each other:
values that are read, sizes that depend on values, copies without ``non_blocking``. Code for GPUs
therefore runs and is compared on a machine without one, except CUDA's own kernels, streams and
branches (FlexAttention, pinned memory).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

aten = torch.ops.aten
#: May read one side and write to the other.
COPIES = {aten._to_copy.default, aten.copy_.default}
#: The host reads a value, or cannot know the size of a result before it has.
WAITS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten._unique2.default,
    aten.unique_consecutive.default,
    aten.unique_dim.default,
    aten.masked_select.default,
    aten.repeat_interleave.Tensor,
    aten.bincount.default,
    aten.equal.default,
}
#: Where a mask is turned into places.
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}


class _Backend(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:  # asked for where layers are recomputed
        return [torch.bfloat16]


backend_registration._setup_privateuseone_for_python_backend("other", backend_module=_Backend())
DEVICE = torch.device("other", 0)


class Waits:
    """Counts how often host and device waited for each other."""

    count = 0


class OnDevice(Tensor):
    """A tensor of the device, and the CPU tensor that holds its values."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor) -> OnDevice:
        made: OnDevice = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            raw.shape,
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=DEVICE,
        )
        made.raw = raw
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"OnDevice({self.raw!r})"

    @property
    def data(self) -> OnDevice:  # type: ignore[override]
        return OnDevice(self.raw.detach())

    @data.setter
    def data(self, other: OnDevice) -> None:
        Tensor.data.__set__(self, other)  # type: ignore[attr-defined]
        self.raw = other.raw

    def untyped_storage(self) -> Any:
        return self.raw.untyped_storage()

    # Values are read here, as torch's own functions abort the threads that run backward.

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def item(self) -> Any:
        return self.cpu().item()

    def __bool__(self) -> bool:
        return bool(self.cpu())

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors: list[Tensor] = []
    raw = _unwrap(args, tensors)
    raw_options = {name: _unwrap(value, tensors) for name, value in kwargs.items()}
    device = kwargs.get("device")
    here = [tensor for tensor in tensors if not isinstance(tensor, OnDevice)]
    there = len(here) < len(tensors)
    if there and "_for_cpu" in func.name():
        raise RuntimeError(f"{func}: only a CPU has this kernel")
    if here and there and func not in COPIES:
        # A number is sent along with a kernel that works on each element; all else is not.
        sent = torch.Tag.pointwise in func.tags
        here = [x for x in here if not (sent and x.dim() == 0)]
        if here:
            raise RuntimeError(f"{func}: a tensor on {DEVICE} and one on the CPU {here[0].shape}")
    stays_here = device is not None and torch.device(device).type == "cpu"
    _count(func, args, kwargs, there)
    if device is not None:
        raw_options["device"] = torch.device("cpu")
    if func is aten.resize_.default:
        args[0].data = OnDevice(func(*raw, **raw_options))
        return args[0]
    out = func(*raw, **raw_options)
    if func is aten.copy_.default:
        return args[0]
    if stays_here:
        return out
    wrapped = _wrap(out)
    if func in COPIES or not there or not _has_aliases(func):
        return wrapped
    return return_and_correct_aliasing(func, args, kwargs, wrapped)


def _unwrap(value: Any, tensors: list[Tensor]) -> Any:
    """Return an argument with the tensors' values; add its tensors to the list."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return value.raw if isinstance(value, OnDevice) else value
    if isinstance(value, list | tuple):
        return [_unwrap(item, tensors) for item in value]
    return value


def _wrap(out: Any) -> Any:
    """Return a result with its tensors on the device."""
    if isinstance(out, Tensor):
        # What is to be conjugated is: a wrapper does not carry that it will be.
        return OnDevice(out.resolve_conj())
    if isinstance(out, list | tuple):
        return type(out)(map(_wrap, out))
    return out


@functools.cache
def _has_aliases(func: Any) -> bool:
    return any(result.alias_info is not None for result in func._schema.returns)


def _count(func: Any, args: Any, kwargs: dict[str, Any], there: bool) -> None:
    masks = func in INDEXED and any(x is not None and x.dtype == torch.bool for x in args[1])
    if func is aten.copy_.default:
        across = isinstance(args[0], OnDevice) != isinstance(args[1], OnDevice)
        waited_for = across and not (args[2] if len(args) > 2 else kwargs.get("non_blocking"))
    elif func is aten._to_copy.default:
        target = kwargs.get("device")
        across = target is not None and (torch.device(target).type == DEVICE.type) != there
        waited_for = across and not kwargs.get("non_blocking")
    else:
        waited_for = there and (func in WAITS or masks)
    Waits.count += waited_for


class _Factories(TorchDispatchMode):
    """``torch.empty`` and its like with the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        sends = func.namespace == "c10d" and func is not torch.ops.c10d.barrier.default
        if sends and OnDevice not in types:
            raise RuntimeError(f"{func}: NCCL sends no tensors of the host")
        if OnDevice in types or (device is not None and torch.device(device).type == DEVICE.type):
            return _run(func, args, kwargs)
        return func(*args, **kwargs)


class _Literals(TorchFunctionMode):
    """``torch.tensor`` with the device, lists as places: what no dispatch sees."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor):
            device = kwargs.pop("device", None)
            made = func(*args, **kwargs)
            return made if device is None else made.to(device)
        if func is Tensor.__getitem__ and isinstance(args[0], OnDevice):
            places = args[1] if isinstance(args[1], tuple) else (args[1],)
            sent = (torch.tensor(p).to(DEVICE) if isinstance(p, list) else p for p in places)
            return func(args[0], tuple(sent))
        return func(*args, **kwargs)


@contextmanager
def other_device() -> Iterator[torch.device]:
    """Make the device available within the context."""
    with ExitStack() as stack:
        stack.enter_context(_Factories())
        stack.enter_context(_Literals())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield DEVICE
