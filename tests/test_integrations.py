"""Forward gradients in training loops that others wrote: plain torch, Lightning, Hugging Face."""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import huggingface_trainer
import lightning
import lightning_module
import training_loop
import transformers

import fwdcompile
from fwdcompile import data

Gradients = list[Tensor]


@pytest.fixture(autouse=True)
def _no_backward(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Neither a backward pass nor a tensor kept for one: either fails the test."""

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise AssertionError("autograd was used")

    monkeypatch.setattr(torch.autograd, "backward", refuse)
    monkeypatch.setattr(torch.autograd, "grad", refuse)
    monkeypatch.setattr(torch.Tensor, "backward", refuse)
    with torch.autograd.graph.saved_tensors_hooks(refuse, refuse):
        yield


def by_hand(model: Callable[..., Any], samples: int, **options: Any) -> fwdcompile.ForwardGradient:
    signs = fwdcompile.Rademacher()
    return fwdcompile.ForwardGradient(
        model, directions=signs, samples=samples, compile=False, **options
    )


def taken(model: nn.Module) -> Gradients:
    """The gradients, which are removed from the model."""
    gradients = []
    for p in model.parameters():
        assert p.grad is not None
        gradients.append(p.grad.clone())
        p.grad = None
    return gradients


def test_the_guard_notices_autograd() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(AssertionError, match="autograd was used"):
        model(torch.ones(1, 2)).square().sum()
    with torch.no_grad():
        model(torch.ones(1, 2)).square().sum()


def test_plain_torch() -> None:
    losses, accuracy = training_loop.main(epochs=8)
    assert losses[0] > 2.1
    assert losses[-1] < 1.2
    assert accuracy > 0.6


class Recorder(lightning.Callback):
    """Keeps what each batch gave: the batch, its gradients and its loss."""

    def __init__(self) -> None:
        self.batches: list[list[Tensor]] = []
        self.gradients: list[Gradients] = []
        self.starts: list[dict[str, Tensor]] = []
        self.losses: list[Tensor] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        self.batches.append(batch)
        self.starts.append(copy.deepcopy(module.net.state_dict()))

    def on_train_batch_end(self, trainer: Any, module: Any, out: Any, *rest: Any) -> None:
        self.losses.append(out["loss"])
        self.gradients.append(taken(module.net))


def test_lightning_trains(tmp_path: Path) -> None:
    recorder = Recorder()
    module, metrics = lightning_module.main(6, default_root_dir=tmp_path, callbacks=[recorder])
    assert float(recorder.losses[0]) > 2.1
    assert metrics["loss"] < 1.5
    assert metrics["accuracy"] > 0.5
    assert not any(loss.requires_grad for loss in recorder.losses)

    net = copy.deepcopy(module.net)
    gradient = by_hand(net, 16, loss_fn=cross_entropy)
    for start, batch, found in zip(
        recorder.starts[:3], recorder.batches, recorder.gradients, strict=False
    ):
        net.load_state_dict(start)
        gradient(*batch)
        for mine, theirs in zip(taken(net), found, strict=True):
            torch.testing.assert_close(mine, theirs)


def test_lightning_resumes(tmp_path: Path) -> None:
    digits = [x[:96] for x in data.load("digits").train]
    batches = DataLoader(TensorDataset(*digits), batch_size=32)

    def run(module: lightning_module.Classifier, epochs: int, path: Path | None = None) -> Any:
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
        trainer = lightning.Trainer(max_epochs=epochs, accelerator="cpu", devices=1,
                                    default_root_dir=tmp_path, enable_checkpointing=False,
                                    **quiet)  # fmt: skip
        trainer.fit(module, batches, batches, ckpt_path=path)
        return trainer

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    module = lightning_module.Classifier(samples=2, seed=3)
    whole, twin = copy.deepcopy(module), copy.deepcopy(module)
    run(whole, 2)
    run(module, 1).save_checkpoint(tmp_path / "half.ckpt")
    run(twin, 2, tmp_path / "half.ckpt")
    for mine, theirs in zip(twin.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs)


class Watch(transformers.TrainerCallback):
    """Keeps the gradients of each step of the optimizer, and the parameters before it."""

    def __init__(self) -> None:
        self.gradients: list[Gradients] = []
        self.starts: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        self.gradients.append([p.grad.clone() for p in model.parameters()])
        self.starts.append(copy.deepcopy(model.state_dict()))


def hugging_face(
    folder: Path,
    model: nn.Module,
    examples: list[dict[str, Tensor]],
    samples: int = 8,
    **options: Any,
) -> tuple[transformers.Trainer, Watch]:
    watch = Watch()
    trainer = huggingface_trainer.ForwardTrainer(
        model,
        huggingface_trainer.arguments(str(folder), logging_strategy="no", **options),
        train_dataset=examples,
        callbacks=[watch],
        samples=samples,
        compile=False,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer, watch


def batched(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([x[name] for x in examples]) for name in examples[0]}


def loss_of(model: nn.Module, examples: list[dict[str, Tensor]]) -> float:
    with torch.no_grad():
        return float(model(**batched(examples)).loss)


def test_hugging_face_trains(tmp_path: Path) -> None:
    examples = huggingface_trainer.examples(256, seed=1)
    model = huggingface_trainer.bert()
    before = loss_of(model, examples)
    trainer, _ = hugging_face(tmp_path, model, examples, max_steps=60, learning_rate=3e-2,
                              lr_scheduler_type="constant", gradient_accumulation_steps=1,
                              per_device_train_batch_size=64)  # fmt: skip
    result = trainer.train()
    assert before > 1.3
    assert loss_of(model, examples) < 1.1
    assert 1.0 < result.training_loss < 1.4


def test_hugging_face_averages_micro_batches(tmp_path: Path) -> None:
    """The last step of the epoch has one micro-batch, the first two have two."""
    examples = huggingface_trainer.examples(20, seed=1)
    model = huggingface_trainer.bert()
    trainer, watch = hugging_face(tmp_path, model, examples, samples=2, num_train_epochs=1, seed=5,
                                  train_sampling_strategy="sequential",
                                  per_device_train_batch_size=4)  # fmt: skip
    trainer.train()

    def objective(inputs: dict[str, Tensor]) -> Any:
        return model(**inputs).loss

    gradient = by_hand(objective, 2, seed=5)
    for step, parts in enumerate(([0, 4], [8, 12], [16])):
        model.load_state_dict(watch.starts[step])
        gradients = []
        for part in parts:
            gradient(batched(examples[part : part + 4]))
            gradients.append(taken(model))
        for found, *mine in zip(watch.gradients[step], *gradients, strict=True):
            torch.testing.assert_close(sum(mine) / len(mine), found)


def test_hugging_face_counts_tokens(tmp_path: Path) -> None:
    """Micro-batches of a language model weigh as many as the tokens they predict."""
    config = transformers.GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1, n_positions=8,
                                     resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
                                     bos_token_id=0, eos_token_id=0)  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"
    examples = []
    for length in (8, 7, 3, 2):
        ids = torch.randint(8, (8,))
        ignored = torch.arange(8) >= length
        examples.append({"input_ids": ids, "labels": ids.masked_fill(ignored, -100)})
    trainer, watch = hugging_face(tmp_path, model, examples, samples=2, max_steps=1, seed=5,
                                  train_sampling_strategy="sequential",
                                  per_device_train_batch_size=2)  # fmt: skip
    trainer.train()

    def objective(inputs: dict[str, Tensor]) -> Any:
        return model(**inputs).loss

    model.load_state_dict(watch.starts[0])
    gradient = by_hand(objective, 2, seed=5)
    gradients = []
    for part in (0, 2):
        gradient(batched(examples[part : part + 2]))
        gradients.append(taken(model))
    for first, second, found in zip(*gradients, watch.gradients[0], strict=True):
        torch.testing.assert_close((13 * first + 3 * second) / 16, found)


def test_hugging_face_resumes(tmp_path: Path) -> None:
    examples = huggingface_trainer.examples(32, seed=1)
    model = huggingface_trainer.bert()
    twin = copy.deepcopy(model)
    options = {"max_steps": 4, "per_device_train_batch_size": 4, "save_strategy": "steps",
               "save_steps": 2}  # fmt: skip
    trainer, _ = hugging_face(tmp_path, model, examples, samples=2, **options)
    trainer.train()
    resumed, watch = hugging_face(tmp_path, twin, examples, samples=2, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert len(watch.gradients) == 2
    for mine, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
