"""Trainers of other libraries with ``ShardedASGD``, beside the same trainers with ``torch.optim.ASGD``."""
