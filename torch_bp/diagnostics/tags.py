"""Under which tags a TensorBoard shows the numbers of a `Reading`, for what writes them and what reads them back."""

OF_RUN = {  # the field of a reading of each
    "loss/train": "loss",
    "loss/val": "validation_loss",
    "grad/total": "grad_norm",
    "noise/scale": "noise_scale",
    "clip/rate": "clip_rate",
    "decrease/predicted": "predicted_decrease",
    "decrease/achieved": "achieved_decrease",
}
OF_LAYER = {  # the field of a reading of a layer, of the first part of each; the second is the layer
    "delta": "signal_norm",
    "update_ratio": "update_ratio",
    "weight": "weight_norm",
    "dead": "dead_units",
}
# What loops and loggers commonly call the losses.
LOSSES = ("loss/train", "train_loss", "train/loss", "train_loss_step", "loss")
VALIDATIONS = ("loss/val", "val_loss", "val/loss", "validation_loss", "loss/validation")
