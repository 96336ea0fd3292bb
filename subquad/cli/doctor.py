"""`subquad doctor`: what this machine has, which kernels run on it and why, and how fast it is."""

import functools
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from subquad.cli.parser import Parser
from subquad.threads import available_cores
from subquad.utils import cache_dir, install_command, quiet_libraries

PACKAGE = "subquad"
MATMUL_SIZES = 128, 256, 512, 1024, 2048
BATCH = 1, 256
"""Rows and tokens of the training step."""


class Finding(NamedTuple):
    """One line of the report. problem: what to do about it, if anything."""

    section: str
    name: str
    value: str
    problem: str | None = None


def add_commands(parser: Parser) -> None:
    doctor = parser.command("doctor", run_doctor, "Report devices, kernels, versions, disk and speed of this machine.")
    doctor.option("--seconds", "S", "seconds for the speed test; 0: none", type=float, default=10.0)
    doctor.flag("--json", "print the findings as JSON")
    doctor.device()


def run_doctor(args: Namespace) -> None:
    quiet_libraries()
    from subquad.modeling.placement import find_device

    device = find_device(args.device)
    findings = [*versions(), *extras(), *devices(), *kernels(device), *resources()]
    if args.seconds > 0:
        findings += speed(device, args.seconds)
    if args.json:
        print(json.dumps([finding._asdict() for finding in findings], indent=2))
        return
    width, section = max(len(finding.name) for finding in findings), None
    for finding in findings:
        if finding.section != section:
            section = finding.section
            print(f"{section}")
        print(f"  {finding.name:{width}}  {finding.value}")
        if finding.problem is not None:
            print(f"  {'':{width}}  ! {finding.problem}")


# ---------------------------------------------------------------------- what is installed


def requirements() -> dict[str | None, list[Any]]:
    """Requirements of this package (`packaging`), by extra; None: those that are always needed."""
    from packaging.requirements import Requirement

    found: dict[str | None, list[Any]] = {}
    for line in importlib.metadata.requires(PACKAGE) or []:
        needed = Requirement(line)
        marker = needed.marker
        if marker is None or marker.evaluate({"extra": ""}):
            found.setdefault(None, []).append(needed)
            continue
        for extra in filter(lambda name: marker.evaluate({"extra": name}), all_extras()):
            found.setdefault(extra, []).append(needed)
    return found


def all_extras() -> list[str]:
    return importlib.metadata.metadata(PACKAGE).get_all("Provides-Extra") or []


def installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> Iterator[Finding]:
    yield Finding("versions", "python", platform.python_version())
    for needed in requirements().get(None, []):
        version, problem = installed_version(needed.name), None
        if version is None or not needed.specifier.contains(version, prereleases=True):
            problem = f'tests pass with {needed.specifier}: pip install "{needed.name}{needed.specifier}"'
        yield Finding("versions", needed.name, version or "missing", problem)


def extras() -> Iterator[Finding]:
    for extra, needed in requirements().items():
        if extra in (None, "dev"):
            continue
        missing = [r.name for r in needed if r.name != PACKAGE and installed_version(r.name) is None]
        value = f"missing {', '.join(missing)}: {install_command(extra)}" if missing else "installed"
        yield Finding("extras", str(extra), value)


# ---------------------------------------------------------------------- the machine


def devices() -> Iterator[Finding]:
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    yield Finding("devices", "cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads of torch, {capability}")
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        problem = None if built else "this build of torch has no GPU support; see pytorch.org for one that has"
        yield Finding("devices", "gpu", "none found", problem)
        return
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        text = f"{gpu.name}, {gpu.total_memory / 1e9:.0f} GB, compute capability {gpu.major}.{gpu.minor}"
        yield Finding("devices", f"cuda:{index}", text)


