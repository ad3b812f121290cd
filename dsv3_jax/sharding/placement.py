"""Expert placement with redundant experts (report section 3.4.1; the balancer published as EPLB).

Experts with a high load are stored several times, and the copies are packed onto devices by a greedy rule that keeps
the load of the busiest device low. There are two policies. The hierarchical one keeps the experts of a routing group in
one node, so that node-limited routing keeps its tokens there; the global one may place an expert on any device.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from dsv3_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Placement:
    """The placement of each layer's experts: P physical experts, of which each device stores P / devices, in order.

    Attributes:
      devices: number of devices, over which the physical experts are divided equally.
      logical: the model's expert of which each physical expert is a copy.
      copies: the physical experts of each logical one, padded with -1.
      counts: how many physical experts each logical one has.
    """

    devices: int
    logical: Int[np.ndarray, "layers P"]
    copies: Int[np.ndarray, "layers E R"]
    counts: Int[np.ndarray, "layers E"]

    def device_loads(self, load: Float[np.ndarray, "layers E"]) -> Float[np.ndarray, "layers devices"]:
        """Returns the load of every device when each expert's load is split evenly among its copies."""
        share = np.take_along_axis(np.asarray(load, np.float64) / self.counts, self.logical, axis=1)
        return share.reshape(len(share), self.devices, -1).sum(axis=2)

    def imbalance(self, load: Float[np.ndarray, "layers E"]) -> Float[np.ndarray, " layers"]:
        """Returns the busiest device's load over the mean load, per layer; 1 is even."""
        loads = self.device_loads(load)
        return loads.max(axis=1) / np.maximum(loads.mean(axis=1), np.finfo(np.float64).tiny)


def place_experts(
    load: Float[np.ndarray, "layers E"], *, physical: int, devices: int, groups: int = 1, nodes: int = 1
) -> Placement:
    """Places every layer's experts by their load: hierarchical where nodes divide groups, global otherwise.

    Args:
      load: tokens that each expert served, or any other measure that is not negative.
      physical: total number of physical experts, P >= E.
      devices: number of devices.
      groups: routing groups of the model (`n_group`).
      nodes: number of nodes, which divides the devices.

    Raises:
      ConfigError: loads are negative or not finite, or a count does not divide another.
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


def pack(weights: Float[np.ndarray, " n"], packs: int, kinds: Int[np.ndarray, " n"] | None = None) -> list[list[int]]:
    """Packs items into `packs` packs of equal size: heaviest first, each into the lightest pack that is not full.

    Packs that hold an item of the same kind are passed over. Where no other pack has space left, the item takes the
    place of one in a full pack, and packs that such choices left uneven are evened out by exchanges.

    Args:
      kinds: items of equal kind (copies of an expert) are put into different packs, if none has more items than there
        are packs; all items differ unless given.
    """
    size = len(weights) // packs
    if size == 1:
        return [[item] for item in range(packs)]
    kinds = np.arange(len(weights)) if kinds is None else kinds
    members: list[list[int]] = [[] for _ in range(packs)]
    sums = np.zeros(packs)
    lightest_refused = False
    for item in np.argsort(-weights, kind="stable").tolist():
        with_space = [p for p in range(packs) if len(members[p]) < size]
        without_kind = [p for p in with_space if not _holds(members[p], kinds[item], kinds)]
        target = min(without_kind or with_space, key=sums.__getitem__)
        lightest_refused |= target != min(with_space, key=sums.__getitem__)
        if not without_kind:
            lightest_refused = True
            item, target = _exchange_with_full_pack(weights, kinds, members, sums, item, target)
        members[target].append(item)
        sums[target] += float(weights[item])
    return _evened_out(weights, kinds, members) if lightest_refused else members


def _exchange_with_full_pack(
    weights: Float[np.ndarray, " n"],
    kinds: Int[np.ndarray, " n"],
    members: list[list[int]],
    sums: Float[np.ndarray, " packs"],
    item: int,
    target: int,
) -> tuple[int, int]:
    """Puts `item` into a full pack without its kind; returns the item that leaves it for the pack `target`.

    Among all exchanges the one whose two packs end lightest is made. There is none where every pack has the kind.
    """
    best: tuple[float, int, int] | None = None
    for p, others in enumerate(members):
        if p == target or _holds(others, kinds[item], kinds):
            continue
        for other in others:
            if not _holds(members[target], kinds[other], kinds):
                heavier = max(sums[target] + weights[other], sums[p] - weights[other] + weights[item])
                best = min(best or (heavier, p, other), (heavier, p, other))
    if best is None:
        return item, target
    _, p, other = best
    members[p][members[p].index(other)] = item
    sums[p] += float(weights[item] - weights[other])
    return other, target


def _holds(items: list[int], kind: Int[np.ndarray, ""], kinds: Int[np.ndarray, " n"]) -> bool:
    return any(kinds[item] == kind for item in items)


def _evened_out(
    weights: Float[np.ndarray, " n"], kinds: Int[np.ndarray, " n"], members: list[list[int]]
) -> list[list[int]]:
    """Returns the packs after the best exchanges of two items that make the heaviest pack lighter, until none does.

    An exchange never brings two items of a kind together.
    """
    packed = np.array(members)
    while True:
        held, of_kind = weights[packed], kinds[packed]
        sums = held.sum(axis=1)
        heaviest = int(np.argmax(sums))
        moved = held[heaviest][:, None, None] - held[None]  # [item of the heaviest, pack, item of the pack]
        heavier = np.maximum(sums[heaviest] - moved, sums[None, :, None] + moved)
        kind_in_pack = (of_kind[heaviest][:, None, None] == of_kind[None]).any(axis=2)
        kind_in_heaviest = (of_kind[:, :, None] == of_kind[heaviest]).any(axis=2)
        heavier[kind_in_pack] = np.inf
        heavier[:, kind_in_heaviest] = np.inf
        own, pack_, other = np.unravel_index(np.argmin(heavier), heavier.shape)
        if not heavier[own, pack_, other] < sums[heaviest] * (1 - 1e-12):
            return packed.tolist()
        packed[heaviest, own], packed[pack_, other] = packed[pack_, other], packed[heaviest, own]


def replicate(weights: Float[np.ndarray, " n"], physical: int, most: int | None = None) -> Int[np.ndarray, " physical"]:
    """Returns the item of each copy: one of each item, then repeatedly one of the item with the most load per copy.

    No other choice of copies has a smaller maximum of the load per copy.

    Args:
      most: an item gets no more copies than this while another has fewer; unlimited unless given.
    """
    counts = np.ones(len(weights))
    copies = list(range(len(weights)))
    for _ in range(physical - len(weights)):
        load = weights / counts
        if most is not None and (counts < most).any():
            load = np.where(counts < most, load, -1.0)
        busiest = int(np.argmax(load))
        copies.append(busiest)
        counts[busiest] += 1
    return np.array(copies)


def _place_layer(
    load: Float[np.ndarray, " E"], physical: int, devices: int, groups: int, nodes: int
) -> Int[np.ndarray, " P"]:
    """Places groups on nodes, chooses copies within each node, and places these on the node's devices."""
    members = np.arange(len(load)).reshape(groups, -1)
    placed: list[int] = []
    for node_groups in pack(load.reshape(groups, -1).sum(axis=1), nodes):
        experts = members[node_groups].reshape(-1)
        # A second copy on a device would serve nobody that the first does not.
        copies = replicate(load[experts], physical // nodes, most=devices // nodes)
        each = load[experts] / np.bincount(copies, minlength=len(experts))
        for device in pack(each[copies], devices // nodes, copies):
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
