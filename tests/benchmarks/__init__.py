"""What using SOAP costs: `python -m tests.benchmarks` measures, prints and writes `benchmarks.json`.

A benchmark is a function without arguments that returns a `Comparison`; `__main__` lists them.
"""
