"""What the tensors of a model mean: one table of roles by name and shape, for every architecture."""

from moe_svd_distill.roles.layout import Geometry, Meaning, ModelLayout, TensorView
from moe_svd_distill.roles.reading import read_layout
from moe_svd_distill.roles.table import ROLES, Axis, Role

__all__ = ["ROLES", "Axis", "Geometry", "Meaning", "ModelLayout", "Role", "TensorView", "read_layout"]
