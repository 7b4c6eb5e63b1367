"""What devices can do, as their makers publish it, and what a CPU of this kind was measured to do.

Peaks are dense (no sparsity), with 32-bit accumulation. Links are bytes a second in one direction.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30
# Share of a device's memory that models can have: the rest is the driver's context, kernels and fragmentation.
USABLE = 0.92
# Bytes that arrive of those that a link could carry.
LINK_EFFICIENCY = 0.75


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One kind of device, and what joins several of them.

    half_flops, full_flops: operations a second in bfloat16 or float16, and in float32.
    memory: bytes. memory_bandwidth, link, network: bytes a second; `network` joins nodes.
    latency: seconds that a collective takes whatever its size.
    efficiency, conv_efficiency: share of the peak that transformer blocks, and convolutions of VAEs, reach: a
        guess for kernels of PyTorch, that measurements should replace (`dataclasses.replace`).
    attention_efficiency: the same of attention; None: as all else in the blocks.
    ring_attention: share of attention's speed that is left on the pieces of two ranks of a ring.
    crowding: share of its speed that a rank keeps where ranks share a device, or wait for its slowest.
    per_node: devices that `link` joins.
    cores: ranks share one device, its memory and so many cores, as processes on a CPU do; 0: each has its own device.
    threads: cores that one rank uses; None: its share of them.
    overlaps: exchanges go on beside computation, and do not take its time.
    fp8: it multiplies float8 with a scale a row, as torch does it.
    """

    name: str
    half_flops: float
    full_flops: float
    memory: float
    memory_bandwidth: float
    link: float
    network: float = 50e9  # one port of 400 Gb/s a device
    latency: float = 15e-6
    efficiency: float = 0.5
    conv_efficiency: float = 0.25
    attention_efficiency: float | None = None
    ring_attention: float = 1.0
    crowding: float = 1.0
    per_node: int = 8
    cores: int = 0
    threads: int | None = None
    overlaps: bool = True
    fp8: bool = True

    def flops(self, itemsize: int, num_ranks: int) -> float:
        """Peak of one rank, for values of this many bytes, were it alone."""
        peak = self.half_flops if itemsize == 2 else self.full_flops
        if not self.cores:
            return peak
        most = self.cores if self.threads is None else self.threads
        return peak * min(most / self.cores, 1 / num_ranks)

    def speed(self, itemsize: int, num_ranks: int, efficiency: float) -> float:
        """Operations a second of one of so many ranks that reach this share of the peak."""
        return self.flops(itemsize, num_ranks) * efficiency * (self.crowding if num_ranks > 1 else 1.0)

    def attention_weight(self, ring: int) -> float:
        """How many operations of other layers take as long as one of attention, on a ring of so many ranks."""
        whole = self.efficiency / (self.attention_efficiency or self.efficiency)
        return whole / (self.ring_attention if ring > 1 else 1.0)

    def room(self, num_ranks: int) -> float:
        """Bytes that one rank can have."""
        return self.memory * USABLE / (num_ranks if self.cores else 1)

    def bandwidth(self, span: int) -> float:
        """Bytes a second between ranks, if the group reaches over `span` neighbouring ranks."""
        return LINK_EFFICIENCY * (self.link if span <= self.per_node else self.network)


HARDWARE: dict[str, Hardware] = {
    # NVIDIA H100 data sheet, SXM: 1979 TFLOP/s bf16 and 67 fp32 (the former with sparsity), 80 GB, 3.35 TB/s,
    # NVLink 900 GB/s both ways.
    "h100": Hardware(
        name="H100 SXM",
        half_flops=989e12,
        full_flops=67e12,
        memory=80 * GIB,
        memory_bandwidth=3.35e12,
        link=450e9,
        efficiency=0.4,
    ),
    # NVIDIA H200 data sheet, SXM: the H100's chip with 141 GB at 4.8 TB/s.
    "h200": Hardware(
        name="H200 SXM",
        half_flops=989e12,
        full_flops=67e12,
        memory=141e9,
        memory_bandwidth=4.8e12,
        link=450e9,
        efficiency=0.4,
    ),
    # NVIDIA A100 data sheet, SXM 80 GB: 312 TFLOP/s bf16, 19.5 fp32, 2039 GB/s, NVLink 600 GB/s both ways.
    "a100": Hardware(
        name="A100 SXM 80GB",
        half_flops=312e12,
        full_flops=19.5e12,
        memory=80 * GIB,
        memory_bandwidth=2.039e12,
        link=300e9,
        network=25e9,
        fp8=False,
    ),
    # NVIDIA L40S data sheet: 362 TFLOP/s bf16 (733 with sparsity), 91.6 fp32, 48 GB, 864 GB/s, PCIe 4.0 x16 64 GB/s
    # both ways. Error correction takes 3 GB of the memory.
    "l40s": Hardware(
        name="L40S",
        half_flops=362e12,
        full_flops=91.6e12,
        memory=45 * GIB,
        memory_bandwidth=864e9,
        link=32e9,
        network=25e9,
        latency=30e-6,
    ),
    # NVIDIA Ada architecture white paper, RTX 4090: 165.2 TFLOP/s fp16 with fp32 accumulation, 82.6 fp32, 24 GB,
    # 1008 GB/s; PCIe 4.0 x16 without peer-to-peer, so that bytes cross it twice.
    "4090": Hardware(
        name="RTX 4090",
        half_flops=165.2e12,
        full_flops=82.6e12,
        memory=24 * GIB,
        memory_bandwidth=1.008e12,
        link=16e9,
        network=12.5e9,
        latency=50e-6,
    ),
    # AMD Instinct MI300X data sheet: 1307 TFLOP/s bf16, 163.4 fp32, 192 GB, 5.3 TB/s; 7 links of 128 GB/s both ways.
    # Its float8 is of another kind (e4m3fnuz).
    "mi300x": Hardware(
        name="MI300X",
        half_flops=1307e12,
        full_flops=163.4e12,
        memory=192e9,
        memory_bandwidth=5.3e12,
        link=448e9,
        latency=20e-6,
        efficiency=0.35,
        fp8=False,
    ),
    # Two cores of a virtual machine, measured by `measuring.py` (docs/plan.md): what one core computes, twice, and
    # what two processes exchange through shared memory.
    "cpu": Hardware(
        name="CPU",
        half_flops=385e9,
        full_flops=153e9,
        memory=16 * GIB,
        memory_bandwidth=16.8e9,
        link=3.78e9,
        network=1e9,
        latency=257e-6,
        efficiency=0.80,
        conv_efficiency=0.80,
        attention_efficiency=0.34,
        crowding=0.97,
        cores=2,
        overlaps=False,
    ),
}
