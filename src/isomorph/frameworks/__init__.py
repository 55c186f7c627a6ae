"""torch, mlx and flax behind one small contract (`model.py`), and stock mlx-lm to compare with."""

FRAMEWORKS = ("torch", "mlx", "flax")

#: Libraries whose own models load in place of isomorph's.
STOCK = ("mlx-lm",)
