"""From a decoder layer and its `BlockLayout` to `Parts`: what it computes, or why it cannot run fused."""

import functools
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from ..kernels.ops.block_norm import Norm
from .activation import activation_of
from .adapters import AdapterCopies
from .group import Group
from .joint_group import group_of
from .projection import Refused, check_call, check_frozen, code_home, read
from .run import Parts

# Longer rows are not held by one program.
MAX_HIDDEN = 16384
ACTIVATION_NAMES = ("act_fn", "activation_fn")
# Fields of a layout that hold the paths of modules.
PATHS = (
    "attention_norm", "attention_output_norm", "mlp_norm", "mlp_output_norm", "q_norm", "k_norm",
    "q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down",
)  # fmt: skip
# Children of an attention that take no part in its forward: upstream computes the tables once for the model.
IDLE = frozenset({"rotary_emb"})


class Layout(Protocol):
    """What is asked of a `BlockLayout`."""

    layer: str
    attention_norm: str | None
    attention_output_norm: str | None
    mlp_norm: str | None
    mlp_output_norm: str | None
    q: str | None
    k: str | None
    v: str | None
    qkv: str | None
    o: str
    gate: str | None
    up: str | None
    gate_up: str | None
    down: str
    q_norm: str | None
    k_norm: str | None
    norm: str
    norm_offset: float
    norm_cast: str
    residual: str
    softcap: str | None
    sliding_window: str | None


@functools.cache
def _packages(layer: str) -> frozenset[str]:
    return frozenset({layer.partition(".")[0], "transformers", "torch", "sloth_plugins"})


def _get(layer: torch.nn.Module, path: str) -> Any:
    found: Any = layer
    for name in path.split("."):
        found = found._modules.get(name)
        if found is None:
            raise Refused(f"it has no {path}")
    return found


@functools.cache
def _is_described(kind: Any, layer: str, norm: str) -> bool:
    """Whether the layer's modeling file knows the class, or one that it derives from, by its name."""
    names = vars(sys.modules[layer.partition(":")[0]])
    known = {torch.nn.LayerNorm} if norm == "layer" else set()
    return any(base in known or names.get(base.__name__) is base for base in kind.__mro__)


def _own(module: torch.nn.Module, name: str, layout: Layout) -> torch.nn.Module:
    """The module, provided that its forward is upstream's or ours, and that nobody watches it."""
    check_call(module, name)
    kind: Any = type(module)
    package = code_home(kind.forward).partition(".")[0]
    if package not in _packages(layout.layer):
        raise Refused(f"the forward of {name} was replaced by {package}")
    if not _is_described(kind, layout.layer, layout.norm):
        raise Refused(f"{name} is a {kind.__module__}.{kind.__qualname__}, which is not the family's")
    return module


def _norm(
    layer: torch.nn.Module, path: str | None, layout: Layout, features: int, device: torch.device, inference: bool
) -> Norm | None:
    if path is None:
        return None
    norm = _own(_get(layer, path), path, layout)
    weight, bias = norm._parameters.get("weight"), norm._parameters.get("bias")
    if weight is None:
        raise Refused(f"{path} has no weight")
    for tensor in (weight, bias):
        if tensor is not None:
            check_frozen(tensor, path, device, inference=inference)
            if tensor.shape != (features,):
                raise Refused(f"{path} has shape {tuple(tensor.shape)} for {features} features")
    eps: Any = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return Norm(
        weight,
        bias,
        eps,
        layout.norm_offset,
        layout.norm == "rms" and layout.norm_cast == "before_weight",
        layout.norm == "layer",
    )


def parent_of(layer: torch.nn.Module, path: str) -> tuple[str, Any]:
    """(path, module) of what holds the part at `path`. Raises `Refused` where the layer has no such part."""
    name = path.rpartition(".")[0]
    return name, _get(layer, name)


