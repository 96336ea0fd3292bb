"""The chunked machinery of the operators: segments, decays, updates, autograd."""
