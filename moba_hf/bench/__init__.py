"""The speed of the operator on this machine next to dense attention, measured after a correctness check.

`moba-hf bench` calls `run`. The correctness gate is `moba_hf.op.checks`, shared with the backend tests.
`rows` says what is measured; `stages`, `peers` and `timing` measure it; `report` writes the results.
"""

from moba_hf.bench.measure import Options, Outcome, run

__all__ = ["Options", "Outcome", "run"]
