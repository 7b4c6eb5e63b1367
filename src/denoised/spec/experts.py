"""What expert parallelism knows of models: how a mixture of experts is recognized. Data only.

Two forms are known, by the names of diffusers. In both the block has its experts under `EXPERTS`:

- a list of feed-forwards, where the block's method `ROUTED` takes (tokens, the expert of each route, the weight of
  each route), the routes of a token side by side, and gives each token's weighted sum;
- one module with the weights of all, each parameter with one entry an expert, and the number of them as `NUM_EXPERTS`.
  It is called with (tokens sorted by expert, how many each expert has). Experts of this form choose their tokens, from
  the whole sequence.
"""

from __future__ import annotations

EXPERTS = "experts"
ROUTED = "moe_infer"
NUM_EXPERTS = "num_experts"

# On a module whose weights are dealt to ranks whole: whoever divides matrices leaves it alone.
DEALT = "denoised_dealt"
