"""Training data: manifest -> records (`prepare`) -> batches (`pipeline`). Modules are imported by name: some need the extra `train`."""
