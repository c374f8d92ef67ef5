"""`python -m recipes fit|validate|test|predict --config recipes/digits.yaml`."""

import sys
from importlib.util import find_spec

if __name__ == "__main__":
    extra = ("lightning", "jsonargparse", "torchmetrics", "rich", "tensorboard", "sklearn")
    if missing := [name for name in extra if find_spec(name) is None]:
        sys.exit(f'recipes: {", ".join(missing)} not installed. Remedy: pip install "torch_bp[recipes]"')

    from recipes.cli import main

    main()
