"""Data modules: tables that lie in scikit-learn's wheel, split into a train, a validation and a test part."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from sklearn.model_selection import train_test_split
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset


class Table(LightningDataModule):
    """A table of numbers and one target, split 70 : 15 : 15 and scaled by its train part alone.

    Integer targets are classes, and every part has the same shares of them. Batches then hold class numbers,
    or for two classes floats 0 and 1 of shape (batch, 1). Other targets are real numbers, (batch, 1), in
    their own unit, and `rescale` is their mean and standard deviation in the train part.

    The table is small and is read here rather than in `setup`: the model takes its sizes from it.

    Args:
        dataset: called with `return_X_y=True`, such as `sklearn.datasets.load_digits`.
        batch_size: rows of a training batch.
        per_feature: whether each column is standardised alone. Columns of one unit, such as pixels, do better
            together: a pixel that is nearly always 0 is then not blown up.
        split_seed: which split. `--seed_everything` does not change it: all runs share their test rows.
    """

    def __init__(
        self, dataset: Callable[..., Any], batch_size: int = 32, per_feature: bool = True, split_seed: int = 0
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.batch_size = batch_size
        x, y = dataset(return_X_y=True)
        if x.ndim != 2 or y.shape != x.shape[:1]:
            raise ValueError(
                f"Table: dataset must give x of shape (rows, features) and y of shape (rows,), got {x.shape} "
                f"and {y.shape}. Wrap it in a function that selects one target."
            )
        self.rescale: tuple[float, float] | None = None
        if np.issubdtype(y.dtype, np.integer):
            classes, y = np.unique(y, return_inverse=True)
            self.rows = split(len(y), split_seed, classes=y)
            self.outputs = len(classes) if len(classes) > 2 else 1
        else:
            self.rows = split(len(y), split_seed)
            self.outputs = 1
            self.rescale = float(y[self.rows["train"]].mean()), float(y[self.rows["train"]].std())

        self.features = x.shape[1]
        axis = 0 if per_feature else None
        mean, std = x[self.rows["train"]].mean(axis), x[self.rows["train"]].std(axis)
        inputs = torch.tensor((x - mean) / np.where(std > 0, std, 1), dtype=torch.float32)
        targets = torch.tensor(y) if self.outputs > 1 else torch.tensor(y, dtype=torch.float32).unsqueeze(1)
        self.parts = {part: TensorDataset(inputs[rows], targets[rows]) for part, rows in self.rows.items()}

    def train_dataloader(self) -> DataLoader:
        # The order follows from seed and epoch, so a resumed fit goes on with the order of its epoch.
        world, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        sampler: DistributedSampler = DistributedSampler(
            self.parts["train"], world, rank, shuffle=True, seed=torch.initial_seed()
        )
        return DataLoader(self.parts["train"], self.batch_size, sampler=sampler)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.parts["val"], batch_size=256)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.parts["test"], batch_size=256)

    def predict_dataloader(self) -> DataLoader:
        return self.test_dataloader()


def split(rows: int, seed: int, classes: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Row numbers of `train` (70 %), `val` and `test` (15 % each), stratified if `classes` are given."""
    train, rest = train_test_split(np.arange(rows), test_size=0.3, stratify=classes, random_state=seed)
    strata = None if classes is None else classes[rest]
    val, test = train_test_split(rest, test_size=0.5, stratify=strata, random_state=seed)
    return {"train": train, "val": val, "test": test}
