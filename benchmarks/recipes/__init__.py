"""One command that trains recipes alike and judges them alike: ``python -m benchmarks.recipes --help``.

The command itself imports no torch: it plans, starts one process per run and reads the files they leave.

- ``plan``: recipes from YAML, laid over one base;
- ``store``: one JSON file per run, whole or not at all;
- ``drive``: what is still to do, a process for each run, progress;
- ``run`` and ``evaluate``: what such a process does;
- ``table``: the files as Markdown.
"""
