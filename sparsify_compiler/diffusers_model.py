"""A diffusers model and its inputs, on the meta device or from files, from the arguments of a command line."""

import difflib
import importlib
import inspect
import json
import warnings
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsify_compiler.errors import OptionError, SparsifyError
from sparsify_compiler.measured import RunStats, stats
from sparsify_compiler.options import assignments as assignments
from sparsify_compiler.options import parse_option as parse_option
from sparsify_compiler.progress import bars
from sparsify_compiler.runtime.clock import generation


def build(class_name: str, config: str, device: str = "meta") -> nn.Module:
    """Build a model in eval mode: without weights on the meta device, with random weights elsewhere.

    Args:
        class_name: a class of diffusers, e.g. `WanTransformer3DModel`; or the path of another one, e.g.
            `package.module.Class`, which gets the config as keyword arguments.
        config: a JSON object, or the path of a file with a JSON object.

    Raises:
        SparsifyError: diffusers is missing, there is no such model, or it cannot be made from this config.
    """
    kind = _model_class(class_name)
    settings = read_config(config)
    # A constructor checks little: with a wrong config, its arithmetic and branches may raise anything.
    try:
        with torch.device(device), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")  # the error says more
            return (kind.from_config(settings) if hasattr(kind, "from_config") else kind(**settings)).eval()
    except Exception as error:
        raise OptionError(
            f"{class_name} cannot be made from the config: {_cause(error)}. "
            "Try the config.json of a checkpoint, or fewer settings: all settings have defaults"
        ) from error


def load(folder: Path, dtype: torch.dtype) -> nn.Module:
    """Load a model from the folder that diffusers wrote, in eval mode.

    Args:
        dtype: data type of the model; parts that diffusers keeps in fp32 stay in fp32.

    Raises:
        SparsifyError: diffusers is missing, or cannot load the model.
    """
    class_name = read_config(str(folder / "config.json")).get("_class_name")
    if not isinstance(class_name, str):
        raise OptionError(
            f"{folder / 'config.json'} must name the model's class as _class_name. Is it the transformer's folder?"
        )
    try:
        return _model_class(class_name).from_pretrained(folder, torch_dtype=dtype).eval()
    except Exception as error:  # a damaged file may raise anything
        if isinstance(error, SparsifyError):
            raise
        hint = "" if find_spec("accelerate") else ". Many models need accelerate: try pip install accelerate"
        raise OptionError(f"{class_name} cannot be loaded from {folder}: {_cause(error)}{hint}") from error


def read_calls(path: Path) -> list[dict[str, Any]]:
    """Read the keyword arguments of calls of a model from a file.

    Args:
        path: a file of `torch.save` with a list of dicts, or safetensors with names such as `0.hidden_states`.

    Raises:
        OptionError: the file holds something else.
    """
    form = "torch.save of a list of dicts, or safetensors with names such as 0.hidden_states"
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            numbered: dict[int, dict[str, Any]] = {}
            for name, tensor in load_file(path).items():
                number, _, argument = name.partition(".")
                numbered.setdefault(int(number), {})[argument] = tensor
            return [numbered[number] for number in sorted(numbered)]
        calls = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickles and safetensors have their own errors
        raise OptionError(f"inputs must be {form}, got {str(path)!r}: {_cause(error)}") from error
    if not isinstance(calls, list) or not calls or not all(isinstance(call, dict) for call in calls):
        raise OptionError(f"inputs must be {form}, got {type(calls).__name__} in {str(path)!r}")
    return calls


def dtype_of(calls: Iterable[Mapping[str, Any]]) -> torch.dtype:
    """The data type for a model: that of the first input that may be latents, a float tensor of 2 or more dims."""
    floating = (
        value.dtype
        for call in calls
        for value in call.values()
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1
    )
    return next(floating, torch.float32)


