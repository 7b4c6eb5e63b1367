"""What a configuration needs and does, before anything is loaded. The public names are in `runtime/plan.py`."""
