"""Imports point down only, importing is light, and nothing needs Triton."""

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import vapt_fast

PACKAGE = Path(vapt_fast.__file__).parent

# Layers from the bottom up; a module may import from its own layer's siblings only where listed as free.
LAYERS = [
    {"kernels"},
    {"_version", "activations", "arguments", "config", "modules", "data", "pixels", "files", "source"},
    {"ops", "functional"},
    {"backbones", "names"},
    {"prompts", "cuda_graphs"},
    {"forward"},
    {
        "adapters",
        "creation",
        "explain",
        "initialisation",
        "timm_api",
        "peft_api",
        "model",
        "official",
        "registry",
    },
    {"accounting", "export", "info"},
    {"training", "benchmark", "demo"},
    {"serving", "tasks"},
    {"cli", "__main__"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def modules():
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def imported(path):
    """Names of vapt_fast's own top-level parts that the file imports, relative imports resolved."""
    parts = path.relative_to(PACKAGE).parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                base = list(parts[: len(parts) - node.level])
            elif node.module and node.module.split(".")[0] == "vapt_fast":
                base = []
                node = ast.ImportFrom(module=".".join(node.module.split(".")[1:]), names=node.names, level=1)
            else:
                continue
            names = (node.module or "").split(".") if node.module else [alias.name for alias in node.names]
            yield from [(base + names)[0]] if node.module or base else names
        elif isinstance(node, ast.Import):
            yield from (
                alias.name.split(".")[1] for alias in node.names if alias.name.startswith("vapt_fast.")
            )


def test_every_module_has_a_layer():
    parts = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in modules()}
    assert parts <= set(RANK)


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    above = {name for name in imported(path) if name in RANK and RANK[name] > RANK[own]}
    assert not above, f"{own} imports from a layer above it: {above}"


def run(code, *flags, **options):
    command = [sys.executable, *flags, "-c", textwrap.dedent(code)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_works_without_triton():
    assert (
        run(
            """
            import sys
            sys.modules["triton"] = None
            import torch, vapt_fast
            model = vapt_fast.AdaptiveViT("test_vit", num_classes=2)
            print(tuple(model(torch.zeros(1, 3, *model.backbone.patch_embed.img_size)).shape))
            """
        )
        == "(1, 2)"
    )


def test_import_loads_nothing_heavy():
    heavy = run(
        """
        import timm, sys
        before = set(sys.modules)
        import vapt_fast
        new = {name.split(".")[0] for name in set(sys.modules) - before}
        heavy = {"triton", "matplotlib", "sklearn", "scipy", "pandas", "typer", "rich", "click", "ray"}
        print(sorted(new & heavy))
        """
    )
    assert heavy == "[]"


def test_the_folder_of_kernels_is_not_importable_by_its_own_name():
    code = """
        try:
            import kernels
        except ImportError:
            print("refused")
        """
    assert run(code, cwd=PACKAGE.parent) == "refused"
