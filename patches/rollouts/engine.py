"""A vLLM engine in this process that serves an adapter: the latest that it was given, under a name of its own.

vLLM finds an adapter by its id, and cached keys and values by the name of the adapter; both are new each time, so that
nothing is ever taken from an older one. The base is not written.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from .adapter import PREFIX, Adapter

Named = tuple[str, torch.Tensor]


class AdapterRefused(Exception):
    """vLLM does not take an adapter; the text says why."""


def serve(llm: Any) -> None:
    """Have an engine (`vllm.LLM`, started with adapters enabled) serve those that it takes."""
    kind: Any = type(llm)
    llm.__class__ = _serving(kind)
    model = llm.apply_model(itself)[0]
    llm._load_weights = model.load_weights
    # Who merges the adapter and loads the result, as TRL does once the patch is reverted, is served as ever.
    model.load_weights = llm._loaded


@functools.cache
def _serving(kind: Any) -> Any:
    """The class of engines `kind`, serving adapters."""

    class ServingLLM(kind):  # type: ignore[misc]  # known at run time only
        request: Any = None
        # Whether its base is the one that is trained, without anything merged into it.
        holds_base = True
        # Called before somebody writes the base.
        before_loading: Callable[[], None] | None = None
        _given = 0
        _load_weights: Any

        def generate(self, *args: Any, **kwargs: Any) -> Any:
            return super().generate(*args, **{"lora_request": self.request, **kwargs})

        def take(self, adapter: Adapter) -> None:
            """Serve an adapter from now on. Raises `AdapterRefused`, and then serves the one before."""
            from vllm.lora.request import LoRARequest

            self._given += 1
            name = f"policy-{self._given}"
            # The path is not read, since the adapter is in memory when it is asked for.
            request = LoRARequest(name, self._given, f"memory:{name}")
            manager = self.collective_rpc(itself)[0].model_runner.lora_manager
            try:
                _register(manager, request.lora_int_id, adapter)
                self.llm_engine.add_lora(request)
            except (ValueError, RuntimeError) as error:
                self.llm_engine.remove_lora(request.lora_int_id)
                raise AdapterRefused(str(error)) from error
            before, self.request = self.request, request
            if before is not None:
                self.llm_engine.remove_lora(before.lora_int_id)

        def load_base(self, params: Iterable[Named]) -> str | None:
            """Give the engine the base that is trained; returns why that cannot be done, or None."""
            model = self.apply_model(itself)[0]
            packed = next((name for name, p in model.named_parameters() if p.numel() == 0), None)
            if packed is not None:
                return f"vLLM has packed {packed.removesuffix('.base_layer.weight')} into a layout of its own"
            self._load_weights((name, param.data) for name, param in params)
            self.holds_base = True
            return None

        def _loaded(self, weights: Iterable[Named]) -> Any:
            """Take a base into which somebody has merged the adapter."""
            self.request, self.holds_base = None, False
            if self.before_loading is not None:
                self.before_loading()
            return self._load_weights(weights)

    return ServingLLM


def itself(found: Any) -> Any:
    """The argument: what vLLM runs on a model or a worker of this process, to get at it."""
    return found


def _mapper(model: Any) -> Any:
    """How vLLM's model names a module of transformers' model, where that differs; else None."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    return None if mapper is None else mapper.get_rename_mapper()


def renaming(model: Any) -> Callable[[str], str]:
    """From names in transformers' model to those in vLLM's."""
    mapper = _mapper(model)
    return (lambda name: name) if mapper is None else (lambda name: mapper._map_name(name) or name)


def _targets(manager: Any) -> set[str]:
    """Modules that may have an adapter, with those that vLLM has fused into one."""
    return {*manager.modules, *(part for parts in manager.packed_modules.values() for part in parts)}


def _register(worker_manager: Any, identity: int, adapter: Adapter) -> None:
    """Make an adapter known by its id, without files. Raises ValueError for what vLLM would refuse in a file."""
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    manager = worker_manager._adapter_manager
    rename, targets = renaming(manager.model), _targets(manager)
    unknown = [module for module in adapter.modules if rename(module) not in targets]
    if unknown:
        raise ValueError(f"{unknown[0]} cannot have an adapter in vLLM's {type(manager.model).__name__}")
    modules = sorted({module.rpartition(".")[2] for module in adapter.modules})
    helper = PEFTHelper(r=adapter.rank, lora_alpha=adapter.rank, target_modules=modules)
    helper.validate_legal(worker_manager.lora_config)
    lora = LoRAModel.from_lora_tensors(
        identity,
        adapter.tensors,
        helper,
        device="cpu",
        dtype=worker_manager.lora_config.lora_dtype,
        weights_mapper=_mapper(manager.model),
    )
    manager.add_adapter(lora)


def base_of(model: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The weights under an adapter, by their names without PEFT."""
    for name, param in model.named_parameters():
        if model.prefix not in name:
            yield name.removeprefix(PREFIX).replace(".base_layer", ""), param
