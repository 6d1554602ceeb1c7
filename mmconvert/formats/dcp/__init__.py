"""Folders of torch.distributed.checkpoint (DCP), and of Megatron-Core (torch_dist)."""
