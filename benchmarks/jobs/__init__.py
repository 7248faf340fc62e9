"""The jobs. Each file has a function `races(quick)`, which `python -m benchmarks` runs.

In jobs that also run on a GPU it is `races(quick, device)`.
"""
