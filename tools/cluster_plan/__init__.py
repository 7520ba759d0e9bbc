"""What a GRPO run will need on a cluster, by arithmetic: memory, seconds, bytes sent, and which layouts are possible.

`job` says what is run and how it is divided, `devices` on what; `parameters`, `memory`, `timing` and `traffic` compute;
`search` tries the layouts; `calibration` replaces assumed rates by measured ones. Everything is a pure function.
"""
