"""The documentation site: Sphinx with MyST, built offline by ``make docs``; a warning is an error."""

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

from vapt_fast import __version__

project = "vapt_fast"
author = copyright = "the vapt_fast authors"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "vapt_fast"
html_math_renderer = "mathml"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4  # links to headings, as on GitHub

autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
add_module_names = False
smartquotes = False  # strings in docstrings stay strings
napoleon_custom_sections = [("Attributes", "params_style")]  # a list, in which "prompts, head" may be a name


def setup(app):
    """Formulas become MathML, which browsers show by themselves; MathJax would be fetched from elsewhere."""

    def write(self, node, as_block):
        self.body.append(tex2mathml(node.astext(), as_block=as_block))
        raise nodes.SkipNode

    app.add_html_math_renderer(
        "mathml",
        inline_renderers=(lambda self, node: write(self, node, False), None),
        block_renderers=(lambda self, node: write(self, node, True), None),
    )
