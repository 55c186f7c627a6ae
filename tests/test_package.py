"""The package as a whole: importing it is light, its public names exist."""

from __future__ import annotations

import subprocess
import sys

FRAMEWORKS = ("torch", "mlx", "jax", "flax", "transformers", "tensorflow", "numpy")


def loaded_after(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


def test_import_loads_no_framework() -> None:
    assert not loaded_after("import isomorph, isomorph.cli") & set(FRAMEWORKS)
    # The check can fail: a submodule that computes does load numpy.
    assert "numpy" in loaded_after("import isomorph.frameworks.model")


def test_help_loads_no_framework() -> None:
    code = "from isomorph.cli import run\nassert run(['--help']) == 0"
    assert not loaded_after(code) & set(FRAMEWORKS)


def test_public_names() -> None:
    import isomorph

    for name in isomorph.__all__:
        assert getattr(isomorph, name) is not None
    assert callable(isomorph.load) and callable(isomorph.convert)
    assert callable(isomorph.quantize) and callable(isomorph.verify)
