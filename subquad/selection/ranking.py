"""Which key/value groups, or which layers, a student should keep whole: rankings by several criteria.

In every criterion the units that are not whole see a window and the first tokens; nothing is trained.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from subquad import progress
from subquad.mixers import ATTENTION
from subquad.modeling.attention.discovery import AttentionInfo, discover_attention
from subquad.modeling.layer_types import FULL
from subquad.selection.texts import Texts, plain_texts, retrieval_texts
from subquad.selection.windows import WHOLE, WindowedReader, Windows
from subquad.utils import UserError, kl_divergence, nearest

Unit = tuple[int, int | None]
"""A layer and one of its key/value heads; None: all of them."""
UNITS = ("group", "layer")
TEXT_TOKENS = 512
ROWS = 4
CANDIDATES = 3
"""Units whose retrieval score is measured again, for each one that is kept."""
HALO_EPSILON = 1e-3
"""In nats: about the noise of the loss."""


class RankedUnit(NamedTuple):
    """A layer, its key/value head (None: the whole layer), and its score; higher scores are kept first."""

    layer: int
    kv_head: int | None
    score: float


def rank_groups(
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    haystack: Tensor,
    by: str = "retrieval",
    unit: str = "group",
    keep: int = 8,
    window: int = 64,
    sinks: int = 4,
    seed: int = 0,
    attention_layers: Sequence[AttentionInfo] | None = None,
) -> list[RankedUnit]:
    """Ranks the key/value groups or the layers of a teacher, the most needed first.

    Args:
        haystack: token ids `[N]` of natural text, a few thousand.
        by: a criterion of `CRITERIA`; the functions there define the scores.
        unit: "group" or "layer".
        keep: how many units the student will keep whole.
        window, sinks: what the others see.
        seed: of the retrieval texts.
        attention_layers: what `discover_attention(teacher)` returned. None: it is called here.

    Returns:
        All units. Those with the teacher's own window, if it is no larger than `window`, are last with score 0.

    Raises:
        UserError: an unknown criterion or unit; "uniform" for groups; more units kept than there are; too little text.
    """
    for name, value, valid in (("by", by, CRITERIA), ("unit", unit, UNITS)):
        if value not in valid:
            raise UserError(f"{name}: got {value!r}{nearest(value, valid)}")
    layers = discover_attention(teacher) if attention_layers is None else attention_layers
    ranking = Ranking(teacher, tokenizer, haystack, layers, unit, keep, window, sinks, seed)
    if not 1 <= keep <= len(ranking.units):
        raise UserError(f"keep: got {keep}, expected a number from 1 to {len(ranking.units)}, the number of {unit}s")
    scores = CRITERIA[by](ranking)
    scores = first_then(scores, dict.fromkeys(ranking.units, 0.0))
    return [RankedUnit(*each, score) for each, score in scores.items()]


def top_groups(
    teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, haystack: Tensor, keep: int, **options: Any
) -> list[tuple[int, int]]:
    """Layer and key/value head of the groups to keep: the first `keep` of `rank_groups(..., **options)`."""
    ranking = rank_groups(teacher, tokenizer, haystack, keep=keep, **options)
    return [(each.layer, each.kv_head) for each in ranking[:keep] if each.kv_head is not None]


class Ranking:
    """What the criteria have in common: the units, their windows, and the model that reads with them."""

    def __init__(
        self,
        teacher: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        haystack: Tensor,
        layers: Sequence[AttentionInfo],
        unit: str,
        keep: int,
        window: int,
        sinks: int,
        seed: int,
    ):
        self.teacher, self.tokenizer, self.haystack, self.layers = teacher, tokenizer, haystack, layers
        self.unit, self.keep, self.window, self.sinks, self.seed = unit, keep, window, sinks, seed
        self.heads = [info.spec.num_kv_heads for info in layers]
        each = [range(heads) if unit == "group" else [None] for heads in self.heads]
        self.units: list[Unit] = [(layer, head) for layer, heads in enumerate(each) for head in heads]
        limits = [info.spec.window for info in layers]
        self.wide = [each for each in self.units if (limits[each[0]] or WHOLE) > window]
        """The units that the window would limit."""
        limit = getattr(teacher.config.get_text_config(), "max_position_embeddings", None) or TEXT_TOKENS
        self.length = min(TEXT_TOKENS, limit)

    def new_reader(self) -> WindowedReader:
        return WindowedReader(self.teacher, self.layers, self.sinks)

    def needles(self) -> Texts:
        # the endings take up to a quarter of the text
        return retrieval_texts(self.tokenizer, self.haystack, 3 * self.length // 4, ROWS, self.window, self.seed)

    def text(self) -> Texts:
        return plain_texts(self.haystack, self.length, ROWS)

    def only(self, whole: Collection[Unit]) -> dict[int, tuple[int, ...]]:
        """The windows where only these units are whole."""
        return {
            layer: tuple(WHOLE if {(layer, head), (layer, None)} & set(whole) else self.window for head in range(heads))
            for layer, heads in enumerate(self.heads)
        }

    def measure(
        self, reader: WindowedReader, window: int, score: Callable[[Tensor], float], units: Sequence[Unit]
    ) -> dict[Unit, float]:
        """The score of the logits where one of `units` after another has `window`, and the rest is as in `read`."""
        scores = {}
        with progress.bar(len(units), f"ranking {self.unit}s", f"{self.unit}s", delay=3) as bar:
            for layer, head in units:
                own = reader.windows[layer]
                changed: Windows = {layer: tuple(window if head in (None, i) else old for i, old in enumerate(own))}
                scores[layer, head] = score(reader.logits(changed))
                bar.update()
        return scores

    def ablate(self, reader: WindowedReader, texts: Texts, units: Sequence[Unit], whole: Collection[Unit]) -> Any:
        """The rise of the loss, in nats per token, where one of `units` is cut to the window, of those that are
        `whole`; the highest first."""
        intact = reader.loss(reader.read(texts, self.only(whole)))
        losses = self.measure(reader, self.window, reader.loss, units)
        return by_score({each: loss - intact for each, loss in losses.items()})


def by_score(scores: dict[Unit, float]) -> dict[Unit, float]:
    """The highest first; of equal ones the first layer."""
    return dict(sorted(scores.items(), key=lambda item: -item[1]))


def first_then(scores: dict[Unit, float], others: dict[Unit, float]) -> dict[Unit, float]:
    """`scores`, then those of `others` for units without one."""
    return scores | {unit: score for unit, score in others.items() if unit not in scores}


def retrieval(ranking: Ranking) -> dict[Unit, float]:
    """The rise of the loss of answers, in nats per token, when the unit is cut to the window (ablation on synthetic
    retrieval, arXiv 2602.11374, there with zeros in place of a window).

    All other units are whole at first. Then the `CANDIDATES * keep` highest are measured again with all others cut,
    which take over less: these come first, in the order of their new scores.
    """
    reader, texts = ranking.new_reader(), ranking.needles()
    first = ranking.ablate(reader, texts, ranking.wide, ranking.units)
    candidates = list(first)[: CANDIDATES * ranking.keep]
    return first_then(ranking.ablate(reader, texts, candidates, candidates), first)


def kl(ranking: Ranking) -> dict[Unit, float]:
    """The fall of KL(teacher || student) on plain text, in nats per token, when the unit alone is whole (GA-S2 of
    arXiv 2512.20569, without its training, and all at once in place of one after another)."""
    reader, texts = ranking.new_reader(), ranking.text()
    log_p = reader.read(texts, ranking.only(ranking.units)).float().log_softmax(-1)

    def divergence(logits: Tensor) -> float:
        return kl_divergence(log_p.exp(), log_p, logits.float().log_softmax(-1)).mean().item()

    cut = divergence(reader.read(texts, ranking.only(())))
    found = ranking.measure(reader, WHOLE, divergence, ranking.wide)
    return by_score({each: cut - value for each, value in found.items()})


def halo(ranking: Ranking) -> dict[Unit, float]:
    """HALO's importance (arXiv 2601.22156): (max R - R_i) / (max C - C_i + epsilon), where R_i is recall and C_i
    quality on short texts with unit i cut, and the maxima are over units: high where recall needs the unit and the
    rest does not.

    R and C are mean log-likelihoods of answers and of plain text in place of the paper's accuracies, and epsilon is
    1e-3 nats in place of 1e-10, which would make the unit of the highest C the first.
    """
    reader = ranking.new_reader()
    losses = [
        ranking.ablate(reader, texts, ranking.wide, ranking.units) for texts in (ranking.needles(), ranking.text())
    ]
    rises = [{each: rise - min(one.values()) for each, rise in one.items()} for one in losses]
    return by_score({each: rises[0][each] / (rises[1][each] + HALO_EPSILON) for each in ranking.wide})


def uniform(ranking: Ranking) -> dict[Unit, float]:
    """1 for `keep` evenly spaced layers, 0 for the others."""
    if ranking.unit != "layer":
        raise UserError(f"by: got 'uniform' for {ranking.unit}s, expected it for layers")
    count = len(ranking.units)
    chosen = {(2 * i + 1) * count // (2 * ranking.keep) for i in range(ranking.keep)}
    return by_score({each: float(each[0] in chosen) for each in ranking.units})


CRITERIA: dict[str, Callable[[Ranking], dict[Unit, float]]] = {
    "retrieval": retrieval,
    "kl": kl,
    "halo": halo,
    "uniform": uniform,
}


def kept_layer_types(
    kept: Sequence[RankedUnit], heads: Sequence[int], window: int = 64, sinks: int = 4
) -> dict[str, Any]:
    """The `layer_types` of a student that keeps these units whole; the other groups see the window and the sinks.

    heads: number of key/value heads of each layer.
    """
    types: dict[str, Any] = {"default": {"mixer": ATTENTION, "window": window, "sinks": sinks}}
    for layer in sorted({unit.layer for unit in kept}):
        own = {unit.kv_head for unit in kept if unit.layer == layer}
        windows = [FULL if {None, head} & own else window for head in range(heads[layer])]
        types[str(layer)] = ATTENTION if set(windows) == {FULL} else {**types["default"], "window": windows}
    return types
