"""Two processes, a batch each: gradients of fused blocks under DDP and FSDP2 against the mean of stock's.

Its models are those of tests/blocks, which must be on the path.
"""

import os

import torch
import torch.distributed as dist
from lora_models import batch, fuse, gradients, lora_model
from torch.distributed.fsdp import fully_shard

from sloth_plugins.patches.blocks import decoder_layer

RUNS = []
RUN = decoder_layer._Fused.run


def counted(self, *args):
    RUNS.append(1)
    return RUN(self, *args)


def worst(sharding, checkpointing, expected, ids):
    """The largest relative distance of a gradient."""
    model = lora_model()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    fuse(model)
    if sharding == "ddp":
        whole = torch.nn.parallel.DistributedDataParallel(model)
    else:
        for layer in model.get_base_model().model.layers:
            fully_shard(layer)
        whole = fully_shard(model)
    whole(input_ids=ids, labels=ids).loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    grads = {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in found.items()}
    return max(((grads[name] - expected[name]).norm() / expected[name].norm()).item() for name in expected)


dist.init_process_group("gloo")
decoder_layer._Fused.run = counted
batches = [batch(seed=seed) for seed in (1, 2)]
each = [gradients(lora_model(), ids)[1] for ids in batches]
mean = {name: (each[0][name] + each[1][name]) / 2 for name in each[0]}
for sharding in ("ddp", "fsdp"):
    for checkpointing in (False, True):
        RUNS.clear()
        off = worst(sharding, checkpointing, mean, batches[dist.get_rank()])
        print(f"{sharding} {checkpointing} {len(RUNS)} {'near' if off < 1e-5 else off}\n", end="", flush=True)
dist.barrier()
# Gloo's threads may outlive the interpreter's end.
os._exit(0)
