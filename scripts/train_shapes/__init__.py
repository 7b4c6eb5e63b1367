"""Training and evaluation of the built-in model `shapes`. See docs/shapes.md."""
