"""Checkpoints as files: local folders and Hub repositories, safetensors and PyTorch weights, read tensor by tensor."""
