"""torch, mlx and flax behind one small contract (`model.py`)."""

FRAMEWORKS = ("torch", "mlx", "flax")
