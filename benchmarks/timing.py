"""How long a call takes: on the CPU by the clock, on a GPU by CUDA events around a replayed graph.

A GPU call is measured inside a CUDA graph of several, so that what is timed is the GPU and not the
Python that launches it; what cannot be captured is timed by events around plain calls, and says so.
"Cold" rotates through copies of the inputs that are together larger than three L2 caches; "warm"
uses one copy over and over.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

CPU_SAMPLE = 5e-3  # seconds of work per sample: far above the clock's and the scheduler's grain
CUDA_SAMPLE = 2e-3  # seconds of replays per sample: launch gaps are microseconds
CUDA_GRAPH = 1e-4  # seconds of work per graph
L2_TIMES = 3
MOST_COPIES = 200  # of inputs too small to fill the cache
# Bits of NVML. Those of an idle GPU, of clocks that are set and of a display are no throttling.
THROTTLES = {
    0x4: "power cap", 0x8: "hardware slowdown", 0x10: "sync boost", 0x20: "thermal (software)",
    0x40: "thermal (hardware)", 0x80: "power brake", 0x200: "board limit", 0x400: "reliability",
}

Call = Callable[..., object]


@dataclass
class Timer:
    """One thing to time. ``sample`` returns milliseconds per call."""

    sample: Callable[[], float]
    note: str = ""  # how it was measured, where that is not the usual way


def spread(samples: Sequence[float]) -> dict[str, float]:
    """Median and the 20th and 80th percentile of samples, with their number."""
    ordered = sorted(samples)
    at = [ordered[round(share * (len(ordered) - 1))] for share in (0.2, 0.8)]
    return {"ms": statistics.median(ordered), "p20": at[0], "p80": at[1], "samples": len(ordered)}


def copies_needed(nbytes: int, device: torch.device) -> int:
    """Sets of inputs and outputs, of ``nbytes`` each, that outgrow the L2 cache; 1 on a CPU."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(MOST_COPIES, max(2, math.ceil(L2_TIMES * cache / max(1, nbytes))))


def duplicate(value):
    """A copy of an input: tensors are cloned, with their strides; all else is passed on."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    return value


def cpu_timer(call: Call, inputs: tuple) -> Timer:
    """Time a call on the CPU; the first, slow calls must have been made."""
    begin = time.perf_counter()
    call(*inputs)
    repeats = max(1, round(CPU_SAMPLE / (time.perf_counter() - begin)))

    def sample() -> float:
        begin = time.perf_counter()
        for _ in range(repeats):
            call(*inputs)
        return (time.perf_counter() - begin) / repeats * 1e3

    return Timer(sample)


def cuda_timer(call: Call, sets: Sequence[tuple]) -> Timer:
    """Time a call on the GPU, over several sets of inputs in turn."""
    try:
        graph, calls = _capture(call, sets, len(sets)), len(sets)
        seconds = _events(graph.replay, 1) / calls
        if calls * seconds < CUDA_GRAPH:
            calls *= math.ceil(CUDA_GRAPH / (calls * seconds))
            graph = _capture(call, sets, calls)
        replays = max(1, math.ceil(CUDA_SAMPLE / (calls * seconds)))
        return Timer(lambda: _events(graph.replay, replays) / calls * 1e3)
    except Exception as error:  # what cannot be captured raises anything
        torch.cuda.synchronize()
        why = f"not captured in a graph ({type(error).__name__}), launch gaps included"

    def every_set() -> None:
        for inputs in sets:
            call(*inputs)

    every_set()
    rounds = max(1, math.ceil(CUDA_SAMPLE / _events(every_set, 1)))
    return Timer(lambda: _events(every_set, rounds) / len(sets) * 1e3, why)


def _events(work: Callable[[], None], times: int) -> float:
    """Seconds that the GPU takes for one ``work``, of ``times`` in a row."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / times


def _capture(call: Call, sets: Sequence[tuple], calls: int) -> torch.cuda.CUDAGraph:
    # Autograd remembers the stream of the forward pass: warm up and capture on the same one.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call(*sets[0])
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    kept: list = [None] * len(sets)  # outputs rotate like the inputs
    with torch.cuda.graph(graph, stream=stream):
        for i in range(calls):
            kept[i % len(sets)] = call(*sets[i % len(sets)])
    graph.replay()
    torch.cuda.synchronize()
    return graph


