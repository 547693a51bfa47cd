import torch
from attrs import field
from attrs.validators import ge

from trainkit import Data, TensorSplit
from trainkit.plugin import hookimpl, plugin


@plugin
class Stripes:
    """Provide images of noisy stripes, across or upright.

    Args:
        size: height and width in pixels.
        images: number of training images; there are half as many for testing.
        noise: brightness of the noise, 0 to 255.
    """

    size: int = field(default=8, validator=ge(4))
    images: int = field(default=256, validator=ge(4))
    noise: int = field(default=100, validator=ge(0))

    @hookimpl
    def data(self) -> Data:
        """Draw both splits; they are the same in every run."""
        generator = torch.Generator().manual_seed(0)

        def split(n: int) -> TensorSplit:
            targets = torch.arange(n) % 2
            stripes = (torch.arange(self.size) % 2 * 100).expand(self.size, -1)
            images = torch.stack([stripes if upright else stripes.T for upright in targets])
            noise = torch.randint(0, self.noise + 1, images.shape, generator=generator)
            return TensorSplit((images + noise).clamp(max=255).to(torch.uint8).unsqueeze(1), targets)

        return Data(
            train=split(self.images),
            test=split(self.images // 2),
            classes=("across", "upright"),
            shape=(1, self.size, self.size),
        )
