"""Finds the number in a MoBA setting that keeps an allowed loss with the fewest keys, or that loses least
within an allowed share of them, on texts like those that a model will read.

What it looks for depends on the setting that `Options` names:

- `per_query`: where every query chooses for itself, each layer gets a topk or full attention;
- `thresholds`: where a tile of queries shares a choice, the model gets one threshold, or each layer gets its
  own if that surely lowers the loss at no more attended pairs.

Both work alike:

1. `sensitivities`: one short forward and backward pass says how much an error of each layer's output matters.
2. Local costs: one dense pass per text says how large that error is at every topk or threshold, and how many
   pairs every threshold attends.
3. A ladder gives the best setting at any share, by a Lagrange multiplier over the layers.
4. Whole passes confirm, and count pairs.

A calibration of SmolLM2-135M takes minutes on two cores. In general it takes, per text of N tokens, one dense
prefill with `samples` rows of attention in every layer, and one output projection for each rule or one choice
of blocks for each threshold; one backward pass over 2,048 tokens, which needs the weights and about 2 GB per
billion parameters of activations in bf16; and a prefill per text for dense attention and for every setting
that is tried. For an 8B model at 32K tokens on one 80 GB GPU that is an estimated few minutes, most of it
loading; it has not been measured.
"""

from moba_hf.calibrate.options import Options
from moba_hf.calibrate.per_query import SHARES, allocate, config_of
from moba_hf.calibrate.results import Calibration, Comparison, Point
from moba_hf.calibrate.run import calibrate, starting_setting
from moba_hf.calibrate.writing import replace_text, write_settings

__all__ = [
    "SHARES",
    "Calibration",
    "Comparison",
    "Options",
    "Point",
    "allocate",
    "calibrate",
    "config_of",
    "replace_text",
    "starting_setting",
    "write_settings",
]
