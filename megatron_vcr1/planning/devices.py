"""Peak rates of GPUs from their data sheets, and the fractions of these peaks that training reaches."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Efficiency:
    """Fractions of a device's peak rates that are reached, in (0, 1].

    The defaults are assumptions for Hopper GPUs with TransformerEngine layers; this project has not measured them.
    Published training runs of 7B-class models reach 46 % of the peak overall. `calibration` replaces the defaults.
    """

    text: float = 0.60  # of the peak matmul rate, in linear layers of the language model
    vision: float = 0.45  # the same in the vision tower, whose matrices are smaller
    attention: float = 0.40  # the same in the attention of both
    head: float = 0.65
    memory: float = 0.65  # of the memory bandwidth, in token-by-token decoding and in the optimizer
    link: float = 0.75  # of the bandwidth between GPUs of a node
    network: float = 0.70  # of the bandwidth between nodes


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU (or CPU core), its connections and its node."""

    name: str
    memory_bytes: float
    flops_per_s: float  # dense matmuls in the training dtype
    memory_bytes_per_s: float
    link_bytes_per_s: float  # one way, to GPUs of the same node
    network_bytes_per_s: float  # one way, this GPU's part of the node's network bandwidth
    gpus_per_node: int = 8
    host_bytes_per_s: float = 50e9  # to and from host memory
    efficiency: Efficiency = field(default_factory=Efficiency)
    microbatch_overhead_s: float = 0.004  # kernel launches and Python, per microbatch, stage and pass
    token_overhead_s: float = 0.003  # the same per decoding step of all sequences
    collective_latency_s: float = 15e-6  # per collective, whatever its size
    decoded_frames_per_s: float = 400.0  # video decoding and resizing by this GPU's part of the node's CPU cores
    fixed_bytes: float = 3e9  # CUDA context, libraries, communication buffers
    fragmentation: float = 0.05  # additional memory that the allocator loses, as a fraction of what varies
    is_cpu: bool = False  # the host memory is the device memory, so a reference in host memory occupies it too


@dataclass(frozen=True, slots=True)
class Cluster:
    """The GPUs of a job, in identical nodes."""

    device: Device
    num_gpus: int

    @property
    def used_per_node(self) -> int:
        """Return how many GPUs of a node the job uses: all, or fewer if the job is smaller than a node."""
        return min(self.num_gpus, self.device.gpus_per_node)


# bfloat16 without sparsity; NVLink within nodes, and one 400 Gbit/s adapter (A100: 200 Gbit/s) per GPU.
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
        microbatch_overhead_s=0.02,
        token_overhead_s=0.01,
        collective_latency_s=200e-6,
        decoded_frames_per_s=50.0,
        fixed_bytes=0.6e9,
        fragmentation=0.0,
        is_cpu=True,
    ),
}
