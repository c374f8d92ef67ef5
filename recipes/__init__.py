"""Lightning recipes over torch_bp, one YAML each, on data that scikit-learn ships.

    python -m recipes fit --config recipes/digits.yaml
    python -m recipes validate|test|predict --config recipes/digits.yaml [--ckpt_path last|best|PATH]
    tensorboard --logdir logs

Anything in a YAML is also a flag: `--trainer.max_epochs 10 --model.hidden "[64,64]" --model.optimizer.lr 0.01`.
Classes go by their full path, since `Adam` alone could be torch's or ours. `module.py` is the model and how it is
trained, `data.py` the data, `callbacks.py` what is measured, `cli.py` the commands.
"""
