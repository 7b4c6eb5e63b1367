"""HTTP: the routes of OpenAI's API for images, videos, sound and chat, and what operators ask of a server.

Knows nothing of tensors, ranks or models: it drives `AsyncOmni`, and reads what a model accepts from its `ModelInfo`.
"""
