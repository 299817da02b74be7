"""The fused blocks of every architecture that says where its decoder layer keeps its parts."""

from collections.abc import Iterator

from sloth_plugins.registry import ArchitectureSpec, Patch, hookimpl


@hookimpl
def sloth_patches(architecture: ArchitectureSpec) -> Iterator[Patch]:
    """`blocks`, for an architecture with a layout."""
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
