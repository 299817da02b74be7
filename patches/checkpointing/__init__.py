"""What each layer keeps for its backward: as little recomputed as the memory at hand allows."""
