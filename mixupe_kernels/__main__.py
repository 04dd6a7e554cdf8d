"""``python -m mixupe_kernels doctor``: versions, the backends found, and for each one missing, why."""

import importlib.metadata
import platform
import sys

import torch

import mixupe_kernels
from mixupe_kernels.ops import backends


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def report() -> list[tuple[str, str]]:
    """(topic, finding) pairs."""
    lines = [
        ("mixupe_kernels", mixupe_kernels.__version__),
        ("python", f"{platform.python_version()}, {platform.platform()}"),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
        ("triton", _version("triton")),
        ("cuda", torch.version.cuda or torch.version.hip or "this torch is built without"),
    ]
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        lines.append(("device", f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}"))
    facts = backends.build_facts() or {"build": "nothing compiled"}
    lines += [(topic.replace("_", " "), str(finding)) for topic, finding in facts.items()]
    missing = backends.missing_backends()
    for name in [*backends.available_backends(), *missing]:
        lines.append((f"backend {name}", f"missing: {missing[name]}" if name in missing else "works"))
    lines.append(("CPU tensors use", backends.serving("cpu")))
    if torch.cuda.is_available():
        lines.append(("CUDA tensors use", backends.serving("cuda")))
    return lines


def main(arguments: list[str]) -> int:
    if arguments != ["doctor"]:
        print("usage: python -m mixupe_kernels doctor")
        return 2
    lines = report()
    width = max(len(topic) for topic, _ in lines)
    for topic, finding in lines:
        print(f"{topic:{width}}  {finding}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