def in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model with all weights in a data type, also those that diffusers keeps in fp32."""
    return nn.Module.to(model, dtype)


def _model_class(class_name: str) -> Any:
    """The model class of diffusers with this name, or the class with this path."""
    if "." in class_name:
        return _imported(class_name)
    try:
        import diffusers
    except ImportError as error:
        raise SparsifyError(
            "a diffusers model needs diffusers: try pip install 'sparsify-compiler[diffusers]'"
        ) from error
    if class_name == "AutoModel":
        raise OptionError(
            "AutoModel is a loader, not a model with a config: give the class that it loads, "
            "which is _class_name in the checkpoint's config.json"
        )

    def is_model(name: str) -> bool:
        kind = getattr(diffusers, name, None)
        return isinstance(kind, type) and all(
            issubclass(kind, base) for base in (diffusers.ModelMixin, diffusers.ConfigMixin)
        )

    if not is_model(class_name):
        models = [name for name in dir(diffusers) if name.endswith("Model")]
        near = filter(is_model, difflib.get_close_matches(class_name, models, n=5))
        hint = next((f" Did you mean {name}?" for name in near), "")
        raise OptionError(
            f"diffusers {diffusers.__version__} has no model class {class_name!r} with a config.{hint}"
        )
    return getattr(diffusers, class_name)


def _imported(path: str) -> Any:
    """The module class with a path such as `package.module.Class`."""
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except Exception as error:  # a module may raise anything when it is imported
        raise OptionError(f"class {path!r} cannot be imported: {_cause(error)}") from error
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise OptionError(f"{path!r} must be the path of a class of torch.nn.Module, got {found!r}")
    return found


def read_config(text: str) -> dict[str, Any]:
    """The JSON object in a string that starts with `{` or `[`, or in the file with that path."""
    given = text.lstrip().startswith(("{", "["))
    source = "the config" if given else f"config file {text}"
    try:
        config = json.loads(text if given else Path(text).read_text("utf-8"))
    except (OSError, ValueError) as error:  # ValueError: neither text nor JSON
        raise OptionError(f"{source} must hold a JSON object: {error}") from error
    if not isinstance(config, dict):
        raise OptionError(f"{source} must hold a JSON object, got {type(config).__name__}")
    return config


def parse_input(name: str, text: str) -> Tensor:
    """A meta tensor from text such as `1x16x21x60x104` or `1x512:int64`; fp32 if the text has no type."""
    shape, _, dtype_name = text.partition(":")
    dtype = getattr(torch, dtype_name or "float32", None)
    if not isinstance(dtype, torch.dtype):
        raise OptionError(f"input {name!r} must have a data type of torch after ':', got {dtype_name!r}")
    sizes = shape.split("x")
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise OptionError(f"input {name!r} must have a shape such as 1x16x21x60x104, got {shape!r}")
    return torch.empty(tuple(map(int, sizes)), dtype=dtype, device="meta")


def parse_value(name: str, text: str) -> Any:
    """A JSON value; a list becomes a tuple."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        python = {"True": "true", "False": "false", "None": "null"}
        meant = python.get(text) or f"'{json.dumps(text)}'"
        raise OptionError(f"value {name!r} must be JSON, got {text!r}: try {name}={meant}") from error
    return tuple(value) if isinstance(value, list) else value


def try_out(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Run the model on the meta device: its own error describes wrong inputs best.

    Raises:
        OptionError: an input is missing, unknown, or has a wrong shape or type.
    """
    signature = inspect.signature(model.forward)
    unknown = [name for name in inputs if name not in signature.parameters]
    missing = [
        name
        for name, parameter in signature.parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        and name not in inputs
    ]
    if unknown or missing:
        problems = [f"does not take {', '.join(unknown)}"] if unknown else []
        problems += [f"needs {', '.join(missing)}"] if missing else []
        raise OptionError(
            f"{type(model).__name__} {' and '.join(problems)}; its inputs are {', '.join(signature.parameters)}"
        )
    try:
        with torch.no_grad():
            model(**inputs)
    except Exception as error:  # a forward checks as little as a constructor
        raise OptionError(f"{type(model).__name__} does not run on these inputs: {_cause(error)}") from error


def generate(
    class_name: str, config: str, inputs: Mapping[str, Any], options: Mapping[str, Any], *, steps: int
) -> RunStats:
    """Measure what attention reads in a generation on the CPU, with random weights and seeded inputs.

    Random weights give more even attention than trained ones, so densities are higher than with trained weights.

    Args:
        inputs: inputs of `forward`; tensors give only shape and type. Inputs named timestep* fall from 1000 on.
        options: options of torch.compile. Defaults here: the eager inner backend, the recall is measured, and the
            guard is off.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build(class_name, config, "cpu")
        given = {name: _random_like(value) for name, value in inputs.items()}
    usual: dict[str, Any] = {"inner_backend": "eager", "measure_recall": 0.01, "guard": "off"}
    compiled: Any = torch.compile(model, backend="sparsify", options={**usual, **options})
    with torch.no_grad(), generation(steps, streams=1), bars(transient=True) as bar:
        for step in bar.track(range(steps), description="steps"):
            time = 1000 * (steps - step) // steps
            now = {
                name: torch.full_like(value, time) if name.startswith("timestep") else value
                for name, value in given.items()
            }
            compiled(**now)
    return stats(compiled)


def _random_like(value: Any) -> Any:
    """Noise with the shape and type of a float tensor, ones for other tensors; other values unchanged."""
    if not isinstance(value, Tensor):
        return value
    if value.is_floating_point():
        return torch.randn(value.shape, dtype=torch.float32).to(value.dtype)
    return torch.ones(value.shape, dtype=value.dtype)


def _cause(error: Exception) -> str:
    """The error's class and the first line of its message: some messages are empty, or only `0`."""
    message = next(iter(str(error).strip().splitlines()), "no message")
    return f"{type(error).__name__}: {message.rstrip('.')}"
