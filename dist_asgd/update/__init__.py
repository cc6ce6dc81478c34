"""The ASGD rule on this rank's tensors: schedule, plan, implementations and kernels. Nothing here communicates."""
