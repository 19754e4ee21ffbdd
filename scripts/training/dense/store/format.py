"""The teacher's top-K log-probabilities of every batch of stage 2, on disk.

    header.json                  what it is of: StoreHeader, written first
    shard-00000.safetensors      SHARD_BATCHES batches each, the held-out ones first; whole or not there

| tensor of a shard | shape | |
|--|--|--|
| ids | [B, R, L] int32 | the tokens |
| spoken | [B, R, L] uint8 | 1 where a token is to be learned |
| starts | [B·R + 1] int64 | where the places of each row begin: one for every token to be learned but a row's first |
| top_ids | [P, K] uint16 or int32 | likeliest first; absent where K is the vocabulary, whose order is then its own |
| top_logprobs | [P, K] float16 | nats |
| tail | [P] float32 | log of the mass of all other tokens |

A place takes K · (2 + 2) + 4 bytes, K · (4 + 2) + 4 with a vocabulary above 65,536; 2 · V + 4 for the whole of it.
float16 keeps a log-probability to 1 part in 2,048, so that p·|Δ ln p| stays under 2e-4 nats.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from laguna_serve.scripts.training.dense.losses import Top
from laguna_serve.scripts.training.dense.targets import HELD_OUT_BATCHES, Batch, join_tops
from laguna_serve.serving.kit.errors import CommandError
from laguna_serve.serving.kit.files import write_file, write_text
from laguna_serve.serving.kit.results import to_json

SHARD_BATCHES = 16
HEADER = "header.json"
SMALL_VOCABULARY = 1 << 16


class StoreError(CommandError, ValueError):
    """A logit store that cannot be learned from, as one line."""


class StoreHeader(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="laguna_serve.logit_store/1"):
    """What a store is of. Two that are equal hold the same logits.

    Attributes:
        batches: of training; HELD_OUT_BATCHES come before them.
        rows, length: of a batch, in sequences and tokens.
        seed, on: what the batches are drawn by, and whether from "chats" or "text".
        teacher, tokenizer, text, held_out: digests.
        source: "forward", or the endpoint and the model that was asked.
    """

    top_k: int
    vocab_size: int
    batches: int
    rows: int
    length: int
    seed: int
    on: str
    teacher: str
    tokenizer: str
    text: str
    held_out: str
    source: str

    @property
    def shards(self) -> int:
        """How many files there are when it is whole."""
        return -(-(self.batches + HELD_OUT_BATCHES) // SHARD_BATCHES)

    def numbers(self, shard: int) -> range:
        """Return the numbers of a shard's batches."""
        return range(shard * SHARD_BATCHES, min((shard + 1) * SHARD_BATCHES, self.batches + HELD_OUT_BATCHES))


def open_header(folder: Path, wanted: StoreHeader) -> None:
    """Begin a store, or check that the one that is there is the wanted one.

    Raises:
        StoreError: it is of another teacher, tokenizer or text, or of other batches; names the first difference.
    """
    path = folder / HEADER
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, msgspec.json.format(msgspec.json.encode(to_json(wanted)), indent=1).decode() + "\n")
        return
    found = read_header(folder)
    for name in StoreHeader.__struct_fields__:
        want, got = getattr(wanted, name), getattr(found, name)
        if want != got:
            what = f"expected the logits of {name} {_short(want)}, got those of {_short(got)}"
            raise StoreError(f"{folder}: {what}; name another folder, or remove this one")


def read_header(folder: Path) -> StoreHeader:
    """Read what a store is of. Raises StoreError when it is none."""
    try:
        return msgspec.json.decode((folder / HEADER).read_bytes(), type=StoreHeader)
    except (OSError, msgspec.DecodeError) as error:
        raise StoreError(f"{folder}: expected a logit store, got none ({error}); name its folder") from None


