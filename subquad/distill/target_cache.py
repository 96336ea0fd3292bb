"""Sparse targets of the teacher on disk: computed once for each row of text, read by every run and every epoch."""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from subquad import __version__, progress
from subquad.config import EndToEndStage
from subquad.data.packing import IGNORE_INDEX, next_labels
from subquad.distill.lm_head import Head, last_outputs
from subquad.distill.objective import Batch, collate, slices
from subquad.distill.teacher_targets import REDUCTIONS, SparseTargets
from subquad.utils import UserError, acquire, cache_dir, probe_output, saving, tensor_digest

if TYPE_CHECKING:
    import pyarrow

logger = logging.getLogger(__name__)
PART_TOKENS = 2**17
"""Tokens of a file of the cache."""
PASS_TOKENS = 2**12
"""Tokens in a forward pass of the teacher."""
CHUNK = 128
"""Positions whose distributions exist at a time."""
COLUMNS = ("ids", "weights", "counts", "outside", "entropy")
"""Arrays of a row: ids and weights of all its tokens, and of each position that is in the loss the number of tokens,
the probability of all others (top_k) and the entropy. A weight is a number of draws, or a probability in float16."""
Row = tuple[np.ndarray, ...]


class TargetCache:
    """A directory of Arrow files, mapped into memory. A file is named by its digest and written completely or not at
    all. A row is found by the digest of its tokens, positions and labels, whatever its place in a run. What is drawn
    depends on the row alone, so that runs with other seeds read the same targets."""

    def __init__(self, teacher: PreTrainedModel, head: Head | None, stage: EndToEndStage):
        """head: that of the teacher, if it can be read. The dtype of autocast is part of the cache's key."""
        self.teacher, self.head, self.stage = teacher, head, stage
        device = teacher.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else teacher.dtype
        weights = tensor_digest(teacher.state_dict().values())
        method = [stage.teacher_targets, stage.target_size, str(dtype)]
        key = json.dumps([__version__, teacher.config.to_json_string(), weights, *method])
        self.directory = cache_dir() / "targets" / hashlib.sha256(key.encode()).hexdigest()[:32]
        self.rows: dict[bytes, tuple[pyarrow.RecordBatch, int]] = {}
        """The file of a row, and its place there."""

    def __call__(self, batch: Batch) -> SparseTargets:
        """The targets of the positions of a batch that are in the loss, in order. `fill` has had its rows."""
        rows = zip(*(self.arrays(key) for key in row_keys(batch)), strict=True)
        ids, weights, counts, outside, entropy = (np.concatenate(arrays) for arrays in rows)
        columns, starts = np.arange(counts.max(initial=1)), counts.cumsum(dtype=np.int64) - counts
        present = columns < counts[:, None]
        index = starts[:, None] + np.where(present, columns, 0)  # fills up with the first token
        padded = np.where(present, weights[index], 0).astype(np.float32)
        is_sampled = self.stage.teacher_targets == "sampled"
        # float16 has rounded probabilities
        total = self.stage.target_size if is_sampled else (padded.sum(1) / (1 - outside))[:, None]
        arrays = ids[index].astype(np.int64), padded / np.float32(total), None if is_sampled else outside, entropy
        device = self.teacher.device
        return SparseTargets(*(None if x is None else torch.from_numpy(x).to(device) for x in arrays))  # type: ignore[arg-type]

    def arrays(self, key: bytes) -> Row:
        """`COLUMNS` of a row, not copied."""
        part, i = self.rows[key]
        return tuple(part.column(name)[i].values.to_numpy() for name in COLUMNS)

    def summary(self, keys: set[bytes]) -> dict[str, float]:
        """Of some rows: the number of positions in the loss, bytes, and the mean probability outside (top_k)."""
        tokens, size, outside = 0, 0, 0.0
        for key in keys:
            arrays = self.arrays(key)
            tokens, size = tokens + len(arrays[-1]), size + sum(x.nbytes for x in arrays)
            outside += float(arrays[3].sum())
        return {"rows": len(keys), "tokens": tokens, "bytes": size, "outside": outside / max(tokens, 1)}

    # ------------------------------------------------------------------ writing

    def fill(self, rows: Dataset) -> set[bytes]:
        """Makes sure that the cache has these rows: the teacher computes those that it lacks. Returns their keys.

        A killed call loses at most the last `PART_TOKENS`. If several processes fill a cache, one writes and the others
        wait. Damaged files are removed and computed again.

        Raises:
            UserError: the cache cannot be written, or logits of the teacher are not finite.
        """
        first: dict[bytes, int] = {}
        for i in range(len(rows)):  # type: ignore[arg-type]
            first.setdefault(row_keys(collate([rows[i]]))[0], i)
        probe_output("SUBQUAD_CACHE", self.directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        with acquire(self.directory / ".lock"):
            for path in self.directory.glob("*.part"):
                path.unlink()
            for path in sorted(self.directory.glob("*.arrow")):
                self.read(path)
            missing = [i for key, i in first.items() if key not in self.rows]
            if missing:
                self.compute(rows, missing)
        return set(first)

    def compute(self, rows: Dataset, missing: list[int]) -> None:
        seq_len = len(rows[missing[0]]["input_ids"])
        part_rows, pass_rows = max(1, PART_TOKENS // seq_len), max(1, PASS_TOKENS // seq_len)
        with progress.bar(len(missing) * seq_len, "targets of the teacher", "tok", delay=3) as bar:
            for part in slices(len(missing), part_rows):
                found: dict[bytes, Row] = {}
                for some in slices(len(missing[part]), pass_rows):
                    batch = collate([rows[i] for i in missing[part][some]])
                    found |= self.targets(batch)
                    bar.update(batch["input_ids"].numel())
                self.write(found)

    @torch.no_grad()
    def targets(self, batch: Batch) -> dict[bytes, Row]:
        """What the cache stores of each row, computed by the teacher."""
        on_device = {name: x.to(self.teacher.device) for name, x in batch.items()}
        outputs = last_outputs(self.teacher, self.head, on_device["input_ids"], on_device.get("position_ids"))
        counted = next_labels(on_device) != IGNORE_INDEX
        return {key: self.row(key, own[mask]) for key, own, mask in zip(row_keys(batch), outputs, counted, strict=True)}

    def row(self, key: bytes, outputs: Tensor) -> Row:
        """outputs: last hidden states, or logits, of the positions in the loss, `[n, D]`."""
        method, size = self.stage.teacher_targets, self.stage.target_size
        uniform = torch.from_numpy(np.random.default_rng(list(key)).random(len(outputs))).to(outputs.device)
        pieces, vocabulary = [], 1
        for positions in slices(len(outputs), CHUNK):
            logits = outputs[positions] if self.head is None else self.head.logits(outputs[positions])
            pieces.append(REDUCTIONS[method](logits.float(), size, uniform[positions]))
            vocabulary = logits.shape[1]
        if not all(bool(piece[-1].isfinite().all()) for piece in pieces):
            raise UserError(f"teacher {self.teacher.name_or_path!r}: its logits are not finite")
        count = np.min_scalar_type(size)
        dtypes = np.min_scalar_type(vocabulary - 1), count if method == "sampled" else np.float16, count
        columns = zip(*pieces, strict=True) if pieces else ((),) * len(COLUMNS)
        return tuple(
            np.concatenate([np.empty(0, dtype), *(x.cpu().numpy().astype(dtype) for x in column if x is not None)])
            for column, dtype in zip(columns, (*dtypes, np.float32, np.float32), strict=True)
        )

    def write(self, rows: Mapping[bytes, Row]) -> None:
        """Adds a file with these rows."""
        import pyarrow

        columns = {name: pyarrow.array([row[i] for row in rows.values()]) for i, name in enumerate(COLUMNS)}
        part = pyarrow.record_batch({"key": pyarrow.array(list(rows)), **columns})
        partial = self.directory / f"{os.getpid()}.part"
        name = str(partial)
        with saving(self.directory, "a file", remove=False), pyarrow.ipc.new_file(name, part.schema) as writer:
            writer.write_batch(part)
        path = partial.replace(self.directory / f"{file_digest(partial)}.arrow")
        self.read(path)

    def read(self, path: Path) -> None:
        """Maps a file into memory; removes it if its content is not what its name says."""
        import pyarrow

        if file_digest(path) != path.stem:
            logger.warning("%s is damaged; its targets are computed again", path)
            path.unlink(missing_ok=True)
            return
        part = pyarrow.ipc.open_file(pyarrow.memory_map(str(path))).get_batch(0)
        self.rows |= {key: (part, i) for i, key in enumerate(part.column("key").to_pylist())}


def row_keys(batch: Batch) -> list[bytes]:
    """The digest of each row of a batch. Positions of a row that is one document are left out, as in `collate`."""
    arrays = {name: x.cpu().numpy() for name, x in sorted(batch.items())}

    def content(b: int) -> Iterator[bytes]:
        for name, array in arrays.items():
            if name != "position_ids" or not array[b, 1:].all():
                yield name.encode()
                yield array[b].tobytes()

    return [hashlib.blake2b(b"".join(content(b)), digest_size=16).digest() for b in range(len(batch["input_ids"]))]


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]
