"""What the tensors of an architecture mean, one declarative entry per family."""

from moe_svd_distill.families.family import Axis, Carrier, Family, Geometry, TensorRole
from moe_svd_distill.families.layout import Meaning, ModelLayout, read_layout

__all__ = ["Axis", "Carrier", "Family", "Geometry", "Meaning", "ModelLayout", "TensorRole", "read_layout"]