def write_shard(path: Path, batches: Sequence[Batch], tops: Sequence[Sequence[Top]], vocab_size: int) -> None:
    """Write batches and the distributions of each of their rows. Raises WriteError."""
    rows = [top for of_batch in tops for top in of_batch]
    joined = join_tops(tuple(rows))
    tensors = {
        "ids": torch.stack([batch.ids for batch in batches]).int(),
        "spoken": torch.stack([batch.spoken for batch in batches]).byte(),
        "starts": torch.tensor([0, *(len(top.tail) for top in rows)]).cumsum(0),
        "top_logprobs": joined.logprobs.half().cpu().contiguous(),
        "tail": joined.tail.float().cpu().contiguous(),
    }
    if joined.ids is not None:
        small = vocab_size <= SMALL_VOCABULARY
        tensors["top_ids"] = joined.ids.cpu().to(torch.uint16 if small else torch.int32).contiguous()
    write_file(path, lambda partial: save_file(tensors, partial))


class LogitStore:
    """A whole store, as the targets of stage 2; nothing of it stays in memory."""

    def __init__(self, folder: Path) -> None:
        """Open a store. Raises StoreError when it is none, or has not all its shards."""
        self.header = read_header(folder)
        self._paths = [shard_path(folder, number) for number in range(self.header.shards)]
        missing = [path.name for path in self._paths if not path.exists()]
        if missing:
            raise StoreError(
                f"{folder}: expected {self.header.shards} shards, got none of {missing[0]}; write it first"
            )
        self._opened: dict[int, Any] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(path.stat().st_size for path in self._paths)

    def batch(self, step: int) -> Batch:
        """Return the batch of a step, with its distributions."""
        return self._read(HELD_OUT_BATCHES + step % self.header.batches)

    def held_out(self, number: int) -> Batch:
        """Return one of HELD_OUT_BATCHES batches that nothing is trained on."""
        return self._read(number)

    def top(self, batch: Batch, rows: slice) -> Top:
        """Return the distribution at the predicted places of some rows."""
        assert batch.tops is not None
        return join_tops(batch.tops[rows])

    def describe_tail(self) -> tuple[int, float]:
        """Count the places, and average the mass that is not kept over them."""
        tails = torch.cat([self._open(shard).get_tensor("tail") for shard in range(self.header.shards)])
        return len(tails), float(tails.exp().mean()) if len(tails) else 0.0

    def _read(self, number: int) -> Batch:
        shard, at = divmod(number, SHARD_BATCHES)
        file, R = self._open(shard), self.header.rows
        ids, spoken = (file.get_slice(name)[at : at + 1][0] for name in ("ids", "spoken"))
        starts = file.get_slice("starts")[at * R : (at + 1) * R + 1].tolist()
        first, last = starts[0], starts[-1]
        kept = file.get_slice("top_ids")[first:last].int().long() if "top_ids" in file.keys() else None  # noqa: SIM118
        whole = Top(kept, file.get_slice("top_logprobs")[first:last].float(), file.get_slice("tail")[first:last])
        tops = tuple(whole.at(slice(a - first, b - first)) for a, b in pairwise(starts))
        return Batch(ids.long(), spoken.bool(), tops)

    def _open(self, shard: int) -> Any:
        if shard not in self._opened:
            self._opened[shard] = safe_open(self._paths[shard], framework="pt")
        return self._opened[shard]


def shard_path(folder: Path, number: int) -> Path:
    """Name a shard's file."""
    return folder / f"shard-{number:05d}.safetensors"


def write_missing(
    folder: Path,
    header: StoreHeader,
    batch_of: Callable[[int], Batch],
    answer: Callable[[int, Batch], Sequence[Top]],
    tell: Callable[[int, int], None],
) -> None:
    """Write the shards that are not there yet.

    Args:
        batch_of: number → batch, the held-out ones first.
        answer: number and batch → the teacher's top K in each row.
        tell: is told how many batches of how many are done.
    """
    total = header.batches + HELD_OUT_BATCHES
    for shard in range(header.shards):
        path, numbers = shard_path(folder, shard), header.numbers(shard)
        if not path.exists():
            batches, tops = [], []
            for number in numbers:
                batches.append(batch_of(number))
                tops.append(answer(number, batches[-1]))
                tell(number + 1, total)
            write_shard(path, batches, tops, header.vocab_size)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:39] + "…"
