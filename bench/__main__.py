"""``python -m bench NAME [options]``: run one benchmark and write its results under bench/results/."""

import importlib
import sys

# Name → module with main(arguments) -> exit status, and what it does.
COMMANDS = {
    "cpu": ("bench.cpu", "operators on this machine's CPU, against eager PyTorch and torch.compile"),
    "gpu": ("bench.gpu", "GPU tests, then operators on this machine's GPU, against the copy rate and peers"),
    "step": ("bench.step", "the time of a whole training step, per model and policy, against mixup"),
    "compare": ("bench.compare", "two revisions by turns, or two folders of results: what has become slower"),
    "report": ("bench.report", "copy the figures of bench/results into README and docs"),
    "ranks": ("bench.ranks", "what several ranks send, counted under gloo, and what it costs at scale by a model"),
    "aot": (
        "bench.aot",
        "compile every kernel ahead of time and count its instructions, registers and loads in flight",
    ),
}


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        print("usage: python -m bench NAME [--help]\n")
        for name, (_, what) in COMMANDS.items():
            print(f"  {name:8} {what}")
        return 2
    return importlib.import_module(COMMANDS[sys.argv[1]][0]).main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