def kernels(device: Any) -> Iterator[Finding]:
    """Which implementation runs an op on tensors of `device`."""
    import torch

    from subquad.ops import fla

    q, chosen = torch.empty(0, device=device), os.environ.get(fla.BACKEND_VARIABLE)
    try:
        used = fla.use_fla(None, q)
    except ValueError as error:
        yield Finding("kernels", "ops", "none", str(error))
        return
    why = f"{fla.BACKEND_VARIABLE}={chosen}" if chosen else f"the device is {device.type}"
    problem = None
    if device.type == "cuda" and not used and not fla.installed():
        why, problem = "fla is not installed", f"the kernels of fla are faster: {install_command('gpu')}"
    yield Finding("kernels", "ops", f"{'fla (Triton)' if used else 'PyTorch'}, since {why}", problem)
    if used and device.type == "cuda" and fla.refuses_scalar_decay():
        text = "backward pass in PyTorch: Triton 3.4 to 3.7.0 compiles it wrongly for this GPU"
        yield Finding("kernels", "scalar decays", text, "install Triton 3.7.1 or later, or tilelang")


def resources() -> Iterator[Finding]:
    home = cache_dir()
    existing = next(path for path in (home, *home.parents) if path.exists())
    free, writable = shutil.disk_usage(existing).free / 1e9, os.access(existing, os.W_OK)
    problem = None if writable else "it cannot be written; set SUBQUAD_CACHE to a directory that can"
    if writable and free < 5:
        problem = "tokenized text and checkpoints need gigabytes; set SUBQUAD_CACHE to a larger disk"
    yield Finding("resources", "cache", f"{home}, {free:.0f} GB free", problem)
    if not hasattr(os, "getloadavg"):
        return
    import torch

    load, cores = os.getloadavg()[0], available_cores()
    busy = load + torch.get_num_threads() > cores + 1
    problem = (
        f"other processes are running: set OMP_NUM_THREADS to the cores that are free, of {cores}" if busy else None
    )
    yield Finding("resources", "load", f"{load:.1f} processes of {cores} cores", problem)


# ---------------------------------------------------------------------- speed


def speed(device: Any, seconds: float) -> Iterator[Finding]:
    """Matrix products, and a training step of a student of nano; each for a part of the time."""
    import torch

    from subquad.modeling.linearize import linearize
    from subquad.modeling.teachers import load_teacher

    rates = {name: product_rate(getattr(torch, name), device, seconds / 5) for name in ("float32", "bfloat16")}
    for name, rate in rates.items():
        problem = None
        if 2 * rate < rates["float32"]:
            problem = f"this {device.type} has no {name}: choose float32, in recipes `precision: float32`"
        yield Finding("speed", f"{name} products", f"{rate / 1e9:,.3g} GFLOP/s", problem)
    teacher, _ = load_teacher("nano", device=device)
    ids = torch.randint(0, 256, BATCH, generator=torch.Generator().manual_seed(0)).to(device)
    student = linearize(teacher, "gated_deltanet").train()

    def step() -> None:
        student(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        student.zero_grad(set_to_none=True)

    rate = ids.numel() / per_call(step, device, seconds / 2)
    yield Finding("speed", "training step of nano", f"{rate:,.0f} tokens/s (gated_deltanet, forward and backward)")


def product_rate(dtype: Any, device: Any, seconds: float) -> float:
    """Operations per second of products of square matrices, as large as the time allows: emulated dtypes are slow."""
    import torch

    for size in MATMUL_SIZES:
        a = torch.randn(size, size, dtype=dtype, device=device)
        needed = per_call(functools.partial(torch.matmul, a, a), device, seconds / len(MATMUL_SIZES))
        if 2 * 8 * needed > seconds:  # the next size takes eight times as long, and is called twice
            break
    return 2 * size**3 / needed


def per_call(call: Callable[[], Any], device: Any, seconds: float) -> float:
    """Seconds of a call, the median of as many as the time allows, at least one, after a warm-up."""
    import torch

    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 2 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
