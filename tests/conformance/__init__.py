"""torch's own conformance data, run through our classes and functions in the place of torch's.

The wheel of torch has what torch tests itself with: inputs of modules with the errors they should raise
(`common_modules`), test classes (`common_nn`), inputs of operators (`common_methods_invocations`) and of optimizers
(`common_optimizers`). All of it is private to torch: where it has moved, importing this raises ImportError.

`groups()` lists what there is to run for modules, `optimizers.groups()` for optimizers; `python -m tests.conformance`
runs it all and prints a table of each.
"""

from tests.conformance import modules, operators, optimizers, own_tests
from tests.conformance.group import CLASSES, MEANT, Group, Outcome

__all__ = ["CLASSES", "KINDS", "MEANT", "Group", "Outcome", "groups", "optimizers"]
KINDS = (modules.INPUTS, modules.ERRORS, own_tests.KIND, operators.INPUTS, operators.ERRORS)


def groups() -> list[Group]:
    """Everything for the classes of `torch_bp.nn`, in the order of their table."""
    return sorted(
        [*modules.groups(), *own_tests.groups(), *operators.groups()],
        key=lambda group: (CLASSES.index(group.name), KINDS.index(group.kind)),
    )
