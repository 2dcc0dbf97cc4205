"""Forward gradients in Lightning: manual optimisation, with one call in place of the backward pass.

pip install 'fwdcompile[examples,lightning]'
python examples/lightning_module.py
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import fwdcompile
from fwdcompile import data

data.import_torchvision()  # see there: some builds do not load without it
import lightning  # noqa: E402


class Classifier(lightning.LightningModule):
    """Digits to labels, trained on one device by forward gradients."""

    def __init__(self, samples: int = 16, seed: int = 0) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.samples, self.seed = samples, seed
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.net.parameters(), lr=1e-2)

    def on_train_start(self) -> None:
        # not in __init__: the parameters are on their device and in their dtype only now
        self.gradient = fwdcompile.ForwardGradient(
            self.net,
            cross_entropy,
            directions=fwdcompile.Rademacher(),
            samples=self.samples,
            compile=False,  # a run of seconds is over before a compilation
        )
        # a resumed run draws the directions that would have followed
        self.gradient.load_state_dict({"iteration": self.global_step, "seed": self.seed})

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        images, labels = batch
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = self.gradient(images, labels)
        optimizer.step()
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        images, labels = batch
        self.log("accuracy", (self.net(images).argmax(-1) == labels).float().mean())


def loader(part: tuple[Tensor, Tensor], size: int, train: bool) -> DataLoader[tuple[Tensor, ...]]:
    """Batches of one size for training: another size would be captured anew."""
    return DataLoader(TensorDataset(*part), batch_size=size, shuffle=train, drop_last=train)


def main(epochs: int = 20, **options: Any) -> tuple[Classifier, dict[str, float]]:
    """Trains; `options` are of `lightning.Trainer`. Returns the module and its last metrics."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    lightning.seed_everything(0, verbose=False)
    settings: dict[str, Any] = {
        "max_epochs": epochs,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = lightning.Trainer(**settings | options)
    digits, module = data.load("digits"), Classifier()
    trainer.fit(module, loader(digits.train, 64, True), loader(digits.validation, 1024, False))
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    print("  ".join(f"{name} {value:.3f}" for name, value in metrics.items()))
    return module, metrics


if __name__ == "__main__":
    main()
