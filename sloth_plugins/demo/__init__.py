"""The demo: a small Llama trained on text made on the spot, stock against patched."""
