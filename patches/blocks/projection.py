"""What a projection of a decoder layer computes right now: its frozen base weight and the one active LoRA adapter.

peft and bitsandbytes are known by the names of their classes, so neither is imported. Whatever is not one of the kinds
described here is refused with a reason, and the layer then runs upstream's forward.
"""

import functools
from dataclasses import dataclass
from types import MethodType
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch.nn.modules.module import _has_any_global_hook

from ..kernels.four_bit_weight import FourBit, of_quant_state
from ..kernels.watched import is_watched, only_moves_inputs

Kind = Literal["dense", "four_bit", "lora"]

_KINDS: dict[str, Kind] = {
    "torch.nn.modules.linear.Linear": "dense",
    "bitsandbytes.nn.modules.Linear4bit": "four_bit",
    "bitsandbytes.nn.modules.LinearNF4": "four_bit",
    "bitsandbytes.nn.modules.LinearFP4": "four_bit",
    "peft.tuners.lora.layer.Linear": "lora",
    "peft.tuners.lora.bnb.Linear4bit": "lora",
}
_PARAMETERS = frozenset({"torch.nn.parameter.Parameter", "torch.Tensor", "bitsandbytes.nn.modules.Params4bit"})
_DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})


class Refused(Exception):
    """Why a layer cannot run fused now; the text is for the user."""


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """A low-rank term: scale * dropout(x) @ a.T @ b.T, with a [r, in] and b [out, r]."""

    a: torch.nn.Parameter
    b: torch.nn.Parameter
    scale: float
    dropout: float


@dataclass(frozen=True, slots=True, eq=False)
class Projection:
    """A linear layer [out, in]: `weight` is dense or four-bit, `bias` [out] or None, `adapter` the active one, if any.

    `base` is the module that owns the weight.
    """

    base: torch.nn.Module
    weight: torch.Tensor | FourBit
    bias: torch.Tensor | None
    adapter: Adapter | None
    shape: tuple[int, int]


