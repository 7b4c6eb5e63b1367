"""Images, videos and sound, from and to files. Knows nothing of models, ranks or HTTP."""
