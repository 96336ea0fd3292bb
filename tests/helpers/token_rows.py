"""The rows of a packed dataset in file order."""

import numpy as np
import torch

from subquad.data import PackedDataset


def in_file_order(rows: PackedDataset) -> dict[str, torch.Tensor]:
    """Each key of all rows of a dataset of one file, `[rows * seq_len]`, without the shuffling of the first epoch."""
    order = np.random.default_rng([rows.seed, 0, 0]).permutation(rows.sources[0].num_rows)
    items = [rows[int(index)] for index in np.argsort(order)]
    return {key: torch.cat([item[key] for item in items]) for key in items[0]}
