"""Sphinx configuration: the pages of this folder and the API reference from the docstrings; builds offline.

sphinx-build -W -n docs docs/_build/html
"""

import re
from typing import Any

from docutils.nodes import Element, SkipNode
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.ext.napoleon import GoogleDocstring
from sphinx.util.nodes import make_refnode
from sphinx.writers.html5 import HTML5Translator

from simo_lightning import __version__

project = "simo_lightning"
version = release = __version__
extensions = [f"sphinx.ext.{name}" for name in ("autodoc", "napoleon", "viewcode")] + ["myst_parser"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme = "furo"
html_math_renderer = "mathml"
html_title = "simo_lightning"
html_show_copyright = False

autodoc_default_options = {"members": True, "show-inheritance": True, "member-order": "bysource"}
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_custom_sections = ["Source"]

# Names of other projects: resolving them needs the network, which a build must not.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|lightning|torchmetrics|torchvision|jsonargparse|matplotlib|numpy|PIL)\..*"),
    ("py:.*", r"(argparse|collections|pathlib|datetime|types|typing)\..*"),
    ("py:.*", r"Tensor|SIGTERMException|.*\.lightning_private\.\w+|.*\._\w+|.*\.T"),  # private names and type variables
]

_SECTION = re.compile(r"(Args|Attributes|Returns|Yields|Raises|Example|Source):$")
_KEPT: dict[str, list[str]] = {}


def _formulas(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Show indented lines of a docstring's prose literally, and escape bars: reST reads |x| as a substitution."""
    sections = next((i for i, line in enumerate(lines) if _SECTION.match(line)), len(lines))
    found, literal = [], False
    for place, line in enumerate(lines):
        indented = line.startswith("    ") and place < sections
        if indented and not literal and place and not lines[place - 1]:
            found += ["::", ""]
            literal = True
        if line and not indented:
            literal = False
        found.append(line if literal else _escaped(line))
    lines[:] = found
    if what in ("attribute", "data", "property"):
        # napoleon reads the text before a colon in the first line as a type: it gets a placeholder instead
        _KEPT[name] = [str(line) for line in GoogleDocstring(found, app.config, app, "method", name).lines()]
        lines[:] = ["kept"]


def _restore(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    if name in _KEPT:
        lines[:] = _KEPT.pop(name)


def _escaped(line: str) -> str:
    parts = re.split(r"(``.*?``)", line)
    return "".join(part if part.startswith("``") else part.replace("|", r"\|") for part in parts)


def _by_last_name(app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: Element) -> Element | None:
    """Link a name that is documented where it is imported from, not where it is defined, such as geometry.nc1."""
    if node.get("refdomain") != "py":
        return None
    domain, name = env.domains.python_domain, str(node["reftarget"]).rsplit(".", 1)[-1]
    found = {entry.node_id: entry for full, entry in domain.objects.items() if full.rsplit(".", 1)[-1] == name}
    if len(found) != 1:
        return None
    (entry,) = found.values()
    document: str = node["refdoc"]
    return make_refnode(app.builder, document, entry.docname, entry.node_id, contnode, name)


def _inline_math(self: HTML5Translator, node: Element) -> None:
    """Write MathML, which browsers render without a script from another site."""
    self.body.append(tex2mathml(node.astext()))
    raise SkipNode


def _block_math(self: HTML5Translator, node: Element) -> None:
    self.body.append(f'<div style="overflow: auto hidden">{tex2mathml(node.astext(), as_block=True)}</div>')
    raise SkipNode


def setup(app: Sphinx) -> None:
    """Connect handlers before and after napoleon, which has priority 500."""
    app.connect("autodoc-process-docstring", _formulas, priority=400)
    app.connect("autodoc-process-docstring", _restore, priority=600)
    app.connect("missing-reference", _by_last_name)
    app.add_html_math_renderer("mathml", (_inline_math, None), (_block_math, None))
