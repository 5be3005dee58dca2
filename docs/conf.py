"Sphinx settings; the site is built by docs/build.py."
project = "efcn_nb"
author = copyright = "efcn_nb contributors"

extensions = ["myst_nb", "sphinxcontrib.katex"]
nb_execution_mode = "off"  # the notebooks' saved outputs are shown
nb_code_prompt_show = "Show source"
nb_code_prompt_hide = "Hide source"
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # a symbol's heading may come straight below the title

html_theme = "furo"
html_title = project
html_static_path = ["static"]
html_css_files = ["site.css"]
katex_css_path = "katex/katex.min.css"  # KaTeX 0.16.22, the version that sphinxcontrib-katex renders with
exclude_patterns = ["_build"]
html_copy_source = False
html_show_sphinx = False
