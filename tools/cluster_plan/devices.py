"""What GPUs can do by their data sheets, and which share of it is reached."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Efficiency:
    """Shares of a device's peaks that are reached, in (0, 1].

    The defaults are assumptions for Hopper with TransformerEngine layers, unmeasured in this project: published
    training of 7B-class models reaches 46 % of the peak over all. `calibration` replaces them.
    """

    text: float = 0.60  # of the matrix-product peak: linear layers of the language model
    vision: float = 0.45  # linear layers of the vision tower, whose matrices are smaller
    attention: float = 0.40  # of both
    head: float = 0.65
    memory: float = 0.65  # of the memory's rate: token by token sampling, the optimizer
    link: float = 0.75  # of the link's rate within a node
    network: float = 0.70  # of the network's rate between nodes


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU (or the CPU) in its node."""

    name: str
    memory_bytes: float
    flops_per_s: float  # dense matrix products in the training dtype
    memory_bytes_per_s: float
    link_bytes_per_s: float  # one way, to the GPUs of its node
    network_bytes_per_s: float  # one way, its share of the node's network
    host_bytes_per_s: float = 50e9  # to and from the host's memory
    efficiency: Efficiency = field(default_factory=Efficiency)
    microbatch_s: float = 0.004  # of launches and bookkeeping that no kernel hides, a microbatch, stage and pass
    token_s: float = 0.003  # the same for one token of all sampled sequences
    collective_s: float = 15e-6  # of starting a collective, whatever its size
    decoded_frames_per_s: float = 400.0  # videos decoded and resized for one GPU by its share of the node
    fixed_bytes: float = 3e9  # context, libraries, collectives' buffers
    fragmentation: float = 0.05  # of all else, lost by the allocator
    is_cpu: bool = False  # its memory is the host's, where a reference that waits is, too


# bfloat16 without sparsity; NVLink and a 400 Gbit/s (A100: 200) adapter for each GPU.
DEVICES = {
    "h100": Device("H100 SXM", 80e9, 989.4e12, 3.35e12, 450e9, 50e9),
    "h200": Device("H200 SXM", 141e9, 989.4e12, 4.8e12, 450e9, 50e9),
    "a100": Device("A100 SXM 80GB", 80e9, 312e12, 2.04e12, 300e9, 25e9),
    "b200": Device("B200 SXM", 180e9, 2250e12, 7.7e12, 900e9, 50e9),
    "cpu": Device(
        "CPU, one thread",
        16e9,
        90e9,
        10e9,
        2e9,
        1e9,
        efficiency=Efficiency(text=0.8, vision=0.7, attention=0.5, head=0.7),
        microbatch_s=0.02,
        token_s=0.01,
        collective_s=200e-6,
        decoded_frames_per_s=50.0,
        fixed_bytes=0.6e9,
        fragmentation=0.0,
        is_cpu=True,
    ),
}
