"""The devices that read prompts for an engine whose other devices generate (report section 3.4).

Programs of the two sets are dispatched without waiting for one another. The prefill set has up to `chunks_ahead` chunks
of prompts to compute. The entries of a finished prompt are copied to the decode set in pieces of a fixed number of
pages, and given to the engine when they have arrived: a program of the decode set never waits for the prefill set.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import deque
from collections.abc import Sequence as SequenceOf
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from dsv3_jax.inference import programs
from dsv3_jax.inference.batches import chunk_length, chunk_of
from dsv3_jax.inference.device_sets import DeviceSets
from dsv3_jax.inference.engine_config import EngineConfig, Sizes, empty_pages
from dsv3_jax.inference.pages import PageAllocator
from dsv3_jax.inference.redundancy import OwnModel
from dsv3_jax.inference.scheduler import Scheduler, Sequence
from dsv3_jax.model import DeepSeekV3
from dsv3_jax.modules.devices import Devices
from dsv3_jax.modules.paged_cache import Pages
from dsv3_jax.sharding.on_mesh import OnMesh

PAGES_OF_A_PIECE = 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Piece:
    """Some pages of a prompt, in the cache's own dtype, and what the MTP module needs to go on.

    Attributes:
      pages: entries of `PAGES_OF_A_PIECE` pages; those after the prompt's last page have no meaning.
      hidden: the slot's hidden states (`Slots.hidden`).
    """

    pages: Pages
    hidden: Float[Array, "W d"]


@dataclasses.dataclass(frozen=True, eq=False)
class Arriving:
    """A prompt on its way to the decode set, where it has its slot and its pages already."""

    sequence: Sequence
    pieces: list[Piece]

    @property
    def is_there(self) -> bool:
        """Whether all of it has arrived."""
        return all(leaf.is_ready() for leaf in jax.tree.leaves(self.pieces))


class PrefillSet:
    """Reads prompts and hands them over.

    Args:
      model: the model on the devices of this set.
      config: the engine's settings, with `sets`.
      decode: the devices of the decode set.

    Attributes:
      scheduler: the queue of the engine, and the prompts that are read or wait for the decode set.
      sizes: sizes of this set's arrays.
      read_tokens: tokens of prompts that were computed.
      load: tokens that chose each expert here, of the chunks that are known to be computed.
    """

    def __init__(self, model: DeepSeekV3, config: EngineConfig, decode: OnMesh):
        assert config.sets is not None
        self._chunks_ahead = config.sets.chunks_ahead
        self._config = config = _own_config(config, config.sets)
        self.sizes = Sizes.of(config, model)
        self._devices, self._everywhere = model.devices, NamedSharding(decode.mesh, PartitionSpec())
        self._own = OwnModel(config)
        self._graph, self._weights = programs.ModelGraph.split(self._own(model))
        slots = programs.Slots.empty(model.config, self.sizes.slots, self.sizes.drafts, model.precision.dtype)
        pages = empty_pages(config, model, self.sizes)
        self._pages, self._slots = model.devices.replicated((pages, slots))
        allocator = PageAllocator(self.sizes.pages, config.page_size)
        self.scheduler = Scheduler(allocator, self.sizes.slots, self.sizes.drafts, reuse_prefixes=config.reuse_prefixes)
        self.read_tokens = 0
        self.load = np.zeros(self._slots.load.shape, np.int32)
        self._loads: deque[Any] = deque()  # arrays, after each chunk that was dispatched and may not be computed yet
        self._arriving: deque[Arriving] = deque()

    def update(self, model: DeepSeekV3) -> None:
        """Replaces the weights, which have the shapes of those before; all prompts are read again."""
        self._weights = nnx.state(self._own(model, self.load))
        self.scheduler.start_again()

    def place_again(self) -> None:
        """Chooses copies of experts anew, by the load of this set alone."""
        self._weights = self._own.placed_again(self._weights, self.load)

    def step(self, decode: Scheduler) -> list[Arriving]:
        """Dispatches chunks and copies, and returns the prompts that have arrived in the decode set.

        Waits for one to arrive only where the decode set has nobody to generate for.

        Args:
          decode: the decode set's requests. Those that it has put back are read again here.
        """
        while decode.waiting:
            self.scheduler.waiting.appendleft(decode.waiting.pop())
        # Requests that were cancelled or put back meanwhile have lost their pages.
        self._arriving = deque(each for each in self._arriving if each.sequence in decode.running)
        while len(self._loads) < self._chunks_ahead and self._read_chunk():
            pass
        self._hand_over(decode)
        if all(sequence.is_reading for sequence in decode.running):
            self._wait()
        while self._loads and self._loads[0].is_ready():
            self.load = np.asarray(self._loads.popleft())
        arrived = [each for each in self._arriving if each.is_there]
        self._arriving = deque(each for each in self._arriving if each not in arrived)
        return arrived

    def call_read(self, sequences: list[Sequence], length: int) -> None:
        """Dispatches the next `length` tokens of each sequence's prompt."""
        chunk = chunk_of(sequences, length, self.sizes)
        self._pages, self._slots, _ = programs.read_chunk(
            self._graph,
            self._weights,
            self._pages,
            self._slots,
            chunk,
            scored=False,
            micro_batches=self._config.micro_batches,
        )
        self._loads.append(_copy_of(self._devices, self._slots.load))

    def nothing(self) -> Piece:
        """Returns a piece that has no page of a prompt, which compiles handing over."""
        return self._piece([], 0)

    def _read_chunk(self) -> bool:
        """Dispatches a chunk of each of the oldest prompts; returns whether there was any."""
        self.scheduler.admit()
        sequences = self.scheduler.to_read(self.sizes.chunk_rows)
        if not sequences:
            return False
        length = chunk_length(sequences, self._config.chunk_sizes)
        self.call_read(sequences, length)
        self.read_tokens += self.scheduler.have_read(sequences, length)
        return True

    def _hand_over(self, decode: Scheduler) -> None:
        """Dispatches the copies of prompts that are read, in their order, as far as the decode set has room."""
        for sequence in [each for each in self.scheduler.running if not each.is_reading]:
            if not decode.has_room(sequence):
                break
            pages, slot = sequence.pages, sequence.slot
            self.scheduler.remove(sequence)  # later programs that write to its pages come after these copies
            decode.add(sequence)
            decode.admit()
            starts = range(0, len(pages), PAGES_OF_A_PIECE) if len(sequence.tokens) > 1 else ()
            pieces = [self._piece(pages[start : start + PAGES_OF_A_PIECE], slot) for start in starts]
            self._arriving.append(Arriving(sequence, pieces))

    def _piece(self, pages: list[int], slot: int) -> Piece:
        index = _index_of(pages, self.sizes)
        piece = _piece_of(self._devices, self._pages, self._slots, index, np.int32(slot))
        return jax.device_put(piece, self._everywhere)

    def _wait(self) -> None:
        """Waits for what comes first: a prompt that is on its way, else a chunk."""
        if self._arriving:
            jax.block_until_ready(self._arriving[0].pieces)
        elif self._loads:
            self._loads[0].block_until_ready()


