"""Lightning's DDP with gradients that are made once."""

from pytorch_lightning.strategies import DDPStrategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel


class BucketedDDP(DDPStrategy):
    """DDP whose gradients lie in the buckets that it reduces: no second copy, and none is copied.

    Lightning wraps the model on a stream of its own, as capturing a graph would want; then every
    gradient is added on that stream, which waits for the backward pass's, and torch warns.
    """

    def __init__(self) -> None:
        super().__init__(gradient_as_bucket_view=True)

    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        devices = self.determine_ddp_device_ids()
        return DistributedDataParallel(model, device_ids=devices, **self._ddp_kwargs)
