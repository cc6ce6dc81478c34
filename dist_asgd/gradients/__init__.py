"""Gradients as a step reads them: averaged by DDP (stage 1) or reduced here (stage 2); clipping and loss scaling."""
