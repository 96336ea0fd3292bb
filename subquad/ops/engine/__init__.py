"""The chunked machinery of the operators: segments, decays, state updates, autograd."""
