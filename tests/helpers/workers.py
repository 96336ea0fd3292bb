"""What worker processes run in tests."""

from tqdm import tqdm


def draw_bar(run, stage_cache):
    with tqdm(total=1, disable=True):
        pass
