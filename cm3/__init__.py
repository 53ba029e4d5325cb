"""CM3: one transformer that writes text and pictures, and reads both.

The public names are loaded when they are first used, so that `import cm3` is quick and brings no torch.
"""

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cm3.pipeline import CM3
    from cm3.tokenizers.document import Document, Image, Text

__version__ = "0.1.0"
__all__ = ["CM3", "Document", "Image", "Text", "__version__"]

_HOME_OF = {
    "CM3": "cm3.pipeline",
    "Document": "cm3.tokenizers.document",
    "Image": "cm3.tokenizers.document",
    "Text": "cm3.tokenizers.document",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value  # found directly from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _map_checkout() -> None:
    """In a checkout, serve cm3.tokenizers, cm3.training and cm3.eval from the folders beside this one.

    These folders have no `__init__.py`: with one, `import tokenizers` would find ours instead of Hugging
    Face's whenever the root of the repository is on `sys.path`. An installed copy holds them inside `cm3/`.
    """
    package = Path(__file__).resolve().parent
    for name in ("tokenizers", "training", "eval"):
        folder = package.parent / name
        if (package / name).is_dir() or not folder.is_dir() or (folder / "__init__.py").exists():
            continue
        spec = ModuleSpec(f"{__name__}.{name}", loader=None, is_package=True)
        spec.submodule_search_locations = [str(folder)]
        module = module_from_spec(spec)
        sys.modules[spec.name] = module
        globals()[name] = module


_map_checkout()
