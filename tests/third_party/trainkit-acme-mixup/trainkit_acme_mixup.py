import torch
from attrs import field
from attrs.validators import gt
from torch.nn.functional import one_hot

from trainkit import Batch, Run
from trainkit.plugin import hookimpl, plugin


@plugin
class AcmeMixup:
    """Mix each image with another one, each at a ratio of its own (Zhang et al., ICLR 2018).

    Args:
        alpha: ratios follow Beta(alpha, alpha).
    """

    alpha: float = field(default=0.2, validator=gt(0))

    @hookimpl
    def transform_batch(self, run: Run, batch: Batch) -> Batch:
        """Mix the training batches; their targets become probabilities."""
        if run.split != "train":
            return batch
        rng = run.rng("acme_mixup")
        other = torch.from_numpy(rng.permutation(len(batch))).to(run.device)
        ratio = torch.from_numpy(rng.beta(self.alpha, self.alpha, len(batch))).float().to(run.device)
        targets = one_hot(batch.targets, len(run.data.classes)).float()
        return Batch(
            batch.images[other].lerp(batch.images, ratio.view(-1, 1, 1, 1)),
            targets[other].lerp(targets, ratio.view(-1, 1)),
            batch.indices,
        )
