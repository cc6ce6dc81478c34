"""State dicts of one optimizer: the sharded form, the full form, and loading either.

The optimizer calls ``StateDicts``; nothing here knows the optimizer's class, or files.
"""
