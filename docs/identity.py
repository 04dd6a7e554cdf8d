"""Draws identity.svg: `python docs/identity.py`."""

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("svg")
matplotlib.rcParams.update({"svg.hashsalt": "mixupe_kernels", "svg.fonttype": "path", "font.size": 11})
from matplotlib import pyplot as plt  # noqa: E402

z = np.linspace(-4, 6, 81)
p = 1 / (1 + np.exp(-z))
cross_entropy = np.log1p(np.exp(-z))
entropy = cross_entropy + (1 - p) * z  # lse - Σ p z, of logits (z, 0)
figure, axes = plt.subplots(figsize=(7.2, 3.4), layout="constrained")
axes.plot(z, cross_entropy, color="#3f51b5", lw=2, label="CE")
axes.plot(z, entropy, color="#e08a00", lw=2, label="H")
axes.plot(z, entropy - cross_entropy, color="#b0174b", lw=2, ls="--", label="q̂ = H − CE")
axes.fill_between(z, 0, entropy - cross_entropy, color="#b0174b", alpha=0.12)
axes.axhline(0, color="0.4", lw=0.8)
axes.axvline(0, color="0.4", lw=0.8)
axes.set(xlabel="logit of the right class, less that of the other", ylabel="nats", xlim=(-4, 6), ylim=(-4, 4))
axes.spines[["top", "right"]].set_visible(False)
axes.legend(frameon=False, loc="upper right")
figure.savefig(Path(__file__).with_suffix(".svg"), metadata={"Date": None})
