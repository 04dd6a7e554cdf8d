"""The examples of README and docs run, their figures are those of bench/results, and the site has what the package has."""

import re
from pathlib import Path

import pytest
import torch

import mixupe_kernels as mk
from bench import report
from mixupe_kernels.ops import backends

ROOT = Path(__file__).parent.parent
PAGES = [*report.PAGES, ROOT / "CONTRIBUTING.md"]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
OF_RANKS = ROOT / "docs/distributed.md"  # its examples run in tests/test_ranks.py
EXAMPLES = [page for page in PAGES if BLOCK.search(page.read_text()) and page != OF_RANKS]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def given() -> dict:
    """What a page's examples may use without making it."""
    torch.manual_seed(0)
    labels = torch.randint(4, (16,))
    return {
        **{name: value for name, value in vars(backends).items() if not name.startswith("__")},
        "mk": mk,
        "torch": torch,
        "images": torch.randint(256, (16, 3, 32, 32), dtype=torch.uint8),
        "labels": labels,
        "model": torch.nn.Linear(6, 4),
        "loader": [(torch.randn(16, 6), labels) for _ in range(2)],
        "mixup_fn": mk.MixupE(clean_fraction=1 / 4),
        "criterion": mk.MixupELoss(eta=1e-3),
    }


def batch_of(names: dict) -> dict:
    """Rows, logits and target that belong together, for each example afresh."""
    x, labels = torch.randn(16, 6), names["labels"]
    lam = torch.cat([torch.rand(12), torch.ones(4)])
    target = mk.MixedTarget(labels, labels.flip(0), lam, 12, 4, 0.3)
    return {"x": x, "logits": mk.forward_mixupe(names["model"], x, target), "target": target}


def test_the_readme_is_read_in_five_minutes():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_there_are_examples():
    assert {"README.md", "CONTRIBUTING.md", "docs/index.md", "docs/losses.md"} <= set(map(name_of, EXAMPLES))


@pytest.mark.parametrize("page", EXAMPLES, ids=name_of)
def test_the_examples_of_a_page_run_from_top_to_bottom(page):
    text, names = page.read_text(), given()
    assert text.count("```python") == len(BLOCK.findall(text)), "an example is indented"
    for found in BLOCK.finditer(text):
        line = text[: found.start(1)].count("\n")
        names.update(batch_of(names))
        exec(compile("\n" * line + found[1], str(page), "exec"), names)  # an error names the page's own line
    for name in ("loss", "mixup_loss", "regmixup", "confidence_penalty", "z_loss"):
        if name in names:
            assert names[name].isfinite(), name
    if "loss.backward()" in text:
        assert any(parameter.grad.abs().sum() > 0 for parameter in names["model"].parameters())


@pytest.mark.parametrize("page", report.PAGES, ids=name_of)
def test_figures_are_the_measured_ones(page):
    text = page.read_text()
    assert report.updated(text) == text, "run `python -m bench report`"
    assert set(re.findall(r"<!-- results: (\w+) -->", text)) <= set(report.SECTIONS)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_are_there(page):
    """What a page tells to type: targets of make, modules, and files of the repository."""
    text = page.read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE)) <= targets
    for module in re.findall(r"python -m (\w+)", text):
        assert module in ("venv", "pytest") or (ROOT / module / "__main__.py").exists(), module


def test_the_reference_has_every_public_name_once():
    text = "\n".join(page.read_text() for page in sorted(ROOT.glob("docs/reference/*.md")))
    documented = re.findall(r"^::: mixupe_kernels\.(\w+)$", text, re.MULTILINE)
    old_names = {"batch_mean"}
    assert sorted(documented) == sorted(set(mk.__all__) - old_names)


def test_the_site_has_every_page():
    listed = set(re.findall(r": ([\w/]+\.md)", (ROOT / "mkdocs.yml").read_text()))
    assert listed == {str(page.relative_to(ROOT / "docs")) for page in ROOT.glob("docs/**/*.md")}


def test_the_recipes_table(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "IMAGES", tmp_path)
    assert report.recipe() == ["Not measured yet."]
    columns = (
        "data_set,network,alpha,budget,method,fraction,gamma,eta,cost,error,error_less_mixup,error_less_mixup_error"
    )
    rows = [
        "MNIST,CNN,1.0,epochs,mixup,0.0,0.0,0.0,1.0,8.0,0.0,0.0",
        "MNIST,CNN,1.0,epochs,two calls,1.0,0.0,0.001,1.9,7.6,-0.4,0.1",
        "MNIST,CNN,1.0,epochs,split,0.25,0.25,0.001,1.25,8.5,0.5,0.2",
        "MNIST,CNN,1.0,time,split,0.25,0.25,0.001,1.25,9.0,1.0,0.2",
    ]
    (tmp_path / "summary.csv").write_text("\n".join([columns, *rows]))
    assert report.recipe()[-1] == "| MNIST, CNN, α = 1 | 8.00 | – | -0.40 ± 0.10, 1.90 × | **+0.50 ± 0.20**, 1.25 × |"
