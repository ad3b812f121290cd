"""The two sets of devices of an engine that reads prompts apart from generating (report section 3.4)."""

from __future__ import annotations

import dataclasses
import math

import jax

from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import ConfigError
from dsv3_jax.sharding.mesh import MeshConfig, make_mesh
from dsv3_jax.sharding.on_mesh import OnMesh


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceSets:
    """The meshes of an engine's two sets of devices, each of which holds all weights and a cache of its own.

    The prefill set has the first devices, the decode set the next ones. Their sizes are the products of the axes; one
    axis of one mesh may be -1, which takes all devices that are left.

    Attributes:
      prefill: mesh of the devices that read prompts. Equal beginnings of prompts share pages of their cache.
      decode: mesh of the devices that generate.
      prefill_sequences: most prompts that are read at a time or wait for the decode set; None for the engine's
        `max_sequences`.
      prefill_cache_tokens: tokens that the prefill set's cache has room for; None for as many as the decode set's.
      prefill_redundant_experts: copies of experts in the prefill set, chosen by that set's own load; None for the
        engine's `redundant_experts`.
      chunks_ahead: most chunks of prompts that the prefill set is given before the first of them is computed, so that
        it has work while the host waits for the decode set.
    """

    prefill: MeshConfig
    decode: MeshConfig
    prefill_sequences: int | None = None
    prefill_cache_tokens: int | None = None
    prefill_redundant_experts: int | None = None
    chunks_ahead: int = 4

    def __post_init__(self) -> None:
        for name, mesh in (("prefill", self.prefill), ("decode", self.decode)):
            if mesh.stage != 1:
                raise ConfigError(f"engine.sets.{name}: an engine has no pipeline stages; leave the axis stage out")
        if -1 in self.prefill.sizes.values() and -1 in self.decode.sizes.values():
            raise ConfigError("engine.sets: only one of the meshes prefill and decode can have an axis of -1")
        least = {"prefill_sequences": 1, "prefill_cache_tokens": 1, "prefill_redundant_experts": 0, "chunks_ahead": 1}
        for name, lowest in least.items():
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise ConfigError(f"engine.sets.{name} must be at least {lowest}, not {value}")

    def devices(self) -> tuple[OnMesh, OnMesh]:
        """Returns the prefill set and the decode set.

        Raises:
          ConfigError: there are too few devices for them.
        """
        all_devices = jax.devices()
        known = [math.prod(size for size in mesh.sizes.values() if size != -1) for mesh in (self.prefill, self.decode)]
        if sum(known) > len(all_devices):
            raise ConfigError(
                f"the prefill set ({self.prefill.written}) and the decode set ({self.decode.written}) take "
                f"{' + '.join(map(str, known))} devices, but there are {len(all_devices)}"
            )
        prefill, decode = known
        if -1 in self.prefill.sizes.values():
            prefill = len(all_devices) - decode
        if -1 in self.decode.sizes.values():
            decode = len(all_devices) - prefill
        return (
            OnMesh(make_mesh(self.prefill, all_devices[:prefill])),
            OnMesh(make_mesh(self.decode, all_devices[prefill : prefill + decode])),
        )

    def devices_for(self, model: ModelConfig) -> tuple[OnMesh, OnMesh]:
        """Returns the prefill set and the decode set, checked to divide the model.

        Raises:
          ConfigError: there are too few devices, or an axis does not divide what it shards of the model.
        """
        sets = self.devices()
        for each in sets:
            mesh = MeshConfig(**dict(each.mesh.shape))
            mesh.check(model, mesh.batch_ranks)
            if mesh.context > 1:
                raise ConfigError("mesh.context shards sequences that are trained on: leave it out of a serving mesh")
        return sets
