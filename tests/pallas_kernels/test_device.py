"""Checks for which devices the Hopper kernels are chosen."""

import types

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from pallas_kernels.device import target_platform

GPUS = [
    ("NVIDIA H100 80GB HBM3", "9.0", "hopper"),
    ("NVIDIA H20", "9.0", "hopper"),
    ("a new name", "9.0", "hopper"),
    ("NVIDIA B200", "10.0", "gpu"),
    ("NVIDIA A100-SXM4-80GB", "8.0", "gpu"),
]


@pytest.mark.parametrize(("kind", "capability", "wanted"), GPUS)
@pytest.mark.parametrize("described_by_a_mesh", [False, True])
def test_hopper_is_recognised_by_its_compute_capability(monkeypatch, kind, capability, wanted, described_by_a_mesh):
    device = types.SimpleNamespace(platform="gpu", device_kind=kind, compute_capability=capability)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    if not described_by_a_mesh:
        assert target_platform() == wanted
        return
    described = AbstractDevice(device_kind=kind, num_cores=132, platform="gpu")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=described)):
        assert target_platform() == wanted


@pytest.mark.parametrize(("kind", "platform", "wanted"), [("NVIDIA H200", "cuda", "hopper"), ("TPU v5", "tpu", "tpu")])
def test_a_program_for_another_machine_is_known_by_the_name_of_its_device(kind, platform, wanted):
    described = AbstractDevice(device_kind=kind, num_cores=1, platform=platform)
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=described)):
        assert target_platform() == wanted
