"""How fast the operator is on this machine, beside dense attention, after it has been proved right.

`moba-hf bench` is `run`. `moba_hf.op.checks` is the correctness gate, which the tests of backends share;
`rows` is what is measured, `stages`, `peers` and `timing` how, `report` the result.
"""

from moba_hf.bench.measure import Options, Outcome, run

__all__ = ["Options", "Outcome", "run"]
