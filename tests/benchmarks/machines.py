"""What a step, a save and a restart cost on machines that are not here.

Formulas alone, of numbers that are all in `Inputs`; nothing is measured. A
message of b bytes takes latency + b / bandwidth (Hockney 1994). An all-reduce
of n members (Thakur et al. 2005, Optimization of Collective Communication
Operations in MPICH) takes

    ring    2 (n - 1) latency + 2 (n - 1) / n b / bandwidth
    tree    2 log2(n) latency + 2 b / bandwidth

where a tree sends in pieces, so that all its levels work at once.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

from dtrain import flags

_DAY = 86_400.0
_field = flags.fields_of(flags.FLAGS)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What is taken for granted, and why; each is a flag."""

    peak: float = _field(
        989e12,
        "Operations a second of a GPU at its best: H100 SXM, dense, 16 bits, "
        "by the data sheet (A100: 312e12).",
        minimum=1.0,
    )
    share: float = _field(
        0.0,
        "Share of the best that it does; 0 is that of a V100 in "
        "stylegan2-ada-pytorch's README, as in docs/gpus.md.",
        minimum=0.0,
    )
    replica_batch_size: int = _field(
        8,
        "Images of a GPU in a step: what stylegan2-ada-pytorch gives each of "
        "eight for 256 pixels.",
        minimum=1,
    )
    gpus_per_node: int = _field(8, "As in a DGX or HGX.", minimum=1)
    nvlink: float = _field(
        450e9,
        "Bytes a second, one way, of a GPU: NVLink 4, by the data sheet.",
        minimum=1.0,
    )
    pcie: float = _field(
        31.5e9, "Likewise of PCIe 4.0 with 16 lanes.", minimum=1.0
    )
    ethernet: float = _field(
        12.5e9,
        "Likewise of a node, shared by its GPUs: 100 Gbit/s.",
        minimum=1.0,
    )
    link_share: float = _field(
        0.8, "Share of these that messages reach: assumed.", minimum=0.01
    )
    nvlink_latency: float = _field(
        3.4e-6,
        "Seconds of a message: NCCL's src/graph/tuning.cc, ring, protocol "
        "Simple.",
        minimum=0.0,
    )
    pcie_latency: float = _field(5.7e-6, "Likewise.", minimum=0.0)
    ethernet_latency: float = _field(
        14e-6, "Likewise, with RDMA; TCP takes several times that.", minimum=0.0
    )
    overlap: float = _field(
        0.0,
        "Share of the computing during which gradients can travel: none, for "
        "a phase sends all of its own at its end (docs/results.md).",
        minimum=0.0,
    )
    gradient_bytes: float = _field(
        4.0, "Bytes of a weight's gradient: float32 at any precision."
    )
    state_bytes: float = _field(
        16.0,
        "Bytes of a weight in a save: itself, Adam's two moments and a moving "
        "average.",
    )
    store: float = _field(
        200e6,
        "Bytes a second that the chief writes to a store: assumed, of one "
        "upload.",
        minimum=1.0,
    )
    stall_secs: float = _field(
        0.0008,
        "Seconds that the training waits for a save: about the median for "
        "600 MB, docs/recovery.md.",
        minimum=0.0,
    )
    inflation: float = _field(
        1.23,
        "Steps that overlap a save take so many times as long: about as for "
        "600 MB on two CPU cores (docs/recovery.md), where both compete; less "
        "on a GPU.",
        minimum=1.0,
    )
    node_days: float = _field(
        66.0,
        "Days until a node is lost, in the mean: assumed, a tenth of the "
        "nodes each week. Llama 3 (arXiv:2407.21783) had 419 interruptions in "
        "54 days of 2,048 nodes: 264.",
        minimum=1e-6,
    )
    restart_secs: float = _field(
        180.0,
        "Seconds from a crash to the first step without a spare: assumed; "
        "import, networks, XLA's compiler, NCCL, restore.",
        minimum=0.0,
    )
    spare_share: float = _field(
        0.53,
        "Share of them that is left with a warm spare: about that of two "
        "workers here, by tests.benchmarks.restart; of one it is about 0.4.",
        minimum=0.0,
    )
    queue_secs: float = _field(
        300.0,
        "Seconds until a scheduler starts a job again that had a notice, with "
        "another node: assumed.",
        minimum=0.0,
    )
    notice_share: float = _field(
        0.5,
        "Share of the losses that a notice comes before; the others are "
        "crashes: assumed.",
        minimum=0.0,
    )
    grace_secs: float = _field(
        30.0, "Seconds from a notice to the end: spot VMs of Google Cloud."
    )
    seed: int = _field(0, "Of the simulated losses.", minimum=0)

    def __post_init__(self) -> None:
        flags.check(self)

    def save(self, weights: float) -> Save:
        """Says what a save of so many trained weights costs."""
        write_secs = weights * self.state_bytes / self.store
        slowed_secs = write_secs * (1 - 1 / self.inflation)
        return Save(self.stall_secs, write_secs, self.stall_secs + slowed_secs)

    def mean_secs(self, num_nodes: int) -> float:
        """Returns the mean time until a job of so many nodes loses one."""
        return self.node_days * _DAY / num_nodes


