"""How fast the operator is on this machine, beside dense attention, after it has been proved right.

`moba-hf bench` and `tests/benchmarks/bench_kernels.py` are `run`. `checks` is the correctness gate, which the
tests of kernels share; `rows` is what is measured, `stages`, `dense` and `timing` how, `report` the result.
"""

from moba_hf.bench.measure import Options, run

__all__ = ["Options", "run"]
