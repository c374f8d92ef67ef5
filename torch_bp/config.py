"""Objects from a YAML or JSON file in LightningCLI's form: `class_path` and `init_args`, with full class paths."""

import difflib
import importlib
import inspect
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


class ConfigError(ValueError):
    """What a configuration names cannot be read or made."""


def read(path: str) -> dict[str, Any]:
    """The mapping in a YAML or JSON file.

    Raises:
        ConfigError: it cannot be read, or PyYAML is missing, which `pip install "torch_bp[lightning]"` brings.
    """
    try:
        content = parse(Path(path).read_text(encoding="utf-8"), path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: the file must hold a mapping, got {type(content).__name__}.")
    return content


def parse(text: str, name: str = "value") -> Any:
    """The value of a JSON or YAML text; numbers such as 1e-3, which YAML takes for words, are numbers.

    >>> parse("{'a': [1e-3, 2]}")
    {'a': [0.001, 2]}
    """
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        import yaml
    except ImportError as error:
        remedy = 'Write JSON, or: pip install "torch_bp[lightning]"'
        raise ConfigError(f"{name}: YAML needs PyYAML. {remedy}") from error

    class Loader(yaml.SafeLoader):
        pass

    number = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not valid YAML or JSON: {error}") from error


def resolve(path: str) -> Any:
    """The object of a full path, `package.module.Name` or `package.module:Name`.

    >>> resolve("math.pi")
    3.141592653589793
    """
    module, _, name = path.replace(":", ".").rpartition(".")
    if not module:
        raise ConfigError(f"class_path: {path!r} must be a full path, such as torch_bp.optim.lr_scheduler.StepLR.")
    try:
        found = importlib.import_module(module)
        if not hasattr(found, name):
            raise ConfigError(f"class_path: {module} must have the name {name}, got none{nearest(name, dir(found))}.")
        return getattr(found, name)
    except ConfigError:
        raise
    except Exception as error:  # importing runs the user's code
        raise ConfigError(f"class_path: {path} cannot be imported: {type(error).__name__}: {error}") from error


def nearest(name: str, known: Iterable[str], prefix: str = "; the nearest are ") -> str:
    """What to add to a message about a name that is not known; nothing if no name is near.

    >>> nearest("stepsize", ["step_size", "gamma"])
    '; the nearest are step_size'
    """
    public = [each for each in known if not each.startswith("_")]
    near = difflib.get_close_matches(name, public, n=3)
    near += sorted(each for each in public if {*_parts(name)} <= {*_parts(each)} and each not in near)
    return prefix + ", ".join(near[:3]) if near else ""


def _parts(name: str) -> list[str]:
    """The words of a name: CosineAnnealingLR has three."""
    return re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)


def node(value: Any) -> tuple[Any, dict[str, Any]]:
    """`(class, init_args)` of a full path, or of a mapping with `class_path` and, maybe, `init_args`.

    Raises:
        ConfigError: it is neither, or the class cannot be imported.
    """
    if isinstance(value, str):
        return resolve(value), {}
    if not (isinstance(value, Mapping) and isinstance(value.get("class_path"), str)):
        raise ConfigError(f"class_path: a full class path or a mapping that has one is needed, got {value!r}.")
    if unknown := value.keys() - {"class_path", "init_args"}:
        path = value["class_path"]
        raise ConfigError(f"{path}: only class_path and init_args may stand beside it, got {sorted(unknown)}.")
    return resolve(value["class_path"]), dict(value.get("init_args") or {})


def build(value: Any, **given: Any) -> Any:
    """Make the object that `value` names.

    `given` arguments are passed where the class, or the class of an argument, takes one of that name and has none yet.

    Raises:
        ConfigError: it cannot be made; the message says why.

    >>> build({"class_path": "fractions.Fraction", "init_args": {"numerator": 1, "denominator": 2}})
    Fraction(1, 2)
    """
    cls, arguments = node(value)
    arguments = {name: _argument(argument, given) for name, argument in arguments.items()}
    title = getattr(cls, "__name__", str(cls))
    try:
        names = inspect.signature(cls).parameters
        arguments = {name: item for name, item in given.items() if name in names} | arguments
        _check_arguments(title, names, arguments, given)
        return cls(**arguments)
    except ConfigError:
        raise
    except Exception as error:  # the class may raise anything
        had = ", ".join(f"{name}={item!r}" for name, item in arguments.items() if name not in given)
        raise ConfigError(f"{title}: {type(error).__name__}: {error}{had and f'; init_args: {had}'}") from error


def _check_arguments(
    title: str, parameters: Mapping[str, inspect.Parameter], arguments: Mapping[str, Any], given: Mapping[str, Any]
) -> None:
    """Refuse arguments that a class does not take, does not get, or that a file gives in words for what is none."""
    known = [p for p in parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    named = [p.name for p in known if p.name not in given]
    if all(p.kind != p.VAR_KEYWORD for p in parameters.values()):
        for name in arguments.keys() - parameters.keys():
            accepted = f"; accepted are {', '.join(named)}" if named else "; it takes none"
            raise ConfigError(f"{title}: there is no argument {name}{nearest(name, named)}{accepted}.")
    if missing := [p.name for p in known if p.default is p.empty and p.name not in arguments]:
        raise ConfigError(f"{title}: init_args must have {', '.join(missing)}, got none.")
    for p in known:
        kind, value = str(getattr(p.annotation, "__name__", p.annotation)), arguments.get(p.name)
        if isinstance(value, str) and kind in ("int", "float"):
            raise ConfigError(f"{title}: {p.name} must be a number, got {value!r}.")
        words = isinstance(value, str | Mapping)  # a lambda is a mapping in YAML
        if words and "Callable" in str(p.annotation) and "str" not in str(p.annotation):
            raise ConfigError(
                f"{title}: {p.name} must be a function, which a file cannot hold, got {value!r}. Give the class_path "
                "of a class whose objects can be called, or of a function that returns one."
            )


def _argument(value: Any, given: dict[str, Any]) -> Any:
    if isinstance(value, Mapping) and "class_path" in value:
        return build(value, **given)
    if isinstance(value, list):
        return [_argument(item, given) for item in value]
    return value
