"""Imported by ranks (`plugins=`) that compile: graphs are traced, guarded and called, but no code is made of them."""

from denoised.attention import graphs

graphs.generate = lambda graph, inputs: graph.forward
