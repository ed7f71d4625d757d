"""Timing: medians of CUDA events with the versions in alternation, a CUDA graph for short calls, clocks, roofs.

Two ways on a GPU, chosen for all versions of a row at once by the fastest of them:

- a call of 50 us and more: the L2 is flushed by writing 256 MB (not timed), then one call between two events. A short
  sleep on the device at the start of each round lets the host run ahead, so that no host time is measured: neither of a
  launch nor of autograd, through which every backward goes.
- a shorter call, unless it goes through autograd: a CUDA graph of 12 calls over 4 sets of inputs in turn, between two
  events, divided by 12. The L2 is not flushed between them: what fits stays there, as it would after the projection
  that has just written q, k and v.
"""

from __future__ import annotations

import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from bench.peers import Version

GRAPH_BELOW_S = 50e-6
GRAPH_CALLS = 12
INPUT_SETS = 4
FLUSH_BYTES = 256 << 20
# About 0.3 and 1.5 ms: longer than the host needs to enqueue a round, by itself or through autograd.
SLEEP_CYCLES = 600_000
SLEEP_CYCLES_THROUGH_AUTOGRAD = 3_000_000


@dataclass
class Timing:
    """Seconds a call by name (None: it failed), how they were taken, and the SM clock seen meanwhile, which is sampled
    by the driver and above what the kernels really run at: an upper bound.
    """

    seconds: dict[str, float | None] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    method: str = "events, L2 flushed"
    rounds: int = 0
    clock_mhz: float | None = None


MakeVersion = Callable[[int], Version]  # from the index of an input set


