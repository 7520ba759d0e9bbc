"""The supported model families, one module or folder each; the rest of the package uses `base.Family` only."""