def _check_children(layer: torch.nn.Module, attention: Any, mlp: Any, layout: Layout) -> None:
    """Raise `Refused` for a module that the layout does not describe, unless it is dropout that does nothing."""
    described = {path for field in PATHS if (path := getattr(layout, field)) is not None}
    (attention_name, attention), (mlp_name, mlp) = attention, mlp
    described |= {attention_name, mlp_name} | {f"{mlp_name}.{name}" for name in ACTIVATION_NAMES}
    described |= {f"{attention_name}.{name}" for name in IDLE}
    for prefix, parent in (("", layer), (f"{attention_name}.", attention), (f"{mlp_name}.", mlp)):
        for name, child in parent._modules.items():
            if child is None or prefix + name in described:
                continue
            if isinstance(child, torch.nn.Dropout) and (child.p == 0.0 or not child.training):
                check_call(child, prefix + name)
                continue
            what = "dropout" if isinstance(child, torch.nn.Dropout) else type(child).__qualname__
            raise Refused(f"{prefix + name} is {what}, which the layout does not describe")


def _heads(attention: Any, qkv: Group, o: Group) -> tuple[int, int, int]:
    dim = getattr(attention, "head_dim", None)
    if not isinstance(dim, int) or o.k % dim:
        raise Refused(f"head_dim {dim} does not divide the {o.k} features of the attention")
    rows = [projection.shape[0] for projection in qkv.projections]
    if len(rows) == 1:
        n_k = (rows[0] - o.k) // 2
    else:
        n_k = rows[1]
    if sum(rows) != o.k + 2 * n_k or n_k % dim or not n_k or o.k % n_k:
        raise Refused(f"projections of {rows} rows are not heads of {dim} features")
    return o.k // dim, n_k // dim, dim


def _check_sizes(hidden: int, layout: Layout, qkv: Group, o: Group, up: Group, down: Group) -> None:
    """Raise `Refused` where upstream would find that shapes do not fit; kernels would read beyond a row."""
    for group, n_in, n_out in ((qkv, hidden, None), (o, o.k, hidden), (up, hidden, down.k), (down, down.k, hidden)):
        wanted = 2 * n_out if n_out is not None and group is up and layout.gate_up is not None else n_out
        for projection in group.projections:
            if projection.shape[1] != n_in or wanted not in (None, projection.shape[0]):
                raise Refused(f"a projection of shape {projection.shape} does not fit {hidden} features")


def _group(
    layer: torch.nn.Module, paths: Sequence[str | None], x: torch.Tensor, dtype: torch.dtype, inference: bool
) -> Group:
    found = [read(_get(layer, path), path, x, dtype, inference=inference) for path in paths if path is not None]
    return group_of(found, dtype)


def read_layer(
    layer: torch.nn.Module, layout: Layout, x: torch.Tensor, dtype: torch.dtype, *, inference: bool = False
) -> Parts:
    """What the layer computes for an input like x [B, S, h], products being in `dtype`. Raises `Refused`.

    In `inference` nothing is differentiated: weights may be trained, and copies of adapters keep the adapters' dtype
    where autocast does not give them another.
    """
    if x.shape[-1] > MAX_HIDDEN:
        raise Refused(f"a hidden size of {x.shape[-1]} is more than {MAX_HIDDEN}")
    attention, mlp = parent_of(layer, layout.o), parent_of(layer, layout.down)
    _check_children(layer, attention, mlp, layout)
    for name, module in (attention, mlp):
        _own(module, name, layout)
        if any(parameter is not None and parameter.requires_grad for parameter in module._parameters.values()):
            raise Refused(f"{name} has parameters of its own that are trained")
    group = functools.partial(_group, layer, x=x, dtype=dtype, inference=inference)
    qkv = group((layout.qkv, layout.q, layout.k, layout.v))
    o = group((layout.o,))
    up = group((layout.gate_up, layout.gate, layout.up))
    down = group((layout.down,))
    activation = next((getattr(mlp[1], name) for name in ACTIVATION_NAMES if hasattr(mlp[1], name)), None)
    known = activation_of(activation)
    if known is None:
        kind = getattr(activation, "__name__", type(activation).__qualname__)
        raise Refused(f"the activation is {kind}, which is not known or not upstream's as it stands")
    heads = _heads(attention[1], qkv, o)
    _check_sizes(x.shape[-1], layout, qkv, o, up, down)
    norm = functools.partial(_norm, layer, layout=layout, device=x.device, inference=inference)
    attention_norm = norm(layout.attention_norm, features=x.shape[-1])
    q_norm, k_norm = norm(layout.q_norm, features=heads[2]), norm(layout.k_norm, features=heads[2])
    if attention_norm is None:
        raise Refused("it has no norm before its attention")
    mlp_norm = norm(layout.mlp_norm, features=x.shape[-1])
    return Parts(
        qkv=qkv,
        o=o,
        up=up,
        down=down,
        heads=heads,
        attention_norm=attention_norm,
        attention_output_norm=norm(layout.attention_output_norm, features=x.shape[-1]),
        mlp_norm=mlp_norm or attention_norm,
        mlp_output_norm=norm(layout.mlp_output_norm, features=x.shape[-1]),
        qk_norms=None if q_norm is None or k_norm is None else (q_norm, k_norm),
        activation=known,
        is_gated=layout.gate is not None or layout.gate_up is not None,
        is_parallel=layout.residual == "parallel",
        copies=AdapterCopies((qkv, o, up, down), _adapter_dtype((qkv, o, up, down), x, dtype) if inference else dtype),
    )


