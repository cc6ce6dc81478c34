"""One script a trainer. Start them from the root of the repository by `torchrun ... -m launch.examples.NAME`."""
