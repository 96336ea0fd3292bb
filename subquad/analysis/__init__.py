"""Why a student scores what it scores: mixing matrices, hidden states, layer errors, ablations, recall tasks."""
