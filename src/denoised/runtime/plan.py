"""What a configuration needs and does, before anything is loaded: the public names of `planning/`.

model = read("Qwen/Qwen-Image", Ask(height=2048, width=2048))
found = predict(Layout(cfg=2, ulysses=4), model, HARDWARE["h100"])
"""

from denoised.runtime.planning.ask import Ask
from denoised.runtime.planning.choose import Option, Plan, plan, plan_one
from denoised.runtime.planning.facts import Component, Denoiser, Limits, ModelFacts, Tokens, Work
from denoised.runtime.planning.hardware import HARDWARE, Hardware
from denoised.runtime.planning.layout import Layout, admissible, idle, of_config, problem
from denoised.runtime.planning.measuring import measure
from denoised.runtime.planning.memory import Memory
from denoised.runtime.planning.prediction import Prediction, Traffic, predict
from denoised.runtime.planning.reading import facts_of, read

__all__ = [
    "HARDWARE",
    "Ask",
    "Component",
    "Denoiser",
    "Hardware",
    "Layout",
    "Limits",
    "Memory",
    "ModelFacts",
    "Option",
    "Plan",
    "Prediction",
    "Tokens",
    "Traffic",
    "Work",
    "admissible",
    "facts_of",
    "idle",
    "measure",
    "of_config",
    "plan",
    "plan_one",
    "predict",
    "problem",
    "read",
]
