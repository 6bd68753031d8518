"""What a measurement was taken on and with: for the JSON of the benchmarks."""

import datetime
import json
import os
import pathlib
import platform
import subprocess

ROOT = pathlib.Path(__file__).resolve().parent.parent


def _output(*command):
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _rounded(value):
    """Floats with six digits: no measurement has more."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


def write_json(report, path):
    """With a line for each result, and one for everything else."""
    results = ",\n".join("  " + json.dumps(_rounded(result)) for result in report["results"])
    rest = [f" {json.dumps(key)}: {json.dumps(_rounded(value))}" for key, value in report.items() if key != "results"]
    pathlib.Path(path).write_text(
        "{\n" + ",\n".join(rest) + f',\n "results": [\n{results}\n ]\n}}\n', encoding="utf-8")


def cpu_model():
    try:
        for line in pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor()


def last_level_cache_bytes(default=32 << 20):
    """Of the first CPU; a default where the system does not tell."""
    sizes = []
    for path in pathlib.Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="utf-8").strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]])
    return max(sizes, default=default)


def stamp(path=None):
    """Commit and hashes of the kernels' sources: of a bundle's stamp file, or of this tree."""
    if path:
        lines = pathlib.Path(path).read_text(encoding="utf-8").splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)
    commit = _output("git", "rev-parse", "--short=12", "HEAD")
    changed = "" if _output("git", "status", "--porcelain", "--untracked-files=no") == "" else "+changes"
    return {"commit": (commit or "unknown") + changed,
            **{f"{device}_sources": _output(str(ROOT / ".ci/gpu/source_hash"), device) for device in ("cpu", "cuda")}}


def describe(torch, device, threads):
    """The machine and how its processors are used."""
    affinity = sorted(os.sched_getaffinity(0))
    result = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": cpu_model(), "cpu_count": os.cpu_count(), "affinity": affinity, "threads": threads,
        "last_level_cache_bytes": last_level_cache_bytes(), "torch_threads": torch.get_num_threads(),
        "environment": {name: value for name, value in sorted(os.environ.items())
                        if name.startswith(("OMP_", "GOMP_", "KMP_", "MKL_", "TANDEM_"))},
        "kernel": platform.release(), "python": platform.python_version()}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        result["gpu"] = properties.name
        result["multiprocessors"] = properties.multi_processor_count
        result["gpu_memory_bytes"] = properties.total_memory
        result["driver"] = _output("nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit",
                                   "--format=csv,noheader")
    return result


def versions(torch):
    result = {"torch": torch.__version__, "cuda": torch.version.cuda, "mkldnn": torch.backends.mkldnn.is_available(),
              "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None}
    for name in ("onnxruntime", "onnx", "numpy", "triton"):
        try:
            result[name] = __import__(name).__version__
        except ImportError:
            result[name] = None
    return result
