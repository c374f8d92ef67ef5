"""The Lightning callback and helper, in fits of a few steps."""

import math

import pytest
import torch

pytest.importorskip("lightning")

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from torch_bp import nn, optim
from torch_bp.lightning import LRFinder, total_steps
from torch_bp.optim import lr_scheduler

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* does not have many workers"),
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
]
X = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))


class Least(LightningModule):
    def __init__(self, factor=1.0, optimizers=1, automatic=True):
        super().__init__()
        self.network = torch.nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        self.factor, self.optimizers_wanted, self.automatic_optimization = factor, optimizers, automatic
        self.rates, self.lengths = [], []

    def training_step(self, batch, batch_idx):
        self.rates.append([group["lr"] for group in self.trainer.optimizers[0].param_groups])
        [x] = batch
        loss = self.factor * nn.functional.mse_loss(self.network(x), x.sum(1, keepdim=True))
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        groups = [{"params": self.network[0].parameters()}, {"params": self.network[2].parameters(), "lr": 0.2}]
        optimizers = [optim.SGD(groups, lr=0.1) for _ in range(self.optimizers_wanted)]
        if self.optimizers_wanted > 1:
            return optimizers
        self.lengths += [total_steps(self.trainer), self.trainer.estimated_stepping_batches]
        schedule = lr_scheduler.CosineAnnealingLR(optimizers[0], 5)
        return optimizers, [{"scheduler": schedule, "interval": "step"}]

    def train_dataloader(self):
        return DataLoader(TensorDataset(X), 8)


def trainer(*callbacks, **options):
    options = {"max_epochs": -1, "max_steps": 300, "enable_checkpointing": False} | options
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Trainer(callbacks=list(callbacks), logger=False, **quiet, **options)


def test_finds_a_rate_and_leaves_the_model():
    model, finder = Least(), LRFinder(min_lr=1e-5, steps=80)
    before = [t.clone() for t in model.state_dict().values()]
    parameters = list(model.parameters())
    state = torch.get_rng_state()
    trainer(finder).fit(model)
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert torch.equal(state, torch.get_rng_state())
    assert finder.test.diverged or len(finder.test.lr) == 80
    assert 1e-3 < finder.test.suggestion("steepest") < 2
    tried = model.rates[: len(finder.test.lr)]
    assert [first for first, _ in tried] == pytest.approx(finder.test.lr)
    assert [second / first for first, second in tried] == pytest.approx([2.0] * len(tried))


def test_accumulated_batches_count_as_one():
    model, finder = Least(), LRFinder(min_lr=1e-5, max_lr=1e-3, steps=10)
    trainer(finder, accumulate_grad_batches=4).fit(model)
    assert len(finder.test.losses) == 10
    assert len(model.rates) == 40
    assert [first for first, _ in model.rates[::4]] == pytest.approx(finder.test.lr)
    first = [nn.functional.mse_loss(Least.forward_of(model, x), x.sum(1, keepdim=True)) for x in X.split(8)[:4]]
    assert finder.test.losses[0] == pytest.approx(sum(map(float, first)) / 4, rel=1e-4)


Least.forward_of = staticmethod(lambda model, x: model.network.train()(x).detach())


def checkpoints(folder):
    """Every way in which Lightning saves: steps, epochs, the last, the best, exceptions."""
    by_step = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1, save_last=True)
    return [by_step, ModelCheckpoint(folder, "best", monitor="loss", save_on_exception=True)]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("failing", [False, True])
def test_checkpoints_rest_and_those_of_a_training_stay(failing, tmp_path, caplog):
    saving = checkpoints(tmp_path)
    (tmp_path / "last.ckpt").write_text("of a training")
    finder = LRFinder(steps=300, max_lr=1e4)
    fit = trainer(finder, *saving, enable_checkpointing=True)
    before = list(fit.callbacks)
    if failing:
        with pytest.raises(RuntimeError, match="finite at the first step"):
            fit.fit(Least(factor=math.nan))
    else:
        with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
            fit.fit(Least())
        assert finder.test.diverged
        assert "ModelCheckpoint, ModelCheckpoint: nothing is written in this fit" in caplog.text
        assert "smoothed loss over the learning rate" in caplog.text
        assert "Begin with lr = " in caplog.text
        assert "This fit has trained nothing: the model is as it was." in caplog.text
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"last.ckpt": "of a training"}
    assert fit.callbacks == before
    assert not saving[1].best_model_path


def test_a_fit_that_is_too_short_says_so(caplog):
    finder = LRFinder(steps=100)
    with pytest.warns(
        UserWarning, match=r"ended after 16 of 100 rates, .* max_steps=100 with max_epochs=-1, or a larger"
    ):
        trainer(finder, max_epochs=2, max_steps=-1).fit(Least())
    assert finder.test.cut_short


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Least(factor=math.nan), "finite at the first step"),
        (Least(optimizers=2, automatic=False), "the model must have one optimizer.*got 2 and automatic"),
    ],
    ids=["nan", "manual"],
)
def test_refuses_and_restores(model, message):
    before = [t.clone() for t in model.state_dict().values()]
    with pytest.raises(RuntimeError, match=message):
        trainer(LRFinder()).fit(model)
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))


def test_total_steps():
    model = Least()
    trainer(max_epochs=3, max_steps=-1, accumulate_grad_batches=2).fit(model)
    assert model.lengths == [12, 12]
    assert total_steps(trainer(max_epochs=7), "epoch") == 7
    with pytest.raises(ValueError, match="interval must be 'step' or 'epoch', got 'steps'"):
        total_steps(trainer(), "steps")
    with pytest.raises(ValueError, match="total_steps must be positive and finite, got -1"):
        total_steps(trainer(), "epoch")
    with pytest.raises(ValueError, match="got inf: the fit is open-ended"):
        trainer(max_epochs=-1, max_steps=-1).fit(Least())


class Longer(Least):
    """A schedule of the length of the fit, which follows the fit where that is resumed with another."""

    def __init__(self, rescales):
        super().__init__()
        self.rescales = rescales

    def configure_optimizers(self):
        optimizer = optim.SGD(self.parameters(), lr=0.1)
        schedule = lr_scheduler.CosineAnnealingLR(optimizer, total_steps(self.trainer))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def on_train_start(self):
        if self.rescales:
            self.lr_schedulers().rescale(total_steps(self.trainer))


@pytest.mark.parametrize("rescales", [False, True])
def test_a_fit_resumed_with_more_epochs(rescales, tmp_path):
    first = trainer(max_epochs=1, max_steps=-1)
    first.fit(Longer(rescales))
    first.save_checkpoint(tmp_path / "first.ckpt")
    again = Longer(rescales)
    message = r"run of 8 steps \(T_max\), the schedule was constructed for 24\..*call rescale\(total_steps=24\)"
    with pytest.warns(UserWarning, match=message):
        trainer(max_epochs=3, max_steps=-1).fit(again, ckpt_path=tmp_path / "first.ckpt", weights_only=True)
    seen = [rate for [rate] in again.rates]
    assert len(seen) == 16
    if rescales:
        assert seen == pytest.approx([0.05 * (1 + math.cos(math.pi * t / 24)) for t in range(8, 24)])
    else:
        assert seen[0] < 1e-6 < 0.09 < max(seen)  # as in torch
