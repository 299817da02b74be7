"""Generation in place of transformers': fused layers over a static cache, on a GPU a CUDA graph for each step."""
