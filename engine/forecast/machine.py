"""The machine that a plan is for."""

from dataclasses import dataclass

from .hardware import GPUS, LINKS, OPERATIONS, PRODUCTS, Gpu


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Nodes of several GPUs each.

    Attributes:
        link: bytes per second from a node to the next.
        disk: bytes per second of a node's drives.
        price: of a GPU for an hour; None where nobody said.
    """

    nodes: int = 1
    gpus: int = 8
    gpu: Gpu = GPUS["h100-80"]
    link: float = 50e9
    disk: float = 6e9
    price: float | None = None

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus

    @property
    def disk_of_rank(self) -> float:
        return self.disk / self.gpus

    def products(self, *, is_bf16: bool) -> float:
        """FLOP/s of large matrix products; fp32 ones take eight times as long."""
        return PRODUCTS * self.gpu.flops / (1 if is_bf16 else 8)

    @property
    def operations(self) -> float:
        """Bytes per second of other operations."""
        return OPERATIONS * self.gpu.bandwidth

    def link_among(self, num_neighbours: int) -> float:
        """Bytes per second that a ring over so many neighbouring ranks passes on."""
        return LINKS * self.gpu.link if self.gpus % num_neighbours == 0 else self.slowest_link

    @property
    def slowest_link(self) -> float:
        """Bytes per second that a ring over all ranks passes on."""
        return LINKS * (self.gpu.link if self.nodes == 1 else min(self.link, self.gpu.link))

    def described(self) -> str:
        nodes = f"{self.nodes} x " if self.nodes > 1 else ""
        return f"{nodes}{self.gpus} x {self.gpu.name}"

    def assumptions(self, *, offloads: bool) -> list[str]:
        """What the seconds rest on: nothing here was measured."""
        gpu = self.gpu
        found = [
            f"matrix products at {PRODUCTS:.0%} of the maker's {gpu.flops / 1e12:,.0f} TFLOP/s, other operations at"
            f" {OPERATIONS:.0%} of {gpu.bandwidth / 1e12:.2f} TB/s",
            f"collectives at {LINKS:.0%} of {gpu.link / 1e9:,.0f} GB/s in a node"
            + (f" and of {self.link / 1e9:,.1f} GB/s between nodes" if self.nodes > 1 else ""),
        ]
        if offloads:
            found.append(f"drives of {self.disk / 1e9:,.1f} GB/s a node, read and written in turn")
        return found
