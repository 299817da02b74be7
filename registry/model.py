"""What an extension declares: architectures, trainers, patches and where a decoder layer keeps its parts.

Everything here is data, frozen and validated when it is built, so a mistake in a plugin is found when the plugin
is loaded and not in the middle of a training run.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from .requirements import malformed

NAME = re.compile(r"[a-z][a-z0-9_]*")
OBJECT_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
CODE_PATH = rf"{OBJECT_PATH.pattern}(\.[A-Za-z_]\w*)?( alone)?"
CODE_PATHS = re.compile(rf"{CODE_PATH}( \| {CODE_PATH})*")
FINGERPRINT = re.compile(r"[0-9a-f]{16}")
GGUF_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*")
ATTRIBUTE_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


class SpecError(ValueError):
    """A declaration that cannot be meant: the message quotes the field and its value."""


def _must_match(pattern: re.Pattern[str], owner: str, field_name: str, value: object, hint: str) -> None:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise SpecError(f"{owner}: {field_name}={value!r} is not {hint}")


def _check_requirements(owner: str, requires: tuple[str, ...]) -> None:
    if isinstance(requires, str) or not all(isinstance(text, str) for text in requires):
        raise SpecError(f"{owner}: requires={requires!r} is not a tuple of PEP 508 strings")
    for text in requires:
        fault = malformed(text)
        if fault is not None:
            raise SpecError(f"{owner}: requires={text!r} is not a PEP 508 requirement: {fault}")


@dataclass(frozen=True, slots=True)
class Supported:
    """The patch is tested on every version of the compat matrix that its requirements admit."""


@dataclass(frozen=True, slots=True)
class Experimental:
    """The patch works where it was tried; `note` says what is not known yet."""

    note: str


@dataclass(frozen=True, slots=True)
class Unsupported:
    """The patch never applies; `reason` says why it is listed all the same."""

    reason: str


Status = Supported | Experimental | Unsupported


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockLayout:
    """Where a decoder layer keeps its parts, as attribute paths below the layer, and how it combines them.

    A part that a family does not have is None. Projections are either separate (`q`, `k`, `v`; `gate`, `up`) or fused
    (`qkv`; `gate_up`), never both. `norm_offset` is what the family adds to a norm's weight (1.0 in Gemma), and
    `norm_cast` says whether the normalised row is rounded to the input's dtype before or after the weight is applied.
    `softcap` and `sliding_window` name config attributes. `replaces` holds the upstream code that the layer calls, as
    in `Patch`, and `requires` PEP 508 strings: the versions whose layer is as described.
    """

    layer: str
    attention_norm: str | None
    mlp_norm: str | None
    o: str
    down: str
    q: str | None = None
    k: str | None = None
    v: str | None = None
    qkv: str | None = None
    gate: str | None = None
    up: str | None = None
    gate_up: str | None = None
    attention_output_norm: str | None = None
    mlp_output_norm: str | None = None
    q_norm: str | None = None
    k_norm: str | None = None
    activation: Literal["silu", "gelu_tanh", "gelu"] = "silu"
    norm: Literal["rms", "layer"] = "rms"
    norm_offset: float = 0.0
    norm_cast: Literal["before_weight", "after_weight"] = "before_weight"
    rotary: Literal["half", "partial_half"] | None = "half"
    residual: Literal["sequential", "parallel"] = "sequential"
    softcap: str | None = None
    sliding_window: str | None = None
    replaces: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()

    _CHOICES = MappingProxyType(
        {
            "activation": ("silu", "gelu_tanh", "gelu"),
            "norm": ("rms", "layer"),
            "norm_cast": ("before_weight", "after_weight"),
            "rotary": ("half", "partial_half", None),
            "residual": ("sequential", "parallel"),
        }
    )

    def __post_init__(self) -> None:
        owner = f"BlockLayout of {self.layer!r}"
        _must_match(OBJECT_PATH, owner, "layer", self.layer, "'package.module:Class'")
        for part in self.__dataclass_fields__:
            value = getattr(self, part)
            if isinstance(value, str) and part not in ("layer", *self._CHOICES):
                _must_match(ATTRIBUTE_PATH, owner, part, value, "an attribute path such as 'self_attn.q_proj'")
        _check_requirements(owner, self.requires)
        for choice, allowed in self._CHOICES.items():
            if getattr(self, choice) not in allowed:
                raise SpecError(f"{owner}: {choice}={getattr(self, choice)!r} is not one of {allowed}")
        separate = (self.q, self.k, self.v)
        if (self.qkv is None) == (None in separate) or (self.qkv is not None and any(separate)):
            raise SpecError(f"{owner}: give either q, k and v, or qkv")
        if (self.up is None) == (self.gate_up is None) or (self.gate is not None and self.up is None):
            raise SpecError(f"{owner}: give either up (with gate where there is one) or gate_up")


@dataclass(frozen=True, slots=True, kw_only=True)
class Patch:
    """One replacement of one upstream forward or function, or of methods of a trainer.

    `target` is the upstream class whose `forward` is replaced (`"package.module:Class"`), or a module-level function
    (`"package.module:function"`); for a function, `within` names the class whose `forward` calls it, and only calls
    made from patched instances of that class see the replacement. `replacement` is `"module:factory"`; the factory
    gets the original callable and returns the new one, which must accept every call that the original accepts.
    In a `TrainerSpec` the target is a trainer's class, and the factory gets the class and returns a mapping of names of
    its methods to what replaces them, functions or staticmethods.
    `formerly` holds other paths under which upstream has had the target; the first path that exists is taken.
    `replaces` holds other upstream code that the patch stands in for or depends on: `"package.module:function"`,
    `"package.module:Class.method"`, or `"package.module:Class"` for its forward. An entry may list alternatives for
    other versions, separated by `" | "`: the first that exists counts, and the patch is left out where none does. What
    a piece of code calls in its own module and class counts as well, unless `" alone"` stands behind it.
    `where` maps config attributes (dotted for nested ones) to the values that the patch is written for. `requires`
    holds PEP 508 strings. `fingerprints` holds those of the upstream code that the patch is written for, of the target
    and of the caller, as `sloth_plugins.fingerprint` computes them; with none, code of which the compat matrix has a
    record must be known to it, and any other that fits the signature is patched. A patch with `default=False` runs only
    when it is selected by name. A patch with a `layout` is one of the layer that the layout describes: its factory gets
    the layout as its second argument.
    A patch of a trainer's `constructor` acts before there is a trainer: its factory gets the class and returns a
    function of the positional and the keyword arguments of a call, which returns those that the class gets instead,
    and a text that says what it has changed, empty where that is nothing.
    """

    name: str
    target: str
    replacement: str
    within: str | None = None
    formerly: tuple[str, ...] = ()
    replaces: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    fingerprints: tuple[str, ...] = ()
    where: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    status: Status = Supported()
    default: bool = True
    summary: str = ""
    layout: BlockLayout | None = None
    constructor: bool = False

    def __post_init__(self) -> None:
        owner = f"Patch {self.name!r}"
        _must_match(NAME, owner, "name", self.name, "a lower-case name such as 'rms_norm'")
        _must_match(OBJECT_PATH, owner, "target", self.target, "'package.module:Class' or 'package.module:function'")
        _must_match(OBJECT_PATH, owner, "replacement", self.replacement, "'package.module:factory'")
        if self.within is not None:
            _must_match(OBJECT_PATH, owner, "within", self.within, "'package.module:Class'")
        for path in self.formerly:
            _must_match(OBJECT_PATH, owner, "formerly", path, "'package.module:Class'")
        if isinstance(self.replaces, str):
            raise SpecError(f"{owner}: replaces={self.replaces!r} is not a tuple of paths")
        for path in self.replaces:
            hint = "'package.module:function', '...:Class' or '...:Class.method', ' alone' behind, or several by ' | '"
            _must_match(CODE_PATHS, owner, "replaces", path, hint)
        for text in self.fingerprints:
            _must_match(FINGERPRINT, owner, "fingerprints", text, "16 hexadecimal digits")
        _check_requirements(owner, self.requires)
        for key, values in self.where.items():
            _must_match(ATTRIBUTE_PATH, owner, "where", key, "a config attribute such as 'hidden_act'")
            if not isinstance(values, tuple) or not values:
                raise SpecError(f"{owner}: where[{key!r}]={values!r} is not a tuple of the values it is written for")
        if not isinstance(self.status, Supported | Experimental | Unsupported):
            raise SpecError(
                f"{owner}: status={self.status!r} is not Supported(), Experimental(note) or Unsupported(reason)"
            )
        object.__setattr__(self, "where", MappingProxyType(dict(self.where)))


def _check_patches(owner: str, patches: tuple[Patch, ...]) -> None:
    if not all(isinstance(patch, Patch) for patch in patches):
        raise SpecError(f"{owner}: patches={patches!r} holds something that is not a Patch")
    names = [patch.name for patch in patches]
    for name in names:
        if names.count(name) > 1:
            raise SpecError(f"{owner}: declares patch {name!r} {names.count(name)} times")


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufFormat:
    """How llama.cpp knows an architecture, so that its checkpoints can be written as GGUF.

    `architecture` is the name in `general.architecture`, one of those of PyPI's gguf. `permuted` says that llama.cpp's
    rotary embedding of it turns neighbours, so that the rows of q and k are written in another order than in the
    checkpoint. What `BlockLayout.norm_offset` adds to a norm's weight is added before the weight is written.
    `metadata` maps GGUF keys, without the architecture before them, to config attributes; one that is absent or None
    is left out. `tensors` maps names of a checkpoint that gguf does not know to GGUF's. `windowed` says whether
    llama.cpp keeps to the config's sliding window. `query_scale` names the config attribute whose inverse square root
    scales q, where llama.cpp does not read it but takes head_dim, or hidden_size / heads for the numbers of layers in
    `query_scale_by_hidden`.
    """

    architecture: str
    permuted: bool = False
    metadata: Mapping[str, str] = field(default_factory=dict)
    tensors: Mapping[str, str] = field(default_factory=dict)
    windowed: bool = False
    query_scale: str | None = None
    query_scale_by_hidden: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        owner = f"GgufFormat {self.architecture!r}"
        _must_match(GGUF_NAME, owner, "architecture", self.architecture, "a name of GGUF such as 'llama'")
        for key, attribute in self.metadata.items():
            _must_match(GGUF_NAME, owner, "metadata", key, "a key of GGUF such as 'attention.sliding_window'")
            _must_match(ATTRIBUTE_PATH, owner, f"metadata[{key!r}]", attribute, "a config attribute")
        for name in ("metadata", "tensors"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchitectureSpec:
    """One architecture: which `config.model_type`s it covers and which patches it has.

    `family` is a name that several architectures share (`qwen` for qwen2 and qwen3): a selection may name either, and
    reports show the family. It defaults to `name`.

    `layout` describes the decoder layer; `backbone` is the class whose forward runs all of them, which are in a
    ModuleList of its own: `"package.module:Class"`.

    `tiny` overrides config attributes so that a model of the architecture is small enough for a test; the contract
    tests and the compat matrix run on every architecture that declares it. Its `"model_type"` names the whole model
    where the architecture is only a part of one, such as the language model of a vision-language model.

    `gguf` says how its checkpoints are exported for llama.cpp; without it they are not.
    """

    name: str
    model_types: tuple[str, ...]
    patches: tuple[Patch, ...]
    family: str = ""
    layout: BlockLayout | None = None
    backbone: str | None = None
    requires: tuple[str, ...] = ()
    tiny: Mapping[str, Any] = field(default_factory=dict)
    gguf: GgufFormat | None = None

    def __post_init__(self) -> None:
        owner = f"ArchitectureSpec {self.name!r}"
        _must_match(NAME, owner, "name", self.name, "a lower-case name such as 'llama'")
        object.__setattr__(self, "family", self.family or self.name)
        _must_match(NAME, owner, "family", self.family, "a lower-case name such as 'llama'")
        if isinstance(self.model_types, str) or not self.model_types:
            raise SpecError(f"{owner}: model_types={self.model_types!r} is not a tuple of config.model_type values")
        _check_patches(owner, self.patches)
        for patch in self.patches:
            if patch.constructor:
                raise SpecError(f"{owner}: patch {patch.name!r} is one of a constructor, which only a TrainerSpec has")
        if self.layout is not None and not isinstance(self.layout, BlockLayout):
            raise SpecError(f"{owner}: layout={self.layout!r} is not a BlockLayout")
        if self.backbone is not None:
            _must_match(OBJECT_PATH, owner, "backbone", self.backbone, "'package.module:Class'")
        if self.gguf is not None and not isinstance(self.gguf, GgufFormat):
            raise SpecError(f"{owner}: gguf={self.gguf!r} is not a GgufFormat")
        _check_requirements(owner, self.requires)
        object.__setattr__(self, "tiny", MappingProxyType(dict(self.tiny)))


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerSpec:
    """Patches of trainers: each `Patch.target` is the class of a trainer, and `where` asks the trainer's `args`.

    A patch is for every trainer whose class is its target or derives from it, whatever model it trains. `family` is a
    name that several specs share (`trl`), as in `ArchitectureSpec`; it defaults to `name`.
    """

    name: str
    patches: tuple[Patch, ...]
    requires: tuple[str, ...] = ()
    family: str = ""

    def __post_init__(self) -> None:
        owner = f"TrainerSpec {self.name!r}"
        _must_match(NAME, owner, "name", self.name, "a lower-case name such as 'trl'")
        object.__setattr__(self, "family", self.family or self.name)
        _must_match(NAME, owner, "family", self.family, "a lower-case name such as 'trl'")
        _check_patches(owner, self.patches)
        for patch in self.patches:
            if patch.within is not None:
                raise SpecError(f"{owner}: patch {patch.name!r} has within={patch.within!r}; a trainer's has none")
        _check_requirements(owner, self.requires)
