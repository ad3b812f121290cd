"""Expert placement with redundant experts (report section 3.4.1; the balancer published as EPLB).

Experts that carry much load are held more than once, and the copies are packed onto devices so that the busiest
device carries as little as a greedy rule finds. Two policies: hierarchical, where the experts of a routing group stay
in one node, so that node-limited routing keeps its tokens there; and global, where they go anywhere.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from dsv3_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where each layer's experts are held: P physical experts, P / devices of them on each device, in order.

    Attributes:
      devices: the physical experts are cut into so many equal parts.
      logical: the expert of the model that each physical one is a copy of.
      copies: physical experts of each logical one, padded with -1.
      counts: how many there are.
    """

    devices: int
    logical: Int[np.ndarray, "layers P"]
    copies: Int[np.ndarray, "layers E R"]
    counts: Int[np.ndarray, "layers E"]

    def device_loads(self, load: Float[np.ndarray, "layers E"]) -> Float[np.ndarray, "layers devices"]:
        """Load of every device when an expert's load is shared evenly among its copies."""
        share = np.take_along_axis(np.asarray(load, np.float64) / self.counts, self.logical, axis=1)
        return share.reshape(len(share), self.devices, -1).sum(axis=2)

    def imbalance(self, load: Float[np.ndarray, "layers E"]) -> Float[np.ndarray, " layers"]:
        """The busiest device's load over the mean, a layer; 1 is even."""
        loads = self.device_loads(load)
        return loads.max(axis=1) / np.maximum(loads.mean(axis=1), np.finfo(np.float64).tiny)


def place_experts(
    load: Float[np.ndarray, "layers E"], *, physical: int, devices: int, groups: int = 1, nodes: int = 1
) -> Placement:
    """Places every layer's experts by their load: hierarchical where nodes divide groups, global otherwise.

    Args:
      load: tokens that each expert served, or any other measure, not negative.
      physical: experts held in all, P >= E.
      groups: routing groups of the model (`n_group`).

    Raises:
      ConfigError: loads that are no loads, or counts that do not divide.
    """
    load = np.asarray(load, np.float64)
    if load.ndim != 2 or not np.isfinite(load).all() or (load < 0).any():
        raise ConfigError("loads of experts must be a table [layers, experts] of finite numbers, none negative")
    experts = load.shape[1]
    if min(physical, devices, groups, nodes) < 1 or physical < experts:
        raise ConfigError(f"{physical} physical experts on {devices} devices cannot hold the model's {experts}")
    for what, total, divisor_name, divisor in (
        ("physical experts", physical, "devices", devices),
        ("devices", devices, "nodes", nodes),
        ("experts", experts, "groups", groups),
    ):
        if total % divisor:
            raise ConfigError(f"the number of {divisor_name} ({divisor}) must divide the number of {what} ({total})")
    if groups % nodes:
        groups = nodes = 1
    logical = np.stack([_place_layer(row, physical, devices, groups, nodes) for row in load])
    return _with_copies(logical, experts, devices)


def pack(weights: Float[np.ndarray, " n"], packs: int) -> list[list[int]]:
    """Items in `packs` packs of equal number: heaviest first, each to the lightest pack that is not full."""
    room = len(weights) // packs
    if room == 1:
        return [[item] for item in range(packs)]
    members: list[list[int]] = [[] for _ in range(packs)]
    sums = [0.0] * packs
    for item in np.argsort(-weights, kind="stable").tolist():
        lightest = min((p for p in range(packs) if len(members[p]) < room), key=sums.__getitem__)
        members[lightest].append(item)
        sums[lightest] += float(weights[item])
    return members


def replicate(weights: Float[np.ndarray, " n"], physical: int) -> Int[np.ndarray, " physical"]:
    """Which item each of the copies is of: one of each, then again and again one of the item whose copies carry most.

    No other choice of copies has a smaller largest load a copy.
    """
    counts = np.ones(len(weights))
    copies = list(range(len(weights)))
    for _ in range(physical - len(weights)):
        busiest = int(np.argmax(weights / counts))
        copies.append(busiest)
        counts[busiest] += 1
    return np.array(copies)


def _place_layer(
    load: Float[np.ndarray, " E"], physical: int, devices: int, groups: int, nodes: int
) -> Int[np.ndarray, " P"]:
    """Groups to nodes, copies within each node, copies to the node's devices."""
    members = np.arange(len(load)).reshape(groups, -1)
    placed: list[int] = []
    for node_groups in pack(load.reshape(groups, -1).sum(axis=1), nodes):
        experts = members[node_groups].reshape(-1)
        copies = replicate(load[experts], physical // nodes)
        each = load[experts] / np.bincount(copies, minlength=len(experts))
        for device in pack(each[copies], devices // nodes):
            placed += experts[copies[device]].tolist()
    return np.array(placed)


def _with_copies(logical: Int[np.ndarray, "layers P"], experts: int, devices: int) -> Placement:
    counts = np.stack([np.bincount(row, minlength=experts) for row in logical])
    copies = np.full((len(logical), experts, counts.max()), -1)
    for layer, row in enumerate(logical):
        for expert in range(experts):
            found = np.flatnonzero(row == expert)
            copies[layer, expert, : len(found)] = found
    return Placement(devices, logical, copies, counts)
