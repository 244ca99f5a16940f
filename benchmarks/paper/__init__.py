"""The paper's figures and ablations made again: ``python -m benchmarks.paper --help``.

- ``apart``: which classes stay apart, and by what measure;
- ``snapshots``: what is measured on the validation split while a recipe trains;
- ``figures``: the pictures of a run, without a single image of the data;
- ``run``: one recipe in a process of its own;
- ``table``: the runs' files as Markdown.

Recipes, learning rates and the store of results are those of ``benchmarks.recipes``.
"""
