"""What the adapter room still asks of a family; the meaning of tensors is in `roles`."""

from moe_svd_distill.families.family import Axis, Carrier, Family, Geometry, TensorRole

__all__ = ["Axis", "Carrier", "Family", "Geometry", "TensorRole"]
