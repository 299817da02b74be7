"""What every architecture gets that says where its decoder layers are, and where these keep their parts."""

from collections.abc import Iterator

from sloth_plugins.registry import ArchitectureSpec, Patch, hookimpl


@hookimpl
def sloth_patches(architecture: ArchitectureSpec) -> Iterator[Patch]:
    """`blocks`, for an architecture with a layout; `checkpointing`, for one with a backbone."""
    layout = architecture.layout
    if layout is not None:
        yield Patch(
            name="blocks",
            target=layout.layer,
            replacement="sloth_plugins.patches.blocks.decoder_layer:decoder_layer",
            replaces=layout.replaces,
            requires=layout.requires,
            layout=layout,
            summary="LoRA layers as two blocks with hand-written backwards",
        )
    if architecture.backbone is not None:
        yield Patch(
            name="checkpointing",
            target=architecture.backbone,
            replacement="sloth_plugins.patches.checkpointing.backbone:backbone",
            summary="each layer computes again as little as the memory at hand allows",
        )
