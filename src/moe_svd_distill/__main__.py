"""``python -m moe_svd_distill`` is the program itself."""

from moe_svd_distill.cli.main import main

if __name__ == "__main__":
    main()
