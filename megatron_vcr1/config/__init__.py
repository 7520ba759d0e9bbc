"""Configuration: `schema` (what can be set), `loading` (TOML and the command line), `layout` (what fits together)."""
