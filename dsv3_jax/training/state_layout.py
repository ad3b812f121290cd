"""How a train state is sharded: on one device, or on a mesh of devices and processes (report section 3.2).

Parameters are sharded by `dsv3_jax.sharding.rules` and replicated over the data axis. Optimizer state is sharded over
those replicas too (ZeRO-1), so that each rank needs the gradients of its own shard only.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsv3_jax.modules.devices import Devices, OneDevice
from dsv3_jax.sharding.batch_feed import BatchFeed
from dsv3_jax.sharding.mesh import MeshConfig, make_mesh
from dsv3_jax.sharding.on_mesh import OnMesh
from dsv3_jax.sharding.rules import BATCH_AXES, CONTEXT, rules_over_stages, shardings
from dsv3_jax.training.state import TrainState

Tree = Any
"""A pytree of arrays, of their shapes, or of their shardings."""


@dataclasses.dataclass(frozen=True)
class StateLayout:
    """The weight layout of a train state; `StateLayout()` is that of one device, which specifies no sharding.

    Attributes:
      mesh: the devices; None for one device.
      zero: whether optimizer state is sharded over the replicas of its parameters.
      overlap: whether tokens are sent to experts beside products (`OnMesh`).
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
    ) -> StateLayout:
        """Returns the layout over `devices`, which are those of all processes unless given.

        Raises:
          ConfigError: the sizes do not multiply to the devices.
        """
        devices = jax.devices() if devices is None else devices
        sizes = sizes.resolve(len(devices))
        return cls(None if len(devices) == 1 else make_mesh(sizes, devices), zero, overlap, layers)

    @property
    def batch_ranks(self) -> int:
        """The number of shards of a batch."""
        return 1 if self.mesh is None else math.prod(self.mesh.shape[axis] for axis in BATCH_AXES)

    @property
    def token_ranks(self) -> int:
        """The number of shards of the tokens of a batch."""
        return self.batch_ranks if self.mesh is None else self.batch_ranks * self.mesh.shape[CONTEXT]

    @property
    def stages(self) -> int:
        """The number of pipeline stages; 1 without a pipeline."""
        return 1 if self.mesh is None else self.mesh.shape["stage"]

    @property
    def devices(self) -> Devices:
        """The devices to give to the model whose state this is."""
        return OneDevice() if self.mesh is None else OnMesh(self.mesh, self.layers, self.overlap)

    def of_state[State: TrainState](self, state: State) -> State:
        """Returns the Sharding of each leaf.

        Args:
          state: arrays or their shapes.
        """
        found: State = self.devices.shardings(state)
        if self.mesh is None or not self.zero:
            return found
        rules = rules_over_stages(self.layers, zero=True)
        return dataclasses.replace(found, optimizer=shardings(state.optimizer, self.mesh, rules))

    def make_state(self, make: Callable[[], TrainState]) -> TrainState:
        """Returns `make()`, compiled so that no device ever holds more than its shard."""
        if self.mesh is None:
            return make()
        return jax.jit(make, out_shardings=self.of_state(jax.eval_shape(make)))()

    def constrain_state[State: TrainState](self, state: State) -> State:
        """Inside a compiled step: constrains the new state to the sharding of the old one."""
        return state if self.mesh is None else jax.lax.with_sharding_constraint(state, self.of_state(state))

    def constrain_gradients(self, gradients: Tree) -> Tree:
        """Inside a compiled step: constrains gradients to the sharding of the optimizer's moments.

        They are therefore reduce-scattered instead of all-reduced.
        """
        if self.mesh is None:
            return gradients
        rules = rules_over_stages(self.layers, self.zero)
        return jax.lax.with_sharding_constraint(gradients, shardings(gradients, self.mesh, rules))

    def replicate(self, tree: Tree) -> Tree:
        """Inside a compiled step: replicates `tree` over all devices, so that every process can read it."""
        if self.mesh is None:
            return tree
        return jax.lax.with_sharding_constraint(tree, NamedSharding(self.mesh, PartitionSpec()))

    @property
    def feed(self) -> BatchFeed:
        """The shard of every batch that this process reads."""
        return BatchFeed.of(self.mesh)

    def on_one_device(self, tree: Tree) -> Tree:
        """Returns `tree` gathered on one device of this process. Every process must call this."""
        if self.mesh is None:
            return tree
        whole = jax.jit(lambda tree: tree, out_shardings=NamedSharding(self.mesh, PartitionSpec()))(tree)
        return jax.tree.map(lambda leaf: leaf.addressable_shards[0].data, whole)
