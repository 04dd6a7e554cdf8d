"""Turns what docstrings have of reStructuredText into Markdown: roles, tables of ``===`` and maths of one line."""

import re

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod|attr|data):`~?([\w.]+)`")
MATH = re.compile(r":math:`([^`]+)`")
RULE = re.compile(r"^ *=+(?: +=+)+ *$")
TEX = {r"\tilde x_i": "x̃ᵢ", "x_{partner(i)}": "x_partner(i)", "λ_i": "λᵢ", "x_i": "xᵢ", "(1 - ": "(1 − "}


def _role(match: re.Match, names: set[str]) -> str:
    name = match[1]
    public = name.removeprefix("mixupe_kernels.")
    return f"[`{public}`][mixupe_kernels.{public}]" if public.split(".")[0] in names else f"`{name}`"


def _math(match: re.Match) -> str:
    text = match[1]
    for tex, plain in TEX.items():
        text = text.replace(tex, plain)
    return text


def _cells(line: str, starts: list[int]) -> list[str]:
    ends = [*starts[1:], None]
    return [line[start:end].strip().replace("|", r"\|") for start, end in zip(starts, ends, strict=True)]


def _table(lines: list[str]) -> list[str]:
    """Markdown for the lines of a simple table: three rules, a head, and rows that may go on in lines without a first cell."""
    indent = len(lines[0]) - len(lines[0].lstrip())
    starts = [match.start() for match in re.finditer(r"=+", lines[0])]
    head, *body = (_cells(line, starts) for line in lines if not RULE.match(line))
    rows: list[list[str]] = []
    for cells in body:
        if cells[0]:
            rows.append(cells)
        else:
            rows[-1] = [f"{above} {cell}".strip() for above, cell in zip(rows[-1], cells, strict=True)]
    return [" " * indent + f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def as_markdown(text: str, names: set[str]) -> str:
    lines, made = text.split("\n"), []
    while lines:
        if RULE.match(lines[0]):
            rules = [number for number, line in enumerate(lines) if RULE.match(line)]
            made += _table(lines[: rules[2] + 1])
            lines = lines[rules[2] + 1 :]
        else:
            made.append(lines.pop(0))
    return MATH.sub(_math, ROLE.sub(lambda match: _role(match, names), "\n".join(made)))


class Markdown(griffe.Extension):
    """Applied to every object once its package is loaded."""

    def on_package(self, *, pkg, **_):
        names = {str(name) for name in pkg.exports or ()}
        self._convert(pkg, names, set())

    def _convert(self, thing, names, seen):
        if thing.is_alias or thing.path in seen:
            return
        seen.add(thing.path)
        if thing.docstring:
            thing.docstring.value = as_markdown(thing.docstring.value, names)
        for member in getattr(thing, "members", {}).values():
            self._convert(member, names, seen)
