"""Where a run's state and batches lie: on one device, or on a mesh of devices and processes (report section 3.2).

Parameters lie by `sharding.rules`, replicated over the data axis; optimizer state is divided over those replicas too
(ZeRO-1), so that gradients are needed in parts only; the batch is cut over data, fsdp and expert ranks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from jaxtyping import Int

from dsv3_jax.model import DeepSeekV3
from dsv3_jax.sharding.embedding_lookup import LookupOnRanks
from dsv3_jax.sharding.expert_parallel import distribute_experts
from dsv3_jax.sharding.linear_on_ranks import distribute_linear_maps
from dsv3_jax.sharding.mesh import MeshConfig, make_mesh
from dsv3_jax.sharding.rules import BATCH_AXES, batch_spec, rules_over_stages, shardings
from dsv3_jax.training.state import TrainState

Tree = Any
"""A pytree of arrays, of their shapes, or of their shardings."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """A layout; `Layout()` is one device, where nothing needs to be said.

    Attributes:
      mesh: the devices, or None.
      zero: whether optimizer state is divided over the replicas of its parameters.
      overlap: whether tokens go to experts in two halves (`ExpertExchange`).
      layers: how many MoE layers each pipeline stage holds; one number without stages, or none.
    """

    mesh: Mesh | None = None
    zero: bool = True
    overlap: bool = False
    layers: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        sizes: MeshConfig,
        *,
        zero: bool = True,
        overlap: bool = False,
        layers: tuple[int, ...] = (),
        devices: Sequence[jax.Device] | None = None,
    ) -> Layout:
        """Over `devices`, all of all processes unless given.

        Raises:
          ConfigError: the sizes do not multiply to the devices.
        """
        devices = jax.devices() if devices is None else devices
        sizes = sizes.resolve(len(devices))
        return cls(None if len(devices) == 1 else make_mesh(sizes, devices), zero, overlap, layers)

    @property
    def batch_ranks(self) -> int:
        """Parts that a batch is cut into."""
        return 1 if self.mesh is None else math.prod(self.mesh.shape[axis] for axis in BATCH_AXES)

    @property
    def stages(self) -> int:
        """Of the pipeline; 1 without one."""
        return 1 if self.mesh is None else self.mesh.shape["stage"]

    def distribute(self, model: DeepSeekV3) -> DeepSeekV3:
        """The model, whose parts now find what lies on other devices."""
        if self.mesh is not None:
            model.embedding.lookup = LookupOnRanks.of(self.mesh, model.embedding.weight)
            distribute_linear_maps(model, self.mesh)
            distribute_experts(model, self.mesh, overlap=self.overlap)
        return model

    def of_state(self, state: TrainState) -> TrainState:
        """A sharding for every leaf.

        Args:
          state: arrays or their shapes.
        """
        if self.mesh is None:
            return jax.tree.map(lambda _: SingleDeviceSharding(jax.local_devices()[0]), state)
        places: TrainState = shardings(state, self.mesh, rules_over_stages(self.layers))
        if not self.zero:
            return places
        divided = rules_over_stages(self.layers, zero=True)
        return dataclasses.replace(places, optimizer=shardings(state.optimizer, self.mesh, divided))

    def make_state(self, make: Callable[[], TrainState]) -> TrainState:
        """`make()` compiled so that no device ever holds more than its part."""
        if self.mesh is None:
            return make()
        return jax.jit(make, out_shardings=self.of_state(jax.eval_shape(make)))()

    def put_state(self, state: TrainState) -> TrainState:
        """A state of arrays that every process has whole, laid out."""
        return state if self.mesh is None else jax.device_put(state, self.of_state(state))

    def constrain_state(self, state: TrainState) -> TrainState:
        """Inside a compiled step: the new state lies as the old one did."""
        return state if self.mesh is None else jax.lax.with_sharding_constraint(state, self.of_state(state))

    def constrain_gradients(self, gradients: Tree) -> Tree:
        """Inside a compiled step: gradients are summed to where the optimizer's moments lie, not to everywhere."""
        if self.mesh is None:
            return gradients
        rules = rules_over_stages(self.layers, self.zero)
        return jax.lax.with_sharding_constraint(gradients, shardings(gradients, self.mesh, rules))

    def replicate(self, tree: Tree) -> Tree:
        """Inside a compiled step: the same on every device, so that every process can read it."""
        if self.mesh is None:
            return tree
        return jax.lax.with_sharding_constraint(tree, NamedSharding(self.mesh, PartitionSpec()))

    def on_one_device(self, tree: Tree) -> Tree:
        """All of `tree` on a device of this process. Every process must ask for it."""
        if self.mesh is None:
            return tree
        whole = jax.jit(lambda tree: tree, out_shardings=NamedSharding(self.mesh, PartitionSpec()))(tree)
        return jax.tree.map(lambda leaf: leaf.addressable_shards[0].data, whole)

    @property
    def feeding(self) -> Feeding:
        """Which part of every batch this process reads."""
        return Feeding.of(self.mesh)


@dataclasses.dataclass(frozen=True)
class Feeding:
    """A process's part of every batch: shard `index` of `count`, rows for the batch ranks `ranks`.

    Processes whose devices have the same batch ranks (a tensor or stage axis between them) read the same shard.
    """

    mesh: Mesh | None
    index: int
    count: int
    ranks: tuple[int, ...]

    @classmethod
    def of(cls, mesh: Mesh | None) -> Feeding:
        if mesh is None:
            return cls(None, 0, 1, (0,))
        sets: dict[int, set[int]] = {}
        for place, device in np.ndenumerate(mesh.devices):
            sizes = [mesh.shape[axis] for axis in BATCH_AXES]
            at = [place[mesh.axis_names.index(axis)] for axis in BATCH_AXES]
            sets.setdefault(device.process_index, set()).add(int(np.ravel_multi_index(at, sizes)))
        parts = sorted({tuple(sorted(ranks)) for ranks in sets.values()})
        total = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
        apart = sum(map(len, parts)) == total and len({len(part) for part in parts}) == 1
        if not apart:  # processes that share a part of their rows: everyone reads all
            parts = [tuple(range(total))]
        mine = tuple(sorted(sets[jax.process_index()])) if apart else parts[0]
        return cls(mesh, parts.index(mine), len(parts), mine)

    def put(self, rows: Int[np.ndarray, "A b T1"], pass_axis: bool = True) -> Any:
        """This process's rows of a batch, as its part of one array over all devices.

        Args:
          rows: [passes, rows of this process a pass, T+1]; without `pass_axis` there is no first axis.
        """
        if self.mesh is None:
            return rows
        axis = int(pass_axis)
        each = rows.shape[axis] // len(self.ranks)
        places = {rank: slot for slot, rank in enumerate(self.ranks)}
        shape = (*rows.shape[:axis], each * len(self.ranks) * self.count, *rows.shape[axis + 1 :])

        def part(index: Any) -> np.ndarray:
            slot = places[(index[axis].start or 0) // each]
            own = slice(slot * each, (slot + 1) * each)
            return rows[:, own] if pass_axis else rows[own]

        sharding = NamedSharding(self.mesh, batch_spec(leading=axis))
        return jax.make_array_from_callback(shape, sharding, part)

    def put_from_whole(self, rows: Int[np.ndarray, "B T1"]) -> Any:
        """A batch that every process has whole (validation), of which each takes its part."""
        if self.mesh is None:
            return rows
        sharding = NamedSharding(self.mesh, batch_spec())
        return jax.make_array_from_callback(rows.shape, sharding, lambda index: rows[index])
