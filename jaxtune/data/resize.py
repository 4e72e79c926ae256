"""How large images are before the model's own image processor sees them: the policies of Unsloth's collator."""

from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image

DEFAULT_SIZE = 512  # pixels, of a model whose config names no image_size
MOST_ASPECT = 200  # longer side over shorter; image processors refuse more

Dimension = Literal[0, 1, "max", "min"]


@dataclass(frozen=True)
class Resize:
    """A policy: `policy(image)` is the image as it goes to the image processor.

    Attributes:
        size: pixels that one side may have at most, larger images are scaled down, their shape kept; or
            (width, height), which every image gets; None leaves images as they are.
        dimension: that side: 0 the width, 1 the height, "max" the longer, "min" the shorter one.
        multiple: both sides are rounded to multiples of so many pixels, of at least one; 1 does not round.
    """

    size: int | tuple[int, int] | None = None
    dimension: Dimension = 0
    multiple: int = 1

    def __post_init__(self) -> None:
        sides = self.size if isinstance(self.size, tuple) else (1 if self.size is None else self.size,)
        if len(sides) not in (1, 2) or any(not isinstance(side, int) or side < 1 for side in sides):
            raise ValueError(
                f"resize={self.size!r}: expected 'min', 'max', a number of pixels, or (width, height), each at least 1"
            )
        if self.dimension not in (0, 1, "max", "min"):
            raise ValueError(
                f"resize_dimension={self.dimension!r}: expected 0 (width), 1 (height), 'max' or 'min' (longer, shorter)"
            )

    def of(self, size: tuple[int, int]) -> tuple[int, int]:
        """(width, height) of an image that has `size` now.

        >>> Resize(512).of((1024, 300)), Resize(512).of((300, 1024)), Resize(512, "max").of((300, 1024))
        ((512, 150), (300, 1024), (150, 512))
        >>> Resize((64, 32)).of((10, 10)), Resize(None, multiple=28).of((100, 9))
        ((64, 32), (112, 28))
        """
        if isinstance(self.size, tuple):
            size = self.size
        elif self.size is not None:
            sides = {0: size[0], 1: size[1], "max": max(size), "min": min(size)}
            side = sides[self.dimension]
            if side > self.size:
                size = (max(1, size[0] * self.size // side), max(1, size[1] * self.size // side))
        width, height = (max(1, round(pixels / self.multiple)) * self.multiple for pixels in size)
        return width, height

    def __call__(self, image: Image.Image) -> Image.Image:
        """The image, scaled with Lanczos' filter where its size changes.

        Raises:
            ValueError: it is more than 200 times longer than it is wide.
        """
        size = self.of(image.size)
        if max(size) > MOST_ASPECT * min(size):
            raise ValueError(
                f"the image is {size[0]} × {size[1]} pixels; one side may be at most {MOST_ASPECT} times the other"
            )
        return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)


def resize_policy(
    resize: Any = "min", dimension: Any = 0, snap_to_patch_size: bool = False, config: Any = None
) -> Resize:
    """The policy that Unsloth's arguments ask for.

    Args:
        resize: "min": no larger than the vision tower's `image_size`, 512 where it has none; "max": as they are; a
            number of pixels: no larger than that; (width, height): exactly so.
        dimension: which side "no larger" is about, see `Resize`.
        snap_to_patch_size: round both sides to whole patches (merged ones, where the tower merges them).
        config: of the model.

    Raises:
        ValueError: another value.
    """
    vision = getattr(config, "vision_config", None)
    multiple = 1
    if snap_to_patch_size:
        patch = getattr(vision, "patch_size", None)
        if patch is None:
            raise ValueError("snap_to_patch_size=True: the model's config has no vision_config.patch_size")
        multiple = patch * getattr(vision, "spatial_merge_size", 1)
    if resize == "max":
        return Resize(None, dimension, multiple)
    if resize == "min":
        size = getattr(vision, "image_size", None) or DEFAULT_SIZE
        return Resize(max(size) if isinstance(size, (list, tuple)) else size, dimension, multiple)
    if isinstance(resize, (list, tuple)):
        resize = tuple(resize) if len(resize) != 1 else resize[0]
    return Resize(resize, dimension, multiple)
