"""State dicts of one optimizer: this rank's fragments, the full form, and loading either. Below the optimizer."""
