"""Attention over a sequence that is spread over ranks: one function, whatever the model."""
