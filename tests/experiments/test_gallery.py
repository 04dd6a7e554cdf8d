"""The gallery says what the rows say."""

from experiments import __main__ as command
from experiments import gallery


def test_the_page_is_that_of_the_rows():
    assert gallery.PAGE.read_text() == gallery.page(), "run `python -m experiments.gallery`"


def test_each_experiment_has_its_picture_command_claim_and_finding():
    assert list(gallery.SAID) and set(gallery.SAID) == set(command.EXPERIMENTS)
    sections = gallery.PAGE.read_text().split("\n## ")[1:]
    for name, section in zip(command.EXPERIMENTS, sections, strict=True):
        assert section.startswith(f"{name}\n") and f"(../experiments/results/{name}.png)" in section
        assert f"`python -m experiments {name}" in section and "**The paper**" in section and "**Here**" in section
