"""Language models that go on learning while they read (TTT-E2E, arXiv 2512.23675)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ttt.language_model import LanguageModel, load

__all__ = ["LanguageModel", "load"]


def __getattr__(name: str) -> Any:
    """`ttt.load` and `ttt.LanguageModel`; JAX is imported when one of them is asked for."""
    if name in __all__:
        from ttt import language_model

        return getattr(language_model, name)
    raise AttributeError(f"module 'ttt' has no attribute {name!r}")
