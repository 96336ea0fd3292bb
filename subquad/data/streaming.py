"""Training text that is read, tokenized and packed while a model trains on it, and continued at any row.

The text may be larger than memory and disk. Its order depends on the seed and the number of processes alone.
"""

import functools
import json
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from subquad.config import Data
from subquad.data import corpora
from subquad.data.encoding import BATCH_CHARACTERS, Encoder, document_batches
from subquad.data.packing import PackedDataset
from subquad.data.sources import Source, resolve_sources
from subquad.utils import UserError

if TYPE_CHECKING:
    import datasets

State = dict[str, Any]
"""A position in a text, of values that JSON has."""
Reader = Callable[[Iterable[Any]], Iterator[corpora.Document]]
"""Makes documents of rows of `datasets`."""


class StreamedDataset(Dataset):
    """The rows of one of several processes, as those of a `PackedDataset`, in ascending order from any row on.

    Each process reads its own shards of each source, or where there are fewer shards than processes, every so many-th
    document. Shards come in a random order, another one in each epoch. Rows are shuffled in blocks of
    `data.shuffle_buffer`: a block is read, then its rows come in a random order. `dataset[i]` exists for any i from the
    last loaded state on; of earlier blocks than the current one no row can be read again.
    """

    def __init__(
        self,
        data: Data,
        tokenizer: PreTrainedTokenizerBase,
        beginning: PackedDataset,
        *,
        seed: int = 0,
        process: int = 0,
        processes: int = 1,
    ):
        """beginning: rows from the beginning of the same text, whose form the rows of the stream have."""
        self.beginning, self.process, self.processes = beginning, process, processes
        assert data.shuffle_buffer is not None
        self.streams = []
        for k, source in enumerate(resolve_sources(data, "train")):
            rows, encoder = open_source(source, process, processes), Encoder(tokenizer, data.assistant_only_loss)
            shape = data.shuffle_buffer, beginning.seq_len, beginning.stride(k)
            self.streams.append(SourceStream(source, *rows, encoder, *shape, [seed, k, process]))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        source, row = self.beginning.schedule[index]
        return self.beginning.make_item(source, self.streams[source].tokens(row))

    def take(self, count: int, start: int, micro_batch: int) -> "StreamedRows":
        """`count` rows of all processes from row `start` on, of which each process reads its own."""
        return StreamedRows(self, count, start, micro_batch)

    def state(self, row: int) -> State:
        """The position of a row, at or after that of the last call."""
        schedule = self.beginning.schedule
        return {"sources": [stream.state(schedule.count(k, row)) for k, stream in enumerate(self.streams)]}

    def load_state(self, states: Sequence[State]) -> None:
        """Continues at the row of the states of all processes.

        Raises:
            UserError: the states are of another number of processes or of another text.
        """
        if len(states) != self.processes:
            raise UserError(
                f"data.shuffle_buffer: got {self.processes} processes for a run that was started with {len(states)}, "
                "expected as many: each streams its own part of the text"
            )
        for stream, state in zip(self.streams, states[self.process]["sources"], strict=True):
            stream.load_state(state)


