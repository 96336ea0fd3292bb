"""Caches in pages of a fixed size: what a server that keeps them there reads is what a cache of the student holds."""

import pytest
import torch

from subquad.modeling.cache import SubquadCache
from subquad.serving.state_pages import StatePage
from subquad.utils import UserError
from tests.helpers.students import MIXERS, all_close, logits, make_student
from tests.helpers.teachers import tiny_teacher

WINDOWED = {
    "window": {"mixer": "attention", "window": 5},
    "sinks": {"mixer": "attention", "window": [3, 5], "sinks": 2},
    "one-token": {"mixer": "attention", "window": 1},
    "memory": {"mixer": "gated_deltanet", "window": 4, "sinks": 2},
    "memory-of-all": {"mixer": "xlstm", "window": 4, "memory": "all"},
    "memory-of-a-head": {"mixer": "kda", "window": [4, 6], "memory_heads": [1], "sinks": 1},
}
CASES = {name: ("plain", {"mixer": name}) for name in MIXERS}
CASES |= {name: ("plain", spec) for name, spec in WINDOWED.items()}
CASES |= {f"mistral-{name}": ("mistral", spec) for name, spec in WINDOWED.items()}
CASES |= {
    "mistral-own": ("mistral", {"mixer": "attention"}),
    "convolution": ("plain", {"mixer": "gla", "short_conv": 4}),
}


class Server:
    """A student whose caches are in pages, which hold random bytes before; sequence i has page `pages[i]`."""

    def __init__(self, student, pages: list[int]):
        self.student, self.pages = student, torch.tensor(pages)
        example = student.new_cache()
        logits(student, torch.zeros(1, 1, dtype=torch.long), past_key_values=example)
        self.layouts = [StatePage(*pair) for pair in zip(student.mixer_layers, example.layers, strict=True)]
        random = torch.Generator().manual_seed(0)
        shapes = [(max(pages) + 1, layout.nbytes + 16) for layout in self.layouts]  # longer than what a layer needs
        memory = [torch.randint(256, shape, dtype=torch.uint8, generator=random) for shape in shapes]
        self.views = [layout.views(x) for layout, x in zip(self.layouts, memory, strict=True)]

    @property
    def settled(self) -> int:
        return max(layout.settled for layout in self.layouts)

    def read(self, sequences: list[int], ids, past_tokens: int, positions):
        """Logits of `ids: [sequences, T]` at `positions: [sequences, T]`, after `past_tokens` tokens."""
        pages = self.pages[sequences]
        layers = [x.load(views, pages, past_tokens) for x, views in zip(self.layouts, self.views, strict=True)]
        found = logits(self.student, ids, past_key_values=SubquadCache(layers), position_ids=positions)
        for layout, views, layer in zip(self.layouts, self.views, layers, strict=True):
            layout.store(views, pages, layer)
        return found


@pytest.mark.parametrize("name", CASES)
def test_sequences_of_several_lengths_share_calls_once_they_are_settled(name):
    """Each sequence is read in pieces; then tokens of all are read in one call, whatever their positions."""
    teacher, spec = CASES[name]
    student = make_student(tiny_teacher(teacher), layer_types={"default": spec})
    ids = torch.randint(3, 61, (3, 40), generator=torch.Generator().manual_seed(1))
    lengths, server = [14, 17, 25], Server(student, [4, 0, 2])
    assert server.settled <= min(lengths)
    for row, length in enumerate(lengths):
        start = 0
        for piece in ids[row : row + 1, :length].split([1, 2, 1, 4, length - 8], dim=1):
            positions = torch.arange(start, start + piece.shape[1])[None]
            found = server.read([row], piece, start, positions)
            start += piece.shape[1]
            assert all_close(found, logits(student, ids[row : row + 1, :start])[:, -piece.shape[1] :])
    for new_tokens in (1, 1, 3):
        positions = torch.tensor(lengths)[:, None] + torch.arange(new_tokens)
        found = server.read([0, 1, 2], ids.gather(1, positions), server.settled, positions)
        lengths = [length + new_tokens for length in lengths]
        for row, length in enumerate(lengths):
            expected = logits(student, ids[row : row + 1, :length])[0, -new_tokens:]
            assert all_close(found[row], expected)


def test_heads_that_see_all_tokens_beside_windows_are_refused():
    student = make_student(tiny_teacher(), layer_types={"default": {"mixer": "attention", "window": [5, "full"]}})
    with pytest.raises(UserError, match="layer 0: some heads see all tokens and others have a window"):
        Server(student, [0])
