"""The mesh: how devices are arranged along the axes of parallelism (report section 3.2)."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import ConfigError

if TYPE_CHECKING:
    from jax.sharding import Mesh

AXES = ("stage", "data", "fsdp", "context", "expert", "tensor")
"""The axes, outermost first: neighbours along the last axis have the fastest links."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Number of devices along each mesh axis. At most one may be -1: it takes all remaining devices.

    Attributes:
      stage: number of pipeline stages.
      data: number of replicas of the parameters. Each computes its own sequences; ZeRO-1 shards optimizer state over
        them.
      fsdp: number of shards of every parameter (fully sharded data parallelism). Each rank computes its own sequences.
      context: number of shards of every sequence's tokens, and inside attention of the heads. For sequences whose
        activations do not fit a device. Parameters are sharded over it as over fsdp.
      expert: number of shards of the routed experts. Each rank computes its own sequences.
      tensor: number of shards of heads and feed-forward widths. These ranks compute the same sequences.
    """

    stage: int = 1
    data: int = 1
    fsdp: int = 1
    context: int = 1
    expert: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for axis, size in self.sizes.items():
            if isinstance(size, bool) or not isinstance(size, int) or not (1 <= size <= 2**20 or size == -1):
                raise ConfigError(f"mesh.{axis} must be a positive whole number, or -1 for the rest, not {size!r}")
        rest = [axis for axis, size in self.sizes.items() if size == -1]
        if len(rest) > 1:
            raise ConfigError(
                f"mesh: only one axis can be -1 (the rest of the devices), not {' and '.join(rest)}; "
                "give one of them a size"
            )
        if self.context != 1 and self.stage != 1:
            raise ConfigError(
                "mesh: pipeline stages compute whole sequences, so that stage and context cannot both be used; leave "
                "out one of them"
            )

    @property
    def sizes(self) -> dict[str, int]:
        """Returns the size of every axis, outermost first."""
        return {axis: getattr(self, axis) for axis in AXES}

    @property
    def written(self) -> str:
        """Returns the axes whose size is not 1, as text."""
        return " x ".join(f"{axis}={size}" for axis, size in self.sizes.items() if size != 1) or "one device"

    @property
    def batch_ranks(self) -> int:
        """Returns the number of shards of the batch, which the expert axis shards too."""
        return self.data * self.fsdp * self.expert

    @property
    def weight_shards(self) -> int:
        """Returns the number of shards of a matrix that ranks gather when they compute with it."""
        return self.fsdp * self.context

    @classmethod
    def parse(cls, text: str) -> MeshConfig:
        """Returns the mesh of a text such as `stage=16,expert=64,data=-1`; axes that it leaves out are 1.

        Raises:
          ConfigError: a part is not AXIS=SIZE, or there is no such axis.
        """
        sizes: dict[str, int] = {}
        for part in filter(None, (part.strip() for part in text.split(","))):
            axis, _, size = (word.strip() for word in part.partition("="))
            if axis not in AXES:
                near = difflib.get_close_matches(axis, AXES, n=1)
                hint = f"did you mean {near[0]}?" if near else f"choose of {', '.join(AXES)}"
                raise ConfigError(f"mesh '{text}': there is no axis '{axis}'; {hint}")
            if axis in sizes:
                raise ConfigError(f"mesh '{text}': axis {axis} is there twice")
            try:
                sizes[axis] = int(size)
            except ValueError:
                raise ConfigError(f"mesh '{text}': {axis} needs a whole number, such as {axis}=2") from None
        return cls(**sizes)

    def resolve(self, device_count: int) -> MeshConfig:
        """Returns the mesh for `device_count` devices, -1 replaced by what the other axes leave.

        Raises:
          ConfigError: the product of the axes is not the number of devices.
        """
        rest = [axis for axis, size in self.sizes.items() if size == -1]
        known = math.prod(size for size in self.sizes.values() if size != -1)
        if device_count % known or (not rest and known != device_count):
            needed = f"a multiple of {known}" if rest else str(known)
            raise ConfigError(
                f"mesh {self.written} takes {needed} devices, but there are {device_count}{self._mend(device_count)}"
            )
        return dataclasses.replace(self, **dict.fromkeys(rest, device_count // known))

    def _mend(self, device_count: int) -> str:
        """Returns the nearest sizes of one axis with which the mesh has `device_count` devices, as a hint."""
        known = math.prod(size for size in self.sizes.values() if size != -1)
        free = -1 in self.sizes.values()
        found = []
        for axis, size in self.sizes.items():
            others = known // size if size > 0 else known
            if size == 1 or device_count % others:
                continue
            fitting = [s for s in range(1, device_count + 1) if device_count % (others * s) == 0]
            sizes = fitting if free else [device_count // others]
            near = sorted(sorted(sizes, key=lambda s: abs(s - size))[:2])
            found += [f"{axis}={s}" for s in near if size > 0]
        return f"; {' or '.join(found)} would do" if found else ""

    def check(self, model: ModelConfig, global_batch: int, sequence_length: int = 0) -> None:
        """Checks that the mesh divides the model, the batch and the sequences, if these have a length of their own.

        Raises:
          ConfigError: an axis does not divide what it shards; the message names both and the nearest sizes that do.
        """
        _check_divides("expert", self.expert, "n_routed_experts", model.n_routed_experts)
        _check_divides("tensor", self.tensor, "num_attention_heads", model.num_attention_heads)
        heads = model.num_attention_heads // self.tensor
        _check_divides("context", self.context, "the heads of a rank of the tensor axis", heads)
        _check_divides("context", self.context, "the sequence length", sequence_length)
        if self.stage > model.num_hidden_layers:
            raise ConfigError(
                f"mesh.stage ({self.stage}) must not exceed the {model.num_hidden_layers} layers of the model"
            )
        if global_batch % self.batch_ranks:
            below = global_batch // self.batch_ranks * self.batch_ranks
            near = " or ".join(str(size) for size in (below, below + self.batch_ranks) if size)
            raise ConfigError(
                f"the batch of {global_batch} sequences must be a multiple of data x fsdp x expert "
                f"({self.data} x {self.fsdp} x {self.expert} = {self.batch_ranks}), such as {near}"
            )


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns the mesh over `devices` (all of this program's unless given), with all axes, those of size 1 included."""
    import jax
    from jax.experimental import mesh_utils
    from jax.sharding import AxisType, Mesh

    devices = list(jax.devices() if devices is None else devices)
    config = config.resolve(len(devices))
    shape = tuple(config.sizes.values())
    # On a torus a mesh axis may use a part of a physical axis.
    arranged = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _check_divides(axis: str, size: int, what: str, total: int) -> None:
    if total % size:
        divisors = [divisor for divisor in range(1, total + 1) if total % divisor == 0]
        near = sorted(sorted(divisors, key=lambda divisor: abs(divisor - size))[:2])
        raise ConfigError(
            f"mesh.{axis} ({size}) must divide {what} ({total}); the nearest sizes that do: "
            f"{' and '.join(map(str, near))}"
        )
