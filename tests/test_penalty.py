"""A new penalty is a few lines in known places: this adds one to a copy of the sources, on every backend, and trains with it."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# "positive": max(q̂, 0). (file, what stands there, what takes its place): all that a penalty needs to work everywhere.
PLACES = [
    (
        "mixupe_kernels/conventions.py",
        '    "linear_detached": Penalty(',
        '    "positive": Penalty(lambda q, threshold: q.clamp(min=0), lambda q, threshold: (q > 0).to(q.dtype)),\n'
        '    "linear_detached": Penalty(',
    ),
    ("csrc/row.h", "penalty_count = 3", "penalty_count = 4"),
    (
        "csrc/row.h",
        "    case 2: return",
        "    case 2: return {q > T(0) ? q : T(0), T(q > T(0)), true};\n    case 3: return",
    ),
    (
        "mixupe_kernels/ops/triton/rows.py",
        '    else:\n        tl.static_assert(PENALTY == 2, "unknown penalty")',
        "    elif PENALTY == 2:\n        value = zero_where(q <= 0, q)\n        slope = zero_where(q <= 0, tl.where(q == q, 1.0, q))\n"
        '    else:\n        tl.static_assert(PENALTY == 3, "unknown penalty")',
    ),
]

USE = """
import torch
import mixupe_kernels as mk
from mixupe_kernels.ops import backends

names = [name for name in backends.backends_for("cpu") if name in mk.available_backends()]
assert names == {expected}, names
torch.manual_seed(0)
logits = 3 * torch.randn(12, 7)
_, target = mk.MixupE()(torch.randn(6, 4), torch.randint(7, (6,)))
for dtype in (torch.float32, torch.bfloat16):
    for name in names:
        with mk.use_backend(name):
            found = []
            for penalty in ("positive", lambda q: q.clamp(min=0)):
                z = logits.to(dtype, copy=True).requires_grad_()
                loss = mk.mixupe_loss(z, target, eta=2.0, penalty=penalty)
                loss.backward()
                found.append((loss.detach(), z.grad))
        (loss, grad), (expected_loss, expected_grad) = found
        torch.testing.assert_close(loss, expected_loss)
        torch.testing.assert_close(grad, expected_grad)
        assert grad.abs().sum() > 0
try:
    torch.ops.mixupe.mixupe_loss(logits, torch.zeros(12, dtype=torch.int64), None, None, torch.ones(()), torch.ones(()), 12, 0, 4)
except (RuntimeError, ValueError) as error:
    assert "penalty must be in [0, 3], got 4" in str(error), error
else:
    raise AssertionError("an unknown penalty was taken")
"""


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="no C++ compiler here")
def test_a_penalty_is_at_most_six_places(tmp_path):
    documented = 1  # the docstring of mixupe_loss, which the code does not need
    assert len(PLACES) + documented <= 6
    for folder in ("mixupe_kernels", "csrc"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(ROOT / "CMakeLists.txt", tmp_path)
    for file, before, after in PLACES:
        text = (tmp_path / file).read_text()
        assert text.count(before) == 1, (file, before)
        (tmp_path / file).write_text(text.replace(before, after))
    configure = ["cmake", "-S", ".", "-B", "build", "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"]
    for command in (
        [*configure, "-DMIXUPE_BINDINGS=OFF", "-DCMAKE_BUILD_TYPE=Debug"],
        ["cmake", "--build", "build", "--target", "_cpu"],
    ):
        run(command, tmp_path)
    run([sys.executable, "-c", USE.replace("{expected}", "['cpp', 'reference']")], tmp_path)
    if importlib.util.find_spec("triton") is not None:
        use = USE.replace("{expected}", "['cpp', 'triton', 'reference']")
        run([sys.executable, "-c", use], tmp_path, TRITON_INTERPRET="1")


def run(command, directory, **environment):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(directory), **environment}
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-3000:])