class Save(NamedTuple):
    """What a save costs, in seconds.

    Attributes:
        stall: that the training waits.
        write: until it is there; steps go on meanwhile, slower.
        cost: of training that is lost to it, by the wait and by the slower
            steps.
    """

    stall: float
    write: float
    cost: float


class Link(NamedTuple):
    """Between two of the members of an all-reduce.

    Attributes:
        bandwidth: bytes a second, one way.
        latency: seconds of a message.
    """

    bandwidth: float
    latency: float


def links(inputs: Inputs) -> dict[str, Link]:
    """Returns the links by their names; Ethernet is that of a whole node."""
    of_all = {
        "NVLink": (inputs.nvlink, inputs.nvlink_latency),
        "PCIe": (inputs.pcie, inputs.pcie_latency),
        "Ethernet": (inputs.ethernet, inputs.ethernet_latency),
    }
    return {
        name: Link(inputs.link_share * bandwidth, latency)
        for name, (bandwidth, latency) in of_all.items()
    }


def ring(num_bytes: float, members: int, link: Link) -> float:
    """Returns the seconds of an all-reduce along a ring."""
    others = members - 1
    sent = 2 * others / members * num_bytes
    return 2 * others * link.latency + sent / link.bandwidth


def tree(num_bytes: float, members: int, link: Link) -> float:
    """Returns the seconds of an all-reduce up and down a tree."""
    if members == 1:
        return 0.0
    secs = 2 * num_bytes / link.bandwidth
    return 2 * math.log2(members) * link.latency + secs


def across_nodes(
    num_bytes: float, gpus: int, inner: Link, outer: Link, per_node: int
) -> float:
    """Returns the seconds of an all-reduce within nodes and between them.

    Each GPU of a node sums a part (half a ring), parts are summed between the
    nodes by ring or tree, whichever is faster, and go to all GPUs of a node
    (the other half). A node's GPUs share its link: the parts are all bytes.
    """
    here = min(gpus, per_node)
    nodes = math.ceil(gpus / per_node)
    between = min(each(num_bytes, nodes, outer) for each in (ring, tree))
    return ring(num_bytes, here, inner) + between


def flat_ring(
    num_bytes: float, gpus: int, inner: Link, outer: Link, per_node: int
) -> float:
    """Returns the seconds of one ring through all GPUs: its slowest link's."""
    return ring(num_bytes, gpus, inner if gpus <= per_node else outer)


def step_secs(
    compute_secs: float, travel_secs: float, overlap: float = 0.0
) -> float:
    """Returns the seconds of a step.

    Args:
        compute_secs: of a replica, for its part of the batch.
        travel_secs: of all its all-reduces.
        overlap: share of the computing during which they can travel.
    """
    return compute_secs + max(0.0, travel_secs - overlap * compute_secs)


def young(cost: float, mean_secs: float) -> float:
    """Returns the best interval of saving, to the first order.

    Young 1974, A first order approximation to the optimum checkpoint interval.

    Args:
        cost: seconds of training lost to a save.
        mean_secs: between two losses.
    """
    return math.sqrt(2 * cost * mean_secs)


def daly(cost: float, mean_secs: float) -> float:
    """Returns the best interval of saving, to a higher order.

    Daly 2006, A higher order estimate of the optimum checkpoint interval for
    restart dumps, equation 37; `restart` is in none of its terms.

    Args:
        cost: seconds of training lost to a save.
        mean_secs: between two losses.
    """
    if cost >= 2 * mean_secs:
        return mean_secs
    part = cost / (2 * mean_secs)
    return young(cost, mean_secs) * (1 + math.sqrt(part) / 3 + part / 9) - cost


def goodput(
    interval: float, cost: float, restart: float, mean_secs: float
) -> float:
    """Returns the share of the time that goes into steps that stay.

        interval / (M exp(R / M) (exp((interval + cost) / M) - 1))

    Daly 2006, equation 20: losses that are exponentially distributed, and may
    strike during a restart, too.

    Args:
        interval: seconds of training between two saves.
        cost: seconds of training lost to a save.
        restart: seconds from a loss to the next step, R.
        mean_secs: between two losses, M.
    """
    lost = restart / mean_secs
    longer = (interval + cost) / mean_secs
    if lost + longer > 700.0:
        # Beyond what a float holds.
        return 0.0
    return interval / (mean_secs * math.exp(lost) * math.expm1(longer))
