"""Configuration of a run.

`schema` and the `*_sections` modules define and document the settings, `loading` reads them from a TOML file and the
command line, `rendering` writes them back to TOML, and `layout` checks that a model can be split as the settings say.
"""