def _adapter_dtype(groups: Sequence[Group], x: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
    """What peft computes the low-rank terms in: the adapters' own dtype, without autocast."""
    if not torch.is_autocast_enabled(x.device.type):
        for adapter in (adapter for group in groups for adapter in group.present()):
            dtype = torch.promote_types(dtype, torch.promote_types(adapter.a.dtype, adapter.b.dtype))
    return dtype


def attention_function(attention: torch.nn.Module) -> tuple[Any, str]:
    """(the function for the implementation that the config names, its name or "custom"), as upstream looks it up."""
    upstream = next(kind for kind in type(attention).__mro__ if not kind.__module__.startswith("sloth_plugins"))
    names: Mapping[str, Any] = vars(sys.modules[upstream.__module__])
    functions, eager = names.get("ALL_ATTENTION_FUNCTIONS"), names.get("eager_attention_forward")
    implementation = getattr(attention.config, "_attn_implementation", None)
    if functions is None or eager is None or not isinstance(implementation, str):
        raise Refused("upstream's attention has no table of implementations")
    if implementation == "eager":
        return eager, implementation
    try:
        function = functions[implementation]
    except KeyError:
        raise Refused(f"attn_implementation {implementation!r} is not installed") from None
    # Under upstream's name there may be somebody else's function, which must be called for what it does.
    return function, implementation if code_home(function).partition(".")[0] == "transformers" else "custom"


def attention_terms(attention: torch.nn.Module, layout: Layout) -> dict[str, Any]:
    """The window and the softcap of an attention, by the names that upstream's functions take them under."""
    terms = {}
    for keyword, attribute, own in (
        ("sliding_window", layout.sliding_window, "sliding_window"),
        ("softcap", layout.softcap, "attn_logit_softcapping"),
    ):
        if attribute is not None:
            terms[keyword] = getattr(attention, own, getattr(attention.config, attribute, None))
    return terms


def check_attention(attention: Any, parts: Parts, cos: torch.Tensor) -> None:
    """Raise `Refused` for dropout, or for a rotary embedding that does not fit the heads."""
    if attention.training and getattr(attention, "attention_dropout", 0.0):
        raise Refused("its attention has dropout")
    if getattr(attention, "scaling", None) is None:
        raise Refused("its attention has no scaling")
    if cos.shape[-1] > parts.heads[2] or cos.shape[-1] % 2:
        raise Refused(f"a rotary embedding of {cos.shape[-1]} features for heads of {parts.heads[2]}")
    if parts.qk_norms is not None and cos.shape[-1] != parts.heads[2]:
        raise Refused("norms of q and k with a partial rotary embedding")
