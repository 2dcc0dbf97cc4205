"""Forward gradients in the Hugging Face Trainer: a subclass that overrides one training step.

Accumulation, schedules, evaluation and checkpoints stay the Trainer's. A small BERT, built from a
configuration, learns to tell which of four marked tokens a padded sequence holds.

    pip install 'fwdcompile[examples,huggingface]'
    python examples/huggingface_trainer.py [FOLDER]
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

import fwdcompile
from fwdcompile import data

data.import_torchvision()  # see there: some builds do not load without it
import transformers  # noqa: E402

Example = dict[str, Tensor]
CLASSES, VOCABULARY, LENGTH = 4, 16, 8


class ForwardTrainer(transformers.Trainer):
    """A Trainer whose gradients are forward gradients, in one process and in full precision.

    Args:
        *args: of `transformers.Trainer`.
        samples: directions a micro-batch; their seed is `args.seed`.
        compile: compiles the step by torch.compile.
        **kwargs: of `transformers.Trainer`.
    """

    def __init__(self, *args: Any, samples: int = 8, compile: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        model = self.model

        def objective(inputs: Example, items: Tensor | None, share: Tensor) -> Tensor:
            return self.compute_loss(model, inputs, num_items_in_batch=items) * share

        self.gradient = fwdcompile.ForwardGradient(
            objective,
            directions=fwdcompile.Rademacher(),
            samples=samples,
            seed=self.args.seed,
            compile=compile,
        )
        self.add_callback(Place(self.gradient))

    def training_step(
        self, model: nn.Module, inputs: Example, num_items_in_batch: Tensor | None = None
    ) -> Tensor:
        """Adds a micro-batch's part of the forward gradient to the parameters' `grad`."""
        model.train()
        parts = 1 if self._scaled(num_items_in_batch) else self.current_gradient_accumulation_steps
        share = torch.tensor(1 / parts, device=self.args.device)
        return self.gradient(self._prepare_inputs(inputs), num_items_in_batch, share)

    def _scaled(self, items: Tensor | None) -> bool:
        """Whether `compute_loss` has divided by the number of items of all micro-batches."""
        said: bool | None = getattr(self, "loss_is_scaled_for_ga", None)  # of transformers 5
        if said is not None:
            return said
        counted = self.model_accepts_loss_kwargs and items is not None
        return counted or self.compute_loss_func is not None


class Place(transformers.TrainerCallback):
    """Numbers the directions by the Trainer's steps: a resumed run draws those that follow."""

    def __init__(self, gradient: fwdcompile.ForwardGradient) -> None:
        self.gradient = gradient

    def on_step_begin(
        self,
        args: transformers.TrainingArguments,
        state: transformers.TrainerState,
        control: transformers.TrainerControl,
        **kwargs: Any,
    ) -> None:
        micro_batch = state.global_step * args.gradient_accumulation_steps
        self.gradient.load_state_dict({"iteration": micro_batch, "seed": args.seed})


def examples(count: int, seed: int) -> list[Example]:
    """Sequences of 5 to 8 plain tokens behind a first one, one of them replaced by a marked one."""
    generator = torch.Generator().manual_seed(seed)

    def random(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    found = []
    for _ in range(count):
        length, label = int(random(5, LENGTH + 1)), random(0, CLASSES)
        ids = random(CLASSES + 2, VOCABULARY, LENGTH)
        ids[0], ids[random(1, length)] = 1, label + 2
        mask = (torch.arange(LENGTH) < length).long()
        found.append({"input_ids": ids * mask, "attention_mask": mask, "labels": label})
    return found


def bert() -> transformers.PreTrainedModel:
    """One layer; no dropout, which would add its noise to that of the directions."""
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=LENGTH,
        num_labels=CLASSES,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.2,
    )
    model = transformers.BertForSequenceClassification(config)
    # its loss is the mean of a micro-batch, though it takes the number of items
    model.accepts_loss_kwargs = False
    return model


def arguments(folder: str, **options: Any) -> transformers.TrainingArguments:
    """Those that say something about forward gradients, and quiet ones."""
    settings: dict[str, Any] = {
        "output_dir": folder,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 32,
        "gradient_accumulation_steps": 2,
        "dataloader_drop_last": True,  # a batch of another size would be captured anew
        "max_grad_norm": 0.0,  # a forward gradient is long, and clipped ones lose their mean
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    return transformers.TrainingArguments(**settings | options)


def accuracy(prediction: transformers.EvalPrediction) -> dict[str, float]:
    """The share of sequences that get their label."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main(folder: str = "runs/huggingface", epochs: int = 16) -> dict[str, float]:
    transformers.set_seed(0)
    trainer = ForwardTrainer(
        bert(),
        arguments(folder, num_train_epochs=epochs, logging_strategy="epoch"),
        train_dataset=examples(1024, seed=1),
        eval_dataset=examples(256, seed=2),
        compute_metrics=accuracy,
        compile=False,  # a run of seconds is over before a compilation
    )
    trainer.train()
    found = trainer.evaluate()
    print(f"accuracy on sequences that were held out: {found['eval_accuracy']:.1%}")
    return found


if __name__ == "__main__":
    main(*sys.argv[1:2])
