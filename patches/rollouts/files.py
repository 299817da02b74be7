"""Adapters as files in shared memory, for an engine in another process of this machine."""

import json
import shutil
import tempfile
import weakref
from pathlib import Path

from .adapter import Adapter

SHARED_MEMORY = Path("/dev/shm")


class AdapterFolder:
    """A folder of adapters, by name; it goes with this object, and with the process at the latest."""

    def __init__(self) -> None:
        parent = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
        self.path = Path(tempfile.mkdtemp(prefix="sloth-plugins-adapters-", dir=parent))
        self._end = weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)

    def write(self, name: str, adapter: Adapter) -> Path:
        """Write an adapter in PEFT's format. Raises OSError, for want of room too, and then leaves nothing of it."""
        from safetensors.torch import save_file

        place = self.path / name
        place.mkdir()
        config = {
            "peft_type": "LORA",
            "r": adapter.rank,
            # The scaling, which is their ratio, is in the matrices.
            "lora_alpha": adapter.rank,
            "target_modules": sorted({module.rpartition(".")[2] for module in adapter.modules}),
        }
        try:
            tensors = {key: tensor.contiguous().cpu() for key, tensor in adapter.tensors.items()}
            save_file(tensors, place / "adapter_model.safetensors")
            (place / "adapter_config.json").write_text(json.dumps(config))
        except Exception:
            self.remove(name)
            raise
        return place

    def remove(self, name: str) -> None:
        """Forget an adapter."""
        shutil.rmtree(self.path / name, ignore_errors=True)