class StreamedRows(Dataset):
    """The rows of a stage, in the order in which accelerate deals micro-batches to the processes."""

    def __init__(self, stream: StreamedDataset, count: int, start: int, micro_batch: int):
        """count, start: rows of all processes, multiples of `micro_batch` times their number."""
        self.stream, self.count, self.micro_batch = stream, count, micro_batch
        self.start = start // stream.processes

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        turn, own = divmod(index, self.micro_batch * self.stream.processes)
        return self.stream[self.start + turn * self.micro_batch + own % self.micro_batch]

    def state(self, done: int) -> State:
        """The position after `done` rows of all processes."""
        return self.stream.state(self.start + done // self.stream.processes)


def open_source(source: Source, process: int, processes: int) -> tuple["datasets.IterableDataset", Reader]:
    """The rows that a process reads of a source, and what makes documents of them."""
    import datasets
    from datasets.distributed import split_dataset_by_node

    rows: Any
    read: Reader = corpora.unwrap
    if shards := corpora.shards(source):
        options = {"shards": shards, "source": source}
        rows = datasets.IterableDataset.from_generator(corpora.shard_documents, gen_kwargs=options)
    else:
        rows, read = corpora.hub_dataset(source), functools.partial(corpora.hub_documents, source=source)
        rows = rows if source.streaming else rows.to_iterable_dataset()
    if rows.num_shards >= processes:
        return rows.shard(processes, process), read
    return split_dataset_by_node(rows, process, processes), read


class SourceStream:
    """The tokens of the rows of a source in one process, in shuffled blocks."""

    def __init__(
        self,
        source: Source,
        rows: "datasets.IterableDataset",
        read: Reader,
        encoder: Encoder,
        block_rows: int,
        seq_len: int,
        stride: int,
        seed: list[int],
    ):
        """rows, read: of `open_source`. stride: tokens from the start of a row to that of the next. seed: of the order
        in blocks; its first number also of that of the shards."""
        self.source, self.rows, self.read, self.encoder = source, rows, read, encoder
        self.block_rows, self.seq_len, self.stride, self.seed = block_rows, seq_len, stride, seed
        sizes = [(path.name, path.stat().st_size) for path in source.files]
        self.text = zlib.crc32(json.dumps(sizes or [source.name, source.subset, source.split]).encode())
        """Identifies the text, wherever its files lie."""
        self.states: dict[int, State] = {}
        """Positions of the blocks since the last call of `state`, and of the next one."""
        self.load_state({"text": self.text, "block": 0, "epoch": 0, "documents": None, "token": 0})

    def tokens(self, row: int) -> np.ndarray:
        """The `seq_len` tokens of a row, `uint32` with flags."""
        block, offset = divmod(row, self.block_rows)
        if block < self.block:
            raise IndexError(f"row {row}; expected {self.block * self.block_rows} or more, since the stream is beyond")
        while self.block < block or self.block_tokens is None:
            self._read_block()
        start = self.order[offset] * self.stride
        return self.block_tokens[start : start + self.seq_len]

    def state(self, row: int) -> State:
        """The position of a row; forgets those of blocks before it."""
        block = row // self.block_rows
        self.states = {number: state for number, state in self.states.items() if number >= block}
        return self.states[block]

    def load_state(self, state: State) -> None:
        """Continues with the block at whose start the state is."""
        if state["text"] != self.text:
            raise UserError(f"{self.source.label}: got other files than those with which the run was started")
        self.block, self.states = state["block"], {state["block"]: state}
        self.block_tokens: np.ndarray | None = None
        self._batches = self._token_batches(state)
        self._queue: deque[tuple[State, np.ndarray]] = deque()
        """Batches of tokens and their positions, from the one on in which the next block begins, at `_token`."""
        self._token = state["token"]

    def _read_block(self) -> None:
        if self.block_tokens is not None:
            self.block += 1
        end = self._token + self.block_rows * self.stride + self.seq_len - self.stride
        while sum(len(tokens) for _, tokens in self._queue) < end:
            self._queue.append(next(self._batches))
        self.block_tokens = np.concatenate([tokens for _, tokens in self._queue])[self._token : end]
        self.order = np.random.default_rng([*self.seed, self.block]).permutation(self.block_rows)
        self._token += self.block_rows * self.stride
        while len(self._queue) > 1 and self._token >= len(self._queue[0][1]):
            self._token -= len(self._queue.popleft()[1])
        self.states[self.block + 1] = {**self._queue[0][0], "block": self.block + 1, "token": self._token}

    def _token_batches(self, state: State) -> Iterator[tuple[State, np.ndarray]]:
        """The tokens of documents, in arrays of any size, each with the position of its first document."""
        while True:
            # `datasets` shuffles the shards by the number of the epoch, except in epoch 0
            self.rows.set_epoch(1 + self.seed[0] + (state["epoch"] << 32))
            self.rows.load_state_dict(state["documents"])
            is_whole, count = state["documents"] is None, 0
            for batch in document_batches(self.read(self.rows), BATCH_CHARACTERS):
                tokens = self.encoder[batch]
                if isinstance(tokens, Exception):
                    raise tokens
                yield state, tokens
                count += len(tokens)
                state = {**state, "documents": self.rows.state_dict()}
            if is_whole and not count:
                raise UserError(f"{self.source.label}: got no training text for process {self.seed[2]}")
            state = {**state, "epoch": state["epoch"] + 1, "documents": None}
