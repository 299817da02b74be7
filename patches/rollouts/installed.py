"""Which vLLM is here. Its wheels go by several names, so that the module is asked, not the package's metadata."""

from typing import Any

# What tests/rollouts runs on; the inside of vLLM that is used here changes with every release.
TESTED = ">=0.31,<0.32"


def untested() -> str | None:
    """Why the installed vLLM is none that the patches were tested with, or None."""
    try:
        import vllm
    except Exception as error:  # noqa: BLE001 - its extension modules raise anything; the text is passed on
        return f"vLLM cannot be imported ({type(error).__name__}: {error})"
    from packaging.specifiers import SpecifierSet

    version = str(vllm.__version__)
    known = SpecifierSet(TESTED).contains(version.partition("+")[0], prereleases=True)
    return None if known else f"vLLM {version} is here, and {TESTED} is what was tested"


def lora_ranks() -> tuple[int, ...]:
    """The values that vLLM admits for `max_lora_rank`, ascending."""
    from typing import get_args

    from vllm.config.lora import MaxLoRARanks

    return tuple(sorted(get_args(MaxLoRARanks)))


def module_of_trl() -> Any:
    """Where TRL makes engines and clients; its globals `LLM` and `VLLMClient` are what it makes them of."""
    from trl.generation import vllm_generation

    return vllm_generation
