"""The documentation as a site: `sphinx-build -W docs site`, then open site/index.html.

The pages are plain Markdown, so that they read as well where they lie. Which of them the site shows, and in which order, is
said here. A link that leaves this folder takes its file along, and nothing is fetched when a page is shown.
"""

import re
from pathlib import Path
from typing import Any

import omni

project = "omni"
version = release = omni.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"omni {version}"
html_show_copyright = False
html_show_sourcelink = False
html_copy_source = False

myst_heading_anchors = 3  # links to sections, as code hosts name them
myst_links_external_new_tab = False

autodoc_default_options = {"exclude-members": "config_class, register_for_auto_class, to_diff_dict, validate"}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_use_ivar = True
napoleon_use_rtype = False
python_maximum_signature_line_length = 100

CONTENTS = {
    "Start": ["Quickstart <self>", "app", "training", "evaluation", "attention"],
    "Bring and take along": ["teach", "compose", "serving", "export", "micro-omni"],
    "Understand": ["architecture", "terms", "vision-encoder", "adding-a-modality", "reliability"],
    "Measured": ["performance", "embedding", "experiments"],
    "Reference": ["api"],
}
"""Headings of the contents, and the pages under each."""


def add_contents(app: Any, page: str, source: list[str]) -> None:
    """The contents, which Sphinx reads off the first page; and links to pages that are not of the site, as files."""
    source[0] = re.sub(r"\]\((\.\./[^)]+\.md)\)", r"](path:\1)", source[0])
    if page == "index":
        there = {path.stem for path in Path(__file__).parent.glob("*.md")}
        for caption, pages in CONTENTS.items():
            listed = "\n".join(each for each in pages if each in there or "<self>" in each)
            source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{listed}\n```\n"


def as_restructured(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are written as Markdown: backticks are code, and a bar or a star in a sentence is only that.

    What a module is for stands on the page itself.
    """
    if what == "property":
        lines[0] = lines[0].replace(": ", " - ")  # what stands before a colon is taken for a type
    parts = re.split(r"(`+[^`]+`+)", "" if what == "module" else "\n".join(lines))
    parts[::2] = [re.sub(r"(?<![*\n])[*](?!\*)|[|]", r"\\\g<0>", part) for part in parts[::2]]
    parts[1::2] = [f"\\ ``{part.strip('`')}``\\ " for part in parts[1::2]]
    lines[:] = "".join(parts).split("\n")


def shorten(
    app: Any, what: str, name: str, thing: Any, options: Any, signature: str | None, returned: str | None
) -> Any:
    """A configuration takes what any of transformers takes; its own settings are described below it."""
    return ("(...)", returned) if signature and len(signature) > 600 else None


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("source-read", add_contents)
    app.connect("autodoc-process-signature", shorten)
    app.connect("autodoc-process-docstring", as_restructured, priority=1)  # before sections such as "Args:" are read
