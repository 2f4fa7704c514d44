"""Calibration: finds the sparsest MoBA setting with an allowed loss, or the best one with an allowed share.

The result is measured on texts like those that the model will read. What is searched depends on the setting
in `Options`:

- `per_query`: if every query chooses for itself, each layer gets a topk or full attention.
- `thresholds`: if a tile of queries shares a choice, the model gets one threshold. Each layer gets its own if
  that significantly lowers the loss without attending to more pairs.

Both searches have the same steps:

1. `sensitivities`: a short forward and backward pass measures how much an error of each layer's output
   matters.
2. Local costs: one dense pass per text measures how large that error is at every topk or threshold, and how
   many pairs every threshold attends to.
3. A ladder finds the best setting at any share, with a Lagrange multiplier over the layers.
4. Whole passes confirm the loss and count pairs.

A calibration of SmolLM2-135M takes minutes on two cores. In general, a calibration consists of:

- per text of N tokens, one dense prefill with `samples` rows of attention in every layer, and one output
  projection for each rule or one choice of blocks for each threshold;
- one backward pass over 2,048 tokens, which needs the weights plus about 2 GB of activations per billion
  parameters in bf16;
- per text, one prefill for dense attention and one for every setting that is tried.

For an 8B model at 32K tokens on one 80 GB GPU, this is estimated to take a few minutes, most of it for
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
