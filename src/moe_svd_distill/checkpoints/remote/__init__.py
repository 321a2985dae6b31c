"""Models that are not on this machine: their tensors are fetched when they are needed, each once.

`source` says where from, `folder` what is kept of a model on this machine, `tensors` fetches and keeps its tensors.
"""
