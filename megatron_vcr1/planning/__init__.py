"""Predicts memory, time and traffic of a GRPO run on a cluster, and which layouts are possible.

`job` describes the run and its layout, `devices` the hardware. `parameters`, `memory`, `timing` and `traffic` predict
one quantity each, `search` tries all layouts, `calibration` replaces assumed efficiencies by measured ones, and
`report` prints plans. Everything except `report` is a pure function of its arguments.
"""
