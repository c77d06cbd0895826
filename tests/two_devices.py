"""Devices that are not there: CPU memory that says it lies on `cuda:0` and `cuda:1`, and refuses to be mixed.

Every tensor that is made on or moved to such a device is remembered by its memory, and says so when it is asked for its
device. Each call of torch that mixes two of them, or one with the CPU, raises as it would on GPUs; numbers are those of
the CPU. So a model that runs here asks for every move that GPUs ask for. What it cannot show: speed, room, streams, and
kernels of GPUs. Calls inside torch's C++ are not seen, backward passes among them: those follow the forward pass.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")
ENGINE: Any = torch.autograd.Variable._execution_engine  # type: ignore[attr-defined]
MOVES = (Tensor.to, Tensor.cpu, Tensor.copy_, Tensor.data.__set__)  # type: ignore[attr-defined]
READS = (Tensor.tolist, Tensor.item, Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.__repr__)
TAKE_CPU_PLACES = (Tensor.__getitem__,)  # a GPU's tensor may be indexed by the CPU's


class MixedDevicesError(Exception):
    """Tensors of two devices met in one call."""


class PretendedDevices(TorchFunctionMode):
    """While it is entered, CUDA devices (and MPS, which has no float64) can be used that are CPU memory."""

    def __init__(self) -> None:
        super().__init__()
        self._places: weakref.WeakKeyDictionary[Any, torch.device] = weakref.WeakKeyDictionary()
        self.moves = 0  # from one pretended device to another
        self._goes_back = False  # gradients that C++ made have no device then

    def place(self, tensor: Tensor) -> torch.device:
        """Give the device that a tensor says it lies on."""
        if tensor.device.type != "cpu":  # meta
            return tensor.device
        return self._places.get(_memory(tensor), CPU)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == Tensor.device.__get__:  # type: ignore[attr-defined]
            return self.place(args[0])
        if func == Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return self.place(args[0]).type == "cuda"
        if func == Tensor.grad.__get__:  # type: ignore[attr-defined]
            gradient = func(*args)
            return gradient if gradient is None else self._put(gradient, self.place(args[0]))
        if func is Tensor.numpy and self.place(args[0]) != CPU:
            raise MixedDevicesError(f"numpy reads no memory of {self.place(args[0])}")
        if func is Tensor.backward:
            with self:  # for layers that run again on the way back, and for hooks; a mode would else be left here
                end, self._goes_back = (torch.ones_like(args[0]),), True
                try:
                    ENGINE.run_backward(args, end, False, False, (), allow_unreachable=True, accumulate_grad=True)
                finally:
                    self._goes_back = False
            return None
        if func in (Tensor.to, Tensor.cpu):
            return self._moved(func, args, kwargs)
        asked = kwargs.get("device")
        if asked is not None and _is_pretended(torch.device(asked)):
            kwargs["device"] = CPU
        found = self._required(func, args, kwargs)
        device = found if asked is None else _numbered(torch.device(asked))
        if func is torch.histc and not args[0].is_floating_point():  # which only GPUs count
            result = func(args[0].float(), *args[1:], **kwargs).to(args[0].dtype)
        else:
            result = func(*args, **kwargs)
        if func in MOVES or (device == CPU and asked is None):
            return result
        for tensor in _tensors(result):
            if _memory(tensor) not in self._places:
                self._put(tensor, device)
        return result

    def _moved(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        tensor, *rest = args
        here, given = self.place(tensor), [*rest, kwargs.get("device"), kwargs.get("dtype"), kwargs.get("other")]
        others = [x for x in given if isinstance(x, Tensor)]
        dtypes = [x for x in given if isinstance(x, torch.dtype)] + [other.dtype for other in others]
        named = [torch.device(x) for x in given if isinstance(x, str | torch.device)] + [self.place(x) for x in others]
        there = CPU if func is Tensor.cpu else _numbered(named[0]) if named else here
        made = Tensor.to(tensor, dtypes[0]) if dtypes else tensor
        if there.type == "meta" or here.type == "meta":
            return made.to(there)
        if (there != here and made is tensor) or kwargs.get("copy"):
            made = made.clone()
        self.moves += there != here and _is_pretended(here) and _is_pretended(there)
        return self._put(made, there)

    def _put(self, tensor: Tensor, device: torch.device) -> Tensor:
        if _is_pretended(device):
            if device.type == "mps" and tensor.dtype == torch.float64:
                raise TypeError("MPS has no float64")
            self._places[_memory(tensor)] = device
        return tensor

    def _required(self, func: Any, args: Any, kwargs: Any) -> torch.device:
        """Give the one device of all that goes into a call; numbers without dimensions may be the CPU's."""
        given = list(_tensors((args, kwargs)))
        places = {self.place(tensor) for tensor in given if tensor.device.type == "cpu"}
        pretended = {place for place in places if place != CPU}
        if len(pretended) > 1:
            raise MixedDevicesError(f"{_name(func)}: {' and '.join(map(str, pretended))}")
        if pretended and CPU in places and func not in MOVES and not self._goes_back:
            first = self.place(given[0])
            ours = [x for x in given if self.place(x) == CPU and x.dim()]
            if ours and not (func in TAKE_CPU_PLACES and first != CPU):
                raise MixedDevicesError(f"{_name(func)}: {next(iter(pretended))} and the CPU")
        return next(iter(pretended), CPU)


def _memory(tensor: Tensor) -> Any:
    while functorch.is_functorch_wrapped_tensor(tensor):  # inside vmap
        tensor = functorch.get_unwrapped(tensor)
    return tensor.untyped_storage()


def _is_pretended(device: torch.device) -> bool:
    return device.type in ("cuda", "mps")


def _numbered(device: torch.device) -> torch.device:
    return torch.device(device.type, 0) if _is_pretended(device) and device.index is None else device


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from _tensors(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _tensors(entry)


def _name(func: Any) -> str:
    return str(getattr(func, "__qualname__", func))