def host_ms(call: Call, inputs: tuple, calls: int = 20) -> float:
    """Milliseconds per call as a program without CUDA graphs sees them, launches included."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(calls):
        call(*inputs)
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) / calls * 1e3


def peak_mib(call: Call, inputs: tuple) -> float:
    """MiB of GPU memory that one call holds at most, beyond what its inputs take."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call(*inputs)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def copy_curve(device: torch.device, sizes: Sequence[int]) -> list[dict[str, float]]:
    """Bandwidth of a plain copy, read and write counted: bytes moved and GB/s for each size."""
    curve = []
    for nbytes in sizes:
        make = [torch.empty(nbytes // 2, dtype=torch.uint8, device=device) for _ in range(2)]
        sets = [tuple(x.clone() for x in make) for _ in range(copies_needed(nbytes, device))]

        def copy(a, b):
            return b.copy_(a)

        copy(*sets[0])
        timer = cuda_timer(copy, sets) if device.type == "cuda" else cpu_timer(copy, sets[0])
        ms = min(timer.sample() for _ in range(7))  # a ceiling: what the machine can do
        curve.append({"bytes": nbytes, "gb_s": nbytes / ms / 1e6})
        del sets
    return curve


def one_line(error: Exception) -> str:
    """What a record says of an error, without the paths of this machine."""
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0][:200]}"


class Sensors:
    """Clocks, power, temperature and energy of the GPU, and what holds its clocks down, read by
    NVML where it works; never set."""

    def __init__(self, device: torch.device):
        self.why_off = "no GPU"
        if device.type != "cuda":
            return
        try:
            import pynvml

            pynvml.nvmlInit()
            properties = torch.cuda.get_device_properties(device)
            bus = f"{properties.pci_domain_id:08x}:{properties.pci_bus_id:02x}:" \
                  f"{properties.pci_device_id:02x}.0"
            self._nvml, self._gpu = pynvml, pynvml.nvmlDeviceGetHandleByPciBusId(bus.encode())
            self.why_off = ""
        except Exception as error:  # no package, no driver, no permission
            self.why_off = f"{type(error).__name__}: {error}"

    def read(self) -> dict[str, float | list[str] | None]:
        """What can be read: sm_mhz, memory_mhz, celsius, watts, joules (since the driver came);
        and throttled, of `THROTTLES`, None if that cannot be read."""
        if self.why_off:
            return {}
        n, gpu = self._nvml, self._gpu
        readers = {
            "sm_mhz": lambda: n.nvmlDeviceGetClockInfo(gpu, n.NVML_CLOCK_SM),
            "memory_mhz": lambda: n.nvmlDeviceGetClockInfo(gpu, n.NVML_CLOCK_MEM),
            "celsius": lambda: n.nvmlDeviceGetTemperature(gpu, n.NVML_TEMPERATURE_GPU),
            "watts": lambda: n.nvmlDeviceGetPowerUsage(gpu) / 1e3,
            "joules": lambda: n.nvmlDeviceGetTotalEnergyConsumption(gpu) / 1e3,
        }
        values = {"throttled": self._throttled()}
        for name, reader in readers.items():
            # Virtual machines hide some of them, and older packages lack some functions.
            with contextlib.suppress(n.NVMLError, AttributeError):
                values[name] = reader()
        return values

    def _throttled(self) -> list[str] | None:
        for word in ("Event", "Throttle"):  # the name until driver 535
            with contextlib.suppress(self._nvml.NVMLError, AttributeError):
                read = getattr(self._nvml, f"nvmlDeviceGetCurrentClocks{word}Reasons")
                bits = read(self._gpu)
                return [name for bit, name in THROTTLES.items() if bits & bit]
        return None

    def driver(self) -> str | None:
        """Version of the driver."""
        if self.why_off:
            return None
        with contextlib.suppress(self._nvml.NVMLError, AttributeError):
            found = self._nvml.nvmlSystemGetDriverVersion()
            return found.decode() if isinstance(found, bytes) else found  # bytes until version 12
        return None