class Timer:
    """Times several versions of the same work on one device."""

    def __init__(self, device: str, through_autograd: bool = False):
        self.cuda = device != "cpu"
        self.graphs = self.cuda and not through_autograd
        self.sleep_cycles = SLEEP_CYCLES_THROUGH_AUTOGRAD if through_autograd else SLEEP_CYCLES
        self.clock = SmClock() if self.cuda else None
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if self.cuda else None

    def measure(self, versions: dict[str, MakeVersion], budget_s: float) -> Timing:
        """Times each version in about ``budget_s`` together. A version that raises is reported in ``errors``."""
        timing = Timing()
        first: dict[str, Version] = {}
        for name, make in versions.items():
            version = self._try(timing, name, lambda make=make: self._warm(make(0)))
            if version is not None:
                first[name] = version
        if not first:
            return timing
        estimates = {name: self._estimate(version) for name, version in first.items()}
        if not self.cuda:
            timing.method = "host clock"
            self._run_rounds(timing, {n: _host_timed(v) for n, v in first.items()}, estimates, budget_s)
        elif self.graphs and min(estimates.values()) < GRAPH_BELOW_S:
            timing.method = f"CUDA graph of {GRAPH_CALLS} calls, {INPUT_SETS} input sets, L2 not flushed"
            graphs = {}
            for name in first:
                graph = self._try(timing, name, lambda make=versions[name]: _capture(make))
                if graph is not None:
                    graphs[name] = self._replay_timed(graph)
            costs = {name: GRAPH_CALLS * estimates[name] for name in graphs}
            self._run_rounds(timing, graphs, costs, budget_s)
        else:
            self._run_rounds(timing, {n: self._flushed(v) for n, v in first.items()}, estimates, budget_s)
        return timing

    def _run_rounds(self, timing: Timing, timed: dict, costs: dict[str, float], budget_s: float) -> None:
        if not timed:
            return
        overhead = 1e-4 if self.cuda else 0.0
        rounds = int(budget_s / sum(cost + overhead for cost in costs.values()))
        timing.rounds = min(max(rounds, 7), 100) if self.cuda else min(max(rounds, 3), 30)
        samples: dict[str, list] = {name: [] for name in timed}
        names = list(timed)
        with self.clock.sampling() if self.clock else _nothing() as clock:
            for turn in range(timing.rounds):
                if self.cuda:
                    torch.cuda._sleep(self.sleep_cycles)
                # Reversed in every second round, so that each version runs after each neighbour equally often.
                for name in names if turn % 2 == 0 else reversed(names):
                    samples[name].append(timed[name]())
            if self.cuda:
                torch.cuda.synchronize()
        timing.seconds |= {name: statistics.median(sample() for sample in samples[name]) for name in names}
        timing.clock_mhz = clock()

    def _try(self, timing: Timing, name: str, action: Callable):
        try:
            return action()
        except Exception as error:  # a peer may refuse a shape with any exception
            if self.cuda:
                torch.cuda.synchronize()  # raises again where the device itself has failed: nothing can be timed then
            timing.seconds[name] = None
            timing.errors[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            return None

    def _warm(self, version: Version) -> Version:
        for _ in range(2):
            with version.context():
                version.call()
        if self.cuda:
            torch.cuda.synchronize()
        return version

    def _estimate(self, version: Version) -> float:
        run = _event_timed(version) if self.cuda else _host_timed(version)
        samples = []
        for _ in range(3 if self.cuda else 1):
            if self.cuda:
                torch.cuda._sleep(self.sleep_cycles)
            samples.append(run())
        if self.cuda:
            torch.cuda.synchronize()
        return min(sample() for sample in samples)

    def _flushed(self, version: Version) -> Callable:
        run = _event_timed(version)

        def flushed():
            self.flush.zero_()
            return run()

        return flushed

    def _replay_timed(self, graph: torch.cuda.CUDAGraph) -> Callable:
        graph.replay()
        replay = _event_timed(Version("graph", graph.replay))

        def timed():
            elapsed = replay()
            return lambda: elapsed() / GRAPH_CALLS

        return timed

    def roofs(self, dtype: torch.dtype) -> dict[str, float]:
        """What this card does now: a matrix product of 8192^3 (TFLOP/s) and a copy (GB/s, read + written)."""
        size, copy_bytes = (8192, 1 << 30) if self.cuda else (1024, 1 << 26)
        device = "cuda" if self.cuda else "cpu"
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        source = torch.empty(copy_bytes, dtype=torch.int8, device=device)
        target = torch.empty_like(source)
        versions = {
            "matmul": lambda _: Version("matmul", lambda: a @ b),
            "copy": lambda _: Version("copy", lambda: target.copy_(source)),
        }
        timing = self.measure(versions, budget_s=0.3)
        return {
            "matmul_tflops": 2 * size**3 / timing.seconds["matmul"] / 1e12,
            "copy_gbs": 2 * copy_bytes / timing.seconds["copy"] / 1e9,
        }


def _event_timed(version: Version) -> Callable[[], Callable[[], float]]:
    def run():
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with version.context():
            start.record()
            version.call()
            stop.record()
        return lambda: start.elapsed_time(stop) * 1e-3

    return run


def _host_timed(version: Version) -> Callable[[], Callable[[], float]]:
    def run():
        with version.context():
            start = time.perf_counter()
            version.call()
            elapsed = time.perf_counter() - start
        return lambda: elapsed

    return run


def _capture(make: MakeVersion) -> torch.cuda.CUDAGraph:
    # Not torch.cuda.graph(): it collects garbage and empties the cache each time, which costs more than the timing.
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        versions = [make(index) for index in range(INPUT_SETS)]
        for version in versions:
            with version.context():
                version.call()
        torch.cuda.synchronize()
        graph.capture_begin()
        try:
            for index in range(GRAPH_CALLS):
                version = versions[index % len(versions)]
                with version.context():
                    version.call()
        finally:
            graph.capture_end()
    return graph


@contextmanager
def _nothing() -> Iterator[Callable[[], None]]:
    yield lambda: None


class SmClock:
    """Samples the SM clock while something runs: by NVML where nvidia-ml-py is there, else by nvidia-smi."""

    def __init__(self, interval_s: float = 0.005):
        self.interval_s = interval_s
        uuid = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
        try:
            import pynvml  # optional

            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            self.read = lambda: float(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM))
            self.read()
        except Exception:  # no package, no library, no permission: the clock is optional
            query = ["nvidia-smi", f"--id={uuid}", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits"]
            self.read = lambda: float(subprocess.run(query, capture_output=True, check=True, text=True).stdout)

    @contextmanager
    def sampling(self) -> Iterator[Callable[[], float | None]]:
        """Yields a function that gives the median clock in MHz once the block has ended."""
        samples: list[float] = []
        done = threading.Event()

        def sample() -> None:
            while not done.wait(self.interval_s):
                try:
                    samples.append(self.read())
                except Exception:  # a clock that cannot be read is left out
                    return

        thread = threading.Thread(target=sample, daemon=True)
        thread.start()
        try:
            yield lambda: statistics.median(samples) if samples else None
        finally:
            done.set()
            thread.join()