def _qualified(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def code_home(function: Any) -> str:
    """The module that a function was compiled in: `functools.wraps` copies names, but not this."""
    function = getattr(function, "__func__", getattr(function, "func", function))
    return str(getattr(function, "__globals__", {}).get("__name__", ""))


@functools.cache
def _kind_with(kind: type, forward: Any) -> Kind | None:
    package = kind.__module__.partition(".")[0]
    return _KINDS.get(_qualified(kind)) if code_home(forward).partition(".")[0] == package else None


def _kind(kind: Any) -> Kind | None:
    """What a class is, provided that its forward is its own package's now."""
    return _kind_with(kind, kind.forward)


def _is_own(forward: Any, module: torch.nn.Module) -> bool:
    """Whether it is the method of the module's class, which some code keeps in the instance."""
    return isinstance(forward, MethodType) and forward.__self__ is module and forward.__func__ is type(module).forward


def _is_idle(hook: Any) -> bool:
    """Whether it is transformers' hook for capturing outputs, which stays once installed, and nothing is captured."""
    if code_home(hook) != "transformers.utils.output_capturing":
        return False
    collector = hook.__globals__.get("_active_collector")
    return collector is not None and not collector.get()


def _has_only_idle_hooks(module: torch.nn.Module) -> bool:
    others = module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    if others or _has_any_global_hook():  # type: ignore[no-untyped-call]  # torch's
        return False
    return all(_is_idle(hook) for hook in module._forward_hooks.values())


def check_call(module: torch.nn.Module, name: str) -> None:
    """Raise `Refused` if anybody watches or has replaced this module's forward."""
    held = vars(module)
    hook, slot = held.get("_hf_hook"), "forward"
    if hook is not None:
        if not only_moves_inputs(hook):
            raise Refused(f"{name} has a hook of accelerate's ({type(hook).__name__})")
        if code_home(held.get("forward")).partition(".")[0] == "accelerate":
            slot = "_old_forward"
    if slot in held and not _is_own(held[slot], module):
        raise Refused(f"the forward of {name} was replaced")
    if is_watched(module) and not _has_only_idle_hooks(module):
        raise Refused(f"{name} has hooks")


def _check_tensor(tensor: torch.Tensor, name: str, device: torch.device) -> None:
    if _qualified(type(tensor)) not in _PARAMETERS or hasattr(tensor, "ds_id") or hasattr(tensor, "_fsdp_flattened"):
        raise Refused(f"{name} is sharded, or no plain tensor ({_qualified(type(tensor))})")
    if tensor.device != device:
        raise Refused(f"{name} is on {tensor.device}, the input on {device}")


def check_frozen(tensor: torch.Tensor, name: str, device: torch.device, *, inference: bool = False) -> None:
    """Raise `Refused` unless a tensor of the base is plain, on the device and, but in `inference`, frozen."""
    _check_tensor(tensor, name, device)
    if tensor.requires_grad and not inference:
        raise Refused(f"{name} is trained")
    if tensor.dtype not in _DTYPES:
        raise Refused(f"{name} is in {tensor.dtype}")


# Quant states are read once; a module that was quantised anew has another one, or other memory.
_four_bit: WeakKeyDictionary[torch.nn.Module, tuple[Any, int, FourBit]] = WeakKeyDictionary()


def _four_bit_of(module: Any, name: str) -> FourBit:
    weight = module.weight
    state = getattr(weight, "quant_state", None) or getattr(module, "quant_state", None)
    if state is None:
        raise Refused(f"{name} has not been quantised yet")
    known = _four_bit.get(module)
    if known is not None and known[0] is state and known[1] == weight.data_ptr():
        return known[2]
    read = of_quant_state(weight.data, state)
    if isinstance(read, str):
        raise Refused(f"{name}: {read}")
    _four_bit[module] = (state, weight.data_ptr(), read)
    return read


def _base(
    module: Any, name: str, x: torch.Tensor, compute: torch.dtype, inference: bool
) -> tuple[torch.Tensor | FourBit, Any]:
    """The weight and bias of a module without adapters."""
    kind = _kind(type(module))
    if kind not in ("dense", "four_bit"):
        raise Refused(f"{name} is a {_qualified(type(module))}")
    check_call(module, name)
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if weight is None:
        raise Refused(f"the weight of {name} is parametrised")
    if bias is not None:
        check_frozen(bias, f"the bias of {name}", x.device, inference=inference)
    if kind == "dense":
        check_frozen(weight, f"the weight of {name}", x.device, inference=inference)
        if weight.dtype is not compute and not torch.is_autocast_enabled(x.device.type):
            raise Refused(f"the weight of {name} is in {weight.dtype}, its input in {compute}")
        if weight.shape != (module.out_features, module.in_features):
            raise Refused(f"the weight of {name} is sharded")
        return weight, bias
    _check_tensor(weight, f"the weight of {name}", x.device)
    if not module.compute_type_is_set:
        module.set_compute_type(x)
        module.compute_type_is_set = True
    if module.compute_dtype not in (None, compute, torch.float32) or (
        module.compute_dtype is torch.float32
        and compute is not torch.float32
        and not torch.is_autocast_enabled(x.device.type)
    ):
        raise Refused(f"{name} computes in {module.compute_dtype}, its input is in {compute}")
    four_bit = _four_bit_of(module, name)
    if x.device.type == "cpu" and four_bit.shape[1] % four_bit.blocksize:
        # Its kernel for the CPU takes other scales than the one for a GPU there, and stock training has those.
        raise Refused(f"bitsandbytes reads {name}, whose rows are no whole blocks, in a way of its own on a CPU")
    if four_bit.shape != (module.out_features, module.in_features):
        raise Refused(f"the weight of {name} is sharded")
    return four_bit, bias


def _adapter(module: Any, name: str, x: torch.Tensor, compute: torch.dtype, inference: bool) -> Adapter | None:
    if module.merged:
        raise Refused(f"the adapter of {name} is merged")
    if module.disable_adapters:
        return None
    active = [adapter for adapter in module.active_adapters if adapter in module.lora_A]
    if not active:
        return None
    if len(active) > 1:
        raise Refused(f"{name} has {len(active)} active adapters")
    adapter = active[0]
    if adapter in module.lora_variant or module.use_dora.get(adapter):
        kind = type(module.lora_variant.get(adapter)).__name__
        raise Refused(f"{name} has a variant of LoRA ({kind})")
    if not getattr(module, "cast_input_dtype_enabled", True):
        raise Refused(f"peft was told not to cast the input of {name}")
    a_layer, b_layer = module.lora_A[adapter], module.lora_B[adapter]
    for layer, part in ((a_layer, "lora_A"), (b_layer, "lora_B")):
        if _kind(type(layer)) != "dense":
            raise Refused(f"{part} of {name} is a {_qualified(type(layer))}")
        check_call(layer, f"{part} of {name}")
        if layer._parameters.get("bias") is not None:
            raise Refused(f"{part} of {name} has a bias")
    a, b = a_layer._parameters.get("weight"), b_layer._parameters.get("weight")
    if a is None or b is None:
        raise Refused(f"the adapter of {name} is parametrised")
    for tensor in (a, b):
        _check_tensor(tensor, f"the adapter of {name}", x.device)
        if tensor.dtype not in _DTYPES:
            raise Refused(f"the adapter of {name} is in {tensor.dtype}")
        if tensor.dtype is not compute and not inference and not torch.is_autocast_enabled(x.device.type):
            raise Refused(f"the adapter of {name} is in {tensor.dtype}, its input in {compute}, without autocast")
    dropout = module.lora_dropout[adapter]
    if type(dropout) not in (torch.nn.Identity, torch.nn.Dropout):
        raise Refused(f"the dropout of {name} is a {_qualified(type(dropout))}")
    check_call(dropout, f"the dropout of {name}")
    p = dropout.p if dropout.training and isinstance(dropout, torch.nn.Dropout) else 0.0
    scale = module.scaling[adapter]
    if not isinstance(scale, float | int):
        raise Refused(f"the scaling of {name} is a {_qualified(type(scale))}")
    return Adapter(a, b, float(scale), p)


def read(
    module: torch.nn.Module, name: str, x: torch.Tensor, compute: torch.dtype, *, inference: bool = False
) -> Projection:
    """Read a projection for an input like `x` that is computed with in `compute`. Raises `Refused`.

    In `inference` nothing is differentiated: base weights may be trained, and adapters may have a dtype of their own.
    """
    adapter = None
    base: Any = module
    if _kind(type(module)) == "lora":
        check_call(module, name)
        base = module.base_layer
        adapter = _adapter(module, name, x, compute, inference)
        if base.__class__.__name__ == "Linear" and getattr(module, "fan_in_fan_out", False):
            raise Refused(f"{name} keeps its weight transposed")
    weight, bias = _base(base, name, x, compute, inference)
    shape = (base.out_features, base.in_features)
    if adapter is not None:
        a, b = adapter.a, adapter.b
        if a.dim() != 2 or b.dim() != 2 or a.shape[1] != shape[1] or b.shape[0] != shape[0] or a.shape[0] != b.shape[1]:
            raise Refused(f"the adapter of {name} has shapes {tuple(a.shape)} and {tuple(b.shape)}, its base {shape}")
    return Projection(base, weight, bias, adapter, shape)
