"""What is measured: one file for each job, with a function `races(quick)` that `python -m benchmarks` runs.

Jobs that know other devices take one as well, `races(quick, device)`.
"""
