"""Few labels: does an encoder gain by images without one? ``python -m benchmarks.semi --help``.

- ``plan``: the arms that are compared, and what each costs;
- ``run``: one of them in a process of its own;
- ``table``: the runs' files as Markdown.
"""
