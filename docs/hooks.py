"""Lets pages be read in the repository too: paths that leave docs/ there lead to pages and pictures of the site here."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
# What a page links to in the repository, and where that is on the site.
MOVED = (
    (r"\]\((?:\.\./)?docs/", "]("),
    (r"\]\((?:\.\./)?CONTRIBUTING\.md", "](contributing.md"),
    (r"\]\((?:\.\./)?CHANGELOG\.md", "](changelog.md"),
    (r"\]\((?:\.\./)?README\.md", "](index.md"),
    (r"\]\(\.\./bench/results/", "](results/"),
    (r"\[[\w.]+\]\((?:\.\./)?(examples/\w*(?:\.py)?)/?\)", r"`\1`"),  # a file of the repository, which the site has not
    (r"\]\(\.\./experiments/results/", "](results/experiments/"),
)
# Tables of figures, which scroll on a narrow screen instead of being broken.
RESULTS = re.compile(r"<!-- results: \w+ -->\n(.*?)<!-- end -->", re.DOTALL)


def on_files(files, config):
    """Add the pictures of bench/results and experiments/results as results/..."""
    for folder, where in (("bench/results", "results"), ("experiments/results", "results/experiments")):
        for path in sorted((ROOT / folder).glob("**/*.png")):
            place = f"{where}/{path.relative_to(ROOT / folder).as_posix()}"
            files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, **_):
    included = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}.get(page.file.src_uri)
    if included:
        markdown = (ROOT / included).read_text()
    if page.file.src_uri == "libraries.md":  # the repository's readers have the table before them
        table = (ROOT / "README.md").read_text().split("## If you use …\n")[1].split("\n## ")[0]
        begin, rest = markdown.split("\n## ", 1)
        markdown = f"{begin}\n{table.split('More in')[0]}\n## {rest}"
    for here, there in MOVED:
        markdown = re.sub(here, there, markdown)
    return RESULTS.sub(r'<div class="results" markdown>\n\n\1\n</div>', markdown)
