"""Run a model: the contract is `api`, `factory` makes the engine of this process."""
