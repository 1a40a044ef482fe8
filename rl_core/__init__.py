"""The vocabulary and the protocol of polyrl. Imports nothing of the other packages, and no Ray, vLLM, DeepSpeed or docker."""