def received(
    devices: Devices,
    pages: Pages,
    slots: programs.Slots,
    sequence: Sequence,
    pieces: SequenceOf[Piece],
    sizes: Sizes,
) -> tuple[Pages, programs.Slots]:
    """Returns the decode set's pages and slots with a prompt written to the pages and the slot of its sequence."""
    for number, piece in enumerate(pieces):
        own = sequence.pages[number * PAGES_OF_A_PIECE : (number + 1) * PAGES_OF_A_PIECE]
        pages, slots = _receive(devices, pages, slots, piece, _index_of(own, sizes), np.int32(sequence.slot))
    return pages, slots


def _own_config(config: EngineConfig, sets: DeviceSets) -> EngineConfig:
    """Returns the settings of the prefill set."""
    own: dict[str, Any] = {"max_sequences": sets.prefill_sequences or config.max_sequences}
    if sets.prefill_cache_tokens is not None:
        own |= {"cache_tokens": sets.prefill_cache_tokens, "cache_memory": None}
    if sets.prefill_redundant_experts is not None:
        own |= {"redundant_experts": sets.prefill_redundant_experts}
    return dataclasses.replace(config, **own)


def _index_of(pages: list[int], sizes: Sizes) -> Int[np.ndarray, " N"]:
    """Returns the pages of a piece as an array, filled up with the number of all pages, which is none."""
    index = np.full(PAGES_OF_A_PIECE, sizes.pages, np.int32)
    index[: len(pages)] = pages
    return index


@functools.partial(jax.jit, static_argnames=("devices",))
def _piece_of(
    devices: Devices, pages: Pages, slots: programs.Slots, index: Int[Array, " N"], slot: Int[Array, ""]
) -> Piece:
    """Returns a piece of a prompt: the pages `index`, on every device of the set."""
    return devices.replicated(Piece(pages.of(index), slots.hidden[slot]))


@functools.partial(jax.jit, static_argnames=("devices",), donate_argnames=("pages", "slots"))
def _receive(
    devices: Devices,
    pages: Pages,
    slots: programs.Slots,
    piece: Piece,
    index: Int[Array, " N"],
    slot: Int[Array, ""],
) -> tuple[Pages, programs.Slots]:
    """Returns the pages and slots with a piece written to the pages `index`; an index that is no page is dropped."""
    slots = dataclasses.replace(slots, hidden=slots.hidden.at[slot].set(piece.hidden))
    return devices.replicated((pages.with_pages(index, piece.pages), slots))


@functools.partial(jax.jit, static_argnames=("devices",))
def _copy_of(devices: Devices, load: Int[Array, "layers E"]) -> Int[Array, "layers E"]:
    return devices.replicated(load + 0)
