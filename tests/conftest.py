"""Shape annotations of the algebra are checked at run time in every test."""

from jaxtyping import install_import_hook

install_import_hook("moe_svd_distill.algebra", "beartype.beartype")
