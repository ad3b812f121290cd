"""Settings of Sphinx for the manual: `make docs` writes docs/_build/index.html."""

import dsv3_jax

project = "DSv3-JAX"
author = "The DSv3-JAX authors"
version = release = dsv3_jax.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
html_title = f"DSv3-JAX {version}"
exclude_patterns = ["_build"]
myst_heading_anchors = 3
autodoc_mock_imports = ["lm_eval", "tqdm"]  # of an extra that the manual does not need
autodoc_typehints = "none"  # shapes of arrays are in the text of each docstring
autodoc_member_order = "bysource"
napoleon_google_docstring = True


def _literal_asterisks(app, what, name, obj, options, lines):
    """Docstrings use an asterisk for a product or for any leading axes, never for emphasis."""
    lines[:] = [line.replace("*", r"\*") for line in lines]


def _literal_types(app, what, name, obj, options, lines):
    """Returns the text without the shapes that napoleon adds from annotations."""
    lines[:] = [line.replace("*", r"\*") if line.lstrip().startswith(":type:") else line for line in lines]


def setup(app):
    """Called by Sphinx. napoleon's own priority is 500."""
    app.connect("autodoc-process-docstring", _literal_asterisks, priority=400)
    app.connect("autodoc-process-docstring", _literal_types, priority=600)
