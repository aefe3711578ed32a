"""Shapes in annotations: jaxtyping's types where it is installed (the tests check them), else the plain array."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, Shaped, UInt32, UInt64
else:
    try:
        from jaxtyping import Bool, Float, Int, Shaped, UInt32, UInt64
    except ImportError:

        class Shaped:
            """`Shaped[Tensor, "n t"]` is `Tensor`."""

            def __class_getitem__(cls, item: tuple[type, str]) -> type:
                return item[0]

        Bool = Float = Int = UInt32 = UInt64 = Shaped

__all__ = ["Bool", "Float", "Int", "Shaped", "UInt32", "UInt64"]
