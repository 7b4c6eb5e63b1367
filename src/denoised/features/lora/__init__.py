"""LoRA adapters: what a file adds to a layer is computed beside the layer, for the rows of requests that asked for it.

A layer's own forward is called as it is, whatever it has become (sharded, quantized, gathered as it runs), and the
adapter's product is added to what comes out. Which adapters act is read off the forward that runs (`Call.adapters`),
never off a switch on a module: requests with different adapters are in flight together, on several threads.
"""

from __future__ import annotations

from denoised.features.lora.files import read
from denoised.features.lora.layouts import Place
from denoised.features.lora.proof import problem
from denoised.features.lora.sites import Sites, survey
from denoised.features.lora.store import Adapters

__all__ = ["Adapters", "Place", "Sites", "problem", "read", "survey"]
