"""`vcr1 report`: one self-contained HTML page about a run or several runs.

`run_record` reads the folders. `tables`, `results`, `curves` and `gallery` select what is shown, `charts` and `frames`
make the pictures, and `page` renders the templates.
"""
